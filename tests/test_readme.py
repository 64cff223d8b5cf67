"""The README's Python blocks run, in order, in one namespace a section; what they train learns."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from h2a2_jax.layers import ForwardContext
from h2a2_jax.training.checkpoint import CheckpointStore
from tests.training.test_checkpoint import NAMES, experiment, make_state

README = Path(__file__).parent.parent / "README.md"
TRAINED = {"For engineers": 3}
"""Losses that the blocks of a section record."""


def sections() -> dict[str, list[str]]:
    """Python blocks by section, without those that an HTML comment above them excuses."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^## ", README.read_text(), flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```python\n(.*?)^```", part, flags=re.MULTILINE | re.DOTALL)
        if blocks:
            found[part.splitlines()[0]] = blocks
    return found


def test_no_block_is_left_out():
    assert "<!-- not run" not in README.read_text()
    assert sum(map(len, sections().values())) == README.read_text().count("```python") >= 8


@pytest.mark.slow
@pytest.mark.parametrize("section", sections())
def test_the_blocks_of_a_section_run(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    if section == "For practitioners":
        with CheckpointStore("runs/demo/checkpoints") as store:
            store.save(1, make_state(1), experiment(), NAMES)
    names: dict[str, Any] = {}
    trained = 0
    for block in sections()[section]:
        exec(compile(block, f"README.md, {section}", "exec"), names)
        if losses := names.pop("losses", None):
            assert len(losses) >= 20 and max(losses[-5:]) < 0.5 * losses[0]
            trained += 1
    assert trained == TRAINED.get(section, 0)
    if section == "For engineers":
        compare_with_vmap(names)


def compare_with_vmap(names: dict[str, Any]) -> None:
    """The gradient over devices is that of one device that maps over the stack."""

    def loss(maps: Any, labels: Any, params: Any) -> jax.Array:
        model = nnx.merge(names["graph"], params, names["stats"], copy=True)
        context = ForwardContext(training=True, axis_name="data", algorithm="gather")
        return names["mean_loss"](model(maps, context), labels, maps)

    def mean(params: Any, stack: Any) -> jax.Array:
        return jax.vmap(loss, in_axes=(0, 0, None), axis_name="data")(*stack, params).mean()

    value, grads = jax.jit(jax.value_and_grad(mean))(names["params"], names["stack"])
    assert names["devices"] > 1
    np.testing.assert_allclose(names["value"], value, rtol=1e-4)
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, nnx.to_pure_dict(names["grads"]), nnx.to_pure_dict(grads))
