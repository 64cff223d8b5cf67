"""The Python blocks of README, docs and the tutorial run, in order; what they train learns; links lead somewhere."""

import json
import re
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from flax import nnx

from h2a2_jax.checkpoint.store import CheckpointStore
from h2a2_jax.layers import ForwardContext
from tests.checkpoint.test_store import NAMES, experiment, make_state

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COLUMNS = [("float", name) for name in "xyz"] + [("uchar", name) for name in ("red", "green", "blue")]
TRAINED = {"layers.md": 4}
"""Losses that the blocks of a page record."""


def python_blocks(text: str) -> list[str]:
    """Python blocks of a text."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def sequences() -> dict[str, list[str]]:
    """Blocks that share a namespace: those of a section of the README, each for another reader, or of a page."""
    found = {page.name: page.read_text() for page in PAGES[1:]}
    for part in re.split(r"^## ", PAGES[0].read_text(), flags=re.MULTILINE)[1:]:
        found[part.splitlines()[0]] = part
    return {name: blocks for name, text in found.items() if (blocks := python_blocks(text))}


def anchors(page: Path) -> set[str]:
    """What links to headings of a page end in, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_no_block_is_left_out() -> None:
    texts = [page.read_text() for page in PAGES]
    assert not any("<!-- not run" in text for text in texts)
    assert sum(map(len, sequences().values())) == sum(text.count("```python") for text in texts) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_folders_files_and_modules_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(r"`((?:h2a2_jax|configs|tests|benchmarks)/[\w/.]+)`", page.read_text())
    modules = re.findall(r"python -m ((?:h2a2_jax|benchmarks|data|tests)[\w.]*)", page.read_text())
    paths = [*named, *(module.replace(".", "/") for module in modules)]
    missing = [p for p in paths if not any((ROOT / f"{p}{ending}").exists() for ending in ("", ".py", "/__main__.py"))]
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize("name", sequences())
def test_the_blocks_of_a_page_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = sequences()[name]
    if "runs/demo" in "".join(blocks):
        with CheckpointStore("runs/demo/checkpoints") as store:
            store.save(1, make_state(1), experiment(), NAMES)
    if "myscans/room.ply" in "".join(blocks):
        Path("myscans").mkdir()
        rows = np.random.default_rng(0).random((3000, 3)) * 2
        header = "".join(f"property {kind} {name}\n" for kind, name in COLUMNS)
        points = "".join(f"{x:.3f} {y:.3f} {z:.3f} 90 120 {int(100 * z)}\n" for x, y, z in rows)
        text = f"ply\nformat ascii 1.0\nelement vertex {len(rows)}\n{header}end_header\n{points}"
        Path("myscans/room.ply").write_text(text)
    names: dict[str, Any] = {}
    trained = 0
    for block in blocks:
        exec(compile(block, name, "exec"), names)
        if losses := names.pop("losses", None):
            assert len(losses) >= 20 and max(losses[-5:]) < 0.5 * losses[0]
            trained += 1
    assert trained == TRAINED.get(name, 0)
    if name == "layers.md":
        compare_with_vmap(names)
    if "cloud" in names:
        assert len(names["cloud"].points) == 3000 and names["boxes"].scores.min(initial=1) >= 0.3
    if name == "For engineers":
        assert names["codes"].shape == (2, 16) and np.isfinite(names["codes"]).all()


def compare_with_vmap(names: dict[str, Any]) -> None:
    """The gradient over devices is that of one device that maps over the stack."""

    def loss(plan: Any, labels: Any, params: Any) -> jax.Array:
        model = nnx.merge(names["graph"], params, names["stats"], copy=True)
        context = ForwardContext(training=True, axis_name="data", algorithm="gather")
        return names["mean_loss"](model(plan, context), labels, plan)

    def mean(params: Any, stack: Any) -> jax.Array:
        return jax.vmap(loss, in_axes=(0, 0, None), axis_name="data")(*stack, params).mean()

    value, grads = jax.jit(jax.value_and_grad(mean))(names["params"], names["stack"])
    assert names["devices"] > 1
    np.testing.assert_allclose(names["value"], value, rtol=1e-4)
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, nnx.to_pure_dict(names["grads"]), nnx.to_pure_dict(grads))


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    names: dict[str, Any] = {}
    for cell in cells:
        exec(compile(cell, "tutorial.ipynb", "exec"), names)
    drawn = len(plt.get_fignums())
    plt.close("all")
    assert drawn == sum("plt.subplots" in cell for cell in cells) >= 4
    assert jax.numpy.allclose(names["by_nnx"].features, names["by_linen"].features, atol=1e-5)
    assert set(np.unique(names["gamma"])) == {0, 1}
    assert len(names["boxes"]) == len(names["table"]) > 0
    assert {path.suffix for path in tmp_path.glob("furniture.*")} == {".html", ".csv", ".png"}
    stored = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert stored and not any(output["output_type"] == "error" for output in stored)


DOCUMENTED = ("sparse", "layers", "linen", "boxes", "models", "losses", "balancers")
"""Parts of the package whose public names are in the API reference."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation as mkdocs builds it; a warning fails."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("part", DOCUMENTED)
def test_every_public_name_is_in_the_api_reference(part: str, site: Path) -> None:
    page = (site / "api" / part / "index.html").read_text()
    names = import_module(f"h2a2_jax.{part}").__all__
    assert not [name for name in names if f'.{name}"' not in page]


def test_tests_that_the_list_of_features_names_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)", (ROOT / "tests" / "FEATURES.md").read_text())
    assert len(named) > 200
    assert not [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()]
