"""The persistent compilation cache, and entries that a kill cut short."""

import os
import warnings
import zlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from h2a2_jax.compilation import (
    compilation_cache,
    default_cache,
    default_folder,
    private_folder,
    remove_damaged_entries,
    use_compilation_cache,
)
from h2a2_jax.errors import InputError
from h2a2_jax.training.callbacks import CompilationCounter
from h2a2_jax.user_cache import CACHE_VARIABLE, user_cache

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def no_cache():
    """A process without a cache, as most are; programs that compile quickly are kept, too."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax_cache.reset_cache()
    for name, value in zip(OPTIONS, (None, 0.0), strict=True):
        jax.config.update(name, value)
    yield
    jax_cache.reset_cache()
    for name, value in before.items():
        jax.config.update(name, value)


def program(x):
    return jnp.sin(x) @ jnp.cos(x).T + 41


def run_anew() -> tuple[int, int]:
    """Run the program as a new process would; return how often it was compiled and loaded."""
    jax.clear_caches()
    x = jnp.ones((3, 3))
    with CompilationCounter(1) as counter, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.block_until_ready(jax.jit(program)(x))
    assert not caught, caught[0].message
    return counter.count - counter.loaded, counter.loaded


def test_a_second_process_loads_what_the_first_compiled(tmp_path, no_cache):
    folder = tmp_path / "new" / "cache"
    with compilation_cache(folder):
        assert run_anew() == (1, 0)
    assert any(folder.glob("*-cache"))
    assert jax.config.jax_compilation_cache_dir is None
    assert run_anew() == (1, 0)
    with compilation_cache(folder):
        assert run_anew() == (0, 1)


def test_an_entry_that_a_kill_cut_short_is_written_again(tmp_path, no_cache):
    with compilation_cache(tmp_path):
        run_anew()
    (entry,) = tmp_path.glob("jit_program*-cache")
    size = entry.stat().st_size
    os.truncate(entry, size // 2)
    with compilation_cache(tmp_path):
        assert not entry.exists()
        assert run_anew() == (1, 0)
    assert abs(entry.stat().st_size - size) < 0.2 * size
    with compilation_cache(tmp_path):
        assert run_anew() == (0, 1)


def test_incomplete_entries_are_removed_and_nothing_else(tmp_path):
    whole = zlib.compress(bytes(range(256)) * 10_000)
    entries = {"whole": whole, "cut": whole[:-1], "empty": b"", "other": b"no program", "zstd": b"\x28\xb5\x2f\xfd"}
    for name, content in entries.items():
        (tmp_path / f"{name}-cache").write_bytes(content)
        (tmp_path / f"{name}-atime").write_bytes(b"12345678")
    (tmp_path / "buckets.json").write_text("")
    assert remove_damaged_entries(tmp_path) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"whole-cache", "whole-atime", "buckets.json"}
    assert remove_damaged_entries(tmp_path / "missing") == 0


def test_an_existing_cache_is_used_unchanged(tmp_path, no_cache):
    use_compilation_cache(tmp_path / "named")
    (tmp_path / "named" / "cut-cache").write_bytes(b"")
    with compilation_cache(tmp_path / "mine"):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")
    assert not (tmp_path / "mine").exists()
    assert (tmp_path / "named" / "cut-cache").exists()


def test_without_a_folder_nothing_is_kept(no_cache):
    with compilation_cache(None):
        assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, no_cache):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"The cache .*file/cache cannot be made"),
        compilation_cache(tmp_path / "file" / "cache"),
    ):
        pass


def test_the_default_folder_is_that_of_the_user(tmp_path, no_cache, monkeypatch):
    for name in (CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == user_cache() == tmp_path / "home" / ".cache" / "h2a2_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "h2a2_jax"
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "of_jax"))
    assert default_folder() == tmp_path / "of_jax" / "h2a2_jax"
    assert user_cache() == tmp_path / "xdg" / "h2a2_jax"
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    assert default_folder() == tmp_path / "xdg" / "h2a2_jax"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "own"))
    assert default_folder() == user_cache() == tmp_path / "own"
    monkeypatch.setenv(CACHE_VARIABLE, "off")
    assert default_folder() is None and default_cache(pytest.fail) is None
    assert user_cache() == tmp_path / "xdg" / "h2a2_jax"


def test_programs_are_kept_in_a_private_folder_alone(tmp_path, monkeypatch):
    folder = private_folder(tmp_path / "new" / "cache")
    assert folder.stat().st_mode & 0o777 == 0o700 and private_folder(folder) == folder
    folder.chmod(0o770)
    with pytest.raises(InputError, match=r"can be written to by other users, .* \(chmod go-w\)"):
        private_folder(folder)
    folder.chmod(0o755)
    private_folder(folder)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(InputError, match=r"belongs to another user, whose programs would be run: .*H2A2_CACHE"):
        private_folder(folder)
    said = []
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    assert default_cache(said.append) is None and "belongs to another user" in said[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        private_folder(tmp_path / "file" / "cache")
