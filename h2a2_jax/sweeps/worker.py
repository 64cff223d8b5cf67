"""One run of a sweep, in a process of its own: python -m h2a2_jax.sweeps.worker <config.json> <workdir>.

It ends when its standard input closes, and that happens however the process that started it ends.
"""

import os
import sys
import threading
import traceback
from pathlib import Path

from h2a2_jax.errors import InputError
from h2a2_jax.training.config import from_json
from h2a2_jax.training.loop import train


def main(config: str, workdir: str) -> None:
    """Train and evaluate, or go on with it.

    Args:
        config: file with the run's config as JSON.
        workdir: of the run.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        train(from_json(Path(config).read_text()), Path(workdir))
    except InputError as error:
        sys.exit(str(error))
    except Exception as error:
        traceback.print_exc()
        # Once more as the last line, which the sweep shows: JAX ends its tracebacks with a remark on them.
        sys.exit(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _end_with_parent() -> None:
    while os.read(0, 1):  # nothing is ever written there: it returns at the end of the pipe
        pass
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
