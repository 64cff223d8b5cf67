"""Initial values and types of parameters, as Flax's layers take them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn import initializers

from h2a2_jax import layers, linen
from h2a2_jax.layers import BatchNorm, InstanceNorm, LayerNorm, SelectionConfig, SelectiveConv, SparseConv
from h2a2_jax.layers.sparse_conv import kaiming_fan_out, uniform_fan_out
from tests.test_linen import SAME, X


@pytest.mark.parametrize("datasets", [None, 2])
@pytest.mark.parametrize(
    ("layer", "start"), [("SparseConv", kaiming_fan_out), ("SparseConvTranspose", uniform_fan_out)]
)
def test_defaults_are_the_documented_functions_of_the_first_key(layer, start, datasets):
    made = getattr(layers, layer)(4, 6, use_bias=True, exclusive_to=datasets, rngs=nnx.Rngs(3))
    each = () if datasets is None else (datasets,)
    np.testing.assert_array_equal(made.kernel[...], start(nnx.Rngs(3).params(), (*each, 27, 4, 6)))
    assert made.bias.shape == (*each, 6) and (made.bias[...] == 0).all()
    rngs = nnx.Rngs(0)
    getattr(layers, layer)(4, 6, use_bias=True, rngs=rngs)
    assert rngs.params.count[...] == 1


def test_an_initializer_sees_the_fans_of_one_kernel():
    variance = initializers.variance_scaling(1.0, "fan_in", "normal")
    for datasets in (None, 3):
        conv = SparseConv(40, 50, kernel_init=variance, exclusive_to=datasets, rngs=nnx.Rngs(0))
        np.testing.assert_allclose(conv.kernel[...].std(), (27 * 40) ** -0.5, rtol=0.02)
    assert (conv.kernel[0] != conv.kernel[1]).all()
    config = SelectionConfig(projection_dim=4, embedding_dim=3, hidden=5, exclusive_init="independent")
    selective = SelectiveConv(
        40, 50, num_datasets=2, selection=config, kernel_init=variance, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    for kernel in (selective.shared, selective.exclusive):
        np.testing.assert_allclose(kernel[...].astype(jnp.float32).std(), (27 * 40) ** -0.5, rtol=0.02)
        assert kernel.dtype == jnp.bfloat16
    assert selective.prior.dtype == selective.prototypes.dtype == jnp.float32
    grouped = SparseConv(40, 50, groups=10, kernel_init=variance, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(grouped.kernel[...].std(), (27 * 4) ** -0.5, rtol=0.02)


def test_a_bias_has_an_initializer_and_a_type():
    for datasets in (None, 2):
        conv = SparseConv(
            4, 6, use_bias=True, bias_init=initializers.normal(1.0), param_dtype=jnp.bfloat16, exclusive_to=datasets,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        assert conv.kernel.dtype == conv.bias.dtype == jnp.bfloat16
        assert len(np.unique(conv.bias[...].astype(jnp.float32))) == 6 * (datasets or 1)
    y = SparseConv(4, 6, use_bias=True, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(X, SAME).features
    assert y.dtype == jnp.float32


@pytest.mark.parametrize("layer", [BatchNorm, InstanceNorm, LayerNorm])
def test_norms_have_initializers_and_a_type(layer):
    norm = layer(
        4, scale_init=initializers.zeros, bias_init=initializers.normal(), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    assert norm.scale.dtype == norm.bias.dtype == jnp.bfloat16 and (norm.scale[...] == 0).all()
    y = norm(X)
    np.testing.assert_allclose(y.features[0], norm.bias[...].astype(jnp.float32), rtol=1e-6)
    assert y.features.dtype == jnp.float32
    with pytest.raises(ValueError, match="bias_init was given without rngs"):
        layer(4, bias_init=initializers.normal())


def test_exclusive_scales_are_drawn_apart_and_statistics_stay_wide():
    norm = BatchNorm(
        4,
        num_datasets=2,
        exclusive_affine=True,
        scale_init=initializers.normal(),
        param_dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )
    assert norm.scale.shape == (2, 4) and (norm.scale[0] != norm.scale[1]).any()
    assert norm.mean.dtype == norm.var.dtype == jnp.float32


def test_linen_layers_take_the_same():
    conv = linen.SparseConv(4, 6, use_bias=True, kernel_init=initializers.ones, param_dtype=jnp.bfloat16)
    params = conv.init(jax.random.key(0), X, SAME)["params"]
    assert params["kernel"].dtype == jnp.bfloat16 and (params["kernel"] == 1).all()
    norm = linen.BatchNorm(4, bias_init=initializers.normal())
    biases = [norm.init(jax.random.key(seed), X)["params"]["bias"] for seed in (0, 1)]
    assert (biases[0] != biases[1]).all()
    training = linen.BatchNorm(4, use_running_average=False)
    variables = training.init(jax.random.key(0), X)
    _, changed = training.apply(variables, X, mutable=["batch_stats"])
    assert (changed["batch_stats"]["mean"] != 0).all()
    still = layers.ForwardContext(training=False)
    assert (training.apply(variables, X, still, mutable=["batch_stats"])[1]["batch_stats"]["mean"] == 0).all()
