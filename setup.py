"""Builds ``sparsekit._C``: one file for every torch >= 2.10 and every CPython >= 3.10, with g++ alone.

``SPARSEKIT_CPP=0`` skips it (pure Python, slow); ``SPARSEKIT_CUDA=1`` is reserved for the CUDA kernels.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import find_packages, setup

# The kernels are compiled once per ISA and chosen at run time, so no file but these may use more than the baseline.
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "zen4": ["-march=x86-64-v4", "-DSPARSEKIT_SHUFFLES"],
}
CSRC = os.path.abspath("csrc")
# g++ 12 takes the undefined lanes of its own AVX-512 intrinsics for mistakes.
QUIET = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
SHARED_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


def extension():
    if os.environ.get("SPARSEKIT_CPP", "1") == "0":
        return {}
    if os.environ.get("SPARSEKIT_CUDA", "0") == "1":
        raise SystemExit("SPARSEKIT_CUDA=1: there are no CUDA kernels in this version yet")

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        """Compiles csrc/cpu/kernels.cpp once per ISA, then the extension that picks among them."""

        def build_extension(self, ext):
            def compile_for(isa):
                return self.compiler.compile(
                    ["csrc/cpu/kernels.cpp"],
                    output_dir=os.path.join(self.build_temp, isa),
                    include_dirs=[CSRC],
                    extra_postargs=[*SHARED_FLAGS, *QUIET, *ISA_FLAGS[isa], f"-DSPARSEKIT_ISA={isa}"],
                    depends=ext.depends,
                )

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for objects in pool.map(compile_for, ISA_FLAGS):
                    ext.extra_objects += objects
            super().build_extension(ext)

    return {
        "ext_modules": [
            CppExtension(
                "sparsekit._C",
                [
                    "csrc/ops.cpp",
                    *(
                        f"csrc/cpu/{name}.cpp"
                        for name in ("batch_norm", "conv2d", "depthwise", "dispatch", "pattern", "pool2d", "walk")
                    ),
                    *(f"csrc/engine/{name}.cpp" for name in ("layers", "program", "programs")),
                ],
                include_dirs=[CSRC],
                depends=[*glob("csrc/*.h"), *glob("csrc/cpu/*.h"), *glob("csrc/engine/*.h")],
                extra_compile_args=SHARED_FLAGS,
                extra_link_args=["-Wl,--strip-debug"],
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


# Another well-known package is called `kernels`, so ours is mapped under sparsekit.
setup(
    packages=find_packages(include=["sparsekit*"]) + ["sparsekit.kernels"],
    package_dir={"sparsekit.kernels": "kernels"},
    **extension(),
)
