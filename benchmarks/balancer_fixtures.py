"""Golden numbers of TorchJD for the balancers that need the Gramian: `tests/fixtures/balancers.npz`.

    python -m benchmarks.balancer_fixtures [--out FILE]        (needs `torchjd[full]`, of the extra `benchmark`)

The file holds gradients as matrices [K, n], K = 1 to 7, and the combination that each method of TorchJD makes of each:
random ones, of one length and of lengths that differ by a hundred; conflicting ones; ranks below K; equal rows; rows of
zero; gradients that cancel. All is float64. TorchJD's solvers are driven as far as they go:

- MGDA: Frank-Wolfe with `epsilon` 1e-15 and 20,000 iterations. Where the minimum lies on the border of the simplex it
  still converges like 1 / t; `left.mgda` holds a bound of the distance to the minimum, sqrt(2 gap). As `mgda_exact`
  the file has the minimum by quadprog, which TorchJD uses for UPGrad.
- CAGrad: CLARABEL with tolerances of 1e-13 in place of 1e-8.
- Nash-MTL: at most 30 of its convex problems, by ECOS with tolerances of 1e-12, until the residual |w (G w) - 1| is
  below 1e-10 (its own criterion is 1e-3, or little change). `left.nash_mtl` holds the residual; a case is left out
  where it exceeds 1e-7: rows of zero and Pareto stationary points, where no solution exists, K = 1, of which TorchJD
  makes no problem, and four cases where ECOS ends before. `max_norm` is 0, for norms that are not clipped.
- PCGrad and GradVac: the orders that they draw are those stored with the matrix. GradVac is called three times in a
  row, with the matrix, twice the matrix in reversed columns, and the matrix again.

The methods that weigh losses have weights of twelve steps, [12, K], for losses of K = 1 to 7 datasets: uncertainty
weighting with plain gradient descent at a rate of 0.1, DWA with epochs of four steps, FAMO with the losses of the next
step as those after the update.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures" / "balancers.npz"
_SOLVED = 1e-7
"""Residual up to which a result of Nash-MTL counts as a solution."""


def matrices() -> dict[str, np.ndarray]:
    """Gradients by name, float64 [K, n]."""
    draw = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for size in range(1, 8):
        found[f"random{size}"] = draw.normal(size=(size, 12))
        found[f"lengths{size}"] = draw.normal(size=(size, 12)) * 10 ** draw.uniform(-1, 1, (size, 1))
    for size in range(2, 8):
        # A common part against the first dataset, so that it conflicts with all others.
        common = draw.normal(size=12)
        found[f"conflict{size}"] = (
            draw.normal(size=(size, 12)) + np.where(np.arange(size) == 0, -1, 1)[:, None] * common
        )
        equal = draw.normal(size=(size, 12))
        equal[-1] = equal[0]
        found[f"equal{size}"] = equal
    for size in (2, 3, 5):
        zero = draw.normal(size=(size, 12))
        zero[1] = 0
        found[f"zero{size}"] = zero
    # Small integers: their Gramians have no rounding error that would blur the rank.
    for size in range(3, 8):
        low = draw.integers(-3, 4, size=(size, 2)) @ draw.integers(-3, 4, size=(2, 12))
        found[f"rank2_{size}"] = low.astype(float) + np.array([4.0, *[0.0] * 11])
    found["zeros3"] = np.zeros((3, 12))
    found["opposite2"] = np.array([[1.0, 2.0, 2.0], [-1.0, -2.0, -2.0]])
    found["opposite_longer2"] = np.array([[1.0, 2.0, 2.0], [-3.0, -6.0, -6.0]])
    found["cancel3"] = np.array([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0], [-3.0, -4.0, 0.0]])
    return found


def make(path: Path) -> dict[str, int]:
    """Write the fixtures; returns the number of cases of each method."""
    import cvxpy
    import torch
    from torchjd import aggregation

    torch.set_default_dtype(torch.float64)
    arrays: dict[str, np.ndarray] = {}
    names = matrices()
    draw = np.random.default_rng(1)

    plain_solve = cvxpy.Problem.solve
    tolerances = {
        "CLARABEL": {name: 1e-13 for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas", "tol_ktratio")},
        "ECOS": {name: 1e-12 for name in ("abstol", "reltol", "feastol")},
    }

    def solve(problem: Any, solver: Any = None, **options: Any) -> Any:
        return plain_solve(problem, solver=solver, **options, **tolerances[str(solver)])

    for name, matrix in names.items():
        rows = torch.from_numpy(matrix)
        size = len(matrix)
        orders = np.argsort(draw.random((3, size, size)), axis=2)
        arrays[f"matrix.{name}"], arrays[f"orders.{name}"] = matrix, orders.astype(np.int32)
        methods = {
            "imtl_g": aggregation.IMTLG(),
            "aligned_mtl": aggregation.AlignedMTL(),
            "aligned_mtl_median": aggregation.AlignedMTL(scale_mode="median"),
            "aligned_mtl_rmse": aggregation.AlignedMTL(scale_mode="rmse"),
            "upgrad": aggregation.UPGrad(),
            "dual_proj": aggregation.DualProj(),
            "conflict_free": aggregation.ConFIG(),
            "mgda": aggregation.MGDA(epsilon=1e-15, max_iters=20_000),
        }
        for method, aggregator in methods.items():
            arrays[f"{method}.{name}"] = aggregator(rows).numpy()
        gramian = matrix @ matrix.T
        weights = methods["mgda"].gramian_weighting(torch.from_numpy(gramian)).numpy()
        gap = max(weights @ gramian @ weights - (gramian @ weights).min(), 0)
        arrays[f"left.mgda.{name}"] = np.sqrt(2 * gap)
        arrays[f"mgda_exact.{name}"] = _shortest(gramian) @ matrix

        with mock.patch.object(cvxpy.Problem, "solve", solve):
            for c in (0.4, 1.2):
                arrays[f"cagrad{c}.{name}"] = aggregation.CAGrad(c=c)(rows).numpy()
            nash, residual = _nash(rows)
        if residual <= _SOLVED:
            arrays[f"nash_mtl.{name}"], arrays[f"left.nash_mtl.{name}"] = nash, np.array(residual)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch, "randperm", _orders(orders[:1], skip=False)))
            arrays[f"pcgrad.{name}"] = aggregation.PCGrad()(rows).numpy()
        vaccine = aggregation.GradVac()
        with mock.patch.object(torch, "randperm", _orders(orders, skip=True)):
            steps = [rows, 2 * rows.flip(1), rows]
            arrays[f"gradvac.{name}"] = np.stack([vaccine(step).numpy() for step in steps])
    arrays |= _loss_weights()
    arrays = {key: value for key, value in arrays.items() if np.isfinite(value).all()}
    libraries = ("torchjd", "torch", "cvxpy", "clarabel", "ecos", "quadprog")
    arrays["versions"] = np.array([f"{library} {version(library)}" for library in libraries])
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    found = [key.rpartition(".")[0] for key in arrays if "." in key]
    return {method: found.count(method) for method in dict.fromkeys(found)}


def _loss_weights() -> dict[str, np.ndarray]:
    """Losses of twelve steps and the weights that they get, which are the derivatives of the combined loss."""
    import torch
    from torchjd import scalarization

    arrays: dict[str, np.ndarray] = {}
    draw = np.random.default_rng(2)
    for size in range(1, 8):
        falling = np.exp(-np.outer(np.arange(12), draw.uniform(0, 0.3, size)))
        losses = falling * 10 ** draw.uniform(-1, 1, size) * draw.uniform(0.9, 1.1, (12, size))
        arrays[f"losses.{size}"] = losses
        uncertainty, dwa, famo = scalarization.UW(size), scalarization.DWA(), scalarization.FAMO(size)
        descent = torch.optim.SGD(uncertainty.parameters(), lr=0.1)
        weights: dict[str, list[np.ndarray]] = {"uncertainty": [], "dwa": [], "famo": []}
        for step, row in enumerate(losses):
            if step:
                famo.update(torch.from_numpy(row))
            for name, scalarizer in (("uncertainty", uncertainty), ("dwa", dwa), ("famo", famo)):
                values = torch.from_numpy(row).requires_grad_()
                scalarizer(values).backward()
                assert values.grad is not None
                weights[name].append(values.grad.numpy())
            descent.step()
            descent.zero_grad()
            if step % 4 == 3:
                dwa.step()
        arrays |= {f"{name}.{size}": np.stack(rows) for name, rows in weights.items()}
    return arrays


def _shortest(gramian: np.ndarray) -> np.ndarray:
    """Weights of the shortest convex combination by quadprog, which needs 1e-14 on the diagonal."""
    from qpsolvers import solve_qp

    size = len(gramian)
    scaled = gramian / max(np.trace(gramian), 1e-300) + 1e-14 * np.eye(size)
    found = solve_qp(
        scaled, np.zeros(size), -np.eye(size), np.zeros(size), np.ones((1, size)), np.ones(1), solver="quadprog"
    )
    assert found is not None
    return found


def _nash(rows: Any) -> tuple[np.ndarray, float]:
    """Combination of Nash-MTL and the residual of its weights, which are not clipped."""
    from torchjd import aggregation

    aggregator = aggregation.NashMTL(n_tasks=len(rows), max_norm=0.0, optim_niter=30)
    weighting = aggregator.weighting
    gramian = (rows @ rows.T).numpy()

    def residual(weights: np.ndarray) -> float:
        return float(np.abs(weights * (gramian @ weights) - 1).max())

    def finished(_: np.ndarray, weights: np.ndarray) -> bool:
        return weighting.alpha_param.value is None or residual(weights) < 1e-10

    if len(rows) == 1:
        return np.zeros(rows.shape[1]), float("inf")
    with mock.patch.object(weighting, "_stop_criteria", finished):
        try:
            combined = aggregator(rows).numpy()
        except ValueError as error:  # a point without a solution
            print(f"Nash-MTL: {error}", file=sys.stderr)
            return np.zeros(rows.shape[1]), float("inf")
    return combined, residual(weighting.prvs_alpha)


def _orders(orders: np.ndarray, *, skip: bool) -> Any:
    """A `torch.randperm` that gives the rows of the orders one after the other.

    Args:
        orders: [calls, K, K].
        skip: True for permutations of the other datasets' numbers, False for those of all.
    """
    import torch

    calls = iter((row % len(orders[0]), order) for step in orders for row, order in enumerate(step))

    def randperm(size: int) -> Any:
        row, order = next(calls)
        if not skip:
            return torch.from_numpy(order.astype(np.int64))
        others = order[order != row]
        return torch.from_numpy((others - (others > row)).astype(np.int64))

    return randperm


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.balancer_fixtures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=FIXTURES, help=f"file to write (default {FIXTURES.name})")
    options = parser.parse_args(arguments)
    counts = make(options.out)
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")
    print("\n".join(f"  {method:20}{count:4} cases" for method, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
