"""Sweeps as people ask for them: by a file and options, or by the name of one that was run."""

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
from orchestrator.spec.sweep import option_words
from orchestrator.spec.sweep import smoke as smoked
from orchestrator.store import SweepLocation, folder_of, is_bucket, open_store, smoke_store
from orchestrator.store.location import location_named as named
from orchestrator.store.location import recorded_names


@dataclass(frozen=True, repr=False)
class SweepRequest:
    """A sweep, checked, and how it was asked for."""

    spec: SweepSpec
    sets: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    smoke: bool = False

    @property
    def origin(self) -> dict[str, Any]:
        """What is kept with a sweep, so that it can be read again as it was asked for."""
        return {
            "sets": list(self.sets),
            "only": list(self.only),
            "smoke": self.smoke,
            "source": self.spec.source,
        }

    @property
    def options(self) -> list[str]:
        """The same as words of a command, behind the file."""
        return option_words(self.sets, self.only, self.smoke)

    def __repr__(self) -> str:
        cells = len(cells_of(self.spec))
        return f"{self.spec.source}: sweep {self.spec.name}, {cells} cells"


def read_request(
    spec: str | Path, sets: Sequence[str] = (), only: Sequence[str] = (), smoke: bool = False
) -> SweepRequest:
    """A sweep from a file, or from the bare name of one.

    Raises:
        SpecError: the first thing that is wrong.
    """
    sweep = load_sweep(find_sweep(str(spec)), sets=sets, only=only)
    return SweepRequest(smoked(sweep) if smoke else sweep, tuple(sets), tuple(only), smoke)


def location_for(sweep: SweepRequest, store: str | Path, data_root: Path | None) -> SweepLocation:
    """Where it goes; a smoke run into a store of its own. Raises as `place_of`."""
    return location_of(sweep.spec, smoke_store(store) if sweep.smoke else store, data_root)


def plan_of(sweep: SweepSpec, location: SweepLocation) -> Plan:
    return plan_sweep(sweep, location.store, resolver_of(location), location.event_log())


def location_named(name: str, store: str | Path) -> SweepLocation:
    """A sweep that was run before.

    Raises:
        ValueError: there is none of this name.
    """
    project, _, short = name.rpartition("/")
    project = project or os.environ.get("AIRSWEEP_PROJECT") or "default"
    opened = open_store(store)
    names = recorded_names(opened)
    if (project, short) not in names:
        there = ", ".join("/".join(one) for one in names)
        raise ValueError(f"no sweep {project}/{short} in {store}; there: {there or 'none yet'}")
    return named(opened, project, short)


def location_of(sweep: SweepSpec, store: Path | str, data_root: Path | None) -> SweepLocation:
    """Where a sweep goes.

    Raises:
        Refused: a relative store inside a Ray job.
        StoreRefused: another version of airsweep made the store.
        RemoteAway: its bucket cannot be read.
    """
    relative = not is_bucket(store) and not folder_of(store).is_absolute()
    if relative and in_ray_job():
        raise lost_store(store)
    project = project_of(sweep)
    data = data_root or os.environ.get("AIRSWEEP_DATA") or sweep.data_root
    location = SweepLocation(open_store(store), project, sweep.name, Path(data) if data else None)
    return location.refresh()


def lost_store(store: Path | str) -> Refused:
    """What is wrong with a relative store of a job."""
    return Refused(
        f"the store {str(store)!r} is relative, and this is a Ray job: its working directory "
        "is thrown away at the end; give --store or AIRSWEEP_STORE an absolute folder that "
        "every node sees, or s3://bucket/prefix"
    )


def project_of(sweep: SweepSpec) -> str:
    """Whose sweep this is."""
    return sweep.project or os.environ.get("AIRSWEEP_PROJECT") or "default"


# ---------------------------------------------------------------- options from Python values


def options(values: Mapping[str, Any] | Iterable[str]) -> list[str]:
    """`KEY=VALUE` as the command line has it; texts that are options already stay.

    >>> options({"iterations": 3, "lora": None, "dataset": "folder:my_images", "seeds": [1, 2]})
    ['iterations=3', 'lora=null', 'dataset="folder:my_images"', 'seeds=[1, 2]']
    """
    if isinstance(values, str):
        return [values]
    if not isinstance(values, Mapping):
        return list(values)
    return [f"{key}={_written(value)}" for key, value in values.items()]


def choices_of(values: Mapping[str, Any] | Iterable[str]) -> list[str]:
    """The same where an option lists values of an axis.

    >>> choices_of({"method": ["air", "cpl"], "lora.rank": 4})
    ['method="air","cpl"', 'lora.rank=4']
    """
    if not isinstance(values, Mapping):
        return options(values)
    listed = {k: v if isinstance(v, list | tuple) else [v] for k, v in values.items()}
    return [f"{key}={','.join(map(_written, of))}" for key, of in listed.items()]


def _written(value: Any) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
