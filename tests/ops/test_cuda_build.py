"""The CUDA kernels as nvcc compiles them, without a GPU: no spills, no stack, and what a multiprocessor holds of them."""

import os
import re
import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
# Shared memory of a multiprocessor, by architecture; every one has 64 K registers.
PARTS = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
REGISTERS = 64 << 10
# Threads of a block, and blocks that a multiprocessor has to run at once: the launch bounds in kernels.cu.
LAUNCHES = {
    "gather_kernel": (256, 3),
    "values_grad_kernel": (256, 2),
    "add_partials_kernel": (256, 1),
    "compress_kernel": (128, 1),
}
DRIVERS_SHARE = 1 << 10  # of every block's shared memory


class Usage(NamedTuple):
    kernel: str
    stack: int
    spilled: int
    registers: int
    shared: int


@pytest.fixture(scope="module")
def built():
    """setup.py's functions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.setenv("SPARSEKIT_CPP", "0")
        patch.chdir(ROOT)
        functions = runpy.run_path("setup.py")
    if functions["cuda_home"]() is None:
        pytest.skip("no CUDA toolkit")
    return functions


@pytest.fixture(scope="module")
def usages(built, tmp_path_factory):
    """What ptxas says of every kernel, by architecture."""
    folder = tmp_path_factory.mktemp("cubin")

    def compile_for(architecture):
        command = [
            built["cuda_home"]() / "bin/nvcc", *built["CUDA_FLAGS"], f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v",
            ROOT / "csrc/cuda/kernels.cu", "-o", folder / f"{architecture}.cubin",
        ]  # fmt: skip
        run = subprocess.run(command, text=True, capture_output=True)
        assert run.returncode == 0, run.stderr
        return [parse(part) for part in run.stderr.split("Compiling entry function")[1:]]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(PARTS, pool.map(compile_for, PARTS)))


def parse(text):
    """One kernel's part of what `ptxas -v` prints."""
    stack, stores, loads = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
    ).groups()
    shared = re.search(r"(\d+) bytes smem", text)
    kernel = next(name for name in LAUNCHES if f"{len(name)}{name}I" in text)
    registers = int(re.search(r"Used (\d+) registers", text)[1])
    return Usage(kernel, int(stack), int(stores) + int(loads), registers, int(shared[1]) if shared else 0)


def test_parses_what_ptxas_prints():
    text = """ '_ZN3cuda13gather_kernelIfLi8ELi4ELb1EEEvNS0_' for 'sm_90'
    ptxas info    : Function properties for _ZN3cuda13gather_kernelIfLi8ELi4ELb1EEEvNS0_
        16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
    ptxas info    : Used 80 registers, used 1 barriers, 16 bytes cumulative stack size, 2048 bytes smem"""
    assert parse(text) == ("gather_kernel", 16, 12, 80, 2048)


@pytest.mark.parametrize("architecture", PARTS)
def test_kernels_spill_nothing_and_fill_the_part(usages, architecture):
    found = usages[architecture]
    assert {u.kernel for u in found} == set(LAUNCHES)
    for u in found:
        threads, blocks = LAUNCHES[u.kernel]
        assert u.stack == u.spilled == 0, u
        # Registers are given to warps, eight to every lane at a time.
        assert blocks * threads * -(-u.registers // 8) * 8 <= REGISTERS, u


@pytest.mark.parametrize("architecture", PARTS)
def test_blocks_fit_shared_memory(usages, architecture):
    """kernels.cu leaves kOtherBytes of a block's share for what is static and the driver's, and stages into the rest."""
    warps, lanes, most_rows, blocks = 8, 32, 16, 3
    other = warps * (lanes * 8 + most_rows * 4) + DRIVERS_SHARE
    staged = PARTS[architecture] // blocks - other
    for u in usages[architecture]:
        assert blocks * (staged + u.shared + DRIVERS_SHARE) <= PARTS[architecture], u


def test_the_same_kernels_are_built_for_all_parts(usages):
    counts = {architecture: len(found) for architecture, found in usages.items()}
    assert len(set(counts.values())) == 1 and counts[80] > 100, counts
