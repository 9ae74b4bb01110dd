"""Small packages in the real formats, for tests."""

import io
import tarfile

import numpy as np
from PIL import Image


def png(seed, size=(24, 24), mode="RGBA", visible=True):
    """A PNG file of random pixels."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    pixels[..., 3] = 255 * visible
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


def tar(files, compression):
    """The bytes of a tar archive; a value that is a string is what a symbolic link points to."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def deb(path, files):
    """A Debian package (deb(5)): an ar archive of three members."""
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": tar({"./control": b"Package: x\n"}, "xz"),
        "data.tar.xz": tar({f"./{name}": content for name, content in files.items()}, "xz"),
    }
    with open(path, "wb") as file:
        file.write(b"!<arch>\n")
        for name, content in members.items():
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))
    return path


def npm(path, files):
    """What ``npm pack`` makes."""
    path.write_bytes(tar({f"package/{name}": content for name, content in files.items()}, "gz"))
    return path
