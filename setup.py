"""Builds the native CPU kernels. All other package settings are in pyproject.toml.

The kernels are shared objects with a C interface, loaded with ctypes: the same sources for AMX, AVX512-BF16, AVX512 and
AVX2. If they cannot be built, the package installs without them and uses torch's kernels.
"""

from __future__ import annotations

import os
import platform
import runpy
from copy import copy
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

KERNELS = "server/kernels/cpu"
_DIGEST = runpy.run_path(f"{KERNELS}/source_digest.py")
SOURCES, MACHINES = _DIGEST["digest"](Path(KERNELS)), _DIGEST["MACHINES"]
AVX512 = ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"]
LIBRARIES = {
    "_native_amx": [*AVX512, "avx512bf16", "avx512vbmi2", "amx-tile", "amx-int8", "amx-bf16"],
    "_native_bf16": [*AVX512, "avx512bf16"],
    "_native": AVX512,
    "_native_avx2_vnni": ["avxvnni"],
    "_native_avx2": [],
}
"""Instruction sets beyond those in `FLAGS`. A library checks at load time whether the processor has them."""
FLAGS = [
    "-std=c++17",
    "-g0",
    "-O3",
    "-mtune=icelake-server",  # the best instruction order on AMD processors too
    "-ffp-contract=off",  # contraction would fuse where double-quantized scales are defined by two roundings
    "-fno-math-errno",
    "-Wno-ignored-attributes",
    "-mavx2",
    "-mfma",
    "-mf16c",
    "-mbmi2",
    "-mprfchw",
]


class CleanBuildPy(build_py):
    """Removes files of earlier builds that the checkout no longer has. Libraries stay; they are rebuilt if outdated."""

    def run(self) -> None:
        build_lib, base = Path(self.build_lib).resolve(), Path(self.get_finalized_command("build").build_base).resolve()
        for path in build_lib.rglob("*") if base in build_lib.parents else ():  # not in a folder that the user chose
            if path.is_file() and path.suffix != ".so":
                path.unlink()
        super().run()


class ParallelBuildExt(build_ext):
    """Builds the libraries in parallel, each with its own object files."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext: Extension) -> None:
        builder = copy(self)
        builder.build_temp = str(Path(self.build_temp, ext.name))
        build_ext.build_extension(builder, ext)


setup(
    cmdclass={"build_py": CleanBuildPy, "build_ext": ParallelBuildExt},
    ext_modules=[
        Extension(
            f"server.kernels.cpu.{name}",
            sources=sorted(glob(f"{KERNELS}/*.cpp")),
            depends=["setup.py", *sorted(glob(f"{KERNELS}/*.h"))],
            language="c++",
            define_macros=[("LORAMUX_SOURCES", f'"{SOURCES}"')],
            extra_compile_args=[*FLAGS, *(f"-m{instructions}" for instructions in instruction_sets)],
            extra_link_args=["-pthread"],
            optional=True,
        )
        for name, instruction_sets in LIBRARIES.items()
        if platform.machine() in MACHINES
    ],
)
