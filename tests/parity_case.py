"""One comparison with the reference implementation."""

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """Outcome of one comparison: the error measured, what is tolerated, and whether it passes."""

    name: str
    error: float
    tolerance: float
    ok: bool

    @classmethod
    def compare(cls, name: str, error: float, tolerance: float) -> "CaseResult":
        """A NaN error fails."""
        return cls(name, float(error), tolerance, bool(error <= tolerance))

    @classmethod
    def failed(cls, name: str, reason: str) -> "CaseResult":
        """A case that gave no number to compare."""
        return cls(f"{name}: {reason}", float("inf"), 0.0, False)

    def line(self) -> str:
        """Name, largest error, tolerance, verdict."""
        return f"{self.name}  {self.error:.3g}  {self.tolerance:.3g}  {'ok' if self.ok else 'FAIL'}"


def guarded(name: str, results: Iterator[CaseResult]) -> Iterator[CaseResult]:
    """The results; an exception on the way becomes one more, a failure, so that other cases still run."""
    try:
        yield from results
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        yield CaseResult.failed(name, f"{type(error).__name__}: {reason}")
