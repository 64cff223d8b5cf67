"""The compiled functions on maps give what numpy gives, bit for bit."""

import ctypes
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from h2a2_jax import sparse
from h2a2_jax.sparse import native_maps
from h2a2_jax.sparse.kernel_map import cut_pairs
from tests.sparse.transcription import TABLES, padded, random_sites, table_of

SOURCE = Path(native_maps.__file__).parent / "native" / "maps.cc"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if loaded := native_maps.library():
        return loaded
    if shutil.which("g++") is None:
        pytest.skip("there is neither the extension nor a compiler")
    file = tmp_path_factory.mktemp("native") / "maps.so"
    subprocess.run(["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-pthread", "-o", file, SOURCE], check=True)
    return native_maps.declare(ctypes.CDLL(str(file)))


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def both(compiled, monkeypatch, request):
    """A function that calls another one with numpy alone and with the compiled functions."""
    monkeypatch.setattr(native_maps, "_threads", lambda entries: request.param)

    def call(function):
        results = []
        for library in (None, compiled):
            monkeypatch.setattr(native_maps, "library", lambda library=library: library)
            results.append(function())
        return results

    return call


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("counts", [(300, 0, 20), (0,)], ids=str)
def test_tables_and_maps_are_equal(both, kind, counts):
    expected, found = both(lambda: table_of(kind, counts=counts))
    np.testing.assert_array_equal(found.rows, expected.rows)
    assert found.rows.dtype == np.int32
    for tile_size in (1, 16, 512):
        expected_map, found_map = both(lambda tile_size=tile_size: padded(expected, tile_size=tile_size))
        np.testing.assert_array_equal(found_map.neighbors, expected_map.neighbors)
        assert_equal_tiles(found_map.tiles, expected_map.tiles)


@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("size, dilation", [(3, 1), (5, 2), (4, 3), (1, 1)])
def test_tables_of_many_sites_are_equal(both, axes, size, dilation):
    sites = random_sites((3000, 1000), reach=8, axes=axes)
    expected, found = both(lambda: sparse.submanifold_neighbors(sites, size, dilation).rows)
    np.testing.assert_array_equal(found, expected)
    coarse = sparse.downsample(sites, 2)
    expected, found = both(lambda: sparse.strided_neighbors(sites, coarse, size, dilation).rows)
    np.testing.assert_array_equal(found, expected)


def test_full_tiles_and_all_of_their_capacity_in_use(both):
    sites = sparse.site_set(np.argwhere(np.ones((1, 4, 4, 4))).astype(np.int32))
    table = sparse.submanifold_neighbors(sites)
    for tile in (2, 4, 8, 64):
        expected, found = both(lambda tile=tile: cut_pairs(table, 64, 64, tile))
        assert_equal_tiles(found, expected)


def test_results_of_switched_off_functions_are_those_of_numpy(monkeypatch):
    monkeypatch.setenv("H2A2_NATIVE", "0")
    native_maps.library.cache_clear()
    assert native_maps.library() is None
    native_maps.library.cache_clear()


def assert_equal_tiles(found, expected):
    for field in fields(expected):
        left, right = getattr(found, field.name), getattr(expected, field.name)
        np.testing.assert_array_equal(left, right, err_msg=field.name)
        assert np.result_type(left) == np.result_type(right)
