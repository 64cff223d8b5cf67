"""Running statistics that all datasets share are the mean over those that took part in a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from h2a2_jax.distributed import train_mesh
from h2a2_jax.training.step import _average


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("present", [(True, True, True), (True, False, True), (False, False, False)])
def test_the_mean_over_the_datasets_of_a_step(devices, present):
    mesh = train_mesh(3, jax.devices()[:devices])
    old = jnp.full((3, 2), 7.0)
    new = jnp.asarray([[1.0, 2.0], [10.0, 20.0], [3.0, 6.0]])
    by_dataset = P("dataset")
    mean = jax.shard_map(
        lambda new, old, here: _average({"mean": new}, {"mean": old}, here)["mean"],
        mesh=mesh, in_specs=(by_dataset, by_dataset, by_dataset), out_specs=by_dataset,
    )(new, old, jnp.asarray(present))  # fmt: skip
    expected = np.asarray(new)[list(present)].mean(0) if any(present) else np.full(2, 7.0)
    np.testing.assert_allclose(mean, np.tile(expected, (3, 1)), rtol=1e-6)
