"""The study's twelve tasks, on small ones in the folders and formats of the real ones."""

import csv
import hashlib
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision", exc_type=ImportError)
scipy_io = pytest.importorskip("scipy.io")

import torchvision.datasets as sets
from PIL import Image

from sparsekit.transfer import evaluate, fetch, full_finetune, linear_finetune, standard, tasks
from sparsekit.transfer.data import LazyImages, View
from sparsekit.transfer.models import SmallResNet

PER_CLASS = 3


def jpeg(path, seed, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size).convert(mode).save(path, "JPEG")
    return path


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


def sun397(root, _):
    names = ["/a/abbey", "/b/bakery/shop"]
    lines(root / "SUN397" / "ClassName.txt", names)
    for file, first in (("Training_01", 0), ("Testing_01", PER_CLASS)):
        listed = [f"{name}/sun_{first + i:016d}.jpg" for name in names for i in range(PER_CLASS)]
        lines(root / "SUN397" / "Partitions" / f"{file}.txt", listed)
        for number, name in enumerate(listed):
            jpeg(root / "SUN397" / name[1:], number + first)


def aircraft(root, _):
    data = root / "fgvc-aircraft-2013b" / "data"
    lines(data / "variants.txt", ["707-320", "Boeing 717"])
    for part, first in (("trainval", 0), ("test", 50)):
        rows = [(f"{first + i:07d}", ["707-320", "Boeing 717"][i % 2]) for i in range(2 * PER_CLASS)]
        lines(data / f"images_variant_{part}.txt", [" ".join(row) for row in rows])
        for name, _label in rows:
            jpeg(data / "images" / f"{name}.jpg", int(name))


def birdsnap(root, _):
    for part in ("train", "test"):
        for bird in ("Acadian_Flycatcher", "Wren"):
            for i in range(PER_CLASS):
                jpeg(root / "birdsnap" / part / bird / f"{i}.jpg", i)


def caltech101(root, _):
    folder = root / "caltech101" / "101_ObjectCategories"
    for name in ("BACKGROUND_Google", "accordion", "ant"):
        for i in range(1, 35):
            jpeg(folder / name / f"image_{i:04d}.jpg", i, mode="L" if i == 1 else "RGB")


def caltech256(root, _):
    folder = root / "caltech256" / "256_ObjectCategories"
    for number, name in enumerate(("ak47", "dog"), 1):
        for i in range(1, 65):
            jpeg(folder / f"{number:03d}.{name}" / f"{number:03d}_{i:04d}.jpg", i)
    lines(folder / "002.dog" / "greg", ["not an image"])


def cars(root, _):
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    scipy_io.savemat(
        base / "devkit" / "cars_meta.mat", {"class_names": np.array(["AM General", "Audi A5"], dtype=object)}
    )
    kind = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(1, 1 + i % 2, f"{i:05d}.jpg") for i in range(1, 2 * PER_CLASS + 1)]
        scipy_io.savemat(base / file, {"annotations": np.array(rows, dtype=kind)})
        for _, _, name in rows:
            jpeg(base / f"cars_{part}" / name, int(name[:5]))


def cifar(root, monkeypatch, kind, key, batches, meta):
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    for attribute, files, count in (("train_list", batches[:-1], PER_CLASS), ("test_list", batches[-1:], PER_CLASS)):
        listed = []
        for seed, file in enumerate(files):
            pixels = np.random.default_rng(seed).integers(0, 256, (2 * count, 3072), dtype=np.uint8)
            content = pickle.dumps({"data": pixels, key: [i % 2 for i in range(2 * count)]})
            (folder / file).write_bytes(content)
            listed.append([file, hashlib.md5(content).hexdigest()])
        monkeypatch.setattr(kind, attribute, listed)
    content = pickle.dumps({kind.meta["key"]: ["apple", "bus"]})
    (folder / meta).write_bytes(content)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(content).hexdigest()})


def cifar10(root, monkeypatch):
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    cifar(root, monkeypatch, sets.CIFAR10, "labels", names, "batches.meta")


def cifar100(root, monkeypatch):
    cifar(root, monkeypatch, sets.CIFAR100, "fine_labels", ["train", "test"], "meta")


def dtd(root, _):
    folder = root / "dtd" / "dtd"
    for number, part in enumerate(("train", "val", "test")):
        listed = [f"{name}/{name}_{number}{i}.jpg" for name in ("banded", "woven") for i in range(PER_CLASS)]
        lines(folder / "labels" / f"{part}1.txt", listed)
        for seed, name in enumerate(listed):
            jpeg(folder / "images" / name, seed)


def flowers(root, monkeypatch):
    folder = root / "flowers-102"
    folder.mkdir(parents=True)
    count = 6 * PER_CLASS
    scipy_io.savemat(folder / "imagelabels.mat", {"labels": np.array([1 + i % 2 for i in range(count)])[None]})
    ids = np.arange(1, count + 1).reshape(3, -1)
    scipy_io.savemat(folder / "setid.mat", {"trnid": ids[:1], "valid": ids[1:2], "tstid": ids[2:]})
    for i in range(1, count + 1):
        jpeg(folder / "jpg" / f"image_{i:05d}.jpg", i)
    sums = {
        key: (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
        for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    monkeypatch.setattr(sets.Flowers102, "_file_dict", {**sets.Flowers102._file_dict, **sums})


def food101(root, _):
    folder = root / "food-101"
    for part, first in (("train", 0), ("test", 50)):
        listed = {name: [f"{name}/{first + i}" for i in range(PER_CLASS)] for name in ("apple_pie", "waffles")}
        lines(folder / "meta" / f"{part}.json", [json.dumps(listed)])
        for names in listed.values():
            for name in names:
                jpeg(folder / "images" / f"{name}.jpg", int(name.split("/")[1]))


def pets(root, _):
    folder = root / "oxford-iiit-pet"
    for part, first in (("trainval", 0), ("test", 50)):
        rows = [(f"{('Abyssinian', 'beagle')[i % 2]}_{first + i}", 1 + i % 2) for i in range(2 * PER_CLASS)]
        lines(folder / "annotations" / f"{part}.txt", [f"{name} {label} {label} 1" for name, label in rows])
        for name, _label in rows:
            jpeg(folder / "images" / f"{name}.jpg", int(name.split("_")[1]))


# Sizes of the small ones: for training, for testing.
SMALL = {
    "sun397": (sun397, 6, 6), "aircraft": (aircraft, 6, 6), "birdsnap": (birdsnap, 6, 6), "caltech101": (caltech101, 60, 8),
    "caltech256": (caltech256, 120, 8), "cars": (cars, 6, 6), "cifar10": (cifar10, 30, 6), "cifar100": (cifar100, 6, 6),
    "dtd": (dtd, 12, 6), "flowers": (flowers, 12, 6), "food101": (food101, 6, 6), "pets": (pets, 6, 6),
}  # fmt: skip


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Write a small task, and let it be as small as that."""

    def make(name):
        build, train, test = SMALL[name]
        build(tmp_path, monkeypatch)
        small = replace(standard.STANDARD[name], classes=2, train=train, test=test)
        monkeypatch.setitem(standard.STANDARD, name, small)
        return tmp_path

    return make


def test_the_twelve_have_the_studys_sizes_and_metrics():
    # Shared by hand from the study's table 1.
    sizes = {name: (own.classes, own.train, own.test) for name, own in standard.STANDARD.items()}
    assert sizes == {
        "sun397": (397, 19850, 19850), "aircraft": (100, 6667, 3333), "birdsnap": (500, 32677, 8171),
        "caltech101": (101, 3030, 5647), "caltech256": (257, 15420, 15187), "cars": (196, 8144, 8041),
        "cifar10": (10, 50000, 10000), "cifar100": (100, 50000, 10000), "dtd": (47, 3760, 1880),
        "flowers": (102, 2040, 6149), "food101": (101, 75750, 25250), "pets": (37, 3680, 3669),
    }  # fmt: skip
    by_class = {name for name, own in standard.STANDARD.items() if own.metric == "mean_per_class"}
    assert by_class == {"aircraft", "caltech101", "caltech256", "flowers", "pets"}


@pytest.mark.parametrize("name", SMALL)
def test_a_task_in_its_real_layout(name, make):
    root = make(name)
    task = tasks.load(name, root)
    _, train, test = SMALL[name]
    assert len(task.train_images) == len(task.train_labels) == train and len(task.test_images) == test
    assert task.train_labels.unique().tolist() == task.test_labels.unique().tolist() == [0, 1]
    assert task.mean == standard.STANDARD[name].stats[0] and task.metric == standard.STANDARD[name].metric
    image = task.train_images[0]
    assert image.mode == "RGB" and image.size == ((32, 32) if "cifar" in name else (40, 30))
    row = next(row for row in tasks.overview(root) if row["name"] == name)
    assert row["there"] and row["where"].startswith(str(root))


def test_labels_are_those_of_the_files(make, tmp_path):
    for name, first in (
        ("food101", "apple_pie"),
        ("sun397", "abbey"),
        ("caltech256", "001.ak47"),
        ("birdsnap", "Acadian_"),
    ):
        task = tasks.load(name, make(name))
        for images, labels in ((task.train_images, task.train_labels), (task.test_images, task.test_labels)):
            assert [first in images.name(i) for i in range(len(images))] == [not label for label in labels.tolist()]
        train, test = ({part.name(i) for i in range(len(part))} for part in (task.train_images, task.test_images))
        assert not train & test


def test_caltechs_split_is_seeded(make):
    root = make("caltech101")
    one, two = tasks.load("caltech101", root), tasks.load("caltech101", root)
    names = [[part.name(i) for i in range(len(part))] for part in (one.train_images, two.train_images)]
    assert names[0] == names[1] and one.train_labels.bincount().tolist() == [30, 30]
    # Not simply the first thirty.
    assert not all(f"image_{i:04d}" in " ".join(names[0]) for i in range(1, 31))


def test_what_is_missing_says_where_it_was_looked_for_and_how_to_get_it(tmp_path):
    for name in SMALL:
        with pytest.raises(RuntimeError, match=rf"is not there, or not whole.* It was looked for in {tmp_path}/\w"):
            tasks.load(name, tmp_path)
        assert not next(row for row in tasks.overview(tmp_path) if row["name"] == name)["there"]
    with pytest.raises(RuntimeError, match=r"Birdsnap cannot be downloaded from here\. Its authors give a script"):
        tasks.load("birdsnap", tmp_path, download=True)


def test_a_full_disk_is_found_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: type("usage", (), {"free": 9_000_000_000}))
    with pytest.raises(RuntimeError, match=r"Food-101 needs 10000 MB in .*, whose disk has 9000 MB left"):
        tasks.load("food101", tmp_path, download=True)


def test_half_downloaded_data_is_refused(make, tmp_path):
    root = make("food101")
    gone = root / "food-101" / "images" / "waffles" / "1.jpg"
    gone.unlink()
    with pytest.raises(
        RuntimeError, match=rf"Food-101 is not whole: 1 of 6 images to train on are missing, such as {gone}"
    ):
        tasks.load("food101", root)
    root = make("sun397")
    (root / "SUN397" / "Partitions" / "Testing_01.txt").unlink()
    with pytest.raises(RuntimeError, match=r"there is no Testing_01\.txt, a file of the official splits"):
        tasks.load("sun397", root)


def test_wrong_counts_are_refused(make, monkeypatch):
    root = make("birdsnap")
    monkeypatch.setitem(standard.STANDARD, "birdsnap", replace(standard.STANDARD["birdsnap"], classes=3))
    with pytest.raises(RuntimeError, match="Birdsnap must have 6 images of 3 classes to train on, got 6 of 2"):
        tasks.load("birdsnap", root)
    jpeg(root / "birdsnap" / "test" / "Owl" / "1.jpg", 1)
    with pytest.raises(RuntimeError, match="train and test must have the same classes, got 2 and 3"):
        tasks.load("birdsnap", root)


def test_corrupt_images_are_named_and_left_out_only_when_allowed(make, caplog):
    root = make("pets")
    images = root / "oxford-iiit-pet" / "images"
    cut, text = images / "Abyssinian_0.jpg", images / "beagle_51.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    text.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"(?s)pets: 1 of 6 images cannot be read:.*Abyssinian_0\.jpg: .*truncated"):
        tasks.load("pets", root)
    task = tasks.load("pets", root, skip_corrupt=True)
    assert len(task.train_images) == len(task.train_labels) == len(task.test_images) == 5
    assert "beagle_51.jpg" in caplog.text and "left out" in caplog.text
    assert [("beagle" in task.train_images.name(i)) for i in range(5)] == [bool(label) for label in task.train_labels]


def test_what_was_read_once_is_not_read_again(make, monkeypatch):
    root = make("dtd")
    tasks.load("dtd", root)

    def fail(self):
        raise AssertionError("read again")

    monkeypatch.setattr(LazyImages, "broken", fail)
    tasks.load("dtd", root)
    # Another size: another file.
    jpeg(root / "dtd" / "dtd" / "images" / "banded" / "banded_00.jpg", 9, size=(90, 90))
    with pytest.raises(AssertionError, match="read again"):
        tasks.load("dtd", root)


def test_lazy_images_are_trained_and_tested_on(make):
    task = tasks.load("aircraft", make("aircraft"))
    torch.manual_seed(0)
    model = SmallResNet((8, 16), (1, 1), 3, 5)
    settings = {"epochs": 2, "size": 32, "batch_size": 4}
    for run in (
        lambda: linear_finetune(model, task, **settings),
        lambda: linear_finetune(model, task, on_the_fly=True, **settings),
        lambda: full_finetune(model, task, **settings),
    ):
        one, two = run(), run()
        assert one.history[1]["loss"] == two.history[1]["loss"] and len(one.history) == 2
        assert 0 <= one.accuracy == two.accuracy <= 1
    assert len(task.first(2).train_images) == 2
    assert evaluate(SmallResNet((8,), (1,), 1, 2), task, size=28) in (0, 0.5, 1)


def test_views_are_the_studys():
    # 400 x 300 -> 341 x 256 -> the middle 224 x 224.
    ramp = np.broadcast_to(np.linspace(0, 255, 400, dtype=np.float32).astype(np.uint8)[None, :, None], (300, 400, 3))
    image = Image.fromarray(np.ascontiguousarray(ramp))
    pixels = View(224, stats=((0, 0, 0), (1, 1, 1)))(image)
    assert pixels.shape == (3, 224, 224)
    assert float(pixels[0, 0, 0]) == pytest.approx((341 - 224) / 2 / 341, abs=0.01)
    shifted = View(224, stats=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))(image)
    torch.testing.assert_close(shifted, pixels * 2 - 1)
    assert View(32, channels=1)(image).shape == (1, 32, 32)
    torch.manual_seed(0)
    view = View(32, stats=((0, 0, 0), (1, 1, 1)), augmented=True, flip=True)
    rising = [bool(crop[0, 0, -1] > crop[0, 0, 0]) for crop in (view(image) for _ in range(40))]
    assert 8 < sum(rising) < 32
    assert all(crop[0, 0, -1] > crop[0, 0, 0] for crop in (replace(view, flip=False)(image) for _ in range(10)))


def test_images_are_the_same_whichever_process_reads_them(tmp_path):
    paths = [jpeg(tmp_path / f"{i}.jpg", i) for i in range(12)]
    view = View(16, augmented=True, flip=True)
    order = torch.randperm(12)
    alone = torch.cat(list(LazyImages(paths).batches(view, 6, order, seed=3)))
    workers = torch.cat(list(LazyImages(paths).batches(view, 2, order, seed=3)))
    assert torch.equal(alone, workers)
    assert not torch.equal(alone, torch.cat(list(LazyImages(paths).batches(view, 6, order, seed=4))))


def folder_of_images(folder, classes=("cat", "dog"), count=5):
    for seed, name in enumerate(classes):
        for i in range(count):
            jpeg(folder / name / f"{i}.jpg", 100 * seed + i)
    return folder


def test_a_folder_of_ones_own(tmp_path):
    task = tasks.from_folder(folder_of_images(tmp_path / "pets"), classes=2, metric="mean_per_class")
    assert task.name == "pets" and task.labels == ("cat", "dog")
    assert task.train_labels.tolist() == [0] * 4 + [1] * 4 and task.test_labels.tolist() == [0, 1]
    again = tasks.from_folder(tmp_path / "pets")
    assert [task.test_images.name(i) for i in range(2)] == [again.test_images.name(i) for i in range(2)]
    folder_of_images(tmp_path / "parts" / "train")
    folder_of_images(tmp_path / "parts" / "val", count=2)
    task = tasks.from_folder(tmp_path / "parts")
    assert len(task.train_labels) == 10 and len(task.test_labels) == 4 and "/val/" in task.test_images.name(0)


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder must hold folders of images, got .*gone, which does not exist"):
        tasks.from_folder(tmp_path / "gone")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds none with images"):
        tasks.from_folder(tmp_path / "empty")
    folder = folder_of_images(tmp_path / "own")
    with pytest.raises(ValueError, match="own must have 3 classes, got 2"):
        tasks.from_folder(folder, classes=3)
    with pytest.raises(ValueError, match="test must lie between 0 and 1, got 1.5"):
        tasks.from_folder(folder, test=1.5)
    (folder / "cat" / "0.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)own: 1 of \d images cannot be read:.*cat/0\.jpg: .*--skip-corrupt"):
        tasks.from_folder(folder)
    assert len(tasks.from_folder(folder, skip_corrupt=True).train_labels) + 2 == 9
    (folder / "owl").mkdir()
    with pytest.raises(ValueError, match="classes without images: owl"):
        tasks.from_folder(folder)
    jpeg(folder / "owl" / "0.jpg", 0)
    with pytest.raises(ValueError, match="own has nothing to train on for 1 of 3 classes: owl"):
        tasks.from_folder(folder)


def test_a_csv_of_ones_own(tmp_path):
    folder_of_images(tmp_path)
    rows = [(f"{name}/{i}.jpg", name, "train" if i < 4 else "test") for name in ("cat", "dog") for i in range(5)]

    def write(header, rows):
        with open(tmp_path / "own.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        return tmp_path / "own.csv"

    task = tasks.from_csv(write(("image", "label", "split"), rows))
    assert (
        task.labels == ("cat", "dog") and task.test_labels.tolist() == [0, 1] and task.test_images[0].size == (40, 30)
    )
    task = tasks.from_csv(write(("file", "kind"), [row[:2] for row in rows]), image="file", label="kind", test=0.4)
    assert task.test_labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="must have the columns image and label, got file, kind"):
        tasks.from_csv(tmp_path / "own.csv")
    with pytest.raises(ValueError, match="line 3: split must be train, test or val, got 'dev'"):
        tasks.from_csv(write(("image", "label", "split"), [rows[0], (*rows[1][:2], "dev")]))
    with pytest.raises(ValueError, match=r"(?s)cannot be read:.*gone\.jpg: .*No such file"):
        tasks.from_csv(write(("image", "label", "split"), [*rows, ("gone.jpg", "cat", "train")]))
    with pytest.raises(FileNotFoundError, match="path must be a CSV file"):
        tasks.from_csv(tmp_path / "none.csv")


def test_data_sets_of_torchvision(tmp_path):
    folder_of_images(tmp_path)
    data = sets.ImageFolder(tmp_path)
    train, test = torch.utils.data.random_split(data, [8, 2], torch.Generator().manual_seed(1))
    task = tasks.from_dataset(data, test, name="pets")
    assert task.labels == ("cat", "dog") and task.train_images[0].size == (40, 30)
    assert task.test_labels.tolist() == [data.targets[i] for i in test.indices] and len(train) == 8
    transformed = sets.ImageFolder(tmp_path, transform=lambda image: torch.randn(3, 8, 8))
    with pytest.raises(ValueError, match=r"(?s)image 0 of ImageFolder: .*leave out the data set's transforms"):
        tasks.from_dataset(transformed, test)
    with pytest.raises(TypeError, match=r"must give \(image, label\) or a dict, got int"):
        tasks.from_dataset([1, 2], [3])


def test_data_sets_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"img": [Image.new("RGB", (9, 9), (i, 0, 0)) for i in range(6)], "fine": [0, 1] * 3}
    data = datasets.Dataset.from_dict(rows, features=features)
    task = tasks.from_dataset(data, data.select(range(2)), image="img", label="fine")
    assert task.labels == ("cat", "dog") and task.train_labels.tolist() == [0, 1] * 3
    assert task.train_images[5].getpixel((0, 0)) == (5, 0, 0)
