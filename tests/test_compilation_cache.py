"""Compiled programs are signed: nothing else is loaded, whatever stands in the folder."""

import errno
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from h2a2_jax import cli, compilation
from h2a2_jax.compilation import (
    SignedFolder,
    compilation_cache,
    default_cache,
    default_folder,
    private_folder,
    signing_key,
)
from h2a2_jax.errors import InputError
from h2a2_jax.training.callbacks import CompilationCounter
from h2a2_jax.user_cache import CACHE_VARIABLE, user_cache, user_data

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
CONTENT = bytes(range(256))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder of a user who has no key and no cache yet."""
    for name in (CACHE_VARIABLE, "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def no_cache() -> Iterator[None]:
    """A process without a cache, as most are; programs that compile quickly are kept, too."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax_cache.reset_cache()
    for name, value in zip(OPTIONS, (None, 0.0), strict=True):
        jax.config.update(name, value)
    yield
    jax_cache.reset_cache()
    for name, value in before.items():
        jax.config.update(name, value)


def program(x: jax.Array) -> jax.Array:
    return jnp.sin(x) @ jnp.cos(x).T + 41


def run_anew(said: list[str] | None = None) -> tuple[int, int]:
    """Run the program as a new process would; return how often it was compiled and loaded."""
    lines: list[str] = []
    jax.clear_caches()
    x = np.ones((3, 3), np.float32)
    with (
        compilation_cache(lines.append),
        CompilationCounter(1) as counter,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        result = jax.jit(program)(x)
    np.testing.assert_allclose(result, np.sin(x) @ np.cos(x).T + 41, rtol=1e-6)
    assert not caught, caught[0].message
    assert said is not None or not lines
    (said if said is not None else []).extend(lines)
    return counter.count - counter.loaded, counter.loaded


def the_entry() -> Path:
    (entry,) = user_cache().glob("jit_program*.compiled")
    return entry


# --- JAX's cache -----------------------------------------------------------------------------------------------------


def test_a_second_process_loads_what_the_first_compiled(no_cache: None, home: Path) -> None:
    assert run_anew() == (1, 0)
    assert the_entry().parent == home / ".cache" / "h2a2_jax"
    assert jax.config.jax_compilation_cache_dir is None
    assert run_anew() == (0, 1)


def test_an_entry_that_a_kill_cut_short_is_written_again(no_cache: None) -> None:
    """So is one that is damaged in any other way, and one without a signature, as JAX alone writes it."""
    run_anew()
    whole = the_entry().read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole + b"0", bytes([whole[0] ^ 1]) + whole[1:], whole[32:]):
        the_entry().write_bytes(damaged)
        said: list[str] = []
        assert run_anew(said) == (1, 0)
        assert len(said) == 1 and "are damaged or of another user or machine: they do not run" in said[0]
        assert run_anew() == (0, 1)


def test_a_moved_cache_is_hit_and_that_of_another_user_is_not(
    no_cache: None, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_anew()
    shutil.copytree(home / ".cache" / "h2a2_jax", tmp_path / "moved")
    (tmp_path / "moved").chmod(0o700)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "moved"))
    assert run_anew() == (0, 1)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "stranger"))
    said: list[str] = []
    assert run_anew(said) == (1, 0) and len(said) == 1


def test_a_folder_that_jax_was_given_is_set_aside_for_a_checked_one(no_cache: None, tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "named"))
    run_anew()
    inside = tmp_path / "named" / "h2a2_jax"
    assert [path.parent for path in (tmp_path / "named").rglob("jit_program*")] == [inside]
    with compilation_cache(pytest.fail):
        assert default_folder() == inside and jax.config.jax_compilation_cache_dir is None
        with compilation_cache(pytest.fail):
            assert default_folder() == inside
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")


def test_a_command_reads_no_cache_of_jax_unchecked(
    no_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "named"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "named"))
    seen: list[object] = []

    def run(invocation: cli.Invocation) -> None:
        seen.extend((jax.config.jax_compilation_cache_dir, default_folder()))

    command = cli.Command("look", "", "", lambda parser: None, run, config=False, needs_workdir=False)
    cli._run_command(command, [], "h2a2 look", lambda command: command.name)
    assert seen == [None, tmp_path / "named" / "h2a2_jax"]


@pytest.mark.parametrize("off", [True, False])
def test_an_address_and_off_leave_jax_as_it_is(off: bool, no_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    named = "folder" if off else "gs://bucket/cache"
    if off:
        monkeypatch.setenv(CACHE_VARIABLE, "off")
    jax.config.update("jax_compilation_cache_dir", named)
    with compilation_cache(pytest.fail):
        assert jax.config.jax_compilation_cache_dir == named


def test_what_prevents_a_cache_costs_the_cache_alone(no_cache: None, home: Path) -> None:
    home.write_text("a file")
    said: list[str] = []
    assert run_anew(said) == (1, 0)
    assert said == [
        f"Compiled programs are not kept. The cache {home / '.cache' / 'h2a2_jax'} cannot be made (Not a directory): "
        "give another folder, or set H2A2_CACHE to one or to off."
    ]


def test_a_jax_that_takes_no_notice_of_the_cache_has_none(no_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    private = sys.modules["jax._src.compilation_cache"]
    for other in (lambda *_: (None, None), lambda: None):  # reads elsewhere; takes other arguments
        with monkeypatch.context() as patch:
            patch.setattr(private, "get_executable_and_time", other)
            said: list[str] = []
            with compilation_cache(said.append):
                assert private._cache is None and jax.config.jax_compilation_cache_dir is None
            assert len(said) == 1 and "keeps no compiled programs for this version of h2a2_jax" in said[0]


@pytest.mark.parametrize("is_known", [True, False])
def test_each_process_of_a_run_keeps_its_programs(
    is_known: bool, no_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX leaves that to the first process; a JAX that does it in another way is left alone."""
    compiler = sys.modules["jax._src.compiler"]
    if not is_known:
        monkeypatch.setattr(compiler, "_cache_write", lambda *_: None)
    before = compiler._cache_write
    monkeypatch.setattr(compiler.distributed.global_state, "process_id", 1)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert run_anew() == (1, 0)
    assert compiler._cache_write is before
    assert run_anew() == ((0, 1) if is_known else (1, 0))


def test_a_program_that_cannot_be_written_is_said_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    cache = compilation._CheckedCache(SignedFolder(private_folder(user_cache()), said.append), said.append)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    cache.put("a", CONTENT)
    cache.put("b", CONTENT)
    assert said == [f"Compiled programs cannot be kept in {home / '.cache' / 'h2a2_jax'} (No space left on device)."]
    assert not list(user_cache().iterdir()) and cache.get("a") is None


# --- signed files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> SignedFolder:
    (tmp_path / "programs").mkdir(mode=0o700)
    files = SignedFolder(tmp_path / "programs", lambda _: None)
    for name in ("a.x", "b.x"):
        files.write(name, CONTENT + name.encode())
    return files


def flip(byte: int, bit: int) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[byte] ^= 1 << bit
        path.write_bytes(content)

    return damage


def become(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES = {
    **{f"bit {bit} of byte {byte}": flip(byte, bit) for byte in (0, 31, 32, 100, -1) for bit in (0, 7)},
    "cut": lambda path: os.truncate(path, 40),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "that of another name": lambda path: shutil.copyfile(path.with_name("b.x"), path),
    "a folder": become(Path.mkdir),
    "a pipe": become(os.mkfifo),
    "a device": become(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": become(lambda path: path.symlink_to(path)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_signed_is_not_read(folder: SignedFolder, damage: Callable[[Path], object]) -> None:
    path = folder.folder / "a.x"
    damage(path)
    assert folder.read("a.x") is None and folder.read("b.x") == CONTENT + b"b.x"
    folder.write("a.x", b"anew")
    assert folder.read("a.x") == b"anew" and not path.is_symlink()


def test_a_file_that_is_larger_than_it_may_be_is_not_read(folder: SignedFolder) -> None:
    assert folder.read("a.x", len(CONTENT)) is None
    with (folder.folder / "a.x").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: takes no space
    assert folder.read("a.x") is None


def test_files_that_were_not_used_for_long_make_room(folder: SignedFolder) -> None:
    for age, name in enumerate(("other.y", ".c.x.dead.part", ".d.x.alive.part", "a.x", "b.x")):
        if not (folder.folder / name).exists():
            (folder.folder / name).write_bytes(CONTENT)
        if "alive" not in name:
            os.utime(folder.folder / name, (1000 + age, 1000 + age))
    folder.note_use("a.x")
    folder.make_room(".x", (folder.folder / "a.x").stat().st_size)
    assert {path.name for path in folder.folder.iterdir()} == {"other.y", ".d.x.alive.part", "a.x"}


# --- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_is_made_once_and_is_private(home: Path) -> None:
    key = signing_key()
    path = home / ".local" / "share" / "h2a2_jax" / "cache.key"
    assert len(key) == 32 and signing_key() == key == path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["cache.key"]


KEYS = {
    "empty": lambda path: os.truncate(path, 0),
    "zero": lambda path: path.write_bytes(bytes(32)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "readable by others": lambda path: path.chmod(0o644),
    "a link": lambda path: (path.rename(path.with_name("other")), path.symlink_to("other")),
}


@pytest.mark.parametrize("damage", KEYS.values(), ids=KEYS)
def test_a_key_that_is_damaged_or_not_private_is_replaced(damage: Callable[[Path], object]) -> None:
    before, path = signing_key(), user_data() / "cache.key"
    damage(path)
    key = signing_key()
    assert key != before and signing_key() == key and path.stat().st_mode & 0o777 == 0o600 and not path.is_symlink()


@pytest.mark.parametrize("links", [True, False])
def test_of_two_first_processes_one_takes_the_key_of_the_other(links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    link, other = os.link, b"7" * 32

    def late(source: Path, target: Path) -> None:
        compilation._write_new(target, other)
        if not links:
            raise OSError(errno.EPERM, "no links here")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert signing_key() == other


def test_a_key_that_cannot_be_had_is_a_sentence(home: Path, no_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home.parent / "caches"))
    said: list[str] = []
    path = user_data() / "cache.key"
    path.mkdir(parents=True)
    assert default_cache(said.append) is None
    assert (
        f"The key of compiled programs, {path}, cannot be read or made (Is a directory): set XDG_DATA_HOME" in said[0]
    )
    path.parent.chmod(0o777)
    assert default_cache(said.append) is None and "can be written to by other users" in said[1]
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "home", _no_home)
    assert default_cache(said.append) is None
    assert said[2] == (
        "Compiled programs are not kept. This user has no home folder for compiled programs: set H2A2_CACHE to a "
        "folder, or to off."
    )


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


# --- folders ---------------------------------------------------------------------------------------------------------


def test_the_default_folder_is_that_of_the_user(
    tmp_path: Path, no_cache: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_folder() == user_cache() == home / ".cache" / "h2a2_jax"
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


def test_programs_are_kept_in_a_private_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    said: list[str] = []
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    assert default_cache(said.append) is None and "belongs to another user" in said[0]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        private_folder(tmp_path / "file" / "cache")


@pytest.mark.parametrize("folder", ["off", ""])
def test_an_error_inside_is_the_callers(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("H2A2_CACHE", folder or str(tmp_path))
    said: list[str] = []
    with pytest.raises(InputError, match="of the caller"), compilation_cache(said.append):
        raise InputError("of the caller")
    assert said == []
