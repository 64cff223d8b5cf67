"""One run of a sweep, in a process of its own.

python -m h2a2_jax.sweeps.worker <config.json> <workdir> [<evaluations>]

It ends when its standard input closes, and that happens however the process that started it ends.
"""

import os
import sys
import threading
import traceback
from pathlib import Path

from h2a2_jax.errors import InputError
from h2a2_jax.inference.evaluate import build_predictor
from h2a2_jax.report.curves import draw_curves
from h2a2_jax.sweeps.plan import drawn_datasets
from h2a2_jax.sweeps.runner import evaluation_folder, finished, read_evaluation
from h2a2_jax.training.checkpoint import restore_checkpoint
from h2a2_jax.training.config import ExperimentConfig, from_json
from h2a2_jax.training.evaluation import evaluate_predictor
from h2a2_jax.training.loop import train
from h2a2_jax.training.stopping import Stopped


def main(config: str, workdir: str, evaluations: str = "1") -> None:
    """Train and evaluate, or go on with it.

    Args:
        config: file with the run's config as JSON.
        workdir: of the run.
        evaluations: how many; those after the first draw other points.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run(from_json(Path(config).read_text()), Path(workdir), int(evaluations))
    except InputError as error:
        sys.exit(str(error))
    except Stopped as stopped:
        sys.exit(stopped.status)
    except Exception as error:
        traceback.print_exc()
        # Once more as the last line, which the sweep shows: JAX ends its tracebacks with a remark on them.
        sys.exit(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def run(config: ExperimentConfig, workdir: Path, evaluations: int = 1) -> None:
    """What is not there yet of a training and its evaluations.

    Args:
        config: of the run.
        workdir: of the run.
        evaluations: how many; the datasets whose test protocol draws points are evaluated again with other points.
    """
    if not finished(workdir):
        train(config, workdir)
        draw_curves(workdir)  # which its summary shows
    missing = [draw for draw in range(1, evaluations) if read_evaluation(workdir, draw) is None]
    if not missing:
        return
    model, _ = restore_checkpoint(workdir, expected=config)
    predictor = build_predictor(model, config.specs, config.eval)
    for draw in missing:
        print(f"Evaluation {draw + 1} of {evaluations}, with other points.", flush=True)
        folder = evaluation_folder(workdir, draw)
        evaluate_predictor(config, predictor, folder, draw=draw, datasets=drawn_datasets(config))


def _end_with_parent() -> None:
    while os.read(0, 1):  # nothing is ever written there: it returns at the end of the pipe
        pass
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
