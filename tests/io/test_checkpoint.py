import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import sparsekit as sk


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    return sk.sparsify_(sk.pruning.magnitude_(net, 0.9, "uniform", exclude="0"))


def plain():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))


def step(net, optimizer):
    optimizer.zero_grad()
    net(torch.ones(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_model_and_optimizer_go_on_bit_for_bit(tmp_path, kind):
    options = {"lr": 0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {})}
    net = model()
    optimizer = kind(net.parameters(), **options)
    step(net, optimizer)
    sk.io.save_checkpoint(tmp_path / "a" / "c.safetensors", net, optimizer, {"epoch": 1})
    other = plain()
    other_optimizer = kind(other.parameters(), **options)
    loaded = sk.io.load_checkpoint(tmp_path / "a" / "c.safetensors", other, other_optimizer)
    assert loaded.extra == {"epoch": 1} and list(loaded.masks) == ["4"]
    assert type(other[4]) is sk.nn.SparseLinear and type(other[0]) is nn.Conv2d
    for _ in range(2):
        step(net, optimizer)
        step(other, other_optimizer)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_sparse_layers_are_stored_compressed(tmp_path):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step(net, optimizer)
    sk.io.save_checkpoint(tmp_path / "c", net, optimizer)
    with safe_open(tmp_path / "c", "pt") as file:
        keys = set(file.keys())
        assert file.metadata()["version"] == "1"
    assert "model/4.weight" not in keys and "model/4.weight_mask" not in keys
    assert {"model/4.weight:values", "model/4.weight:crow_indices", "optimizer/4/momentum_buffer:values"} <= keys
    assert os.path.getsize(tmp_path / "c") < 30_000  # dense: 4 bytes x 5760 x 2


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "c"
    sk.io.save_checkpoint(path, model(), extra={"epoch": 1})
    with pytest.raises(TypeError):
        sk.io.save_checkpoint(path, model(), extra={"epoch": object()})
    assert sk.io.load_checkpoint(path).extra == {"epoch": 1}

    def fail(name):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        sk.io.write_atomically(path, fail)
    assert os.listdir(tmp_path) == ["c"]


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sk.io.load_checkpoint(tmp_path / "none")
    (tmp_path / "garbage").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="damaged"):
        sk.io.load_checkpoint(tmp_path / "garbage")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="whose format is None"):
        sk.io.load_checkpoint(tmp_path / "foreign")
    save_file({"x": torch.zeros(1)}, tmp_path / "newer", {"format": "sparsekit", "version": "99", "json": "{}"})
    with pytest.raises(ValueError, match="version 99; this sparsekit reads up to 1"):
        sk.io.load_checkpoint(tmp_path / "newer")
    sk.io.save_checkpoint(tmp_path / "good", model())
    with pytest.raises(ValueError, match="no optimizer state"):
        net = plain()
        sk.io.load_checkpoint(tmp_path / "good", net, torch.optim.SGD(net.parameters()))
    with pytest.raises(RuntimeError, match="Missing key|Unexpected key"):
        sk.io.load_checkpoint(tmp_path / "good", nn.Linear(3, 3))
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        sk.io.load_checkpoint(tmp_path / "cut")


def test_indices_out_of_range_are_refused(tmp_path):
    sk.io.save_checkpoint(tmp_path / "good", model())
    with safe_open(tmp_path / "good", "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["model/4.weight:col_indices"][0] = 10**6
    save_file(tensors, tmp_path / "bad", metadata)
    with pytest.raises(ValueError, match="damaged: model/4.weight: col_indices must lie"):
        sk.io.load_checkpoint(tmp_path / "bad")


def test_version_1_stays_readable(tmp_path):
    """A file of version 1, written by hand: this test must pass in every later version."""
    header = {"shapes": {"model/weight": [2, 3]}, "extra": {"epoch": 7}}
    tensors = {
        "model/weight:values": torch.tensor([5.0, 6.0]),
        "model/weight:crow_indices": torch.tensor([0, 1, 2], dtype=torch.int32),
        "model/weight:col_indices": torch.tensor([2, 0], dtype=torch.int32),
        "model/bias": torch.tensor([1.0, 2.0]),
    }
    metadata = {"format": "sparsekit", "version": "1", "json": json.dumps(header)}
    save_file(tensors, tmp_path / "golden", metadata)
    layer = nn.Linear(3, 2)
    assert sk.io.load_checkpoint(tmp_path / "golden", layer).extra == {"epoch": 7}
    assert layer.weight.tolist() == [[0, 0, 5], [6, 0, 0]] and layer.bias.tolist() == [1, 2]
    assert type(layer) is sk.nn.SparseLinear and layer.sparsity == pytest.approx(4 / 6)


def test_extra_holds_tensors(tmp_path):
    extra = {"a": {"b": torch.arange(3), "c": [torch.tensor(True), 1, None]}, "d": (1, 2)}
    sk.io.save_checkpoint(tmp_path / "c", nn.Linear(2, 2), extra=extra)
    found = sk.io.load_checkpoint(tmp_path / "c").extra
    assert torch.equal(found["a"]["b"], extra["a"]["b"]) and found["a"]["c"][0].item() is True
    assert found["a"]["c"][1:] == [1, None] and found["d"] == [1, 2]
