"""What every test needs before anything imports JAX: six virtual CPU devices and checked shape annotations."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=6".strip()

import pytest
from jaxtyping import install_import_hook

install_import_hook("h2a2_jax", "beartype.beartype")


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
