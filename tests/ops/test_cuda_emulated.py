"""The CUDA kernels against the reference without a GPU: compiled for the CPU (tests/cuda), also under sanitizers."""

import random
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sparsekit import _ops, reference
from sparsekit.formats import pattern_from_mask

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc/cuda/kernels.cu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("conv2d", "conv2d_input_grad", "conv2d_values_grad", "compress", "decompress")
# What ops.cpp accepts; 0 is the kernels' own choice.
ROWS = {0: (0, 1, 2, 4, 8), 2: (16, 8, 4, 2, 0), 4: (8, 4, 2, 1, 0), 7: (4, 2, 1, 0, 4), 8: (4, 2, 1, 0, 4)}  # by slots
TILINGS = [(slots, rows[i]) for i in range(5) for slots, rows in ROWS.items()]
# Multiprocessors, and bytes of shared memory of one: so small that some channels do not fit at once, and those of GPUs.
DEVICES = (1, 32 << 10), (2, 100 << 10), (3, 228 << 10)
NAN = float("nan")
CXX = shutil.which("g++")
pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++")


@dataclass(frozen=True)
class Conv:
    """A convolution; the defaults are the plainest one."""

    batch: int = 1
    channels: tuple[int, int] = (5, 6)
    size: tuple[int, int] = (8, 8)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    sparsity: float = 0.6

    @property
    def geometry(self):
        return list(self.kernel), list(self.stride), list(self.padding), list(self.dilation), self.groups

    @staticmethod
    def random(seed: int) -> "Conv":
        r = random.Random(seed)
        groups = r.choice([1, 1, 1, 2, 3])
        kernel = r.choice([(1, 1), (3, 3), (2, 3), (1, 5), (5, 5)])
        dilation = r.choice([(1, 1), (1, 1), (2, 2), (3, 1)])
        padding = tuple(r.choice([0, 0, 1, 2, 3]) for _ in range(4))
        need = [dilation[i] * (kernel[i] - 1) + 1 - padding[2 * i] - padding[2 * i + 1] for i in (0, 1)]
        return Conv(
            r.choice([1, 1, 2, 3]), (groups * r.choice([1, 3, 8]), groups * r.choice([1, 2, 7])),
            tuple(max(n, r.choice([1, 4, 5, 8, 12])) for n in need), kernel,
            r.choice([(1, 1), (1, 1), (2, 2), (3, 1), (1, 2)]), padding, dilation, groups, r.choice([0.0, 0.5, 0.8, 1.0]),
        )  # fmt: skip


SAME = (1, 1, 1, 1)
# Without taps and with; tiles of several images, of one, and of a part; one tile and many; rows of more than 32
# non-zeros, and of none.
CONVS = [
    Conv(),
    Conv(batch=3, size=(16, 16)),
    Conv(batch=2, size=(9, 9), stride=(2, 2)),
    Conv(batch=3, size=(1, 1), channels=(70, 9)),
    Conv(size=(12, 11), channels=(80, 20), sparsity=0.3),
    Conv(size=(7, 7), channels=(33, 40), sparsity=0.95),
    Conv(size=(4, 3), padding=(0, 2, 0, 0)),
    Conv(size=(4, 4), padding=(0, 0, 1, 3)),
    Conv(size=(40, 40), channels=(3, 4)),
    Conv(size=(3, 5), padding=(3, 0, 4, 2), batch=2, kernel=(2, 2)),
    Conv(kernel=(3, 3), padding=SAME, size=(7, 7), batch=5),
    Conv(kernel=(3, 3), padding=SAME, size=(13, 21)),
    Conv(kernel=(3, 3), padding=SAME, size=(2, 270), channels=(2, 2)),
    Conv(kernel=(3, 3), padding=SAME, size=(16, 16), batch=2, channels=(12, 7), sparsity=0.0),
    Conv(kernel=(3, 3), padding=SAME, stride=(2, 2), size=(9, 12), batch=2),
    Conv(kernel=(3, 3), stride=(3, 1), size=(10, 7)),
    Conv(kernel=(2, 3), stride=(1, 2), padding=(1, 0, 2, 3), size=(8, 9), batch=2),
    Conv(kernel=(2, 2), stride=(4, 3), size=(9, 8), batch=2),
    Conv(kernel=(3, 3), dilation=(2, 2), padding=(2, 2, 2, 2)),
    Conv(kernel=(3, 2), dilation=(3, 1), stride=(2, 2), padding=(3, 0, 1, 2), size=(9, 9)),
    Conv(kernel=(3, 3), padding=SAME, groups=3, channels=(6, 9)),
    Conv(kernel=(3, 3), padding=SAME, stride=(2, 2), groups=6, channels=(6, 12), sparsity=0.3),
    Conv(kernel=(1, 7), padding=(0, 0, 3, 3), size=(5, 10)),
    Conv(kernel=(4, 8), padding=(4, 3, 7, 1), size=(6, 7), sparsity=0.9),
    Conv(kernel=(5, 5), padding=(2, 2, 2, 2), size=(1, 1)),
    Conv(kernel=(3, 3), padding=SAME, sparsity=1.0),
]


def draw(generator, *size):
    """Integers, whose sums of products are exact in float32 in any order."""
    return torch.randint(-3, 4, size, generator=generator).double()


def memory(t):
    """The elements of a dense tensor in the order of its memory, [numel]."""
    return (t.permute(0, 2, 3, 1) if t.dim() == 4 and _ops.is_channels_last(t) else t.contiguous()).reshape(-1)


class Calls:
    """Calls of the kernels, run by one process, and what they should return."""

    def __init__(self):
        self.input, self.expected = [], []

    def add(self, op, expected, conv, run, sizes, buffers, dense=None, relu=False):
        """``sizes``: of input and output; ``buffers``: crow, col, permutation, values, source, bias or gradient, residual."""
        dtype, tiling, device, shift = run
        (kh, kw), (sh, sw), (top, _, left, _), (dh, dw), groups = conv.geometry
        numbers = [
            OPS.index(op), DTYPES.index(dtype), *tiling, *device, relu, shift * dtype.itemsize,
            *sizes[0], *sizes[1][1:], kh, kw, sh, sw, top, left, dh, dw, groups,
            *([0] * 4 if dense is None else dense.stride()),
        ]  # fmt: skip
        self.input.append(struct.pack("28q", *numbers))
        out = torch.full_like(expected, 0 if op == "decompress" else NAN, dtype=dtype)
        for t in (*buffers, *[None] * (7 - len(buffers)), out):
            if t is None:
                self.input.append(struct.pack("q", -1))
                continue
            t = memory(t.to(dtype) if t.is_floating_point() else t)
            self.input += struct.pack("q", t.numel() * t.itemsize), t.view(torch.uint8).numpy().tobytes()
        what = f"{op} {dtype} (slots, rows) = {tiling} (multiprocessors, bytes) = {device} shift {shift} {conv}"
        self.expected.append((expected.to(dtype), what))

    def add_all(self, conv, dtype=torch.float32, tiling=(0, 0), device=DEVICES[0], seed=0):
        """Every op on one convolution; the sources of every second are not aligned to more than an element."""
        g = torch.Generator().manual_seed(seed)
        x = draw(g, conv.batch, conv.channels[0], *conv.size)
        shape = conv.channels[1], conv.channels[0] // conv.groups, *conv.kernel
        mask = torch.rand(shape, generator=g) >= conv.sparsity
        mask[shape[0] // 2] &= conv.sparsity == 0  # an empty row
        pattern = pattern_from_mask(mask, conv.groups)
        forward, backward = pattern[:2], pattern[2:]
        values = draw(g, pattern.nnz)
        size = _ops.output_size(x.shape, conv.channels[1], *conv.geometry[:4])
        bias, dy, residual = draw(g, size[1]), draw(g, *size), draw(g, *size)
        common = conv, (dtype, tiling, device, seed % 2), (x.shape, size)

        y = reference.conv2d(x, values, *forward, None, *conv.geometry)
        self.add("conv2d", y, *common, [*forward, None, values, x])
        y = (y + bias[:, None, None] + residual).relu()
        self.add("conv2d", y, *common, [*forward, None, values, x, bias, residual], relu=True)
        dx = reference.conv2d_input_grad(dy, values, *backward, x.shape, *conv.geometry).contiguous()
        self.add("conv2d_input_grad", dx, *common, [*backward, values, dy])
        if pattern.nnz == 0:
            return
        dw = reference.conv2d_values_grad(dy, x, *forward, *conv.geometry)
        self.add("conv2d_values_grad", dw, *common, [*forward, None, None, x, dy])
        for layout in (torch.contiguous_format, torch.channels_last):
            weight = draw(g, *shape).contiguous(memory_format=layout)
            kept = reference.compress(weight, *forward)
            self.add("compress", kept, *common, [*forward, None, None, weight], dense=weight)
            dense = reference.decompress(values, *forward, shape, layout == torch.channels_last)
            self.add("decompress", dense, *common, [*forward, None, values], dense=dense)

    def execute(self, program, **env):
        return subprocess.run([program], input=b"".join(self.input), capture_output=True, env=env)

    def check(self, program):
        result = self.execute(program)
        assert result.returncode == 0, result.stderr.decode()[:5000]
        out = torch.frombuffer(bytearray(result.stdout), dtype=torch.uint8)
        sizes = [expected.numel() * expected.itemsize for expected, _ in self.expected]
        for actual, (expected, what) in zip(out.split(sizes), self.expected):
            actual, expected = actual.clone().view(expected.dtype), memory(expected)
            assert torch.equal(actual, expected), f"{what}\n{actual}\n{expected}"


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Compiles the kernels for the CPU with the flags, once a session."""
    programs = {}

    def program(*flags):
        if flags not in programs:
            programs[flags] = tmp_path_factory.mktemp("emulated") / "emulated"
            includes = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/cuda", "tests/cuda")]
            command = [
                CXX,
                "-std=c++20",
                "-U_FORTIFY_SOURCE",
                *flags,
                *includes,
                "-x",
                "c++",
                KERNELS,
                ROOT / "tests/cuda/emulated.cpp",
            ]
            subprocess.run([*command, "-o", programs[flags]], check=True)
        return programs[flags]

    return program


@pytest.fixture(autouse=True)
def one_thread():
    """The references are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def emulated(build):
    return build("-O1")


@pytest.mark.parametrize("slots", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_match_the_reference(emulated, dtype, slots):
    calls = Calls()
    for i, conv in enumerate(CONVS):
        calls.add_all(conv, dtype, (slots, ROWS[slots][i % 5]), DEVICES[i % 3], seed=i)
    calls.check(emulated)


def test_random_convolutions_match_the_reference(emulated):
    calls = Calls()
    for i in range(600):
        calls.add_all(Conv.random(i), DTYPES[i % 3], TILINGS[i % len(TILINGS)], DEVICES[i // 3 % 3], seed=i)
    calls.check(emulated)


def test_a_tile_that_does_not_fit_shared_memory_is_refused(emulated):
    calls = Calls()
    calls.add_all(Conv(kernel=(3, 3), dilation=(40, 40), padding=(40, 40, 40, 40), size=(100, 100)))
    result = calls.execute(emulated)
    assert result.returncode == 1 and b"dilation is too large" in result.stderr


# --- sanitizers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def thread_sanitized(build):
    return build("-O1", "-g1", "-fsanitize=thread")


def some_calls():
    calls = Calls()
    for i, conv in enumerate(CONVS):
        calls.add_all(conv, DTYPES[i % 3], TILINGS[i % len(TILINGS)], DEVICES[i % 2], seed=i)
    return calls


def test_no_data_races(thread_sanitized):
    some_calls().check(thread_sanitized)


BARRIERS = [
    n for n, line in enumerate(KERNELS.read_text().splitlines(), 1) if re.search(r"__sync(warp|threads)\(", line)
]


@pytest.mark.parametrize("line", BARRIERS)
def test_every_barrier_is_needed(thread_sanitized, line):
    """Without any one of them there is a data race: no barrier is idle, and the test above can fail."""
    result = some_calls().execute(thread_sanitized, SKIPPED_BARRIER=str(line), TSAN_OPTIONS="halt_on_error=1")
    assert result.returncode == 66, KERNELS.read_text().splitlines()[line - 1]


def test_no_access_out_of_bounds(build):
    sanitized = build("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    some_calls().check(sanitized)
    # And it would be seen: an output that is a byte short.
    calls = Calls()
    calls.add_all(CONVS[0])
    calls.input[-1] = calls.input[-1][:-1]
    calls.input[-2] = struct.pack("q", len(calls.input[-1]))
    result = calls.execute(sanitized)
    assert result.returncode == 1 and b"heap-buffer-overflow" in result.stderr
