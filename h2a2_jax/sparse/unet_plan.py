"""Maps of a U-Net in one call."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from h2a2_jax.errors import InputError
from h2a2_jax.sparse.buckets import BucketLadder, MapLayout, level_sizes, pad_tables
from h2a2_jax.sparse.in_jit import check_padded, downsample_sites, inverse_map, strided_map, submanifold_map
from h2a2_jax.sparse.kernel_map import KernelMap
from h2a2_jax.sparse.neighbors import inverse_neighbors, strided_neighbors, submanifold_neighbors
from h2a2_jax.sparse.sites import PerAxis, Sites, SiteSet, Voxelization, check_count, downsample, voxelize


@jax.tree_util.register_pytree_with_keys_class
class UNetPlan:
    """Maps of a U-Net, padded to a bucket: a pytree, for jit, vmap and stacking.

        voxels = sparse.voxelize(clouds, voxel_size=0.05)
        plan = sparse.UNetPlan(voxels, levels=4)
        x = self.stem(x, plan.same[0])  # level 0: the voxels
        y = self.down(x, plan.down[0])  # level 1: twice their stride
        x = self.up(y, plan.up[0])  # back to level 0

    Attributes:
        sites: sites of each level, the finest first.
        same: submanifold map of each level.
        down: strided map from each level to the next, whose kernel is the factor.
        up: inverse map from the next level back to each.
    """

    sites: tuple[Sites, ...]
    same: tuple[KernelMap, ...]
    down: tuple[KernelMap, ...]
    up: tuple[KernelMap, ...]

    def __init__(
        self,
        voxels: Voxelization | SiteSet | Sequence[np.ndarray],
        levels: int = 4,
        *,
        voxel_size: float | Sequence[float] | None = None,
        kernel_size: PerAxis = 3,
        factor: PerAxis = 2,
        capacities: Sequence[int] | None = None,
        ladder: BucketLadder[tuple[int, ...]] | None = None,
        layout: str | MapLayout | None = None,
        channels: int = 64,
    ) -> None:
        """Build the maps on the host (numpy arrays).

        Args:
            voxels: sites of the finest level, or one point cloud per scan, as for `voxelize`.
            levels: number of levels.
            voxel_size: edge of a voxel in metres, for point clouds.
            kernel_size: kernel of the submanifold maps.
            factor: ratio of the strides of two levels, one number or one per axis.
            capacities: number of rows of each level.
            ladder: ladder whose lowest bucket that fits gives the capacities (`UNetPlan.ladder`). Default: the finest
                level is rounded up by at most a quarter, and the others to a half, a quarter, ... of its capacity, so
                that scans of similar size and density share their shapes.
            layout: lists that the maps carry, as in `pad_tables`.
            channels: channels of the layers, for the size of the tiles.

        Raises:
            InputError: a level does not fit its capacity, or clouds and voxel size do not go together.
            ValueError: both capacities and a ladder are given, or numbers are not one per axis.
        """
        if capacities is not None and ladder is not None:
            raise ValueError("UNetPlan was given capacities and a ladder; expected one of them.")
        sets = _levels(voxels, levels, factor, voxel_size)
        down = tuple(strided_neighbors(fine, coarse, factor) for fine, coarse in pairwise(sets))
        tables = {
            "sites": sets,
            "same": tuple(submanifold_neighbors(sites, kernel_size) for sites in sets),
            "down": down,
            "up": tuple(inverse_neighbors(table) for table in down),
        }
        if capacities is None:
            sizes = level_sizes(sets)
            capacities = ladder.fit(sizes) if ladder else _usual_capacities(sizes)
        self.__dict__.update(pad_tables(tables, capacities, layout=layout, channels=channels))

    @staticmethod
    def ladder(
        samples: Sequence[Voxelization | SiteSet | Sequence[np.ndarray]],
        levels: int = 4,
        *,
        voxel_size: float | Sequence[float] | None = None,
        factor: PerAxis = 2,
        ratio: float = 1.25,
    ) -> BucketLadder[tuple[int, ...]]:
        """Ladder whose lowest bucket holds every sample: plans of all of them have one shape.

        Args:
            samples: voxels of sample batches, or their point clouds.
            levels: number of levels.
            voxel_size: edge of a voxel in metres, for point clouds.
            factor: ratio of the strides of two levels.
            ratio: factor from one bucket to the next, for batches that are larger than all samples.

        Raises:
            InputError: there is no sample, or clouds and voxel size do not go together.
        """
        sizes = [level_sizes(_levels(voxels, levels, factor, voxel_size)) for voxels in samples]
        if not sizes:
            raise InputError("a ladder is measured on samples, given none; pass the voxels of at least one batch.")
        return BucketLadder(tuple(np.max(sizes, 0).tolist()), ratio=ratio)

    @classmethod
    def in_jit(
        cls,
        sites: Sites,
        capacities: Sequence[int],
        *,
        kernel_size: PerAxis = 3,
        factor: PerAxis = 2,
        tile_size: int | None = None,
    ) -> tuple["UNetPlan", Int[Array, ""]]:
        """The same maps inside jit, from the sites of the finest level.

        Args:
            sites: padded sites (`voxelize_points`).
            capacities: number of rows of each level below that one.
            kernel_size: kernel of the submanifold maps.
            factor: ratio of the strides of two levels.
            tile_size: number of pairs in a tile; None leaves the tiles out.

        Returns:
            The plan; overflow int32 [], number of sites of all levels that did not fit.

        Raises:
            ValueError: the sites are not padded ones, or a number is out of range.
        """
        check_padded("UNetPlan.in_jit", sites)
        pyramid, overflow = [sites], jnp.int32(0)
        for capacity in capacities:
            coarse, lost = downsample_sites(pyramid[-1], factor, capacity)
            pyramid.append(coarse)
            overflow += lost
        same = tuple(submanifold_map(level, kernel_size, tile_size=tile_size) for level in pyramid)
        down = tuple(strided_map(fine, coarse, factor, tile_size=tile_size) for fine, coarse in pairwise(pyramid))
        up = tuple(inverse_map(table, tile_size=tile_size) for table in down)
        return cls.tree_unflatten(None, (tuple(pyramid), same, down, up)), overflow

    @property
    def capacities(self) -> tuple[int, ...]:
        """Number of rows of each level."""
        return tuple(sites.capacity for sites in self.sites)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], None]:
        """Fields with their names, for JAX."""
        return tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in _FIELDS), None

    @classmethod
    def tree_unflatten(cls, _: None, fields: Sequence[Any]) -> "UNetPlan":
        """Plan of given fields, for JAX."""
        plan = object.__new__(cls)
        plan.__dict__.update(zip(_FIELDS, fields, strict=True))
        return plan


_FIELDS = ("sites", "same", "down", "up")


def _levels(voxels: Any, levels: int, factor: PerAxis, voxel_size: Any) -> tuple[SiteSet, ...]:
    """Sites of every level."""
    if (voxel_size is not None) == isinstance(voxels, Voxelization | SiteSet):
        raise InputError(
            f"a plan was given a {type(voxels).__name__} and voxel_size={voxel_size}; expected voxels alone, of "
            "sparse.voxelize or sparse.site_set, or a list of point clouds and a voxel_size."
        )
    if voxel_size is not None:
        voxels = voxelize(voxels, voxel_size)
    sets = [voxels.sites if isinstance(voxels, Voxelization) else voxels]
    for _ in range(check_count("levels", levels) - 1):
        sets.append(downsample(sets[-1], factor))
    return tuple(sets)


def _usual_capacities(sizes: Sequence[int]) -> tuple[int, ...]:
    """Capacities of levels of the given sizes, where no ladder was measured."""
    (finest,) = BucketLadder((1024,)).fit((sizes[0],))
    shares = [finest // max(1, size) for size in sizes]
    return tuple(-(-(finest >> (share.bit_length() - 1)) // 64) * 64 for share in shares)
