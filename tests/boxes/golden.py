"""Numbers of the reference implementation, by case."""

from pathlib import Path

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
