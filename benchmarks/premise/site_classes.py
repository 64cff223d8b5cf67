"""Class of the surface around a site, from the occupied sites alone: plane, edge, corner or other."""

import numpy as np
from jaxtyping import Float, Int

from h2a2_jax.sparse.neighbors import submanifold_neighbors
from h2a2_jax.sparse.sites import SiteSet, kernel_offsets

SITE_CLASSES = ("plane", "edge", "corner", "other")
RADIUS = 2
"""Reach of the neighbourhood along each axis, in sites."""

_FEWEST = 6
_FLAT = 0.077
_ONE_SIDED_FLAT = 0.35
_FILLED = 0.25
_ROUND = 0.66
_ONE_SIDED = 0.44


def classify_sites(sites: SiteSet) -> Int[np.ndarray, " n"]:
    """Class of every site, as an index into `SITE_CLASSES`.

    The class follows from the occupied sites within a ball of radius 2.5 sites: the eigenvalues l1 >= l2 >= l3 of their
    covariance and the distance m of their mean from the centre (1 is two sites). In the continuum a plane through
    the centre of a ball has l3 = 0 and m = 0, the border of a half-plane m = 0.42, the crease of two half-planes at a
    right angle l3 / sum = 0.09, l2 / l1 = 0.5, m = 0.3, and the corner of three quarter planes l3 / sum = 0.13,
    l2 / l1 = 1, m = 0.49. Sites of a grid make planes thicker (l3 / sum up to 0.06 for tilted ones). The thresholds
    lie between the values at random positions and rotations:

    - "other": fewer than 6 sites, or l3 / sum >= 0.25 (filled or cluttered);
    - "plane": l3 / sum < 0.077 and m < 0.35;
    - "corner": not flat, l2 / l1 >= 0.66 and m >= 0.44;
    - "edge": the rest: creases, borders, bars.
    """
    count, eigenvalues, off_centre = neighbourhood_moments(sites)
    total = np.maximum(eigenvalues.sum(1), 1e-12)
    flatness, roundness = eigenvalues[:, 2] / total, eigenvalues[:, 1] / np.maximum(eigenvalues[:, 0], 1e-12)
    flat = flatness < _FLAT
    classes = np.full(len(count), SITE_CLASSES.index("edge"))
    classes[~flat & (roundness >= _ROUND) & (off_centre >= _ONE_SIDED)] = SITE_CLASSES.index("corner")
    classes[flat & (off_centre < _ONE_SIDED_FLAT)] = SITE_CLASSES.index("plane")
    classes[(count < _FEWEST) | (flatness >= _FILLED)] = SITE_CLASSES.index("other")
    return classes


def neighbourhood_moments(
    sites: SiteSet,
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n 3"], Float[np.ndarray, " n"]]:
    """Occupied sites within 2.5 sites of each site: their number, covariance eigenvalues, distance of their mean.

    Eigenvalues descend, in squared sites; the distance is in units of two sites.
    """
    offsets = kernel_offsets(2 * RADIUS + 1)
    ball = (offsets**2).sum(1) <= (RADIUS + 0.5) ** 2
    occupied = (submanifold_neighbors(sites, 2 * RADIUS + 1).rows[ball] >= 0).astype(np.float64)
    moved = offsets[ball].astype(np.float64)
    count = occupied.sum(0)
    mean = occupied.T @ moved / count[:, None]
    squares = (moved[:, :, None] * moved[:, None, :]).reshape(-1, 9)
    second = (occupied.T @ squares / count[:, None]).reshape(-1, 3, 3)
    covariance = second - mean[:, :, None] * mean[:, None, :]
    eigenvalues = np.maximum(np.linalg.eigvalsh(covariance)[:, ::-1], 0)
    return count.astype(np.int64), eigenvalues, np.linalg.norm(mean, axis=1) / RADIUS
