"""Frozen parameters by name: the parameters of every entry, and entries that are refused."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from h2a2_jax.checkpoint.parameter_groups import (
    GROUPS,
    frozen_mask,
    frozen_paths,
    frozen_text,
    without_frozen_gradients,
)
from h2a2_jax.checkpoint.train_state import TrainState
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.errors import InputError
from tests.checkpoint.test_store import NAMES, PLAIN, TINY, state_shapes

ADAPTED = replace(PLAIN, norm_affine="prompt", adapters=True)


def state(model: Any = TINY) -> TrainState:
    return state_shapes(NAMES, model, False)


def frozen(*entries: str, model: Any = TINY) -> frozenset[str]:
    return frozen_paths(state(model).shared, state(model).exclusive, entries)


def test_a_place_is_frozen_with_its_exclusive_parameters():
    held = frozen("layer1")
    assert {"backbone.stages.0.0.first.conv.shared", "backbone.stages.0.0.first.conv.exclusive"} <= held
    assert all(name.startswith("backbone.stages.0.") for name in held)
    assert held == frozen("backbone.stages.0") == frozen("backbone.stages.0.0", "layer1")


def test_prompts_and_adapters_are_groups():
    prompts, adapters = frozen("prompts", model=ADAPTED), frozen("adapters", model=ADAPTED)
    assert {name.split(".norm.")[1] for name in prompts} == {"prompt.kernel", "prompt.bias"}
    assert adapters == {f"backbone.stages.{s}.0.second.conv.adapter" for s in range(4)}
    assert adapters < frozen("exclusive", model=ADAPTED) and prompts < frozen("shared", model=ADAPTED)
    assert not (prompts | adapters) & frozen("norms", "kernels", model=ADAPTED)


def test_a_path_is_taken_up_to_a_dot():
    assert frozen("heads.box_bias") == {"heads.box_bias"} and frozen("embedding") == {"embedding"}
    with pytest.raises(InputError, match=r"'heads.box',.* did you mean 'heads.box_bias' or"):
        frozen("heads.box")


def test_shared_and_exclusive_are_everything_with_and_without_a_dataset_axis():
    assert frozen("shared") == set(flat_names(state().shared))
    assert frozen("exclusive") == set(flat_names(state().exclusive))
    assert frozen("exclusive") == frozen("heads", "embedding", "exclusive_kernels")
    assert frozen("shared") == frozen("kernels", "norms", "selection", "modulation", "gates")


def test_every_group_is_of_some_parameters():
    for group in GROUPS:
        if group != "scan_embedding":
            assert frozen(group, model=ADAPTED if group in ("prompts", "adapters") else TINY)
    assert frozen("backbone") == frozen("stem", "layer1", "layer2", "layer3", "layer4")


def test_nothing_is_frozen_without_entries():
    assert frozen() == frozenset()


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"'layr1', which names no parameter; .* did you mean 'layer1'"):
        frozen("stem", "layr1")
    with pytest.raises(InputError, match=r"'backbone.stage.0'.* did you mean 'backbone.stages.0'"):
        frozen("backbone.stage.0")
    with pytest.raises(InputError, match=r"has '',.*choose one of them"):
        frozen("")


def test_a_group_that_the_model_lacks_is_refused():
    with pytest.raises(InputError, match=r"'gates', but this model \(see model.selection\) has no such parameters"):
        frozen("gates", model=PLAIN)


def test_everything_frozen_is_refused():
    with pytest.raises(InputError, match=r"optim.freeze is backbone, neck, heads, which is every parameter"):
        frozen("backbone", "neck", "heads", model=PLAIN)
    with pytest.raises(InputError, match="every parameter"):
        frozen("shared", "exclusive")


def test_a_mask_marks_the_frozen_leaves():
    tree, held = state().exclusive, frozen("layer2", "embedding")
    mask = frozen_mask(tree, held)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    assert {name for name, value in zip(flat_names(mask), jax.tree.leaves(mask), strict=True) if value} == {
        "backbone.stages.1.0.first.conv.exclusive",
        "backbone.stages.1.0.second.conv.exclusive",
        "embedding",
    }


def test_the_text_counts_frozen_parameters_by_place():
    tree = {"neck": {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}, "embedding": jnp.ones((1, 5))}
    shared, exclusive = {"neck": tree["neck"]}, {"embedding": tree["embedding"]}
    assert frozen_text(shared, exclusive, {"neck.a"}) == "Frozen: 6 of 15 parameters: neck in part."
    assert frozen_text(shared, exclusive, {"embedding", "neck.a", "neck.b"}).endswith(": neck, embedding.")
    assert frozen_text(shared, exclusive, ()) == "Frozen: 0 of 15 parameters."


def test_no_gradient_reaches_frozen_parameters():
    def loss(tree: dict[str, Any]) -> Any:
        tree = without_frozen_gradients(tree, {"a.b"})
        return tree["a"]["b"] * tree["a"]["c"]

    gradient = jax.grad(loss)({"a": {"b": 2.0, "c": 3.0}})
    assert gradient == {"a": {"b": 0.0, "c": 2.0}}
