"""The sample scan that comes with the package: a procedural room, so that prediction can be tried at once."""

from importlib import resources
from pathlib import Path

from h2a2_jax.errors import InputError


def sample_scan() -> Path:
    """Return the path of the sample scan, `sample_room.ply`: metres, z up, with colours, of no dataset and no licence.

    Raises:
        InputError: the installation lacks it.
    """
    path = Path(str(resources.files("h2a2_jax.inference") / "assets" / "sample_room.ply"))
    if not path.is_file():
        raise InputError(f"The sample scan {path} is missing: install h2a2_jax again.")
    return path
