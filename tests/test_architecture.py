"""Imports go downwards, floor by floor, as docs/architecture.md says."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "h2a2_jax"
FLOORS: tuple[set[str], ...] = (
    {"typing", "errors", "user_cache"},
    {"rendezvous"},
    {"host", "files", "compilation", "distributed", "figures", "sparse", "boxes", "balancers"},
    {"layers", "losses", "untrusted"},
    {"linen", "models", "scans"},
    {"config", "prepare", "viewer"},
    {"check", "loader"},
    {"checkpoint"},
    {"initialization", "optimizer"},
    {"convert"},
    {"pretrained"},
    {"inference"},
    {"evaluation"},
    {"training"},
    {"report"},
    {"sweeps"},
    {"cli"},
    {"__main__"},
)
"""Parts of the package; those of one floor do not import one another."""


def imported(path: Path) -> set[str]:
    """Parts of the package that a file imports, by name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "h2a2_jax":
            found |= {alias.name for alias in node.names if alias.name != "__version__"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("h2a2_jax."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("h2a2_jax.")}
    return found


def parts() -> dict[str, list[Path]]:
    found = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    return found | {folder.parent.name: sorted(folder.parent.rglob("*.py")) for folder in PACKAGE.glob("*/__init__.py")}


def test_every_part_has_a_floor() -> None:
    named = [name for floor in FLOORS for name in floor]
    assert len(named) == len(set(named)) and set(named) == set(parts())


@pytest.mark.parametrize("part", sorted(name for floor in FLOORS for name in floor))
def test_imports_go_downwards(part: str) -> None:
    level = next(i for i, floor in enumerate(FLOORS) if part in floor)
    allowed = {part, *(name for floor in FLOORS[:level] for name in floor)}
    upwards = {str(path.relative_to(PACKAGE)): sorted(imported(path) - allowed) for path in parts()[part]}
    assert not {path: names for path, names in upwards.items() if names}


def test_sparse_knows_no_flax() -> None:
    for path in (PACKAGE / "sparse").rglob("*.py"):
        assert "import flax" not in path.read_text() and "from flax" not in path.read_text(), path


def test_the_table_of_rooms_shows_the_floors() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| ?(\d*) \| ((?:`\w+`(?:, )?)+) \|", page, flags=re.MULTILINE)
    shown: list[set[str]] = []
    for number, names in rows:
        if number:
            shown.append(set())
        shown[-1] |= set(re.findall(r"`(\w+)`", names))
    assert tuple(shown) == FLOORS[:-1]  # all but __main__
