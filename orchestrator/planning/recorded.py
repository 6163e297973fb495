"""Sweeps that a store has recorded: what they need, and what has changed since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from air_core.datasets.unlabelled import LABELS
from air_core.models.weights import local_path
from orchestrator.formatting import relative_path
from orchestrator.planning.history import read_history
from orchestrator.planning.ledger import Ledger, read_ledger
from orchestrator.planning.requests import run_command
from orchestrator.planning.resolve import Resolver
from orchestrator.store import ArtifactStore, SweepLocation, recorded_locations
from orchestrator.store.gc import StoreRequirements


def changed_folders(ledger: Ledger, location: SweepLocation) -> Iterator[str]:
    """Sentences on the folders of images that are not as in the last run of a sweep.

    A folder is read only if a text file or the list of files changed after the run had begun.
    """
    refs = [data.ref for data in ledger.data.values() if data.ref.name.startswith("folder:")]
    if not refs:
        return
    resolver = Resolver(location.store.root / "digests.json", location.data_root)
    for ref in refs:
        folder, what, counts = local_path(ref.name.removeprefix("folder:")), ref.name, ""
        try:
            inside = [p for p in folder.iterdir() if p.suffix in (".csv", ".txt") or p.is_dir()]
            newest = max(path.stat().st_mtime for path in (folder, *inside))
            if (
                newest <= ledger.history.begun
                or (now := resolver.dataset_by_name(ref.name).ref) == ref
            ):
                continue
            if ref.labelled not in (None, now.labelled):
                what = relative_path(folder / LABELS)
                counts = f" ({ref.labelled:,} -> {now.labelled:,} labelled images)"
        except (ValueError, OSError):  # the folder has no images any more
            pass
        yield f"{what} has changed since this run{counts}: `{run_command(location)}` uses it"


def all_requirements(store: ArtifactStore) -> StoreRequirements:
    """List the artifacts that the recorded sweeps of a store need: those of their ledgers, and the
    results in their event logs."""
    readable, unread = {}, {}
    for location in recorded_locations(store):
        try:
            readable[location.full_name] = {*_needed(location)}
        except (ValueError, OSError) as problem:
            unread[location.full_name] = str(problem).partition("\n")[0]
    return StoreRequirements(readable, unread)


def _needed(location: SweepLocation) -> Iterator[str]:
    ledger = read_ledger(location)
    yield from (slot.key.digest[:12] for slot in ledger.slots)
    yield from (digest[:12] for digest in ledger.history.first)
    for needs in ledger.needs.values():
        for digest, whole in needs.items():
            if whole is None or not location.store.has(whole):
                yield digest


def count_by_sweep(store: ArtifactStore, keys: Iterable[str], but: SweepLocation) -> Counter[str]:
    """Count the trials of `keys` by the recorded sweep that computed them.

    Args:
        but: a sweep to leave out.
    """
    remaining, counts = set(keys), Counter[str]()
    for location in recorded_locations(store):
        if location.folder == but.folder:
            continue
        first = read_history(location.event_log()).first
        done = {key for key, (_, state) in first.items() if state in ("done", "recovered")}
        counts[location.full_name] += len(done & remaining)
        remaining -= done
    return +counts
