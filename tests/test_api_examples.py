"""The examples of the API pages of sparse, layers and linen run; each public name is documented and used in one."""

import ast
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PAGES = Path(__file__).parent.parent / "docs" / "api"
MODULES = ("sparse", "layers", "linen")
HEADING = re.compile(r"^## ", flags=re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r"^#* ?::: h2a2_jax\.(\S+)$", flags=re.MULTILINE)


def sections(module: str) -> list[str]:
    """Sections of a page, each with its heading."""
    return HEADING.split((PAGES / f"{module}.md").read_text())[1:]


def used_names(code: str) -> set[str]:
    """Dotted names in code: of `layers.weights.to_spconv` that, `layers.weights` and `layers`."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute | ast.Name)}


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_page_run(module: str) -> None:
    names: dict[str, Any] = {}
    blocks = BLOCK.findall((PAGES / f"{module}.md").read_text())
    for block in blocks:
        exec(compile(block, f"{module}.md", "exec"), names)
    assert len(blocks) == len(sections(module))
    assert names["overflow"] == 0 and np.isfinite(names["smooth"]).all()


@pytest.mark.parametrize("module", MODULES)
def test_each_public_name_is_documented_once_and_used_in_its_section(module: str) -> None:
    documented = []
    for section in sections(module):
        names = [re.sub(r"(\.\w+)\1$", r"\1", name) for name in DIRECTIVE.findall(section)]  # cover is in cover.py
        (block,) = BLOCK.findall(section)
        assert not [name for name in names if name not in used_names(block)], section.splitlines()[0]
        documented += names
    assert sorted(documented) == sorted(f"{module}.{name}" for name in import_module(f"h2a2_jax.{module}").__all__)


def test_each_function_of_weights_is_used() -> None:
    weights = import_module("h2a2_jax.layers.weights")
    public = {name for name, value in vars(weights).items() if getattr(value, "__module__", "") == weights.__name__}
    used = used_names("".join(BLOCK.findall((PAGES / "layers.md").read_text())))
    assert not [name for name in public if name[0] != "_" and f"layers.weights.{name}" not in used]
