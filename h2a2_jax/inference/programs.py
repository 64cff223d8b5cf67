"""Compiled programs in a folder: a later process loads and runs them without tracing, lowering or compiling anything.

JAX's own compilation cache keeps what the compiler makes, and finds it by the program's text, which each process has to
trace and lower first; for a detector that takes longer than running it. Here a program is found by what it is made of:
the package's source, the versions and settings of JAX, the device, and the shapes of the arguments. No setting of JAX
is changed, so that a library can keep its programs without a say in those of the process.

A compiled program is code, and loading it runs code: files are signed with a key of this user, and read by
`h2a2_jax.compilation.SignedFolder` alone, which returns nothing that the user did not write.
"""

import hashlib
import json
import os
import pickle
import secrets
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
from jax.experimental import serialize_executable

import h2a2_jax
from h2a2_jax.compilation import Say, SignedFolder
from h2a2_jax.host import available_cores, cpu_features
from h2a2_jax.pretrained.catalog import MIRROR_VARIABLE
from h2a2_jax.sparse import native_form
from h2a2_jax.sparse.xla_cpu import compiler_options
from h2a2_jax.user_cache import CACHE_VARIABLE

_VERSION = 3
_ENDING, _INDEX_ENDING = ".program", ".index"
_DIGEST = hashlib.sha256().digest_size
_MOST_BYTES = 1 << 29
"""Size of all programs in a folder; those that were not used for the longest time are removed."""
_MOST_RECENT = 4
"""Programs that the next process loads ahead: folding, network, boxes, and one for a second bucket."""
_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "H2A2_")
"""Beginnings of the environment variables that a program depends on."""
_NO_VARIABLES = (CACHE_VARIABLE, MIRROR_VARIABLE)
"""Environment variables of this package that no program depends on."""
_NO_MATTER = ("cache", "log", "traceback", "profil", "coordinat", "distributed")
"""Parts of the names of JAX's settings that no program depends on."""


class ProgramStore:
    """Compiled programs of one kind of detector in a folder, with the padded shapes that they were compiled for.

    A store is a cache. A file that is damaged or of other versions counts as none, and one that cannot be written is
    told. May be used from several threads, and by several processes at once.

    Args:
        folder: a folder of the user, such as `private_folder` returns; it is there.
        detector: text that is different for detectors of different architectures.
        levels: named tuple of int of the padded shapes (`DetectorKind.levels`).
        say: is told what keeps programs from being kept or loaded.

    Raises:
        InputError: there is no key to sign programs with (`h2a2_jax.compilation.signing_key`).
    """

    def __init__(self, folder: Path, detector: str, levels: type[Any], say: Say = warnings.warn):
        self._files, self._levels, self._say = SignedFolder(folder, say), levels, say
        self.detector = f"{_environment()}\n{detector}"
        self._index = f"{_digest(self.detector)[:32]}{_INDEX_ENDING}"
        self._ahead: dict[str, Future[tuple[Any, Any] | None]] = {}
        self._used: list[str] = []
        self._writing = threading.Lock()
        for digest in self._read_index()["recent"]:
            self._load_ahead(digest)

    def keep(self, function: Callable[..., Any], name: str) -> "KeptProgram":
        """Return the function as a program that is compiled once for each set of shapes, in this process or before.

        Arguments and results are pytrees of arrays; nothing else may depend on values that the store does not know.
        """
        return KeptProgram(self, function, name)

    def load(self, digest: str) -> tuple[Any, Any] | None:
        """Return a compiled program and its result with numbers in place of arrays; None if it is not there."""
        ahead = self._ahead.get(digest)
        found = self._read(digest) if ahead is None else ahead.result()
        if found is not None:
            self._note_use(digest)
        return found

    def save(self, digest: str, compiled: Any, result: Any) -> None:
        """Store a compiled program; a full disk, or a program that JAX cannot store, is told."""
        try:
            payload, arguments, _ = serialize_executable.serialize(compiled)
            body = zlib.compress(pickle.dumps((arguments.num_leaves, result, payload)), 1)
            self._files.write(digest + _ENDING, body)
        except (OSError, ValueError, NotImplementedError, RuntimeError) as error:
            self._say(f"A compiled program cannot be kept in {self._files.folder} ({error}).")
            return
        self._note_use(digest)
        self._files.make_room(_ENDING, _MOST_BYTES)

    def read_bases(self) -> dict[int, Any]:
        """Lowest padded shapes, by number of scans in a pass, of the detectors that have used the store."""
        return self._read_index()["bases"]

    def write_bases(self, bases: Mapping[int, Any]) -> None:
        """Store padded shapes; those that another process stored for other numbers of scans stay.

        The first scan sets the shapes, and programs are compiled for them: later processes take the same ones.
        """
        self._update_index(bases=bases)

    def _note_use(self, digest: str) -> None:
        if digest not in self._used:
            self._used.append(digest)
            self._files.note_use(digest + _ENDING)
            self._update_index(recent=self._used[-_MOST_RECENT:])

    def _load_ahead(self, digest: str) -> None:
        future: Future[tuple[Any, Any] | None] = Future()

        def run() -> None:
            try:
                future.set_result(self._read(digest))
            except BaseException as error:  # else nobody would ever see the end of the future
                future.set_exception(error)

        self._ahead[digest] = future
        # No daemon: one that the interpreter ends inside of XLA ends the process with SIGABRT.
        threading.Thread(target=run, name="load-program", daemon=False).start()

    def _read(self, digest: str) -> tuple[Any, Any] | None:
        body = self._files.read(digest + _ENDING, _MOST_BYTES)
        if body is None:
            return None
        arguments, result, payload = pickle.loads(zlib.decompress(body))
        trees = (jax.tree.structure((tuple(range(arguments)), {})), jax.tree.structure(list(jax.tree.leaves(result))))
        try:
            compiled = serialize_executable.deserialize_and_load(payload, *trees, execution_devices=_devices())
        except (ValueError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
            path = self._files.folder / (digest + _ENDING)
            self._say(f"The program {path} cannot be loaded ({error}): it is compiled again.")
            return None
        return compiled, result

    def _read_index(self) -> dict[str, Any]:
        try:
            stored = json.loads(self._files.read(self._index) or b"")
            bases = {int(count): self._levels(*map(int, base)) for count, base in stored["bases"].items()}
            recent = [digest for digest in stored["recent"] if _is_digest(digest)]
        except (ValueError, KeyError, TypeError, AttributeError):
            return {"bases": {}, "recent": []}
        return {"bases": {c: base for c, base in bases.items() if c > 0 and min(base) > 0}, "recent": recent}

    def _update_index(self, bases: Mapping[int, Any] | None = None, recent: Iterable[str] = ()) -> None:
        with self._writing:
            stored = self._read_index()
            document = {
                "bases": {str(count): list(base) for count, base in {**stored["bases"], **(bases or {})}.items()},
                "recent": list(recent) or stored["recent"],
            }
            try:
                self._files.write(self._index, json.dumps(document).encode())
            except OSError as error:
                path = self._files.folder / self._index
                self._say(f"The cache {path} cannot be written ({error.strerror}).")


class KeptProgram:
    """A function of pytrees of arrays, compiled once for each set of shapes; `ProgramStore.keep` makes it.

    Attributes:
        compiled: number of programs that this process compiled; those that were loaded do not count.
    """

    def __init__(self, store: ProgramStore, function: Callable[..., Any], name: str):
        self._store, self._function, self._name = store, function, name
        self._programs: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        self._lock = threading.Lock()
        self.compiled = 0

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        leaves, structure = jax.tree.flatten(arguments)
        key = structure, _settings(), *map(_describe, leaves)
        with self._lock:
            if key not in self._programs:
                self._programs[key] = self._load_or_compile(leaves, structure, "\n".join(map(str, key)))
            compiled, result = self._programs[key]
        return jax.tree.unflatten(result, compiled(*leaves))

    def _load_or_compile(self, leaves: list[Any], structure: Any, described: str) -> tuple[Any, Any]:
        digest = _digest(f"{self._store.detector}\n{self._name}\n{described}")
        found = self._store.load(digest)
        if found is not None:
            return found[0], jax.tree.structure(found[1])
        results: list[Any] = []

        def flat(*leaves: Any) -> list[Any]:
            result = self._function(*jax.tree.unflatten(structure, leaves))
            values, tree = jax.tree.flatten(result)
            results.append(tree)
            return values

        # A name that no other program has: one that JAX's own cache returns lacks functions once it is stored again.
        flat.__name__ = f"{self._name}_{secrets.token_hex(8)}"
        compiled = jax.jit(flat, compiler_options=compiler_options()).lower(*leaves).compile()
        self.compiled += 1
        tree = results[-1]
        self._store.save(digest, compiled, jax.tree.unflatten(tree, range(tree.num_leaves)))
        return compiled, tree


def _describe(leaf: Any) -> str:
    kind = jax.typeof(leaf)
    return f"{kind.dtype}{list(kind.shape)}{'weak' * kind.weak_type}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 2 * _DIGEST and set(text) <= set("0123456789abcdef")


def _devices() -> list[Any]:
    """The device that programs run on: JAX's default one."""
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    return [default if isinstance(default, jax.Device) else jax.local_devices(backend=default)[0]]


@cache
def _environment() -> str:
    """Everything outside of a function that its compiled program depends on, but for settings that may change."""
    device = _devices()[0]
    source = hashlib.sha256()
    package = Path(h2a2_jax.__file__).parent
    for path in sorted(path for ending in ("py", "so", "pyd") for path in package.rglob(f"*.{ending}")):
        source.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    versions = (h2a2_jax.__version__, jax.__version__, jaxlib.__version__, flax.__version__)
    # XLA splits the work of a program for CPUs by the cores there are when it compiles.
    processor = cpu_features(), available_cores()
    platform = (device.platform, device.device_kind, device.client.platform_version, processor)
    # Asking for the compiled kernels also registers them, before a program that calls them is loaded.
    return repr((_VERSION, versions, platform, native_form(), source.hexdigest()))


def _settings() -> str:
    """Settings of JAX in this thread, and environment variables."""
    settings = {name: repr(value) for name, value in jax.config.values.items() if not _is_no_matter(name)}
    variables = {name: v for name, v in os.environ.items() if name.startswith(_SETTINGS) and name not in _NO_VARIABLES}
    return repr((sorted(settings.items()), sorted(variables.items())))


def _is_no_matter(name: str) -> bool:
    return any(part in name for part in _NO_MATTER)
