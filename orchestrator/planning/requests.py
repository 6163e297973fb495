"""Requests for sweeps: a sweep file with options, or the name of a sweep that has run before."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.environment import in_ray_job
from orchestrator.errors import Refused
from orchestrator.planning.plan import Plan, plan_sweep
from orchestrator.planning.resolve import resolver_of
from orchestrator.spec import SweepSpec, cells_of, find_sweep, load_sweep
from orchestrator.spec.sweep import option_words, smoke_variant
from orchestrator.store import SweepLocation, is_bucket, open_store, smoke_store, store_folder
from orchestrator.store.location import recorded_location, recorded_names


@dataclass(frozen=True, repr=False)
class SweepRequest:
    """A checked sweep with the options it was read with: the input of `plan`, `run` and `submit`.

    `read_request` makes one from a sweep file.

    Attributes:
        spec: the sweep after all options were applied.
        sets: `--set KEY=VALUE` options, which change keys of the file.
        only: `--only KEY=VALUE` options, which select cells.
        smoke: whether `spec` is the smoke version: one point, one seed and few images, in a
            store of its own.
    """

    spec: SweepSpec
    sets: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    smoke: bool = False

    @property
    def origin(self) -> dict[str, Any]:
        """The options and the file as the store records them, to read the same sweep again."""
        return {
            "sets": list(self.sets),
            "only": list(self.only),
            "smoke": self.smoke,
            "source": self.spec.source,
        }

    @property
    def options(self) -> list[str]:
        """The options as words of a command line, to append after the sweep file."""
        return option_words(self.sets, self.only, self.smoke)

    def __repr__(self) -> str:
        cells = len(cells_of(self.spec))
        return f"{self.spec.source}: sweep {self.spec.name}, {cells} cells"


def read_request(
    spec: str | Path, sets: Sequence[str] = (), only: Sequence[str] = (), smoke: bool = False
) -> SweepRequest:
    """Read and check a sweep file, and apply options to it.

    Args:
        spec: path of a sweep file, or the bare name of one, such as `quickstart`.
        sets: `KEY=VALUE` texts that change keys of the file, such as `iterations=3`.
        only: `KEY=VALUE` texts that select cells, such as `method="air"`.
        smoke: whether to shrink the sweep to a smoke test.

    Raises:
        SpecError: the file or an option is invalid; the message has file, line and column.
    """
    sweep = load_sweep(find_sweep(str(spec)), sets=sets, only=only)
    return SweepRequest(smoke_variant(sweep) if smoke else sweep, tuple(sets), tuple(only), smoke)


def location_for(sweep: SweepRequest, store: str | Path, data_root: Path | None) -> SweepLocation:
    """Locate a requested sweep: its store, its project, and the folder of its event log.

    The sweep need not have run before. A smoke request uses the smoke store beside `store`, so its
    results never mix with those of the full sweep.

    Args:
        store: folder or bucket URI.
        data_root: folder of real datasets; None: AIRSWEEP_DATA, else `data_root` of the sweep file.

    Raises:
        Refused: the store is a relative path inside a Ray job.
        StoreRefused: an incompatible version of airsweep wrote the store.
        BucketUnreachable: the bucket of the store is unreachable.
    """
    return location_of(sweep.spec, smoke_store(store) if sweep.smoke else store, data_root)


def plan_of(sweep: SweepSpec, location: SweepLocation) -> Plan:
    """Plan a sweep at a location."""
    return plan_sweep(sweep, location.store, resolver_of(location), location.event_log())


def location_named(name: str, store: str | Path) -> SweepLocation:
    """Locate a sweep that has run before, by its name.

    Args:
        name: `NAME` or `PROJECT/NAME`. Without a project, AIRSWEEP_PROJECT or `default` is used.
        store: folder or bucket URI of the store that recorded the sweep.

    Raises:
        ValueError: the store has no sweep of this name; the message lists the sweeps it has.
    """
    project, _, short = name.rpartition("/")
    project = project or os.environ.get("AIRSWEEP_PROJECT") or "default"
    opened = open_store(store)
    names = recorded_names(opened)
    if (project, short) not in names:
        recorded = ", ".join("/".join(pair) for pair in names)
        raise ValueError(
            f"no sweep {project}/{short} in {store}; recorded sweeps: {recorded or 'none'}"
        )
    return recorded_location(opened, project, short)


def location_of(sweep: SweepSpec, store: Path | str, data_root: Path | None) -> SweepLocation:
    """Locate a sweep in a store, as `location_for` does, without a change for smoke requests."""
    relative = not is_bucket(store) and not store_folder(store).is_absolute()
    if relative and in_ray_job():
        raise relative_store_error(store)
    project = project_of(sweep)
    data = data_root or os.environ.get("AIRSWEEP_DATA") or sweep.data_root
    location = SweepLocation(open_store(store), project, sweep.name, Path(data) if data else None)
    return location.refresh()


def relative_store_error(store: Path | str) -> Refused:
    """The error for a relative store path in a Ray job."""
    return Refused(
        f"the store {str(store)!r} is relative, and this is a Ray job: its working directory is "
        "deleted when the job ends; set --store or AIRSWEEP_STORE to an absolute folder that "
        "every node mounts, or to s3://bucket/prefix"
    )


def project_of(sweep: SweepSpec) -> str:
    """The project of a sweep: of its file, else AIRSWEEP_PROJECT, else `default`."""
    return sweep.project or os.environ.get("AIRSWEEP_PROJECT") or "default"


# ---------------------------------------------------------------- options from Python values


def set_options(values: Mapping[str, Any] | Iterable[str]) -> list[str]:
    """Convert Python values to the `KEY=VALUE` texts of `--set`.

    Args:
        values: a dict from key to value, or texts in that form, which are returned unchanged.

    >>> set_options({"iterations": 3, "lora": None, "dataset": "folder:my_images", "seeds": [1, 2]})
    ['iterations=3', 'lora=null', 'dataset="folder:my_images"', 'seeds=[1, 2]']
    """
    if isinstance(values, str):
        return [values]
    if not isinstance(values, Mapping):
        return list(values)
    return [f"{key}={_json(value)}" for key, value in values.items()]


def only_options(values: Mapping[str, Any] | Iterable[str]) -> list[str]:
    """Convert Python values to the `KEY=VALUE,...` texts of `--only`.

    >>> only_options({"method": ["air", "cpl"], "lora.rank": 4})
    ['method="air","cpl"', 'lora.rank=4']
    """
    if not isinstance(values, Mapping):
        return set_options(values)
    listed = {k: v if isinstance(v, list | tuple) else [v] for k, v in values.items()}
    return [f"{key}={','.join(map(_json, choices))}" for key, choices in listed.items()]


def _json(value: Any) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
