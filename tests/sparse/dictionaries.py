"""Sparse tensors as dictionaries from (scan, x, y, z) to features, and random ones."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from h2a2_jax import sparse


def random_tensor(counts=(20, 0, 13), axes=3, stride=1, channels=2, more=4, seed=0, reach=3):
    """Features on random sites, some negative; in 2-D for `axes` 2. Rows of padding hold zeros."""
    rng = np.random.default_rng(seed)
    steps = np.broadcast_to(stride, axes)
    coords = [np.c_[np.full(n, b), rng.integers(-reach, reach, (n, axes)) * steps] for b, n in enumerate(counts)]
    sites = sparse.site_set(np.concatenate(coords).astype(np.int32), stride=stride, num_scans=len(counts))
    rows = rng.normal(size=(len(sites), channels)).astype(np.float32)
    capacity = len(sites) + more
    padded = sparse.pad_sites(sites, capacity, identity=f"sites{seed}")
    return sparse.SparseTensor(jnp.asarray(sparse.pad_rows(rows, capacity)), padded)


def as_dictionary(x):
    """Features by site; checks that sites are in order, that rows of padding are zero and belong to no scan."""
    x = jax.device_get(x)
    n, coords = int(x.sites.n), np.asarray(x.sites.coords)
    rows = [tuple(row) for row in coords[:n].tolist()]
    assert rows == sorted(set(rows)) and coords.dtype == np.int32
    assert (x.features[n:] == 0).all() and (coords[n:, 0] == x.sites.num_scans).all() and (coords[n:, 1:] == 0).all()
    return dict(zip(rows, x.features[:n].tolist(), strict=True))


def differentiable(function, *arguments, order=1):
    """Check derivatives in both modes against differences, in float64."""
    with jax.enable_x64(True):
        arguments = [jnp.asarray(argument, jnp.float64) for argument in arguments]
        check_grads(jax.jit(function), arguments, order=order, modes=("fwd", "rev"), atol=1e-6, rtol=1e-6)
