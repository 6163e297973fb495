"""Datasets and models on shared storage: filled beside their place, checked, renamed. Once.

What lies at its place is whole: it was filled in a hidden folder of the same file system, checked
there, described by a manifest, and renamed last. A lock lets one do it at a time; who waited finds
it done. What a killed one has left counts for nothing, and goes with the next.

Knows no cluster and no store; what is right is said by `datacheck` and `modelcheck`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from air_core.seal import intact, sealed_json
from orchestrator.files import file_digest, flocked, write_whole
from orchestrator.inventory import size
from orchestrator.place import Refused, whoami
from orchestrator.unpacking import FolderSource, Source, checksum, open_source, parse_checksum

if TYPE_CHECKING:
    from air_core.datasets import Dataset

T = TypeVar("T")

MANIFEST = ".staged.json"  # at the end of the place's name: a file inside would be part of it
WORK = ".staging-"  # folders that count for nothing
ABANDONED = 24 * 3600.0  # seconds: where nobody can lock, what is younger may have a maker
SHORT = (errno.ENOSPC, errno.EDQUOT)
NOT_MINE = (errno.EACCES, errno.EPERM, errno.EROFS)
WITH_A_PACKAGE = ("digits",)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)?")


class Watch(Protocol):
    """Passes on what is done, one by one, and may show how far it is."""

    def __call__(self, words: str, each: Iterable[T], total: int) -> Iterable[T]: ...


def unwatched(words: str, each: Iterable[T], total: int) -> Iterable[T]:
    return each


@dataclass(frozen=True)
class Staging:
    """What is to be put where, and how it is known to be right.

    Args:
        kind: dataset or model.
        root: folder of all of that kind; what is staged lies below it under its name.
        check: what it is, told of the folder that was filled (its root and the thing itself);
            raises a ValueError where it is not what the name says.
        published: checksums of sources by file name, from those who published them.
    """

    kind: str
    name: str
    root: Path
    check: Callable[[Path, Path], Mapping[str, Any]]
    published: Mapping[str, str]

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(
                f"{self.name!r} cannot be the name of a folder here; allowed: letters, digits, "
                "dots, dashes and underscores, in two parts with a slash at most"
            )

    @property
    def place(self) -> Path:
        return self.root / self.name

    @property
    def manifest(self) -> Path:
        return self.place.with_name(self.place.name + MANIFEST)

    @property
    def slug(self) -> str:
        return self.name.replace("/", "--")


@dataclass(frozen=True)
class Staged:
    """What lies there now."""

    place: Path
    manifest: Mapping[str, Any]
    found: bool  # it was there before

    def json(self) -> dict[str, Any]:
        known = {key: value for key, value in self.manifest.items() if key not in ("files", "seal")}
        return {"place": str(self.place), "found": self.found, **known}

    def line(self) -> str:
        """For people."""
        known = self.manifest
        what = f"{self.place}: {known['count']:,} files, {size(known['bytes'])}"
        if self.found:
            return f"{what}, there since {known['date'][:10]} (by {known['user']})"
        return f"{what}, written and checked"


def stage(
    staging: Staging,
    sources: Sequence[Source],
    checksums: Sequence[str] = (),
    verify: bool = False,
    watch: Watch = unwatched,
    say: Callable[[str], None] = lambda line: None,
) -> Staged:
    """Put it there, or find that it is.

    Args:
        sources: what it is made of; none: it has to be there.
        checksums: of the sources, in their order; what is left out is not compared.
        verify: of what is there compare every byte, not sizes alone.
        say: told what people should know meanwhile.

    Raises:
        ValueError: the sources are not what they should be, or what is there is not.
        Refused: no room, or not allowed to write.
    """
    if len(checksums) > len(sources):
        raise ValueError(f"{len(checksums)} checksums for {len(sources)} sources; one each at most")
    expected = [parse_checksum(text) for text in checksums]
    if staging.place.exists() and staging.manifest.exists():  # nobody who only reads needs to write
        return _there(staging, verify, watch)
    try:
        staging.root.mkdir(parents=True, exist_ok=True)
        with _turn(staging, say) as alone:
            if os.path.lexists(staging.place):
                return _there(staging, verify, watch)
            if not sources:
                raise ValueError(
                    f"{staging.place} is not there; give what it is made of with --from"
                )
            _clean(staging, alone)
            return _filled(staging, sources, expected, watch, say)
    except OSError as problem:
        if problem.errno in SHORT:
            free = size(shutil.disk_usage(staging.root).free) if staging.root.is_dir() else "?"
            raise Refused(
                f"no room below {staging.root} ({problem.strerror}), {free} are free now; nothing "
                "half made is left: make room, or choose another place with --to"
            ) from problem
        if problem.errno in NOT_MINE:
            raise Refused(
                f"{problem.filename or staging.root} cannot be written by {whoami()} "
                f"({problem.strerror}); choose another place with --to, or ask who owns it"
            ) from problem
        raise


# ---------------------------------------------------------------- filling


def _filled(
    staging: Staging,
    sources: Sequence[Source],
    expected: Sequence[tuple[str, str]],
    watch: Watch,
    say: Callable[[str], None],
) -> Staged:
    said = list(watch("reading sources", _described(sources, expected, staging), len(sources)))
    needed, files = _needed(sources)
    _room(staging.root, needed, say)
    work = staging.root / f"{WORK}{staging.slug}-{uuid.uuid4().hex[:8]}"
    content = work / staging.name
    try:
        content.mkdir(parents=True)
        for _ in watch("writing files", _unpacked(sources, content), files):
            pass
        names = _settled(content)
        facts = _checked(staging, work, content)
        known = {
            "kind": staging.kind,
            "name": staging.name,
            "count": len(names),
            "bytes": sum((content / name).stat().st_size for name in names),
            "sources": said,
            "checked": dict(facts),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "user": whoami(),
            "version": version("airsweep"),
            "files": {
                name: {"bytes": (content / name).stat().st_size, "blake2b": digest}
                for name, digest in zip(names, _digests(content, names, watch), strict=True)
            },
        }
        staging.place.parent.mkdir(exist_ok=True)
        # Before the rename: what lies at its place has a manifest.
        write_whole(staging.manifest, sealed_json(known))
        staging.manifest.chmod(0o644)
        try:
            os.rename(content, staging.place)
        except OSError as problem:
            if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return _there(staging, False, watch)  # nobody could lock, and he was faster
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Staged(staging.place, known, found=False)


def _checked(staging: Staging, work: Path, content: Path) -> Mapping[str, Any]:
    """
    Raises:
        ValueError: it is not what the name says; told without the folder that is gone by then.
    """
    try:
        return staging.check(work, content)
    except ValueError as problem:
        said = str(problem)
        for place in (content, work):
            said = said.replace(f"{place}/", "").replace(str(place), "what was given")
        raise ValueError(f"{said}; nothing was staged") from problem


def _described(
    sources: Sequence[Source], expected: Sequence[tuple[str, str]], staging: Staging
) -> Iterator[dict[str, Any]]:
    """What a manifest says of the sources, once their checksums are right."""
    for number, source in enumerate(sources):
        asked = expected[number] if number < len(expected) else None
        if source.path.is_dir():
            if asked:
                raise ValueError(f"{source.path} is a folder, which has no checksum; leave it out")
            yield {"folder": str(source.path.absolute())}
            continue
        published = staging.published.get(source.path.name)
        known = asked or (parse_checksum(published) if published else None)
        if known:
            found = checksum(source.path, known[0])
            if found != known[1]:
                whose = "--checksum says" if asked else "it was published with"
                hint = "" if asked else "; where it is another file of that name, rename it"
                raise ValueError(
                    f"{source.path} has {known[0]} {found}, but {whose} {known[1]}: it is damaged, "
                    f"was not downloaded to its end, or is another file{hint}"
                )
        yield {
            "file": source.path.name,
            "bytes": source.path.stat().st_size,
            "sha256": checksum(source.path, "sha256"),
        }


def _needed(sources: Sequence[Source]) -> tuple[int, int]:
    """Bytes and files of all sources together.

    Raises:
        ValueError: one is not harmless, or two have the same file.
    """
    whose: dict[str, Path] = {}
    total = 0
    for source in sources:
        mine = {}
        for member in source.members():
            if member.name in whose:
                raise ValueError(
                    f"{member.name} is in {whose[member.name]} and in {source.path}; give one of "
                    "the two"
                )
            mine[member.name] = source.path
            total += member.bytes
        whose |= mine
    if not whose:
        raise ValueError(f"no files in {', '.join(str(source.path) for source in sources)}")
    return total, len(whose)


def _room(root: Path, needed: int, say: Callable[[str], None]) -> None:
    free = shutil.disk_usage(root).free
    if needed > free:
        raise Refused(
            f"{size(needed)} are needed below {root}, and {size(free)} are free; make room, or "
            "choose another place with --to"
        )
    say(f"{size(needed)} to write, {size(free)} are free below {root}")


def _unpacked(sources: Sequence[Source], content: Path) -> Iterator[str]:
    for source in sources:
        try:
            yield from source.unpack(content)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as problem:
            place = Path(problem.filename).relative_to(content)
            raise ValueError(
                f"{source.path}: {place} cannot be written, since one name is a file and a folder"
            ) from problem


def _settled(content: Path) -> list[str]:
    """All files below a folder, that others may read from now on.

    Raises:
        ValueError: a link leads out of it.
    """
    found = []
    inside = os.path.realpath(content)
    for place, folders, files in os.walk(content):
        os.chmod(place, 0o755)
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if os.path.islink(path):
                real = os.path.realpath(path)
                if not real.startswith(inside + os.sep) or not os.path.exists(real):
                    raise ValueError(f"{path} is a link that leads out of the archive, or nowhere")
        for name in files:
            path = os.path.join(place, name)
            if not os.path.islink(path):
                os.chmod(path, 0o644)
            found.append(Path(path).relative_to(content).as_posix())
    return sorted(found)


def _digests(content: Path, names: Sequence[str], watch: Watch) -> list[str]:
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        read = threads.map(lambda name: file_digest(content / name), names)
        return list(watch("taking checksums", read, len(names)))


# ---------------------------------------------------------------- what is there


def _there(staging: Staging, verify: bool, watch: Watch) -> Staged:
    """
    Raises:
        ValueError: what is there was not staged, or was changed since.
    """
    known = _manifest(staging)
    files: Mapping[str, Mapping[str, Any]] = known["files"]
    again = f"remove {staging.place} and stage it again"
    there = _sizes(staging.place)
    for name, of in files.items():
        if there.get(name) != of["bytes"]:
            what = f"has {there[name]:,} bytes" if name in there else "is not there"
            raise ValueError(
                f"{staging.place} is not what was staged: {name} {what}, staged were "
                f"{of['bytes']:,}; {again}"
            )
    more = sorted(there.keys() - files.keys())
    if more:
        raise ValueError(
            f"{staging.place} is not what was staged: {more[0]} has come to it, and {len(more):,} "
            f"files in all; remove them, or {again}"
        )
    if verify:
        names = list(files)
        for name, digest in zip(names, _digests(staging.place, names, watch), strict=True):
            if digest != files[name]["blake2b"]:
                raise ValueError(
                    f"{staging.place} is not what was staged: {name} has other bytes; {again}"
                )
    return Staged(staging.place, known, found=True)


def _manifest(staging: Staging) -> dict[str, Any]:
    place, manifest = staging.place, staging.manifest
    try:
        data = manifest.read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{place} is there, but was not staged: {manifest.name} is not beside it, so what it "
            f"is cannot be told; move it away, and stage it with --from the folder that it is then"
        ) from None
    if not intact(data):
        raise ValueError(
            f"{manifest} is not as it was written; remove it and {place}, and stage it again"
        )
    known: dict[str, Any] = json.loads(data)
    if (known["kind"], known["name"]) != (staging.kind, staging.name):
        raise ValueError(
            f"{manifest} is of the {known['kind']} {known['name']}; choose another name, or "
            "another place with --to"
        )
    return known


def _sizes(place: Path) -> dict[str, int]:
    return {
        path.relative_to(place).as_posix(): path.stat().st_size
        for path in place.rglob("*")
        if path.is_file()
    }


# ---------------------------------------------------------------- one at a time


@contextmanager
def _turn(staging: Staging, say: Callable[[str], None]) -> Iterator[bool]:
    """Nobody else stages it meanwhile. False: the file system has no locks, so that cannot be told;
    then the rename decides."""
    lock = staging.root / f"{WORK}{staging.slug}.lock"  # it stays: who waits has it open
    with ExitStack() as held:
        try:
            held.enter_context(flocked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            say(f"somebody else stages {staging.name} in {staging.root} now; waiting for that")
            held.enter_context(flocked(lock, fcntl.LOCK_EX))
        except OSError as problem:
            if problem.errno in (*SHORT, *NOT_MINE):
                raise
            yield False
            return
        yield True


def _clean(staging: Staging, alone: bool) -> None:
    """Remove what killed ones have left of the same name."""
    now = time.time()
    for work in staging.root.glob(f"{WORK}{staging.slug}-????????"):
        if alone or now - work.stat().st_mtime > ABANDONED:
            shutil.rmtree(work, ignore_errors=True)


# ---------------------------------------------------------------- of what kind


def stage_dataset(
    name: str,
    given: Sequence[Path],
    root: Path,
    checksums: Sequence[str] = (),
    verify: bool = False,
    watch: Watch = unwatched,
    say: Callable[[str], None] = lambda line: None,
) -> Staged:
    """A dataset below a data root, checked as `airsweep data check` does.

    Args:
        name: of a dataset; or folder:<path>, which is copied to `<root>/<its own name>`.
        given: its archives and lists as they were downloaded, or a folder that holds them unpacked.

    Raises:
        ValueError, Refused: see `stage`.
    """
    from air_core.datasets import get_dataset
    from air_core.datasets.image_folder import PREFIX
    from air_core.datasets.published import ARCHIVES

    if name.startswith(PREFIX):
        if given:
            raise ValueError(f"{name} says itself what is copied; leave --from out")
        folder = Path(name.removeprefix(PREFIX)).expanduser().absolute()
        sources: list[Source] = [FolderSource(folder)] if folder.is_dir() else []
        own = Staging("dataset", folder.name, root, _checks(None, watch), {})
        return stage(own, sources, checksums, verify, watch, say)
    dataset = get_dataset(name)
    if name in WITH_A_PACKAGE:
        raise ValueError(f"{name} needs no data root ({dataset.get}): there is nothing to stage")
    staging = Staging("dataset", name, root, _checks(name, watch), ARCHIVES.get(name, {}))
    sources = [_unpacked_already(p, dataset) if p.is_dir() else open_source(p) for p in given]
    return stage(staging, sources, checksums, verify, watch, say)


def _unpacked_already(folder: Path, dataset: Dataset) -> FolderSource:
    """What of a folder is the dataset: it may be a data root that holds others too."""
    base = folder / dataset.name
    try:
        files = dataset.files(folder)
    except ValueError:  # not all of it is there; another source may have the rest
        return FolderSource(folder)
    if not all(base in file.parents for file in files):
        base = folder
    return FolderSource(base, frozenset(file.relative_to(base).parts[0] for file in files))


def _checks(name: str | None, watch: Watch) -> Callable[[Path, Path], Mapping[str, Any]]:
    """Is what was filled the published dataset; None: a folder of one's own?"""

    def checks(work: Path, content: Path) -> Mapping[str, Any]:
        from air_core.datasets.image_folder import PREFIX
        from orchestrator.datacheck import check

        asked, root = (name, work) if name else (f"{PREFIX}{content}", None)
        found = check(asked, root, lambda each, total: watch("opening images", each, total))
        if found.difference is not None:
            raise ValueError(found.difference)
        return {"images": found.images, "classes": len(found.classnames), "parts": found.parts}

    return checks


def stage_model(
    name: str,
    given: Path | None,
    root: Path,
    checksums: Sequence[str] = (),
    verify: bool = False,
    watch: Watch = unwatched,
    say: Callable[[str], None] = lambda line: None,
) -> Staged:
    """CLIP weights or a diffusers folder at `<root>/<name>`, checked that a job can read it.

    Raises:
        ValueError, Refused: see `stage`.
    """
    from orchestrator.modelcheck import check_model, model_source

    staging = Staging("model", name, root, lambda work, content: check_model(name, content), {})
    sources = [model_source(name, given)] if given is not None else []
    return stage(staging, sources, checksums, verify, watch, say)
