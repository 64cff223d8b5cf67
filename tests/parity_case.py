"""One comparison with the reference implementation."""

import dataclasses


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
