"""The native CPU kernels, built with the package. Everything else about the package is said in pyproject.toml.

They are plain shared objects with a C interface, loaded with ctypes: the same sources for processors with a matrix
unit, with instructions for bf16, with AVX512 alone, and with AVX2. Where they cannot be built the package installs
without them, and torch's own kernels serve.
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
_HERE = runpy.run_path(f"{KERNELS}/source_digest.py")
SOURCES, MACHINES = _HERE["digest"](Path(KERNELS)), _HERE["MACHINES"]
AVX512 = ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"]
LIBRARIES = {
    "_native_amx": [*AVX512, "avx512bf16", "avx512vbmi2", "amx-tile", "amx-int8", "amx-bf16"],
    "_native_bf16": [*AVX512, "avx512bf16"],
    "_native": AVX512,
    "_native_avx2_vnni": ["avxvnni"],
    "_native_avx2": [],
}
"""What each needs beside what all do, which is in `FLAGS`. Whether a machine has it is asked when one is loaded."""
FLAGS = [
    "-std=c++17",
    "-g0",
    "-O3",
    "-mtune=icelake-server",  # the order of instructions that is best on AMD's processors too
    "-ffp-contract=off",  # contraction would fuse where the stored scales are defined by two roundings
    "-fno-math-errno",
    "-Wno-ignored-attributes",
    "-mavx2",
    "-mfma",
    "-mf16c",
    "-mbmi2",
    "-mprfchw",
]


class BuildAfresh(build_py):
    """Of an earlier build nothing stays that may be gone from the checkout since, as it would be installed with the
    rest; libraries do, which are built again where their sources are newer."""

    def run(self) -> None:
        left, base = Path(self.build_lib).resolve(), Path(self.get_finalized_command("build").build_base).resolve()
        for path in left.rglob("*") if base in left.parents else ():  # no folder that somebody has named
            if path.is_file() and path.suffix != ".so":
                path.unlink()
        super().run()


class BuildEach(build_ext):
    """Libraries of the same sources keep their objects apart, and are built at the same time."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext: Extension) -> None:
        own = copy(self)
        own.build_temp = str(Path(self.build_temp, ext.name))
        build_ext.build_extension(own, ext)


setup(
    cmdclass={"build_py": BuildAfresh, "build_ext": BuildEach},
    ext_modules=[  # no other processor has any of it: there would be nothing but errors that pip hides
        Extension(
            f"server.kernels.cpu.{name}",
            sources=sorted(glob(f"{KERNELS}/*.cpp")),
            depends=["setup.py", *sorted(glob(f"{KERNELS}/*.h"))],
            language="c++",
            define_macros=[("LORAMUX_SOURCES", f'"{SOURCES}"')],
            extra_compile_args=[*FLAGS, *(f"-m{part}" for part in parts)],
            extra_link_args=["-pthread"],
            optional=True,
        )
        for name, parts in LIBRARIES.items()
        if platform.machine() in MACHINES
    ],
)
