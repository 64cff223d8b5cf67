"""What every test needs before anything imports JAX: six CPU devices, quick compilation, checked annotations."""

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from tests.xla_flags import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(6)}".strip()
# What one worker or process of a run compiled the others take over.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="h2a2_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# The key that signs compiled programs lies beside them: tests leave nothing in the home folder.
os.environ.setdefault("XDG_DATA_HOME", str(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "data"))

# Below nohup it is ignored, by what the tests start too.
signal.signal(signal.SIGINT, signal.default_int_handler)

install_import_hook("h2a2_jax", "beartype.beartype")

# Tracing makes many objects and hardly any cycles: a search at each 700 of them is a twentieth of the time.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Drop the compiled programs of a file behind its last test: a worker that keeps all of them grows to gigabytes."""
    yield
    import jax  # here, for it reads the environment that is set above

    from h2a2_jax.host import release_memory

    jax.clear_caches()
    release_memory()  # else the process keeps 2.6 GB instead of .6 after the detector's tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests go first, so that no worker begins one when the others have nothing left to do."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def _folder(variable: str) -> Path:
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set")
    folder = Path(os.environ[variable])
    if not folder.is_dir():
        pytest.fail(f"{variable}={folder} is not a folder; unset it to skip the tests that need it")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of full-size reference numbers, from H2A2_GOLDEN_DIR."""
    return _folder("H2A2_GOLDEN_DIR")


@pytest.fixture(scope="session")
def scans_dir() -> Path:
    """Folder of real scans with their info files, from H2A2_SCANS_DIR."""
    return _folder("H2A2_SCANS_DIR")
