"""Builds ``sparsekit._C``: one file for every torch >= 2.10 and every CPython >= 3.10, with g++ alone.

``SPARSEKIT_CPP=0`` skips it (pure Python, slow). ``SPARSEKIT_CUDA=1`` adds the CUDA kernels, for which it needs a CUDA
toolkit, but no GPU: found through ``CUDA_HOME`` or the nvcc on the PATH; ``auto`` adds them if there is one.
``TORCH_CUDA_ARCH_LIST`` chooses the architectures.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

# The kernels are compiled once per ISA and chosen at run time, so no file but these may use more than the baseline.
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "zen4": ["-march=x86-64-v4", "-DSPARSEKIT_SHUFFLES"],
}
TILE_FLAGS = ["-march=x86-64-v4", "-mamx-tile", "-mamx-bf16"]
CSRC = os.path.abspath("csrc")
# g++ 12 takes the undefined lanes of its own AVX-512 intrinsics for mistakes.
QUIET = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
SHARED_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
CUDA_FLAGS = ["-O3", "-std=c++20", f"-I{CSRC}/cuda"]


def cuda_home():
    """The toolkit's own folder, or None: an nvcc on the PATH may lie in a prefix that holds the toolkit as ``cuda``."""
    nvcc = shutil.which("nvcc")
    prefixes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    if nvcc:
        prefixes += [
            p for link in (Path(nvcc), Path(nvcc).resolve()) for p in (link.parents[1] / "cuda", link.parents[1])
        ]
    return next((p for p in prefixes if (p / "bin/nvcc").exists() and (p / "include/cuda_runtime.h").exists()), None)


def wants_cuda():
    """Whether SPARSEKIT_CUDA asks for the CUDA kernels; an error if it does and there is no toolkit."""
    choice = os.environ.get("SPARSEKIT_CUDA", "0")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"SPARSEKIT_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "1" and cuda_home() is None:
        raise SystemExit("SPARSEKIT_CUDA=1: no CUDA toolkit; set CUDA_HOME to one, or put its nvcc on the PATH")
    return choice != "0" and cuda_home() is not None


def compile_cuda(folder):
    """csrc/cuda/kernels.cu for every architecture, as an object file. Needs neither torch nor a GPU."""
    targets = []
    for arch in re.split("[; ]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES):
        number = arch.removesuffix("+PTX").replace(".", "")
        targets.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            targets.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    os.makedirs(folder, exist_ok=True)
    out = os.path.join(folder, "cuda_kernels.o")
    flags = [*CUDA_FLAGS, *targets, "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    subprocess.check_call([cuda_home() / "bin/nvcc", *flags, "-c", f"{CSRC}/cuda/kernels.cu", "-o", out])
    return out


def extension():
    if os.environ.get("SPARSEKIT_CPP", "1") == "0":
        return {}
    cuda = wants_cuda()

    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        """Compiles csrc/cpu/kernels.cpp once per ISA, and tiles.cpp, then the extension that picks among them."""

        def build_extension(self, ext):
            def compile_with(name, folder, flags):
                return self.compiler.compile(
                    [f"csrc/cpu/{name}.cpp"],
                    output_dir=os.path.join(self.build_temp, folder),
                    include_dirs=[CSRC],
                    extra_postargs=[*SHARED_FLAGS, *QUIET, *flags],
                    depends=ext.depends,
                )

            jobs = [("kernels", isa, [*flags, f"-DSPARSEKIT_ISA={isa}"]) for isa, flags in ISA_FLAGS.items()]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for objects in pool.map(compile_with, *zip(*jobs, ("tiles", "amx", TILE_FLAGS))):
                    ext.extra_objects += objects
                if cuda:
                    ext.extra_objects.append(compile_cuda(self.build_temp))
                    ext.library_dirs += [str(cuda_home() / lib) for lib in ("lib64", "lib")]
                    ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
            super().build_extension(ext)

    return {
        "ext_modules": [
            CppExtension(
                "sparsekit._C",
                [
                    "csrc/ops.cpp",
                    *(
                        f"csrc/cpu/{name}.cpp"
                        for name in (
                            "batch_norm",
                            "conv2d",
                            "depthwise",
                            "dispatch",
                            "linear",
                            "pattern",
                            "pool2d",
                            "walk",
                        )
                    ),
                    *(
                        f"csrc/engine/{name}.cpp"
                        for name in ("layers", "paired_conv", "program", "programs", "tiled_conv")
                    ),
                    *(["csrc/cuda/ops.cpp"] if cuda else []),
                ],
                include_dirs=[CSRC],
                depends=[*glob("csrc/*.h"), *glob("csrc/*/*.h"), *glob("csrc/cuda/*.cu")],
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
