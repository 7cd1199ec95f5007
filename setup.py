"""The native CPU kernels, built with the package. Everything else about the package is said in pyproject.toml.

The library is a plain shared object with a C interface, loaded with ctypes. Where it cannot be built the package
installs without it, and torch's own kernels serve.
"""

from __future__ import annotations

from glob import glob

from setuptools import Extension, setup

KERNELS = "server/kernels/cpu"
ISA = ["f", "bw", "dq", "vl", "vnni", "bf16", "vbmi"]
"""Parts of AVX-512 that the kernels use. Whether a machine has them is asked when the library is loaded."""
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
    *(f"-mavx512{part}" for part in ISA),
]

setup(
    ext_modules=[
        Extension(
            "server.kernels.cpu._native",
            sources=sorted(glob(f"{KERNELS}/*.cpp")),
            depends=sorted(glob(f"{KERNELS}/*.h")),
            language="c++",
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
