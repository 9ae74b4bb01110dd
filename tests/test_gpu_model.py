"""The GPU performance model: counts by hand, how it moves, and that docs/gpu.md holds what it says."""

import pytest
import torch

from benchmarks import gpu, gpu_model, readme
from benchmarks.shapes import RESNET50, Layer
from sparsekit import dispatch

LAYER = Layer(in_channels=64, out_channels=32, kernel=3, stride=2, size=8, count=1)
parts = pytest.mark.parametrize("part", gpu_model.PARTS, ids=lambda part: part.name)


def test_work_by_hand():
    # 64 * 32 * 9 = 18432 weights, a quarter of them kept: 4608. 2 images of 8 x 8, 4 x 4 out.
    assert gpu_model.kept(LAYER, 0.75) == 4608
    activations = 2 * (64 * 64 + 32 * 16)
    assert activations == 9216
    macs = 4608 * 2 * 16
    work = {op: gpu_model.sparse_work(LAYER, op, 0.75, batch=2, itemsize=4) for op in gpu_model.OPS}
    assert work["fwd"] == work["dw"] == (macs, 4 * 9216 + 4608 * 8 + 4 * 33)
    assert work["dx"] == (macs, 4 * 9216 + 4608 * 12 + 4 * 65)
    assert gpu_model.sparse_work(LAYER, "fwd", 0.75, 2, itemsize=2) == (macs, 2 * 9216 + 4608 * 6 + 4 * 33)
    assert gpu_model.dense_work(LAYER, 2, 4) == (18432 * 2 * 16, 4 * (9216 + 18432))
    assert LAYER.macs * 2 == 18432 * 2 * 16


def test_bound_by_hand():
    part = gpu_model.H100._replace(multiprocessors=10, hertz=1e9, dram=1e12)
    work = gpu_model.sparse_work(LAYER, "fwd", 0.75, 2, 4)
    bound = gpu_model.bound(LAYER, "fwd", 0.75, part, 2, 4)
    assert bound == pytest.approx((work.bytes / 1e12, work.macs / 320e9))
    assert bound.seconds == bound.loads and bound.name == "loads"
    assert gpu_model.bound(LAYER, "fwd", 0.999, part, 2, 4).name == "dram"


def test_time_by_hand():
    """The formula that docs/gpu.md writes down, with the constants of the cost table."""
    sparse = 27e-6 + 1.8e-13 * 4608 * 32 + 4.2e-13 * 9216 * 4
    assert gpu_model.sparse_seconds(LAYER, 0.75, gpu_model.H100, "tf32", batch=2) == pytest.approx(sparse)
    dense = 5e-6 + max(1e-14 * 18432 * 32, 4.2e-13 * 9216 * 4)
    assert gpu_model.dense_seconds(LAYER, gpu_model.H100, "tf32", batch=2) == pytest.approx(dense)


def test_the_documents_constants_are_the_cost_tables():
    document = gpu.DOCUMENT.read_text()
    for text, value in (
        ("*a* = 1.8e-13 s for float32", dispatch.GPU_COSTS["tf32"].sparse),
        ("(2.5e-13 s for half precision)", dispatch.GPU_COSTS["float16"].sparse),
        ("*m* = 4.2e-13 s a byte", dispatch.GPU_COSTS["tf32"].move),
        ("*d* = 1e-14 s for TF32", dispatch.GPU_COSTS["tf32"].dense),
        ("4e-14 s for float32", dispatch.GPU_COSTS["float32"].dense),
        ("4.5e-15 s for half precision", dispatch.GPU_COSTS["float16"].dense),
        ("sparse = 27 µs", 1e6 * dispatch.GPU_START_SECONDS["sparse"]),
        ("dense  = 5 µs", 1e6 * dispatch.GPU_START_SECONDS["dense"]),
    ):
        assert text in " ".join(document.split()) or text in document
        assert f"{value:g}" in text
    assert dispatch.GPU_COSTS["bfloat16"] == dispatch.GPU_COSTS["float16"]
    for how in gpu_model.PRECISIONS.values():
        assert how.kind in dispatch.GPU_COSTS


@parts
@pytest.mark.parametrize("layer", RESNET50, ids=lambda layer: layer.name)
def test_a_bound_is_below_what_is_expected(layer, part):
    for key, how in gpu_model.PRECISIONS.items():
        for s in gpu_model.SPARSITIES:
            for op in gpu_model.OPS:
                bound = gpu_model.bound(layer, op, s, part, itemsize=how.itemsize).seconds
                assert bound < gpu_model.sparse_seconds(layer, s, part, key)
        dense = gpu_model.dense_work(layer, itemsize=how.itemsize)
        assert dense.macs / part.peaks[key] < gpu_model.dense_seconds(layer, part, key)


@parts
@pytest.mark.parametrize("precision", gpu_model.PRECISIONS)
def test_times_fall_with_sparsity_and_rise_with_batch(part, precision):
    for layer in RESNET50:
        times = [gpu_model.sparse_seconds(layer, s / 100, part, precision) for s in range(100)]
        assert times == sorted(times, reverse=True) and len(set(times)) == 100
        for seconds in (gpu_model.dense_seconds, lambda *a, **k: gpu_model.sparse_seconds(a[0], 0.9, *a[1:], **k)):
            times = [seconds(layer, part, precision, batch=batch) for batch in (1, 8, 32, 128)]
            assert times == sorted(times) and len(set(times)) == 4


@parts
@pytest.mark.parametrize("precision", gpu_model.PRECISIONS)
def test_break_even_is_where_times_cross(part, precision):
    crossed = 0
    for layer in RESNET50:
        even, dense = (f(layer, part, precision) for f in (gpu_model.layer_break_even, gpu_model.dense_seconds))
        if even is None:
            assert gpu_model.sparse_seconds(layer, 0.9999, part, precision) > dense
            continue
        crossed += 1
        assert gpu_model.sparse_seconds(layer, even, part, precision) <= dense
        assert gpu_model.sparse_seconds(layer, even - 2e-3, part, precision) > dense
    assert crossed or (part, precision) == (gpu_model.H100, "fp16")


def test_break_even_by_hand():
    assert gpu_model.break_even(lambda s: 10 * (1 - s), 2.5) == pytest.approx(0.75, abs=1e-4)
    assert gpu_model.break_even(lambda s: 10 * (1 - s) + 3, 2.5) is None
    assert gpu_model.break_even(lambda s: 1 - s, 2.5) == 0
    assert [gpu_model.percent(s) for s in (None, 0, 0.75, 0.97101)] == ["never", "always", "75.0 %", "97.2 %"]


def test_condensed_columns_and_optimizers_by_hand():
    part = gpu_model.H100
    layer = next(layer for layer in RESNET50 if layer.name == "512-512-k3-s1-7")
    macs = 32 * 49 * 512 * 512 * 9
    tensor = macs * (1 - 0.95**16) / (gpu_model.GATHERED * 495e12)
    assert gpu_model.condensed_seconds(layer, 0.95, part) == pytest.approx(27e-6 + tensor)
    assert gpu_model.optimizer_seconds(1e9, part, 1) == pytest.approx(5e-6 + 20e9 / 3.35e12)
    assert gpu_model.optimizer_seconds(1e9, part, 2) == pytest.approx(5e-6 + 28e9 / 3.35e12)


@pytest.mark.parametrize(("name", "scale"), [("NVIDIA A100-SXM4-40GB", "A100"), ("NVIDIA H100 80GB HBM3", "H100")])
def test_dispatch_knows_the_parts(monkeypatch, name, scale):
    facts = type("Facts", (), {"name": name, "multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    part = next(part for part in gpu_model.PARTS if scale in part.name)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    shape, nnz = gpu_model.shape_of(LAYER, 32), gpu_model.kept(LAYER, 0.9)
    for train, passes in ((False, 1), (True, 3)):
        sparse, dense = dispatch.predict_on_gpu(shape, nnz, train, torch.float32, 0)
        assert sparse == pytest.approx(passes * gpu_model.sparse_seconds(LAYER, 0.9, part, "tf32"))
        assert dense == pytest.approx(passes * gpu_model.dense_seconds(LAYER, part, "tf32"))


def test_dispatch_scales_other_parts_by_their_multiprocessors(monkeypatch):
    facts = type("Facts", (), {"name": "NVIDIA L4", "multi_processor_count": 66})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    assert dispatch._gpu_scale(0) == (2, 2, 2)


def test_the_document_holds_what_the_model_says(tmp_path, monkeypatch):
    copy = tmp_path / "gpu.md"
    copy.write_text(gpu.DOCUMENT.read_text())
    monkeypatch.setattr(gpu, "DOCUMENT", copy)
    gpu.main(["--docs"])
    assert copy.read_text() == gpu.ROOT.joinpath("docs/gpu.md").read_text()
    readme.fill("predicted", "nothing", copy)
    assert copy.read_text() != gpu.ROOT.joinpath("docs/gpu.md").read_text()


def test_measurements_go_beside_their_predictions():
    """The path that a GPU takes, on the CPU with small layers: every cell has both, and fills a table."""
    bench = gpu.run(["--device", "cpu", "--layers", "128-128-k3-s1-28", "--dtype", "float32", "--batch", "2"]
                    + ["--sparsity", "0.9", "--runs", "1"])  # fmt: skip
    assert len(bench.results["cells"]) == len(gpu_model.OPS)
    for cell in bench.results["cells"].values():
        entry = cell["sparse"]["90"]
        assert entry["us"] > 0 and entry["error"] <= gpu.TOLERANCE and "failed" not in entry
        layer = gpu.select_layers(bench.args)[0]
        assert entry["predicted_us"] == 1e6 * gpu_model.sparse_seconds(layer, 0.9, bench.part, "tf32", 2)
        assert all(dense["predicted_us"] > 0 and dense["us"] > 0 for dense in cell["dense"].values())
    optimizers = bench.results["optimizers"]
    assert list(optimizers) == [f"{name}, {s} %" for s in (0, 90) for name in ("SGD with momentum", "AdamW")]
    parameters = sum(layer.count * gpu_model.kept(layer, 0.9) for layer in RESNET50)
    expected = 1e6 * gpu_model.optimizer_seconds(parameters, bench.part, 2)
    assert optimizers["AdamW, 90 %"]["predicted_us"] == expected and optimizers["AdamW, 90 %"]["us"] > 0
    assert gpu.measured_tables(bench.results).count("measured (predicted)") == 2
