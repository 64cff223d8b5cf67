"""Weights of the Gramian methods against TorchJD's, in float64 (`benchmarks.balancer_fixtures`)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.balancer_fixtures import FIXTURES
from benchmarks.balancers import WEIGHTS, combine, fixture_errors
from h2a2_jax.balancers.active_sets import MOST_DATASETS
from h2a2_jax.balancers.mgda import mgda_weights
from h2a2_jax.balancers.nash_mtl import nash_mtl_weights
from h2a2_jax.balancers.upgrad import upgrad_weights


@pytest.mark.parametrize("method", WEIGHTS)
def test_combinations_are_those_of_torchjd(method: str) -> None:
    with jax.enable_x64(True):
        errors = fixture_errors(method)
    # All but Nash-MTL's cases without a solution and with one dataset, which TorchJD does not solve.
    assert len(errors) == (25 if method == "nash_mtl" else 38)
    assert {name: error for name, (error, left) in errors.items() if error > 1e-6 + left} == {}
    assert np.median([left for _, left in errors.values()]) < 1e-4  # of MGDA's Frank-Wolfe alone; 0 for the others


@pytest.mark.parametrize("method", ["mgda", "imtl_g", "nash_mtl", "upgrad", "gradvac"])
def test_all_datasets_take_part_by_default(method: str) -> None:
    """In the cases above, K of seven take part; here there are K."""
    with jax.enable_x64(True), np.load(FIXTURES) as stored:
        matrix, orders = stored["matrix.conflict3"], stored["orders.conflict3"]
        (padded,) = combine(method, [matrix], [orders])
        gramian = jnp.asarray(matrix @ matrix.T)
        if method == "gradvac":
            weights, _ = jax.jit(WEIGHTS[method])(gramian, jnp.asarray(orders[0]), jnp.zeros((3, 3)))
        else:
            weights = jax.jit(WEIGHTS[method])(gramian)
    np.testing.assert_allclose(np.asarray(weights) @ matrix, padded[0] if method == "gradvac" else padded, rtol=1e-9)


def test_nash_weights_solve_their_equation_and_are_clipped() -> None:
    with jax.enable_x64(True), np.load(FIXTURES) as stored:
        free, bounded = jax.jit(partial(nash_mtl_weights, max_norm=0.0)), jax.jit(nash_mtl_weights)
        for name in ("lengths7", "rank2_7", "equal7"):
            matrix = stored[f"matrix.{name}"]
            gramian = matrix @ matrix.T
            weights = np.asarray(free(jnp.asarray(gramian)))
            np.testing.assert_allclose(weights * (gramian @ weights), 1, atol=1e-9)
            clipped = np.asarray(bounded(jnp.asarray(gramian)))
            np.testing.assert_allclose(clipped, weights / np.sqrt(len(matrix)), rtol=1e-6)
            assert np.linalg.norm(clipped @ matrix) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("method", ["cagrad0.4", "imtl_g", "nash_mtl", "conflict_free"])
def test_weights_stay_finite_in_float32_where_gradients_cancel(method: str) -> None:
    names = ("opposite2", "opposite_longer2", "cancel3", "zeros3", "equal7", "rank2_7")
    with np.load(FIXTURES) as stored:
        matrices = [stored[f"matrix.{name}"].astype(np.float32) for name in names]
        orders = [stored[f"orders.{name}"] for name in names]
    for name, matrix, combined in zip(names, matrices, combine(method, matrices, orders), strict=True):
        assert combined.dtype == np.float32
        assert np.linalg.norm(combined) <= 2 * len(matrix) * np.linalg.norm(matrix, axis=1).max(), name


def test_too_many_datasets_for_an_exact_solver_are_refused() -> None:
    gramian = jnp.eye(MOST_DATASETS + 1)
    for weigh in (mgda_weights, upgrad_weights):
        with pytest.raises(ValueError, match=r"13 datasets have 8,192 sets to try, .* use at most 12 datasets or"):
            weigh(gramian)
