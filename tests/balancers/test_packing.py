"""Packed trees: the same tree again, and the same norms, factors and balanced gradients as of plain trees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax.balancers.ngh import norm_gradient_harmonization
from h2a2_jax.balancers.packing import (
    LARGEST,
    Packed,
    PackedValues,
    Packing,
    name_tensors,
    pack_like,
    scale_tensors,
    tensor_norms,
    tensor_values,
    unpack,
)
from h2a2_jax.checkpoint.tree import flat_names

PARAMETERS: dict[str, Any] = {
    "block": {"kernel": np.zeros((3, 5, 20), np.float32), "bias": np.zeros(7, np.float32)},
    "frozen": np.zeros(6, np.float32),
    "large": np.zeros((LARGEST + 1,), np.float32),
    "scale": np.zeros((), np.float32),
    "narrow": np.zeros(128, np.float16),
}


def kind(name: str) -> str | None:
    return None if name == "frozen" else "kernel" if name.endswith("kernel") else "bias"


def gradients(datasets: int) -> dict[str, Any]:
    """Gradients of sizes that differ by orders; a very small and a very large one among them."""
    random = np.random.default_rng(0)

    def draw(leaf: np.ndarray) -> np.ndarray:
        scale = 10 ** random.uniform(-3, 1, datasets)
        if leaf.shape == (7,):
            scale = np.array([1e-21, 1e21, 1.0])[:datasets]
        values = random.normal(size=(datasets, *leaf.shape)) * scale.reshape(-1, *[1] * leaf.ndim)
        return values.astype(leaf.dtype)

    return jax.tree.map(draw, PARAMETERS)


def on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def assert_equal(ours: Any, theirs: Any) -> None:
    assert flat_names(ours) == flat_names(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


PACKING = Packing.of(PARAMETERS, kind)


@pytest.mark.parametrize("place", [on_device, lambda tree: tree])
def test_a_tree_is_packed_and_unpacked_unchanged(place: Any) -> None:
    plain = place(gradients(2))
    packed = PACKING.pack(plain)
    assert isinstance(packed, Packed)
    assert flat_names(packed) == [
        "packed.float32.bias", "packed.float32.kernel", "frozen", "large", "packed.float16.bias",
    ]  # fmt: skip
    # A row for the bias and one for the scale; 300 numbers of the kernel fill three.
    assert [packed.arrays[f"packed.float32.{name}"].shape for name in ("bias", "kernel")] == [(2, 2, 128), (2, 3, 128)]
    assert_equal(unpack(packed), plain)
    assert name_tensors(packed) == name_tensors(plain) == flat_names(plain)
    state = {"state": plain, "step": np.array(2)}
    assert_equal(unpack(pack_like({"state": packed, "step": np.array(1)}, state)), state)


def test_values_of_tensors_are_packed_into_one_array() -> None:
    values = jnp.arange(12, dtype=jnp.float32).reshape(6, 2)
    plain = tensor_values(PARAMETERS, values)
    packed = PACKING.pack(plain)
    assert isinstance(packed, PackedValues)
    np.testing.assert_array_equal(packed.values, values)
    assert_equal(unpack(packed), plain)
    assert_equal(tensor_values(PACKING.pack(PARAMETERS), values), packed)


def test_norms_and_factors_are_those_of_plain_trees() -> None:
    plain = on_device(gradients(3))
    packed = PACKING.pack(plain)
    norms = tensor_norms(plain)
    assert norms.shape == (3, 6) and (norms > 0).all() and jnp.isfinite(norms).all()
    np.testing.assert_allclose(tensor_norms(packed), norms, rtol=2e-6)
    factors = jnp.arange(18, dtype=jnp.float32).reshape(3, 6)
    assert_equal(unpack(scale_tensors(packed, factors)), scale_tensors(plain, factors))


def test_a_value_that_is_not_finite_is_found_in_its_tensor_alone() -> None:
    plain = gradients(3)
    plain["block"]["kernel"][1, 2, 0, 0] = np.nan
    found = ~jnp.isfinite(tensor_norms(PACKING.pack(on_device(plain))))
    assert np.argwhere(found).tolist() == [[1, flat_names(plain).index("block.kernel")]]


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_packed_gradients_are_harmonised_as_plain_ones(scope: str) -> None:
    balancer = norm_gradient_harmonization(3, scope=scope)
    present = jnp.array([True, True, False])
    plain = on_device(gradients(3))
    packed, parameters = PACKING.pack(plain), PACKING.pack(on_device(PARAMETERS))
    ours, record = balancer.update(packed, balancer.init(parameters), parameters, present=present)
    wanted, plain_record = balancer.update(plain, balancer.init(PARAMETERS), PARAMETERS, present=present)
    for a, b in ((ours, wanted), (record, plain_record), (balancer.init(parameters), balancer.init(PARAMETERS))):
        a = unpack(a)
        assert flat_names(a) == flat_names(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5 if y.dtype == np.float32 else 2e-3)
