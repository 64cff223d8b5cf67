"""Builds the optional C++ kernels of the sparse convolution; everything else is in pyproject.toml.

Each kernel source is compiled once for each form, an instruction set; `handlers.cc` chooses among them at run time. A
machine without a C++ compiler gets the package without them, which then runs on XLA alone.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("h2a2_jax/sparse/native")
KERNELS = ("pairs", "winograd", "pool")
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
FORMS: dict[str, list[str]] = {"portable": []}
if IS_X86:
    FORMS["avx2"] = ["-mavx2", "-mfma"]
    FORMS["avx512"] = ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma"]


def has_compiler() -> bool:
    """Return True where a C++ compiler can be called."""
    commands = (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++")
    return any(shutil.which(shlex.split(command)[0]) for command in commands if command)


class BuildForms(build_ext):
    """Compiles each source with the flags of each form."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; with `optional` a failure is a warning."""
        found = importlib.util.find_spec("jaxlib")
        if found is None or found.origin is None:
            raise CompileError("jaxlib, whose headers the kernels need, is not installed")
        include = str(Path(found.origin).parent / "include")
        # -O3 behind the flags of the interpreter's own build, which may ask for less.
        options = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
        objects = []
        for form, flags in FORMS.items():
            objects += self.compiler.compile(
                [str(SOURCES / f"{kernel}.cc") for kernel in KERNELS],
                output_dir=str(Path(self.build_temp) / form),
                macros=[("H2A2_FORM", form)],
                extra_postargs=[*options, *flags],
                depends=ext.depends,
            )
        objects += self.compiler.compile(
            [str(SOURCES / "handlers.cc"), str(SOURCES / "maps.cc")],
            output_dir=self.build_temp,
            macros=[("H2A2_X86", "1")] if IS_X86 else [],
            include_dirs=[include],
            extra_postargs=options,
            depends=ext.depends,
        )
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, target, target_lang="c++")


native = Extension(
    "h2a2_jax.sparse._native",
    sources=[str(path) for path in sorted(SOURCES.glob("*.cc"))],
    depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
    language="c++",
    optional=True,
)
setup(
    cmdclass={"build_ext": BuildForms},
    ext_modules=[native] if has_compiler() else [],
    setup_requires=["jaxlib>=0.10"] if has_compiler() else [],
)
