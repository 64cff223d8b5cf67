"""Numbers of the reference implementation, by case."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

FIXTURES = Path(__file__).parents[1] / "fixtures"


def load_cases(path):
    """Arrays of a file with keys "<case>.<name>", as {case: {name: array}}."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as file:
        for key in file.files:
            case, name = key.split(".", 1)
            cases.setdefault(case, {})[name] = file[key]
    return cases


def relative_error(actual, expected):
    """Largest difference over the largest magnitude of what is expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        return float("inf")
    scale = np.abs(expected).max(initial=0.0)
    return float(np.abs(actual - expected).max(initial=0.0) / (scale if scale > 0 else 1.0))


def boxes_of_corners(corners):
    """Boxes without yaw from their lower and upper corners (m), the form of the reference's axis-aligned losses."""
    low, high = corners[..., :3], corners[..., 3:]
    return jnp.concatenate([(low + high) / 2, high - low, jnp.zeros_like(low[..., :1])], axis=-1)
