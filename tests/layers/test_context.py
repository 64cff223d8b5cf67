import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax.layers import DatasetContext, ForwardContext


def test_a_dataset_picks_its_own_values_by_index_or_by_weight():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4)), jnp.float32)
    np.testing.assert_array_equal(DatasetContext.one(1, 3).pick(values), values[1])
    np.testing.assert_array_equal(DatasetContext(jnp.array([0.0, 1, 0])).pick(values), values[1])
    np.testing.assert_allclose(DatasetContext.mean(3).pick(values), values.mean(0), rtol=1e-6)
    np.testing.assert_array_equal(DatasetContext(jnp.ones(1)).pick(values[:1]), values[0])
    picked = jax.jit(jax.vmap(lambda d: DatasetContext.one(d, 3).pick(values)))(jnp.arange(3))
    np.testing.assert_array_equal(picked, values)


@pytest.mark.parametrize("by", ["index", "weights"])
def test_the_gradient_of_other_datasets_is_exactly_zero(by):
    context = DatasetContext.one(2, 3) if by == "index" else DatasetContext(jnp.array([0.0, 0, 1]))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
    gradient = jax.grad(lambda v: (context.pick(v) * weight).sum())(jnp.ones((3, 2, 4)))
    np.testing.assert_array_equal(gradient[2], weight)
    assert (gradient[:2] == 0).all()


def test_another_number_of_datasets_is_refused():
    with pytest.raises(ValueError, match="parameters of 3 datasets, a context of 2"):
        DatasetContext.one(0, 2).pick(jnp.zeros((3, 1)))


def test_without_a_dataset_one_is_assumed_or_the_mean():
    np.testing.assert_array_equal(ForwardContext(training=True).dataset_of(1).weights, [1])
    np.testing.assert_allclose(ForwardContext().dataset_of(4).weights, 0.25)
    with pytest.raises(ValueError, match="4 datasets trains on one at a time"):
        ForwardContext(training=True).dataset_of(4)


def test_a_context_is_an_argument_of_jit_that_keeps_its_settings():
    context = ForwardContext(DatasetContext.one(1, 2), jnp.ones(3), training=True, dtype=jnp.bfloat16, axis_name="r")
    seen = []

    @jax.jit
    def run(context):
        seen.append((context.training, context.dtype, context.axis_name, context.algorithm))
        return context.dataset.pick(jnp.arange(2.0)) + context.embedding.sum()

    assert run(context) == 4 and seen == [(True, jnp.bfloat16, "r", "auto")]
