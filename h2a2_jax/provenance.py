"""Which program made a result: versions of packages, and the revision of this one."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import h2a2_jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_GIT_SECONDS = 10


def versions() -> dict[str, str]:
    """Versions by name: of Python, of what computes, of this package."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "h2a2_jax": h2a2_jax.__version__,
    }


def revision(package: Path | None = None) -> str:
    """The git revision of the checkout that the package runs from.

    Args:
        package: folder of the package; None: of this one.

    Returns:
        The full hash, with " + uncommitted changes" where tracked files or new ones in the package differ from it;
        "installed package" where the package is in no checkout: a repository that a site-packages folder happens to lie
        in does not count, for it does not hold the package's files; "unknown" where git does not tell.
    """
    package = package or Path(h2a2_jax.__file__).parent
    if not any((folder / ".git").exists() for folder in package.absolute().parents):
        return "installed package"
    try:
        if not _git(package, "ls-files", "--", "__init__.py"):
            return "installed package"
        commit = _git(package, "rev-parse", "HEAD")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ":/")
        new = _git(package, "ls-files", "--others", "--exclude-standard", "--", ".")
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, or a folder that git does not trust
        return "unknown"
    return commit + (" + uncommitted changes" if changed or new else "")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # imported from a folder that pip does not know
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    # Not those that a hook or another tool set for another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env={**environment, "GIT_OPTIONAL_LOCKS": "0"},  # looking must not be in the way of who works there
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        timeout=_GIT_SECONDS,
    ).stdout.strip()
