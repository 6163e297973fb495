"""Requests for sweeps: a sweep file with options, or the name of a sweep that has run before."""

from __future__ import annotations

import difflib
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.environment import in_ray_job
from orchestrator.errors import Refused
from orchestrator.formatting import relative_path
from orchestrator.planning.plan import Plan, plan_sweep
from orchestrator.planning.resolve import resolver_of
from orchestrator.spec import SweepSpec, cells_of, find_sweep, load_sweep
from orchestrator.spec.marked_yaml import DICT, document_of
from orchestrator.spec.sweep import option_words, smoke_variant
from orchestrator.spec.sweep_file import sweep_from_document
from orchestrator.store import (
    SweepLocation,
    is_bucket,
    open_store,
    read_resolved,
    smoke_store,
    store_folder,
    store_of_smoke,
)

SHOWN = 3  # recorded sweeps in a message, those with the most similar names


@dataclass(frozen=True, repr=False)
class SweepRequest:
    """A checked sweep with the options it was read with: the input of `plan`, `run` and `submit`.

    `read_request` makes one from a sweep file.

    Attributes:
        spec: the sweep after all options were applied.
        sets: `--set KEY=VALUE` options, which change keys of the file.
        only: `--only KEY=VALUE` options, which select cells.
        smoke: whether `spec` is the smoke version: two points of a search, one seed and few images,
            in a store of its own.
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
            "source": "" if self.spec.source == DICT else self.spec.source,
        }

    @property
    def options(self) -> list[str]:
        """The options as words of a command line, to append after the sweep file."""
        return option_words(self.sets, self.only, self.smoke)

    def __repr__(self) -> str:
        cells = len(cells_of(self.spec))
        return f"{self.spec.source}: sweep {self.spec.name}, {cells} cells"


def read_request(
    spec: str | Path | Mapping[str, Any],
    sets: Sequence[str] = (),
    only: Sequence[str] = (),
    smoke: bool = False,
) -> SweepRequest:
    """Read and check a sweep file, and apply options to it.

    Args:
        spec: path of a sweep file, the bare name of one, such as `quickstart`, or its content.
        sets: `KEY=VALUE` texts that change keys of the file, such as `iterations=3`.
        only: `KEY=VALUE` texts that select cells, such as `method="air"`.
        smoke: whether to shrink the sweep to a smoke test.

    Raises:
        SpecError: the file or an option is invalid; the message has file, line and column.
    """
    if isinstance(spec, Mapping):
        sweep = sweep_from_document(document_of(spec), sets, only)
    else:
        sweep = load_sweep(find_sweep(str(spec)), sets=sets, only=only)
    return SweepRequest(smoke_variant(sweep) if smoke else sweep, tuple(sets), tuple(only), smoke)


def location_for(
    sweep: SweepRequest, store: str | Path, data_root: str | Path | None
) -> SweepLocation:
    """Locate a requested sweep: its store, its project, and the folder of its event log.

    The sweep need not have run before. A smoke request uses the smoke store beside `store`, so its
    results never mix with those of the full sweep.

    Args:
        store: folder or bucket URI.
        data_root: folder of real datasets; None: AIRSWEEP_DATA.

    Raises:
        Refused: the store is a relative path inside a Ray job.
        StoreRefused: the store has another format.
        BucketUnreachable: the bucket of the store is unreachable.
    """
    spec, store = sweep.spec, smoke_store(store) if sweep.smoke else store
    if not is_bucket(store) and not store_folder(store).is_absolute() and in_ray_job():
        raise relative_store_error(store)
    data = data_root or os.environ.get("AIRSWEEP_DATA")
    data_folder = Path(data) if data else None
    location = SweepLocation(open_store(store), project_of(spec), spec.name, data_folder)
    return location.refresh()


def plan_of(sweep: SweepSpec, location: SweepLocation) -> Plan:
    """Plan a sweep at a location."""
    return plan_sweep(
        sweep, location.store, resolver_of(location, sweep.folders), location.event_log()
    )


def location_named(name: str, store: str | Path) -> SweepLocation:
    """Locate a sweep that has run before, by its name.

    Args:
        name: `NAME` or `PROJECT/NAME`, or the sweep file, which ends with `.yaml`. Without a
            project, AIRSWEEP_PROJECT or `default` is used.
        store: folder or bucket URI of the store that recorded the sweep.

    Raises:
        ValueError: the store has no sweep of this name; the message names similar ones.
    """
    project, _, short = name.rpartition("/")
    project = project or os.environ.get("AIRSWEEP_PROJECT") or "default"
    if name.endswith(".yaml"):
        sweep = load_sweep(find_sweep(name))
        project, short = project_of(sweep), sweep.name
    opened = open_store(store)
    names = opened.sweeps()
    if (project, short) not in names:
        wanted, known = f"{project}/{short}", ["/".join(pair) for pair in names]
        recorded = ", ".join(difflib.get_close_matches(wanted, known, n=SHOWN, cutoff=0.0))
        if len(known) > SHOWN:
            recorded += f" and {len(known) - SHOWN} more, see `airsweep list`"
        smoke = smoke_store(store)
        in_smoke = (project, short) in open_store(smoke).sweeps()
        hint = "if it ran with --store, give the same"
        if in_smoke:
            hint = f"its smoke run is in another store: --store {shlex.quote(str(smoke))}"
        raise ValueError(
            f"no sweep {wanted} in {store}; recorded sweeps: {recorded or 'none'}; {hint}"
        )
    return SweepLocation(opened, project, short, None).refresh()


def request_again(location: SweepLocation) -> SweepRequest:
    """The request of a sweep's last run, from its file as it is now; of a dict, as it was.

    Raises:
        ValueError: the file does not exist, or is invalid.
    """
    origin = read_resolved(location)
    file = origin.get("source") or location.folder / "spec.yaml"
    sets, only = (origin.get(name, ()) for name in ("sets", "only"))
    return read_request(file, sets, only, bool(origin.get("smoke")))


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


# ---------------------------------------------------------------- commands in messages


def run_command(location: SweepLocation, origin: Mapping[str, Any] | None = None) -> str:
    """The command that runs a sweep again, with all options that select it.

    Args:
        origin: see `complete_origin`. Default: that of the last run.
    """
    origin = read_resolved(location) if origin is None else origin
    store = location.store.name
    given = store_of_smoke(store) if origin.get("smoke") else store
    options = (origin.get("sets", []), origin.get("only", []), bool(origin.get("smoke")))
    file = origin.get("source") or str(location.folder / "spec.yaml")
    words = [file, *option_words(*options), *_store_words(given)]
    root, usual = origin.get("data_root"), os.environ.get("AIRSWEEP_DATA")
    if root and not (usual and Path(root) == Path(usual).absolute()):
        words += ["--data-root", relative_path(Path(root))]
    return shlex.join(["airsweep", "run", *words])


def results_command(command: str, location: SweepLocation, *options: str) -> str:
    """A command that reads a recorded sweep, such as `airsweep table NAME --store STORE`."""
    usual = os.environ.get("AIRSWEEP_PROJECT") or "default"
    project = "" if location.project == usual else f"{location.project}/"
    words = [project + location.name, *options, *_store_words(location.store.name)]
    return shlex.join(["airsweep", *command.split(), *words])


def store_command(command: str, location: SweepLocation) -> str:
    """A command without a sweep, such as `airsweep ui --store STORE`."""
    return shlex.join(["airsweep", *command.split(), *_store_words(location.store.name)])


def complete_origin(origin: Mapping[str, Any], location: SweepLocation) -> dict[str, Any]:
    """`SweepRequest.origin`, and the data root."""
    root = location.data_root
    return {**origin, **({} if root is None else {"data_root": str(root.absolute())})}


def _store_words(store: str) -> list[str]:
    """The option `--store`, unless a command finds the store by default."""
    usual = os.environ.get("AIRSWEEP_STORE") or "runs"
    if is_bucket(store):
        return [] if store == usual else ["--store", store]
    is_usual = not is_bucket(usual) and Path(store) == store_folder(usual).absolute()
    return [] if is_usual else ["--store", relative_path(Path(store))]


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
