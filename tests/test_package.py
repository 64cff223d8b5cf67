"""What the package declares of itself."""

import tomllib
from importlib.resources import files
from pathlib import Path

import h2a2_jax

ROOT = Path(__file__).parent.parent


def test_requirements_and_citation_agree_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *extras["visual"], *extras["data"]}
    listed = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")}
    assert wanted <= listed
    assert listed - wanted <= set(extras["dev"])
    assert f"version: {h2a2_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_package_says_that_it_is_typed():
    assert files(h2a2_jax).joinpath("py.typed").is_file()


def test_every_file_that_the_code_reads_is_part_of_the_wheel():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["h2a2_jax"]
    folder = ROOT / "h2a2_jax"
    packaged = {path for pattern in declared for path in folder.glob(pattern)}
    compiled = (".py", ".pyc", ".so", ".pyd", ".cc", ".h")
    assert {path for path in folder.rglob("*") if path.is_file() and path.suffix not in compiled} <= packaged
