"""What a prediction remembers for later processes: padded shapes and the programs compiled for them."""

import contextlib
import json
import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from h2a2_jax.compilation import use_compilation_cache
from h2a2_jax.models import LevelSizes

_VERSION = 1
_WRITING = threading.Lock()


@dataclass(frozen=True)
class BucketFile:
    """Lowest shapes of the ladders, by number of scans in a pass, in <folder>/buckets.json.

    A ladder is set by the first scan that is seen. Remembered, it gives later processes the same shapes, and so the
    programs that JAX's compilation cache in the same folder holds. It is a cache: what cannot be read is made again.

    Attributes:
        path: of the file.
    """

    path: Path

    @classmethod
    def opened(cls, folder: Path) -> "BucketFile":
        """The file of a folder, which becomes JAX's compilation cache for this process as well.

        Raises:
            InputError: the folder cannot be made or written to.
        """
        use_compilation_cache(folder)
        return cls(folder / "buckets.json")

    def read(self) -> dict[int, LevelSizes]:
        """What is remembered; nothing if there is no such file or it is of another version."""
        try:
            stored = json.loads(self.path.read_text())
            if stored["version"] != _VERSION:
                return {}
            bases = {int(count): LevelSizes(*map(int, base)) for count, base in stored["bases"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # a cache that is not there or damaged
        return {count: base for count, base in bases.items() if count > 0 and min(base) > 0}

    def write(self, bases: Mapping[int, LevelSizes]) -> None:
        """Remember; what another process remembers for other numbers of scans stays.

        A full disk or a folder that is gone is a warning.
        """
        temporary = self.path.with_suffix(f".{os.getpid()}")
        with _WRITING:  # threads of one process
            bases = self.read() | dict(bases)
            document = {"version": _VERSION, "bases": {str(count): list(base) for count, base in bases.items()}}
            try:
                temporary.write_text(json.dumps(document))
                temporary.replace(self.path)
            except OSError as error:  # no reason to lose the boxes that were just found
                warnings.warn(f"The cache {self.path} cannot be written ({error.strerror}).", stacklevel=2)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
