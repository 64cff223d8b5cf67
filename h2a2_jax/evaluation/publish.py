"""Write the detector of a run as a pretrained folder, with calibrated scores and plain names of classes if asked.

    python -m h2a2_jax.evaluation.publish runs/rooms FOLDER --calibrate --names="garbagebin=trash can"

The shipped detector is made so. Scores, steps and classes of the model card are those of the run; the rest is given.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from h2a2_jax.distributed import say
from h2a2_jax.errors import InputError
from h2a2_jax.evaluation.matches import MATCHES_FILE, read_matches
from h2a2_jax.evaluation.score_calibration import calibrated
from h2a2_jax.inference.scan_prediction import renamed_specs
from h2a2_jax.pretrained.folder import card_facts, write_pretrained
from h2a2_jax.pretrained.load import load_pretrained

_TEXTS = ("name", "license", "terms", "measured", "trained_by")


def main(arguments: list[str] | None = None) -> None:
    """Read the run, calibrate and rename, write; what cannot be done ends in a sentence and status 2."""
    parser = argparse.ArgumentParser(prog="python -m h2a2_jax.evaluation.publish", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run or of one of its checkpoints, or a pretrained one")
    parser.add_argument("folder", type=Path, help="pretrained folder to write; an earlier one is replaced")
    parser.add_argument(
        "--calibrate", action="store_true", help="make scores the share of hits among the run's evaluated detections"
    )
    parser.add_argument("--matches", type=Path, help=f"{MATCHES_FILE} of an evaluation (default that of the run)")
    parser.add_argument("--iou", type=float, default=0.25, help="IoU of a hit (default 0.25)")
    parser.add_argument("--names", default="", help="other names of classes: old=new,old=new")
    for name in _TEXTS:
        parser.add_argument(f"--{name}", help="of the model card")
    given = parser.parse_args(arguments)
    try:
        detector = load_pretrained(given.run)
        facts = card_facts(detector)
        if given.calibrate:
            detector = calibrated(detector, read_matches(given.matches or given.run / MATCHES_FILE), given.iou)
        pairs = [pair.partition("=") for pair in given.names.split(",") if given.names]
        if not all(old and new for old, _, new in pairs):
            raise InputError(f"--names is {given.names!r}; expected names as in garbagebin=trash can,sofa=couch.")
        specs = renamed_specs(detector.specs, {old: new for old, _, new in pairs})
        facts = replace(facts, **{name: value for name in _TEXTS if (value := getattr(given, name)) is not None})
        write_pretrained(replace(detector, specs=specs), given.folder, facts)
    except InputError as error:
        parser.error(str(error))
    say(f"Written to {given.folder}.")


if __name__ == "__main__":
    main()
