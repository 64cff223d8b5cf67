"""Train, evaluate, predict, report or sweep: python run.py --config=configs/joint.py:demo --workdir=runs/demo.

Boxes of files of points: python run.py --mode=predict --workdir=runs/demo --input=FOLDER --output=boxes.
Look over a folder of scans before training on it: python run.py --mode=check --data=FOLDER.
The same commands without a clone: h2a2 train, h2a2 predict, ... (`h2a2_jax/cli.py`).
"""

import sys

try:
    from h2a2_jax.cli import run_py
    from h2a2_jax.host import leave
except ModuleNotFoundError as missing:
    print(
        f"run.py: {missing.name} is not installed for {sys.executable}: activate the environment that the README's "
        "first command makes (source .venv/bin/activate), or pip install -e .",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    leave(run_py())
