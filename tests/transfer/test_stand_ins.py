import hashlib
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

pytest.importorskip("torchvision", exc_type=ImportError)


from safetensors import SafetensorError

from sparsekit.transfer import fetch, stand_ins, tasks
from sparsekit.transfer.stand_ins import OPENCV, STAND_INS, WESNOTH, choose, make

from .packages import deb, npm, png

UNITS = "usr/share/games/wesnoth/1.16/data/core/images/units"
TERRAIN = "usr/share/games/wesnoth/1.16/data/core/images/terrain"


def small(name, **changes):
    return replace(STAND_INS[name], **{"fewest": 4, "fewest_groups": 2, **changes})


def wesnoth(path):
    files = {f"{UNITS}/random-dice.png": png(0)}
    for race in ("elves", "orcs"):
        for unit in ("archer", "grunt", "rider", "shaman", "slayer"):
            for frame in range(4):
                files[f"{UNITS}/{race}/{unit}-attack-{frame}.png"] = png(len(files))
            files[f"{UNITS}/{race}/{unit}+female.png"] = png(len(files))
            files[f"{UNITS}/{race}/{unit}/mounted.png"] = png(len(files))
        files[f"{UNITS}/{race}/copy.png"] = files[f"{UNITS}/{race}/archer-attack-0.png"]
        files[f"{UNITS}/{race}/empty.png"] = png(0, visible=False)
        files[f"{UNITS}/{race}/link.png"] = "archer-attack-1.png"
    files[f"{UNITS}/orcs/elf.png"] = files[f"{UNITS}/elves/rider-attack-0.png"]
    files[f"{UNITS}/transport/boat.png"] = png(999)
    for kind in ("grass", "water", "masks"):
        for name in ("green", "dry-n", "dry-s", "ocean-A01", "ocean-A02", "ocean-A03", "mid"):
            files[f"{TERRAIN}/{kind}/{name}.png"] = png(len(files), (72, 36))
    return deb(path, files)


def pictures_of(task, split):
    return {image.numpy().tobytes() for image in getattr(task, f"{split}_images")}


def groups_of(name, files):
    """Group of every image, by its pixels."""
    found = {}
    for picture in STAND_INS[name].pictures(files):
        pixels = stand_ins._draw(picture.content)
        if pixels is not None:
            found.setdefault(pixels.numpy().tobytes(), picture.group)
    return found


def test_units_are_split_whole_and_copies_dropped(tmp_path):
    files = {WESNOTH.name: wesnoth(tmp_path / "wesnoth.deb")}
    task = make("wesnoth-race", small("wesnoth-race"), files)
    # Six pictures of five units each; the elf that is also an orc is neither's.
    assert task.labels == ("elves", "orcs") and len(task.train_labels) + len(task.test_labels) == 59
    assert task.train_images.shape[1:] == (3, 64, 64) and task.metric == "mean_per_class"
    groups = groups_of("wesnoth-race", files)
    parts = [{groups[image] for image in pictures_of(task, split)} for split in ("train", "test")]
    assert not parts[0] & parts[1] and len(parts[1]) == 2
    assert "wesnoth-1.16-data 1:1.16.9-1 (debian), GPL-2+" in task.source and "sprites" in task.source


def test_animated_terrain_stays_together(tmp_path):
    files = {WESNOTH.name: wesnoth(tmp_path / "wesnoth.deb")}
    task = make("wesnoth-terrain", small("wesnoth-terrain"), files)
    assert task.labels == ("grass", "water") and len(task.train_labels) + len(task.test_labels) == 14
    groups = Counter(groups_of("wesnoth-terrain", files).values())
    assert groups["grass/ocean-A"] == 3 and groups["grass/dry-n"] == 1


def test_pictures_are_drawn_on_a_grey_square(tmp_path):
    drawn = stand_ins._draw(png(3, (64, 32)))
    assert drawn.shape == (3, 64, 64) and (drawn[:, :14] == 128).all() and not (drawn[:, 20:44] == 128).all()
    assert (stand_ins._draw(png(3, (64, 64), visible=False)) is None) and stand_ins._draw(png(3, (4, 4))) is None
    for mode in ("P", "LA", "L", "RGB"):
        assert stand_ins._draw(png(3, (64, 64), mode)).float().std() > 10


def test_clip_art_has_two_levels_and_few_of_a_series(tmp_path):
    files = {}
    for subject in ("animals/birds", "animals/bugs", "food/fruit"):
        for name in ("a", "b", "c", "d_01", "d_02", "d_03"):
            files[f"usr/share/openclipart/png/{subject}/{name}.png"] = png(len(files))
    files["usr/share/openclipart/png/unsorted/x.png"] = png(len(files))
    packages = {stand_ins.OPENCLIPART.name: deb(tmp_path / "art.deb", files)}
    coarse = make("openclipart", small("openclipart", most=2), packages)
    assert coarse.labels == ("animals", "food") and len(coarse.train_labels) + len(coarse.test_labels) == 15
    fine = make("openclipart-fine", small("openclipart-fine"), packages)
    assert fine.labels == ("animals/birds", "animals/bugs", "food/fruit")


def test_icons_are_tested_on_a_theme_of_their_own(tmp_path):
    layouts = {
        "oxygen-icon-theme": "oxygen/base/48x48/{}", "gnome-icon-theme": "gnome/48x48/{}",
        "mate-icon-theme": "mate/48x48/{}", "faenza-icon-theme": "Faenza/{}/48",
        "elementary-xfce-icon-theme": "elementary-xfce/{}/48",
    }  # fmt: skip
    packages, seed = {}, 0
    for theme, layout in layouts.items():
        files = {}
        for context in ("actions", "mimes" if theme.startswith("elementary") else "mimetypes", "stock"):
            for name in ("open", "close"):
                files[f"usr/share/icons/{layout.format(context)}/{name}.png"] = png(seed := seed + 1)
                # Other sizes are not taken.
                files[f"usr/share/icons/{layout.format(context).replace('48', '16')}/{name}.png"] = png(
                    seed := seed + 1
                )
        if theme.startswith("elementary"):
            files["usr/share/icons/elementary-xfce/actions/48/from-oxygen.png"] = png(1)
        packages[theme] = deb(tmp_path / f"{theme}.deb", files)
    task = make("icons", small("icons"), packages)
    assert task.labels == ("actions", "mimetypes")
    assert task.train_labels.bincount().tolist() == [8, 8] and task.test_labels.bincount().tolist() == [2, 2]


def test_emoji_of_all_skin_tones_stay_together(tmp_path):
    listed, images = [], {}
    codes = {"People": ["1F44B", "1F468-200D-1F33E", "1F469-200D-1F33E", "1F590-FE0F"], "Flags": ["1F1E9", "1F1EA"]}
    for category, of_category in codes.items():
        for code in of_category:
            emoji = {
                "unified": code,
                "image": f"{code.lower()}.png",
                "category": category,
                "subcategory": f"all {category}",
            }
            if category == "People":
                toned = f"{code.removesuffix('-FE0F')}-1F3FB"
                emoji["skin_variations"] = {"1F3FB": {"unified": toned, "image": f"{toned.lower()}.png"}}
                images[f"img/google/64/{toned.lower()}.png"] = png(len(images))
            images[f"img/google/64/{code.lower()}.png"] = png(len(images))
            listed.append(emoji)
    files = {"emoji.json": json.dumps(listed).encode(), **images}
    packages = {stand_ins.EMOJI.name: npm(tmp_path / "emoji.tgz", files)}
    task = make("emoji", small("emoji", fewest=2), packages)
    assert task.labels == ("Flags", "People") and len(task.train_labels) + len(task.test_labels) == 10
    groups = groups_of("emoji", packages)
    assert len(set(groups.values())) == 5
    assert not {groups[i] for i in pictures_of(task, "train")} & {groups[i] for i in pictures_of(task, "test")}
    assert make("emoji-fine", small("emoji-fine", fewest=2), packages).labels == ("all Flags", "all People")


def test_stamps_and_digits(tmp_path):
    files = {
        f"usr/share/tuxpaint/stamps/{kind}/{name}.png": png(10 * i + j)
        for i, kind in enumerate(("animals", "food"))
        for j, name in enumerate(("frog-1", "frog_2", "bee", "cow", "cow_mirror", "owl"))
    }
    task = make("tuxpaint", small("tuxpaint"), {stand_ins.TUXPAINT.name: deb(tmp_path / "stamps.deb", files)})
    assert len(task.train_labels) + len(task.test_labels) == 10
    sheet = {"usr/share/doc/opencv-doc/examples/data/digits.png": png(5, (2000, 1000), "L")}
    digits = stand_ins._opencv_digits(deb(tmp_path / "opencv.deb", sheet))
    assert digits.train_images.shape == (4000, 1, 20, 20) and digits.test_labels.bincount().tolist() == [100] * 10


def test_groups_are_chosen_by_name_and_about_a_fifth():
    groups = Counter({f"unit {number}": 1 + number % 7 for number in range(60)})
    chosen = choose(groups)
    assert 0.15 < sum(groups[group] for group in chosen) / groups.total() < 0.26
    assert choose(Counter(dict(reversed(groups.items())))) == chosen
    assert choose(Counter({"big": 100, "small": 60})) == {"small"}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small wesnoth package, put by hand where data is kept."""
    root = tmp_path / "data"
    root.mkdir()
    file = wesnoth(root / WESNOTH.file)
    own = replace(WESNOTH, sha256=hashlib.sha256(file.read_bytes()).hexdigest(), size=file.stat().st_size)
    for name in ("wesnoth-race", "wesnoth-terrain"):
        monkeypatch.setitem(STAND_INS, name, small(name, packages=(own,)))
    return file


def test_tasks_of_one_package_are_made_together_and_kept(package, tmp_path):
    root = tmp_path / "data"
    task = tasks.load("wesnoth-race", root)
    package.unlink()
    again, other = tasks.load("wesnoth-race", root), tasks.load("wesnoth-terrain", root)
    assert torch.equal(task.train_images, again.train_images) and again.labels == task.labels
    assert other.labels == ("grass", "water") and not list(root.glob(".packages*"))


def test_damaged_tasks_are_made_again_and_packages_checked(package, tmp_path):
    root = tmp_path / "data"
    tasks.load("wesnoth-race", root)
    kept = stand_ins.kept_in("wesnoth-race", root)
    kept.write_bytes(kept.read_bytes()[: kept.stat().st_size // 2])
    assert len(tasks.load("wesnoth-race", root).labels) == 2
    kept.unlink()
    package.write_bytes(package.read_bytes()[:-100])
    with pytest.raises(ValueError, match="must have sha256"):
        tasks.load("wesnoth-race", root)
    assert not kept.exists()


def test_a_full_disk_is_found_before_the_download(tmp_path, monkeypatch):
    full = type("usage", (), {"free": 1_000_000})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: full)
    with pytest.raises(RuntimeError, match=r"the task opencv-digits needs 396 MB in .*, whose disk has 1 MB left"):
        stand_ins.load("opencv-digits", tmp_path)
    with pytest.raises(RuntimeError, match=rf"{re.escape(OPENCV.file)} needs 96 MB"):
        fetch.fetch_package(OPENCV, tmp_path)


def test_a_disk_that_is_full_while_a_task_is_written_loses_nothing(package, tmp_path, monkeypatch):
    root = tmp_path / "data"

    def full(tensors, name, metadata):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(stand_ins, "save_file", full)
        with pytest.raises(
            RuntimeError, match=r"wesnoth-race\.safetensors cannot be written: .*No space left on device"
        ):
            tasks.load("wesnoth-race", root)
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == [WESNOTH.file]
    assert len(tasks.load("wesnoth-race", root).labels) == 2


def test_damaged_packages_are_named(tmp_path):
    path = wesnoth(tmp_path / "wesnoth.deb")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"wesnoth\.deb is damaged"):
        list(fetch.files_in(path))
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is not a Debian package"):
        list(fetch.files_in(path))
