"""Classes of sites on digital planes, box edges and box corners, axis-aligned and tilted."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from h2a2_jax.report.geometry import SITE_CLASSES, classify_sites, neighbourhood_moments
from h2a2_jax.sparse.sites import site_set

REACH = 9


def surface(kind, rotation, shift):
    """Voxels of a plane, two half-planes or three quarter-planes, and those on the feature itself."""
    fine = np.arange(-REACH, REACH, 0.12)
    a, b = (part.ravel() for part in np.meshgrid(fine, fine))
    zero = np.zeros_like(a)
    if kind == "plane":
        points, feature = np.stack([a, b, zero], 1), np.stack([a, b, zero], 1)[(abs(a) < 3) & (abs(b) < 3)]
    elif kind == "edge":
        half = a >= 0
        points = np.concatenate([np.stack([a, b, zero], 1)[half], np.stack([zero, b, a], 1)[half]])
        feature = np.stack([0 * fine, fine, 0 * fine], 1)[abs(fine) < 3]
    else:
        quarter = (a >= 0) & (b >= 0)
        faces = [np.stack([a, b, zero], 1), np.stack([a, zero, b], 1), np.stack([zero, a, b], 1)]
        points, feature = np.concatenate([face[quarter] for face in faces]), np.zeros((1, 3))
    voxels, on_it = (np.unique(np.floor(p @ rotation.T + shift).astype(np.int32), axis=0) for p in (points, feature))
    return voxels, on_it


def share_found(kind, tilted, draws):
    rng = np.random.default_rng(1)
    hits, total = 0, 0
    for _ in range(draws):
        rotation = Rotation.random(random_state=rng).as_matrix() if tilted else np.eye(3)
        voxels, on_it = surface(kind, rotation, rng.uniform(0, 1, 3))
        sites = site_set(np.insert(voxels, 0, 0, 1))
        classes = classify_sites(sites)
        coords = {tuple(c): k for k, c in zip(classes, sites.coords[:, 1:].tolist(), strict=True)}
        found = [coords[tuple(c)] for c in on_it.tolist() if tuple(c) in coords]
        hits += sum(SITE_CLASSES[k] == kind for k in found)
        total += len(found)
    return hits / total


@pytest.mark.parametrize("kind", ["plane", "edge", "corner"])
def test_axis_aligned_features_are_always_found(kind):
    assert share_found(kind, tilted=False, draws=3) == 1


@pytest.mark.parametrize(("kind", "least"), [("plane", 0.95), ("edge", 0.85), ("corner", 0.75)])
def test_tilted_features_are_mostly_found(kind, least):
    assert share_found(kind, tilted=True, draws=20) >= least


def test_a_lone_site_and_a_filled_block_are_other():
    block = np.stack(np.meshgrid(*[np.arange(9)] * 3), -1).reshape(-1, 3)
    coords = np.insert(np.concatenate([block, [[40, 40, 40]]]), 0, 0, 1).astype(np.int32)
    sites = site_set(coords)
    names = dict(zip(map(tuple, sites.coords[:, 1:].tolist()), classify_sites(sites), strict=True))
    assert SITE_CLASSES[names[40, 40, 40]] == SITE_CLASSES[names[4, 4, 4]] == "other"


def test_moments_do_not_depend_on_the_stride_or_on_other_scans():
    voxels, _ = surface("edge", np.eye(3), np.zeros(3))
    coords = np.insert(voxels, 0, 0, 1)
    one = neighbourhood_moments(site_set(coords))
    both = np.concatenate([coords, coords + np.array([1, 0, 0, 0], np.int32)])
    moved = neighbourhood_moments(site_set(both * np.array([1, 4, 4, 4], np.int32), stride=4))
    for a, b in zip(one, moved, strict=True):
        assert np.allclose(np.concatenate([a, a]), b)
