"""Sparse convolution on padded active sites, without Flax: functions on arrays.

Sites are built on the host (`sites`), tables of neighbours from them (`neighbors`). Padded to the shapes of a bucket
(`buckets`), tables are kernel maps (`kernel_map`). The same sites and maps can be built inside jit (`in_jit`). Features
are convolved (`conv`) and pooled (`pool`) on a device. `docs/layers.md` walks through an example.
"""

from h2a2_jax.sparse.buckets import BucketLadder, level_sizes, pad_tables
from h2a2_jax.sparse.conv import convolve
from h2a2_jax.sparse.covering import cover
from h2a2_jax.sparse.in_jit import (
    cover_sites,
    downsample_sites,
    find_rows,
    generate_sites,
    generative_map,
    inverse_map,
    pool_map,
    rows_of_part,
    sites_from_coords,
    strided_map,
    submanifold_map,
    unite_sites,
    voxelize_points,
)
from h2a2_jax.sparse.kernel_map import (
    KernelMap,
    PairTiles,
    SiteBlocks,
    choose_tile_size,
    limit_tiles,
    pad_map,
    union_rows,
)
from h2a2_jax.sparse.native_call import has_native, native_form
from h2a2_jax.sparse.neighbors import (
    NeighborTable,
    generative_neighbors,
    inverse_neighbors,
    pool_neighbors,
    strided_neighbors,
    submanifold_neighbors,
)
from h2a2_jax.sparse.points import interpolate, sites_of_points, to_points, voxel_max, voxel_mean
from h2a2_jax.sparse.pool import average_pool, global_pool, max_pool
from h2a2_jax.sparse.pruning import interpolate_sites, keep_highest
from h2a2_jax.sparse.sites import (
    Sites,
    SiteSet,
    SparseTensor,
    Voxelization,
    check_values,
    downsample,
    generate,
    kernel_offsets,
    pad_rows,
    pad_sites,
    site_set,
    unite,
    voxel_coordinates,
    voxelize,
)
from h2a2_jax.sparse.tensors import broadcast, from_dense, prune, to_dense, union_add, unite_tensors
from h2a2_jax.sparse.unet_plan import UNetPlan
from h2a2_jax.sparse.xla_cpu import compiler_options

__all__ = [
    "BucketLadder",
    "KernelMap",
    "NeighborTable",
    "PairTiles",
    "SiteBlocks",
    "SiteSet",
    "Sites",
    "SparseTensor",
    "UNetPlan",
    "Voxelization",
    "average_pool",
    "broadcast",
    "check_values",
    "choose_tile_size",
    "compiler_options",
    "convolve",
    "cover",
    "cover_sites",
    "downsample",
    "downsample_sites",
    "find_rows",
    "from_dense",
    "generate",
    "generate_sites",
    "generative_map",
    "generative_neighbors",
    "global_pool",
    "has_native",
    "interpolate",
    "interpolate_sites",
    "inverse_map",
    "inverse_neighbors",
    "keep_highest",
    "kernel_offsets",
    "level_sizes",
    "limit_tiles",
    "max_pool",
    "native_form",
    "pad_map",
    "pad_rows",
    "pad_sites",
    "pad_tables",
    "pool_map",
    "pool_neighbors",
    "prune",
    "rows_of_part",
    "site_set",
    "sites_from_coords",
    "sites_of_points",
    "strided_map",
    "strided_neighbors",
    "submanifold_map",
    "submanifold_neighbors",
    "to_dense",
    "to_points",
    "union_add",
    "union_rows",
    "unite",
    "unite_sites",
    "unite_tensors",
    "voxel_coordinates",
    "voxel_max",
    "voxel_mean",
    "voxelize",
    "voxelize_points",
]
