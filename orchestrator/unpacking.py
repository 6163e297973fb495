"""Archives and folders as files to be put somewhere, and nothing outside of it. Standard library.

All members are looked at before the first is written: a name that leads out of the target, a link
that does, a device, or a file behind a link refuses the archive as a whole. `tarfile` looks again
while it writes.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

ENDINGS = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
OTHERS = (".rar", ".7z")  # that the standard library does not read
ALGORITHMS = ("sha256", "sha512", "sha1", "md5")  # of checksums that people publish
LONGEST = 1000  # characters of a name: beyond what systems take, checks of paths have failed before
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)


class Unsafe(ValueError):
    """An archive that would write outside of its target."""


@dataclass(frozen=True)
class Member:
    """A file: where it goes below the target, and its bytes."""

    name: str
    bytes: int


class Source(Protocol):
    """What files come from."""

    path: Path

    def members(self) -> list[Member]:
        """All files, looked at and found harmless; nothing is written.

        Raises:
            ValueError: it is damaged, or Unsafe.
        """

    def unpack(self, folder: Path) -> Iterator[str]:
        """Write them, one after the other; their names. After `members`."""


def open_source(path: Path) -> Source:
    """An archive, a folder, or one plain file.

    Raises:
        ValueError: it is not there, or an archive of a kind that is not read.
    """
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise ValueError(f"{path} is not there")
    if not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder")
    name = path.name.lower()
    if name.endswith(OTHERS):
        raise ValueError(
            f"{path}: an archive of this kind is not read; unpack it and give the folder; read are "
            f"{', '.join(ENDINGS)}"
        )
    if zipfile.is_zipfile(path):
        return ZipSource(path)
    with _told_if_damaged(path):
        if tarfile.is_tarfile(path):
            return TarSource(path)
    if name.endswith(ENDINGS):
        raise ValueError(f"{path} is no archive that can be read: {AGAIN}")
    return FileSource(path)


AGAIN = "it is damaged or was not downloaded to its end; get it again"


@contextmanager
def _told_if_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGED as problem:
        raise ValueError(f"{path}: {AGAIN} ({problem})") from problem


@dataclass
class FileSource:
    """One file, such as a list that lies beside an archive."""

    path: Path

    def members(self) -> list[Member]:
        return [Member(self.path.name, self.path.stat().st_size)]

    def unpack(self, folder: Path) -> Iterator[str]:
        shutil.copyfile(self.path, folder / self.path.name)
        yield self.path.name


@dataclass
class FolderSource:
    """A folder of this machine; links in it count as what they lead to.

    Args:
        only: these files or folders of it; None: all.
    """

    path: Path
    only: frozenset[str] | None = None

    def members(self) -> list[Member]:
        return [Member(name, (self.path / name).stat().st_size) for name in self._names()]

    def unpack(self, folder: Path) -> Iterator[str]:
        for name in self._names():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path / name, folder / name)
            yield name

    def _names(self) -> list[str]:
        found = []
        seen: set[str] = set()
        for place, folders, files in os.walk(self.path, followlinks=True, onerror=_raise):
            if (real := os.path.realpath(place)) in seen:
                raise ValueError(
                    f"{place} leads to a folder that was met before: a circle of links"
                )
            seen.add(real)
            below = Path(place).relative_to(self.path)
            if below == Path() and self.only is not None:
                folders[:] = [name for name in folders if name in self.only]
                files = [name for name in files if name in self.only]
            for name in files:
                if not (Path(place) / name).is_file():  # a pipe would be waited for for ever
                    raise ValueError(f"{Path(place) / name} is no file, or a link to nothing")
                found.append((below / name).as_posix())
        return sorted(found)


def _raise(problem: OSError) -> None:
    raise problem


@dataclass
class TarSource:
    """A tar archive, compressed or not."""

    path: Path

    def members(self) -> list[Member]:
        found, links, hard = [], set(), {}
        with _told_if_damaged(self.path), tarfile.open(self.path) as archive:
            for info in archive:
                name = harmless(info.name, self.path)
                if info.issym():
                    self._inside(info, os.path.dirname(info.name))
                    links.add(name)
                elif info.islnk():
                    self._inside(info, "")
                    hard[name] = str(PurePosixPath(info.linkname))
                elif info.isfile():
                    found.append(Member(name, info.size))
                elif not info.isdir():
                    raise refused(self.path, info.name, "is a device or a pipe")
            self._ended(archive)
        _not_behind(links, [*(one.name for one in found), *hard, *hard.values()], self.path)
        return found

    def _ended(self, archive: tarfile.TarFile) -> None:
        """An archive ends with zeros; `tarfile` takes one that was cut off for a shorter one."""
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it has no end")

    def _inside(self, info: tarfile.TarInfo, base: str) -> None:
        there = os.path.normpath(os.path.join(base, info.linkname))
        if info.linkname.startswith("/") or there.split("/")[0] == "..":
            raise refused(self.path, info.name, f"is a link to {info.linkname}, which lies outside")

    def unpack(self, folder: Path) -> Iterator[str]:
        with _told_if_damaged(self.path), tarfile.open(self.path) as archive:
            for info in archive:
                archive.extract(info, folder, filter="data")
                if info.isfile():
                    yield info.name


@dataclass
class ZipSource:
    """A zip archive."""

    path: Path
    _infos: list[zipfile.ZipInfo] = field(default_factory=list)

    def members(self) -> list[Member]:
        found = []
        with _told_if_damaged(self.path), zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                # `filename` has lost what stood behind a NUL, and other systems' slashes.
                name = harmless(info.orig_filename, self.path)
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise refused(self.path, info.filename, "is a link, a device or a pipe")
                if info.flag_bits & 1:
                    raise ValueError(f"{self.path} is encrypted; unpack it and give the folder")
                if not info.is_dir():
                    found.append(Member(name, info.file_size))
        return found

    def unpack(self, folder: Path) -> Iterator[str]:
        with _told_if_damaged(self.path), zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                archive.extract(info, folder)  # never more bytes than `file_size`, and their CRC
                if not info.is_dir():
                    yield info.filename


def harmless(name: str, archive: Path) -> str:
    """A member's name in its shortest form, if it stays below the target.

    >>> harmless("./jpg//image_1.jpg", Path("a.tgz"))
    'jpg/image_1.jpg'

    Raises:
        Unsafe: it does not.
    """
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name):
        raise refused(archive, name, "has an absolute name")
    if ".." in re.split(r"[\\/]", name):
        raise refused(archive, name, "leads out of the folder that it is unpacked to")
    if "\0" in name or len(name) > LONGEST or any(len(p.encode()) > 255 for p in name.split("/")):
        raise refused(archive, name[:80], "has a name that no file can have")
    return str(PurePosixPath(name))


def refused(archive: Path, name: str, why: str) -> Unsafe:
    return Unsafe(
        f"{archive}: its member {name!r} {why}; nothing of it was unpacked: the published archives "
        "have no such member, get it from the place that published it"
    )


def _not_behind(links: set[str], names: list[str], archive: Path) -> None:
    """No member is written through a link, or in its place: where that leads is seen too late."""
    places = [(name, PurePosixPath(name)) for name in names if links]
    places += [(name, PurePosixPath(name).parent) for name in links]
    for name, place in places:
        for one in (place, *place.parents):
            if str(one) in links:
                raise refused(archive, name, f"lies behind the link {str(one)!r}")


def checksum(path: Path, algorithm: str) -> str:
    """Of a file, in hex digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest()


def parse_checksum(text: str) -> tuple[str, str]:
    """
    >>> parse_checksum("md5:FFF73e5086ae6bdbea199a49dfb8a4c1")
    ('md5', 'fff73e5086ae6bdbea199a49dfb8a4c1')

    Raises:
        ValueError: it is none.
    """
    algorithm, _, digits = text.strip().lower().partition(":")
    size = 2 * hashlib.new(algorithm).digest_size if algorithm in ALGORITHMS else 0
    if not size or not re.fullmatch(f"[0-9a-f]{{{size}}}", digits):
        raise ValueError(
            f"checksum {text!r}: wanted <algorithm>:<hex digits>, all of them, with one of "
            f"{', '.join(ALGORITHMS)}, such as sha256:2c26b46b68ff..."
        )
    return algorithm, digits
