"""A balancer's record by groups of parameters: numbers by hand, and every parameter in its group."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from h2a2_jax.balancers.ngh import HarmonizationState, norm_gradient_harmonization
from h2a2_jax.checkpoint.parameter_groups import KINDS, PLACES
from h2a2_jax.checkpoint.train_state import split_model
from h2a2_jax.checkpoint.tree import flat_names
from h2a2_jax.layers.kernel_selection import SelectionConfig
from h2a2_jax.models import TR3D, DetectorConfig, HeadConfig
from h2a2_jax.training.metrics import group_summary

NAMES = ("scannet", "s3dis")


@functools.cache
def shared_parameters(depth: int = 10, prompts: bool = False, **choices: Any) -> nnx.State:
    """Shapes only; depth 34 is TR3D's own."""
    selection = SelectionConfig(**choices) if choices else None
    config = DetectorConfig(depth=depth, selection=selection, norm_affine="prompt" if prompts else "shared")
    heads = [HeadConfig("scannet", 18, 6), HeadConfig("s3dis", 5, 6)]
    return split_model(nnx.eval_shape(lambda: TR3D(config, heads, rngs=nnx.Rngs(0))))[2]


def record_of(psi: Any, norms: Any, scales: Any) -> HarmonizationState:
    def arrays(tree: Any) -> Any:
        return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), tree, is_leaf=lambda v: not isinstance(v, dict))

    return HarmonizationState(arrays(psi), arrays(norms), arrays(scales), jnp.int32(0))


RECORD = record_of(
    {"a": {"kernel": 0.5, "bias": 1.0}, "b": {"kernel": 0.7}},
    {"a": {"kernel": [3.0, 1.0], "bias": [4.0, 0.0]}, "b": {"kernel": [1e30, 2.0]}},
    {"a": {"kernel": [0.5, 2.0], "bias": [1.0, 1.0]}, "b": {"kernel": [1.0, 100.0]}},
)


def test_means_norms_and_factors_of_a_group():
    values = group_summary(RECORD, NAMES, 0.6, {"first": r"^a\.", "kernels": "kernel$", "nothing": "^c"})
    expected = {
        "psi/first": 0.75,
        "harmonized_share/first": 0.5,
        "gradient_norm/first/scannet": 5,
        "scale/first/scannet": 0.5**0.5,
        "gradient_norm/first/s3dis": 1,
        "scale/first/s3dis": 2**0.5,
        "psi/kernels": 0.6,
        "harmonized_share/kernels": 0.5,
        "gradient_norm/kernels/scannet": 1e30,
        "scale/kernels/scannet": 0.5**0.5,
        "gradient_norm/kernels/s3dis": 5**0.5,
        "scale/kernels/s3dis": 200**0.5,
    }
    assert values.keys() == expected.keys()
    np.testing.assert_allclose(list(values.values()), [expected[key] for key in values], rtol=1e-6)
    assert all(type(value) is float for value in values.values())


def test_one_norm_over_everything_is_one_group():
    values = group_summary(record_of(0.5, [3.0, 1.0], [0.5, 2.0]), NAMES, 0.8)
    assert values == {
        "psi/all": 0.5,
        "harmonized_share/all": 1.0,
        "gradient_norm/all/scannet": 3.0,
        "scale/all/scannet": 0.5,
        "gradient_norm/all/s3dis": 1.0,
        "scale/all/s3dis": 2.0,
    }


def test_factors_that_are_not_above_zero_have_a_plain_mean():
    """As weights of MGDA and IMTL-G may be."""
    mixed = {"a": {"kernel": [2.0, 0.0], "bias": [8.0, 3.0]}, "b": {"kernel": [1.0, 1.0]}}
    record = record_of(jax.device_get(RECORD.psi), jax.device_get(RECORD.norms), mixed)
    values = group_summary(record, NAMES, 0.6, {"first": r"^a\."})
    assert [values[f"scale/first/{name}"] for name in NAMES] == pytest.approx([4.0, 1.5])


@pytest.mark.parametrize(
    "choices", [{}, {"tau": 0.25}, {"convolutions": ("stem", "residual", "neck")}, {"tau": 0.25, "prompts": True}]
)
def test_every_shared_parameter_has_one_place_and_one_kind(choices: dict[str, Any]):
    names = flat_names(shared_parameters(**choices))
    for groups in (PLACES, KINDS):
        assert all(sum(re.search(pattern, name) is not None for pattern in groups.values()) == 1 for name in names)
    kinds = {kind for kind, pattern in KINDS.items() if any(re.search(pattern, name) for name in names)}
    expected = set(KINDS) if choices else {"kernels", "norms"}
    assert kinds == (expected if "prompts" in choices else expected - {"prompts"})


def test_scan_embeddings_have_a_place():
    names = flat_names(shared_parameters(scan_embedding=True))
    for name in names:
        found = [place for place, pattern in PLACES.items() if re.search(pattern, name)]
        assert len(found) == 1 and (found == ["scan_embedding"]) == ("scan_embedding" in name)


def test_a_detector_of_full_size_gives_a_hundred_numbers():
    shared = shared_parameters(34, tau=0.25)
    record = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, leaf.dtype), jax.eval_shape(norm_gradient_harmonization(3).init, shared)
    )
    values = group_summary(record, ("scannet", "sunrgbd", "s3dis"), 0.8)
    assert len(jax.tree.leaves(shared)) > 400 and len(values) == 11 * 8
    np.testing.assert_allclose(values["gradient_norm/stem/scannet"], 3**0.5, rtol=1e-6)
    np.testing.assert_allclose(values["gradient_norm/neck/s3dis"], 18**0.5, rtol=1e-6)
