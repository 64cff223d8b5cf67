"""The revision is that of the package's own checkout or none."""

import re
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

import h2a2_jax
from h2a2_jax.host import revision, versions

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in a repository of its own, as a checkout is."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "checkout" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder.parent / "run.py").write_text("")
    (folder.parent / ".gitignore").write_text("runs/\nsite-packages/\n")
    git(folder.parent, "init", "--quiet")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "--quiet", "--message=first")
    return folder


@needs_git
def test_a_clean_checkout_has_a_revision(package: Path):
    assert revision(package) == git(package, "rev-parse", "HEAD")


@needs_git
def test_results_in_the_checkout_do_not_change_the_revision(package: Path):
    (package.parent / "runs").mkdir()
    (package.parent / "runs" / "metrics.jsonl").write_text("")
    (package.parent / "notes.txt").write_text("")
    assert " " not in revision(package)


@needs_git
@pytest.mark.parametrize("changed", ["run.py", "package/__init__.py", "package/new.py"])
def test_uncommitted_changes_are_reported(package: Path, changed: str):
    (package.parent / changed).write_text("changed = True")
    assert re.fullmatch(r"[0-9a-f]{40} \+ uncommitted changes", revision(package))


@needs_git
def test_a_repository_around_an_installed_package_is_not_its_own(package: Path):
    installed = package.parent / "site-packages" / "package"
    shutil.copytree(package, installed)
    assert revision(installed) == "installed package"


@needs_git
def test_variables_of_another_repository_do_not_mislead(package: Path, tmp_path: Path, monkeypatch):
    head = git(package, "rev-parse", "HEAD")
    git(tmp_path, "init", "--quiet", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert revision(package) == head


@needs_git
def test_a_checkout_without_a_commit_has_no_revision(package: Path):
    shutil.rmtree(package.parent / ".git")
    git(package.parent, "init", "--quiet")
    git(package.parent, "add", ".")
    assert revision(package) == "unknown"


@needs_git
def test_without_git_nothing_fails(package: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert revision(package) == "unknown"
    shutil.rmtree(package.parent / ".git")
    assert revision(package) == "installed package"


def test_versions_are_those_of_the_imported_packages():
    found = versions()
    assert found["jax"] == jax.__version__ and found["h2a2_jax"] == h2a2_jax.__version__
    assert {"python", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} < found.keys()
