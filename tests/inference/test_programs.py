"""Programs that are kept: a later process compiles nothing, and a file that cannot be read counts as none."""

import contextlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2a2_jax.checkpoint.store import StoredDetector
from h2a2_jax.checkpoint.train_state import split_model
from h2a2_jax.checkpoint.tree import Arrays, flat_names
from h2a2_jax.compilation import SignedFolder
from h2a2_jax.config import ExperimentConfig
from h2a2_jax.errors import InputError
from h2a2_jax.inference.predictor import Predictor
from h2a2_jax.inference.programs import ProgramStore
from h2a2_jax.models import LevelSizes
from h2a2_jax.scans.sources import SourceConfig
from tests.inference.tiny import SPECS, TINY, random_detector, room

BASES = {2: LevelSizes(*range(1, 10))}


def program(x: dict[str, Any], y: Any) -> tuple[Any, dict[str, Any]]:
    return x["a"] @ y, {"sum": x["a"].sum() + jnp.sin(y)[0, 0]}


def run(store: ProgramStore, size: int = 3) -> tuple[int, Any]:
    """Number of programs compiled, and the result."""
    kept = store.keep(program, "program")
    result = kept({"a": np.ones((2, size), np.float32)}, np.full((size, 4), 2, np.float32))
    return kept.compiled, result


def test_a_program_is_compiled_once_for_each_set_of_shapes(tmp_path: Path):
    store = ProgramStore(tmp_path, "detector", LevelSizes)
    compiled, (product, rest) = run(store)
    assert compiled == 1 and np.array_equal(product, np.full((2, 4), 6)) and rest["sum"] == pytest.approx(6 + np.sin(2))
    assert run(store)[0] == 0 and run(store, 5)[0] == 1
    later = ProgramStore(tmp_path, "detector", LevelSizes)
    compiled, (again, rest_again) = run(later)
    assert compiled == 0 and np.array_equal(again, product) and rest_again["sum"] == rest["sum"]
    assert run(later, 5)[0] == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".index", ".program", ".program"]


def test_a_program_that_is_loaded_ahead_is_not_cut_off_by_the_end_of_the_process(tmp_path: Path):
    run(ProgramStore(tmp_path, "detector", LevelSizes))
    before = set(threading.enumerate())
    ahead = ProgramStore(tmp_path, "detector", LevelSizes)
    assert not any(thread.daemon for thread in set(threading.enumerate()) - before)
    assert run(ahead)[0] == 0


def test_another_detector_setting_or_function_has_its_own_program(tmp_path: Path):
    run(ProgramStore(tmp_path, "detector", LevelSizes))
    assert run(ProgramStore(tmp_path, "other", LevelSizes))[0] == 1
    with jax.default_matmul_precision("highest"):
        assert run(ProgramStore(tmp_path, "detector", LevelSizes))[0] == 1
    kept = ProgramStore(tmp_path, "detector", LevelSizes).keep(lambda x, y: x["a"], "first")
    assert kept({"a": np.ones((2, 3), np.float32)}, np.ones((3, 4), np.float32)).shape == (2, 3) and kept.compiled == 1


def test_a_damaged_program_is_compiled_again(tmp_path: Path):
    run(ProgramStore(tmp_path, "detector", LevelSizes))
    (file,) = tmp_path.glob("*.program")
    whole = file.read_bytes()
    for damaged in (whole[:-1], b"", whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"are damaged or of another user or machine: they do not run"):
            assert run(ProgramStore(tmp_path, "detector", LevelSizes))[0] == 1
        assert run(ProgramStore(tmp_path, "detector", LevelSizes))[0] == 0
    file.write_bytes(b"")
    told: list[str] = []
    run(ProgramStore(tmp_path, "detector", LevelSizes, told.append))  # as the command prints it
    assert len(told) == 1 and "they do not run" in told[0]


def test_programs_of_another_user_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as stranger:
        stranger.setenv("XDG_DATA_HOME", str(tmp_path / "stranger"))
        store = ProgramStore(tmp_path, "detector", LevelSizes)
        run(store)
        store.write_bases(BASES)
    monkeypatch.setattr("pickle.loads", lambda content: pytest.fail("an unsigned pickle was opened"))
    with pytest.warns(UserWarning, match="they do not run"):
        assert run(ProgramStore(tmp_path, "detector", LevelSizes))[0] == 1
    assert ProgramStore(tmp_path, "other", LevelSizes).read_bases() == {}


def test_programs_that_were_not_used_for_long_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = ProgramStore(tmp_path, "detector", LevelSizes)
    for size in (3, 4):
        run(store, size)
    for number, file in enumerate(sorted(tmp_path.glob("*.program"), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(file, (1000 + number, 1000 + number))
    run(ProgramStore(tmp_path, "detector", LevelSizes), 3)  # a use makes a program young
    size = max(path.stat().st_size for path in tmp_path.glob("*.program"))
    monkeypatch.setattr("h2a2_jax.inference.programs._MOST_BYTES", int(2.5 * size))
    run(store, 5)
    later = ProgramStore(tmp_path, "detector", LevelSizes)
    assert [run(later, size)[0] for size in (3, 5, 4)] == [0, 0, 1]


def test_a_folder_that_is_gone_is_a_warning(tmp_path: Path):
    store = ProgramStore(tmp_path / "gone", "detector", LevelSizes)
    with pytest.warns(UserWarning, match="A compiled program cannot be kept in .*gone"):
        assert run(store)[0] == 1
    with pytest.warns(UserWarning, match="cannot be written"):
        store.write_bases(BASES)


def test_shapes_are_stored_beside_the_programs(tmp_path: Path):
    store = ProgramStore(tmp_path, "detector", LevelSizes)
    assert store.read_bases() == {}
    store.write_bases(BASES)
    run(store)
    assert ProgramStore(tmp_path, "detector", LevelSizes).read_bases() == BASES
    assert ProgramStore(tmp_path, "o", LevelSizes).read_bases() == {}
    with ThreadPoolExecutor(4) as pool:  # warnings are errors in tests: no thread takes the file of another away
        list(pool.map(lambda i: store.write_bases({1 + i % 8: LevelSizes(*[1] * 9)}), range(100)))
    assert set(store.read_bases()) == set(range(1, 9))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("damaged", ["", "[]", "{}", json.dumps({"bases": {"1": [1, 2]}, "recent": []})])
def test_a_damaged_index_counts_as_none(tmp_path: Path, damaged: str, signed: bool):
    store = ProgramStore(tmp_path, "detector", LevelSizes)
    store.write_bases({1: LevelSizes(*range(2, 11))})
    (index,) = tmp_path.iterdir()
    if signed:
        SignedFolder(tmp_path).write(index.name, damaged.encode())
    else:
        index.write_text(damaged)
    with contextlib.nullcontext() if signed else pytest.warns(UserWarning, match="they do not run"):
        assert ProgramStore(tmp_path, "detector", LevelSizes).read_bases() == {}
        store.write_bases(BASES)
    assert store.read_bases() == BASES


def stored_detector() -> StoredDetector:
    """The random detector as a checkpoint would hold it."""

    def arrays(part: Any) -> Arrays:
        return dict(zip(flat_names(part), map(np.asarray, jax.tree.leaves(part)), strict=True))

    datasets = tuple(SourceConfig(spec.name, root="data") for spec in SPECS)
    _, exclusive, shared, stats = split_model(random_detector())
    parts = arrays(exclusive), arrays(shared), arrays(stats)
    return StoredDetector(ExperimentConfig(datasets, TINY), SPECS, parts, "The checkpoint")


def test_a_later_process_predicts_without_building_the_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scan = room("small", 500, 1.2)
    first = Predictor(stored_detector(), SPECS, score_threshold=0.1, cache=tmp_path)
    (found,) = first.predict([scan], "s3dis")
    (expected,) = Predictor(random_detector(), SPECS, score_threshold=0.1).predict([scan], "s3dis")
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-5)
    monkeypatch.setattr(StoredDetector, "shapes", lambda self: pytest.fail("the detector was built"))
    later = Predictor(stored_detector(), SPECS, score_threshold=0.1, cache=tmp_path)
    assert later.bucket_bases == first.bucket_bases
    (again,) = later.predict([scan], "s3dis")
    assert np.array_equal(again.boxes, found.boxes) and np.array_equal(again.scores, found.scores)


def test_arrays_of_another_architecture_are_refused(tmp_path: Path):
    detector = stored_detector()
    lacking = {name: array for name, array in detector.parts[1].items() if "stem" not in name}
    detector = replace(detector, parts=(detector.parts[0], lacking, detector.parts[2]))
    with pytest.raises(InputError, match=r"The checkpoint is of another model: .*stem.* is nothing in the checkpoint"):
        Predictor(detector, SPECS, cache=tmp_path).predict([room("small", 500, 1.2)], "s3dis")


def test_a_program_that_jax_has_cached_too_is_stored_whole(tmp_path: Path):
    """JAX's cache returns programs without the functions that storing them again would need."""
    assert jax.config.jax_compilation_cache_dir

    def function(x: Any) -> Any:
        for _ in range(3):
            x = jnp.sort(jnp.sin(x) @ x, 0)
        return x

    x = np.random.default_rng(0).random((16, 16), np.float32)
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            expected = np.asarray(ProgramStore(tmp_path / name, "detector", LevelSizes).keep(function, "function")(x))
            jax.clear_caches()
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    kept = ProgramStore(tmp_path / "second", "detector", LevelSizes).keep(function, "function")
    np.testing.assert_array_equal(kept(x), expected)
    assert kept.compiled == 0
