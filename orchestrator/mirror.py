"""A store in a bucket, through a folder of this machine. Knows no spec.

What is made is put into the bucket first and into the folder then; what is read is pulled into the
folder once. So all who open files go on opening files, and the folder can be thrown away at any
time.

In the bucket an artifact lies below `artifacts/<stage>/v<recipe>/<digest12>/`, its files under
names that begin with their digests: two builders of one key never write over each other's. Its
`record.json` is put last and once, and names the files that count; without it the rest is nothing.
Shards are put once. A bucket has no rename, and needs none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from air_core.seal import intact
from orchestrator.files import file_digest, write_beside
from orchestrator.keys import ArtifactKey
from orchestrator.remote import Remote, side_by_side

CACHE = "AIRSWEEP_CACHE"
RECORD = "record.json"
FRESH = 5.0  # seconds for which a listing may say that something is not there


def mirror_root(remote: Remote) -> Path:
    """The folder of this machine for a bucket."""
    cache = os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / (
        "airsweep/stores"
    )
    whole = f"{remote.endpoint or os.environ.get('AWS_ENDPOINT_URL', '')} {remote}"
    digest = hashlib.blake2b(whole.encode(), digest_size=6).hexdigest()
    name = f"{remote.bucket}/{remote.prefix}".rpartition("/")[2] or remote.bucket
    return Path(cache).expanduser().absolute() / f"{name}-{digest}"


class Mirror:
    """Keeps one folder and one bucket together."""

    def __init__(self, remote: Remote, root: Path) -> None:
        self.remote, self.root = remote, root
        self._whole: set[str] = set()  # artifacts that are there; they never go
        self._surveyed: dict[str, float] = {}  # when a folder of artifacts was listed
        self._rows: dict[str, tuple[float, dict[str, int]]] = {}  # when, and bytes by name

    def look_again(self) -> None:
        """What was not there may be there now."""
        self._surveyed.update(dict.fromkeys(self._surveyed, 0.0))
        self._rows = {place: (0.0, files) for place, (_, files) in self._rows.items()}

    # ---------------------------------------------------------------- artifacts

    def survey(self, keys: Iterable[ArtifactKey]) -> None:
        """Learn what there is of many keys, in few requests."""
        for folder in dict.fromkeys(_folder(key) for key in keys):
            if self._young(self._surveyed.get(folder)):
                continue
            started = time.monotonic()
            for one in self.remote.listed(folder):
                if one.name.endswith(f"/{RECORD}"):
                    self._whole.add(f"{folder}/{one.name.removesuffix(f'/{RECORD}')}")
            self._surveyed[folder] = started

    def has(self, key: ArtifactKey) -> bool:
        place = _place(key)
        if place in self._whole:
            return True
        young = self._young(self._surveyed.get(_folder(key)))
        if not young and self.remote.has(f"{place}/{RECORD}"):
            self._whole.add(place)
        return place in self._whole

    def record(self, key: ArtifactKey) -> bytes | None:
        """The record of an artifact, without its files; None: it is not there."""
        place, kept = _place(key), self._kept(key)
        with suppress(FileNotFoundError):
            here = kept.read_bytes()
            if intact(here) is not False:  # a damaged copy is fetched again
                return here
        data = self.remote.get(f"{place}/{RECORD}")
        if data is not None:
            self._whole.add(place)
            write_beside(kept, data)
        return data

    def _kept(self, key: ArtifactKey) -> Path:
        return self.root / "records" / f"{_place(key).removeprefix('artifacts/')}.json"

    def publish(self, key: ArtifactKey, work: Path, record: bytes) -> bool:
        """Put what was built into the bucket. False: somebody else was faster, and his counts."""
        place = _place(key)
        names = self._names(record)
        side_by_side(lambda name: self.remote.send(f"{place}/{names[name]}", work / name), names)
        won = self.remote.put_once(f"{place}/{RECORD}", record)
        self._kept(key).unlink(missing_ok=True)
        if not won:
            theirs = set(self._names(self.remote.get(f"{place}/{RECORD}") or b"{}").values())
            for name in set(names.values()) - theirs:
                self.remote.delete(f"{place}/{name}")
        self._whole.add(place)
        return won

    def pull(self, key: ArtifactKey, place: Path) -> bool:
        """Bring an artifact into the folder; False: it is not there.

        Raises:
            ValueError: a file is not what the record says.
        """
        known = self._kept(key).exists()
        record = self.record(key)
        if record is None:
            return False
        try:
            self._pull_files(key, place, record)
        except ValueError:
            if not known:
                raise
            # It may have been removed by hand since we read its record, and made again.
            self._kept(key).unlink(missing_ok=True)
            self._whole.discard(_place(key))
            return self.pull(key, place)
        return True

    def _pull_files(self, key: ArtifactKey, place: Path, record: bytes) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        work = place.parent / f".{key.digest[:12]}-{uuid.uuid4().hex[:8]}"
        work.mkdir()
        try:
            digests = json.loads(record)["files"]
            names = self._names(record)
            side_by_side(lambda name: self._fetch(key, names[name], work / name), names)
            for name, digest in digests.items():
                if file_digest(work / name) != digest:
                    raise ValueError(
                        f"{self.called(key, names[name])} is not what was written; "
                        f"remove {RECORD} beside it and run again"
                    )
            (work / RECORD).write_bytes(record)
            if not (place / RECORD).is_file():  # nobody has pulled it meanwhile
                shutil.rmtree(place, ignore_errors=True)
                os.rename(work, place)
        except OSError:
            if not (place / RECORD).is_file():
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _fetch(self, key: ArtifactKey, name: str, file: Path) -> None:
        if not self.remote.download(f"{_place(key)}/{name}", file):
            raise ValueError(
                f"{self.called(key, name)} is gone; remove {RECORD} beside it and run again"
            )

    def _names(self, record: bytes) -> dict[str, str]:
        """Names in the bucket by names in the folder."""
        files: Mapping[str, str] = json.loads(record).get("files", {})
        for name in files:
            # It becomes a file of this machine, and whoever writes to the bucket may have put it.
            if Path(name).name != name or name in ("", ".."):
                raise ValueError(f"a record in {self.remote} names {name!r}, which is no file name")
        return {name: stored_name(name, digest) for name, digest in files.items()}

    def _young(self, when: float | None) -> bool:
        return when is not None and time.monotonic() - when < FRESH

    # ---------------------------------------------------------------- rows

    def shards(self, key: ArtifactKey) -> dict[str, int]:
        """Bytes by name of what a row, or an artifact, has in the bucket."""
        place = _place(key)
        when, files = self._rows.get(place, (None, {}))
        if not self._young(when):
            started = time.monotonic()
            files = {one.name: one.size for one in self.remote.listed(place)}
            self._rows[place] = (started, files)
        return files

    def called(self, key: ArtifactKey, name: str) -> str:
        """A file of an artifact or row, for people."""
        return f"{self.remote}/{_place(key)}/{name}"

    def has_shard(self, key: ArtifactKey, name: str) -> bool:
        """Asked anew each time."""
        return self.remote.has(f"{_place(key)}/{name}")

    def put_shard(self, key: ArtifactKey, name: str, data: bytes) -> bytes:
        """Put a file of a row; what is there now, which may be what somebody faster has put."""
        place = _place(key)
        won = self.remote.put_once(f"{place}/{name}", data)
        if place in self._rows:
            self._rows[place][1][name] = len(data)
        return data if won else self.remote.get(f"{place}/{name}") or data

    def pull_shards(self, key: ArtifactKey, folder: Path, names: Collection[str]) -> None:
        """Bring files of a row into the folder, those that are there."""
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            side_by_side(lambda name: self._pull(f"{_place(key)}/{name}", folder / name), missing)

    def count_up(self, key: ArtifactKey, name: str, most: int) -> int:
        """Leave a mark; how many there were, at most `most`."""
        for count in range(most):
            if self.remote.put_once(
                f"{_place(key)}/{name}{count}", b"x" + os.urandom(8).hex().encode()
            ):
                return count
        return most

    def count_off(self, key: ArtifactKey, name: str, count: int) -> None:
        """Take back the first so many marks."""
        for number in range(count):
            self.remote.delete(f"{_place(key)}/{name}{number}")

    # ---------------------------------------------------------------- files that change

    def push(self, path: Path) -> None:
        """Put a file of the folder into the bucket, over what is there."""
        self.remote.send(self._name(path), path)

    def push_data(self, path: Path, data: bytes) -> None:
        """The same of what a file was a moment ago: readers of this machine may replace it."""
        self.remote.put(self._name(path), data)

    def push_once(self, path: Path) -> None:
        self.remote.put_once(self._name(path), path.read_bytes())

    def pull_file(self, path: Path) -> bool:
        """Bring a file into the folder, over what is there; False: the bucket has none."""
        return self._pull(self._name(path), path)

    def pull_folder(self, folder: Path, but: Collection[str] = ()) -> None:
        """Bring the files of a folder that have changed, not those of folders in it."""
        tags = folder / ".tags.json"
        known: dict[str, Any] = json.loads(tags.read_text()) if tags.exists() else {}
        there = {
            one.name: one.etag
            for one in self.remote.listed(self._name(folder), deep=False)
            if one.name not in but
        }
        changed = [
            name
            for name, tag in there.items()
            if known.get(name) != tag or not (folder / name).exists()
        ]
        if changed:
            folder.mkdir(parents=True, exist_ok=True)
            side_by_side(lambda name: self.pull_file(folder / name), changed)
            write_beside(tags, json.dumps(there).encode())

    def delete(self, path: Path) -> None:
        self.remote.delete(self._name(path))

    def _pull(self, name: str, file: Path) -> bool:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}-{uuid.uuid4().hex[:8]}")
        try:
            found = self.remote.download(name, temporary)
            if found:
                os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
        return found

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def stored_name(name: str, digest: str) -> str:
    """A file of an artifact in the bucket: two builders' never lie in each other's place."""
    return f"{digest[:12]}-{name}"


def _folder(key: ArtifactKey) -> str:
    return f"artifacts/{key.stage}/v{key.recipe}"


def _place(key: ArtifactKey) -> str:
    return f"{_folder(key)}/{key.digest[:12]}"
