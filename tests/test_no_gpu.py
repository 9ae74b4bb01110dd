"""What people read where something for GPUs is missing: a driver, a GPU, Triton, CUDA in torch, a toolkit at the build."""

import copy
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import sparsekit as sk
from sparsekit import gpu, kernels

ROOT = Path(__file__).parent.parent
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """What is missing is found out once a process, but for these tests."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    clear = gpu.lacks.cache_clear
    clear()
    yield
    clear()


@no_gpu
def test_without_a_gpu_or_driver():
    if torch.version.cuda is None and torch.version.hip is None:
        pytest.skip("a torch for the CPU")
    assert gpu.backends() == ("reference",) and gpu.missing().startswith("no GPU kernels: cuda: ")
    assert "PyTorch finds no GPU" in gpu.missing() and "\n" not in gpu.missing()


def test_with_a_torch_for_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    assert "this torch was built for the CPU" in kernels.no_gpu()
    if kernels.available()[1].startswith("Triton"):
        pytest.skip("Triton is not installed")
    assert "triton" not in gpu.backends() and "this torch was built for the CPU" in gpu.lacks()["triton"]


def test_without_triton(tmp_path):
    code = "import sys; sys.modules['triton'] = None; import sparsekit as sk; print(sk.gpu.lacks()['triton'])"
    # Elsewhere than in the source tree, where sparsekit.kernels is not in its place.
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Triton cannot be imported") and "pip install triton" in run.stdout


@pytest.mark.skipif(hasattr(torch.ops.sparsekit_cuda, "conv2d"), reason="built with the CUDA kernels")
def test_a_build_without_the_cuda_kernels_says_so():
    assert gpu.lacks()["cuda"] == "sparsekit was built without SPARSEKIT_CUDA=1"
    message = (
        r"name must be one of .*reference in this installation, got 'cuda' \(sparsekit was built without SPARSEKIT_CUDA"
    )
    with pytest.raises(ValueError, match=message), gpu.use_backend("cuda"):
        pass


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="got 'cudnn'$"), gpu.use_backend("cudnn"):
        pass


@no_gpu
def test_info_names_what_is_missing():
    testing = pytest.importorskip("typer.testing")
    from sparsekit import cli

    printed = testing.CliRunner().invoke(cli.app, ["info"]).stdout
    assert "gpu: none\ngpu_backends: none\n" in printed
    for name, reason in gpu.lacks().items():
        assert f"no {name} kernels for GPUs: {reason}" in printed


@no_gpu
def test_the_benchmark_predicts_and_says_why_it_does_not_measure(capsys):
    from benchmarks import gpu as benchmark

    benchmark.main(["--layers", "64-64-k1"])
    printed = capsys.readouterr()
    assert printed.err.startswith(f"nothing to measure: {kernels.no_gpu()}. ") and "### Rates" in printed.out


# --- what PyTorch can trace of a GPU without one ---------------------------------------------------------------------


def on_a_fake_gpu(model, mode):
    """A copy of ``model`` whose tensors have shapes, dtypes and a device, and no numbers."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = FakeTensor(mode, parameter.detach().to("meta"), torch.device("cuda:0"))
                module._parameters[name] = torch.nn.Parameter(fake)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer.to("meta"), torch.device("cuda:0"))
    return model


@pytest.mark.skipif(torch.version.cuda is None, reason="a torch for the CPU aborts in autograd of fake CUDA tensors")
@pytest.mark.parametrize("backend", ["sparse", "auto", "dense"])
def test_models_on_a_gpu_compile_to_one_graph(monkeypatch, backend):
    """Dispatch asks for the GPU's name, its size and the cost table while Dynamo traces; nothing reads a number back."""
    facts = type("Facts", (), {"name": "NVIDIA H100 80GB HBM3", "multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: facts.name)
    monkeypatch.setattr(gpu, "lacks", lambda: {})
    layers = [torch.nn.Conv2d(16, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64 * 49, 10)]
    model = sk.sparsify_(sk.pruning.magnitude_(torch.nn.Sequential(*layers), 0.9, "uniform"))
    model[0].backend = model[3].backend = backend
    graphs = []

    def capture(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    traced = torch.compile(on_a_fake_gpu(model, mode), backend=capture, fullgraph=True)
    with mode:
        out = traced(torch.empty(4, 16, 7, 7, device="cuda:0"))
        assert out.shape == (4, 10) and out.device.type == "cuda"
    # The cost table gives so small a layer to cuDNN.
    assert len(graphs) == 1 and sum("conv2d" in target for target in graphs[0]) == 1, graphs
    assert ("sparsekit.conv2d" in graphs[0]) == (backend == "sparse"), graphs


# --- the build ------------------------------------------------------------------------------------------------------


def setup(monkeypatch, choice, path, home=None):
    """Names that setup.py defines, and what it hands to setuptools, with a PATH and CUDA_HOME of one's own."""
    handed = {}
    monkeypatch.setattr(setuptools, "setup", handed.update)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setenv("SPARSEKIT_CUDA", choice)
    monkeypatch.delenv("SPARSEKIT_CPP", raising=False)
    if home is None:
        monkeypatch.delenv("CUDA_HOME", raising=False)
    else:
        monkeypatch.setenv("CUDA_HOME", str(home))
    return runpy.run_path(str(ROOT / "setup.py")), handed


def toolkit(folder):
    for file in ("bin/nvcc", "include/cuda_runtime.h"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch(0o755)
    return folder


@pytest.mark.parametrize("choice", ["yes", "2", ""])
def test_other_values_of_sparsekit_cuda_are_refused(monkeypatch, tmp_path, choice):
    with pytest.raises(SystemExit, match=f"SPARSEKIT_CUDA must be 0, 1 or auto, got '{choice}'"):
        setup(monkeypatch, choice, tmp_path)


def test_cuda_kernels_without_a_toolkit_are_refused(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="SPARSEKIT_CUDA=1: no CUDA toolkit; set CUDA_HOME"):
        setup(monkeypatch, "1", tmp_path)
    with pytest.raises(SystemExit, match="SPARSEKIT_CUDA=1: no CUDA toolkit"):
        setup(monkeypatch, "1", tmp_path, home=tmp_path / "nothing there")


@pytest.mark.parametrize(
    ("choice", "there", "built"),
    [("0", True, False), ("0", False, False), ("auto", True, True), ("auto", False, False), ("1", True, True)],
)
def test_the_build_takes_the_cuda_kernels_or_leaves_them(monkeypatch, tmp_path, choice, there, built):
    home = toolkit(tmp_path / "toolkit") if there else None
    _, handed = setup(monkeypatch, choice, tmp_path, home)
    assert ("csrc/cuda/ops.cpp" in handed["ext_modules"][0].sources) == built


def test_the_toolkit_is_found(monkeypatch, tmp_path):
    """Through CUDA_HOME, an nvcc on the PATH, or one that lies in a prefix with the toolkit as its folder `cuda`."""
    plain, prefix, linked = toolkit(tmp_path / "plain"), tmp_path / "prefix", tmp_path / "linked"
    toolkit(prefix / "cuda")
    for folder, target in ((prefix / "bin", prefix / "cuda/bin/nvcc"), (linked, plain / "bin/nvcc")):
        folder.mkdir()
        (folder / "nvcc").symlink_to(target)
    for path, home, expected in (
        (tmp_path, plain, plain),
        (plain / "bin", None, plain),
        (prefix / "bin", None, prefix / "cuda"),
        (linked, None, plain),
        (prefix / "bin", plain, plain),
    ):
        names, _ = setup(monkeypatch, "auto", path, home)
        assert names["cuda_home"]() == expected
