"""Cost and benefit of airsweep, compared with scripts that run the same grid without it.

A grid (`peer_scripts/grid.yaml`: 5 methods x 3 seeds on the digits, one LoRA, its images) runs four
times on two workers, each time in a new folder: with `airsweep run`, a joblib loop, an Optuna loop
on sqlite, and Ray Tune with its MLflow callback. The scripts in `peer_scripts/` call the same
method on the same inputs, which they build once with the stages of airsweep and store. The
benchmark measures the wall time from an empty folder, the lines of user code, the trials that are
computed again after a `kill -9` in the middle of the grid and a second start, and the trials that
are computed again after a method is added to the grid.

    python benchmarks/peers.py [--whole] [--walls 1] [--only joblib]

Without `--whole` the grid has fewer images, LoRA steps and rounds and takes a quarter of an hour on
two cores. The last line is JSON: `ratio` is the wall time of airsweep divided by that of the joblib
loop (target: at most 1.1).
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import time
import tokenize
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import environment, options, progress, report

SCRIPTS = Path(__file__).parent / "peer_scripts"
GRID = SCRIPTS / "grid.yaml"
ADDED = "grip"  # the method that is added to the grid
CUT = ("images_per_class=32", "lora.steps=60", "iterations=4", "auxiliary.k_step=24")
PEERS = {
    "airsweep": None,
    "joblib": "joblib_loop.py",
    "optuna": "optuna_loop.py",
    "ray_tune": "ray_tune.py",
}


def command(peer: str, spec: Path, folder: Path, sets: Sequence[str]) -> list[str]:
    script = PEERS[peer]
    if script is not None:
        return [sys.executable, str(SCRIPTS / script), str(spec), *sets]
    given = [word for one in sets for word in ("--set", one)]
    return [
        *(sys.executable, "-m", "orchestrator", "run", str(spec)),
        *("--store", str(folder / "runs"), *given),
    ]


def start(peer: str, spec: Path, folder: Path, sets: Sequence[str]) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    alone = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    with open(folder / "output.txt", "ab") as output:
        return subprocess.Popen(
            command(peer, spec, folder, sets),
            env=environment(PEER_FOLDER=str(folder), **alone),
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def run(peer: str, spec: Path, folder: Path, sets: Sequence[str]) -> float:
    """Run a script and return its wall time in seconds.

    Raises:
        RuntimeError: the script failed; the message has the end of its output.
    """
    started = time.perf_counter()
    code = start(peer, spec, folder, sets).wait()
    if code:
        raise RuntimeError(
            f"{peer} ended with exit code {code}:\n{(folder / 'output.txt').read_text()[-3000:]}"
        )
    return time.perf_counter() - started


def count_completed(peer: str, folder: Path) -> Counter[str]:
    """Count how often each trial was computed to its end."""
    if peer != "airsweep":
        log = folder / "log.txt"
        lines = log.read_text().splitlines() if log.exists() else []
        return Counter(line.split()[0] for line in lines)
    (*ledgers,) = (folder / "runs" / "sweeps").glob("*/*/events.jsonl")
    lines = [line for file in ledgers for line in file.read_text().splitlines(keepends=True)]
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return Counter(event["key"] for event in events if event["event"] == "trial_done")


def killed_and_run_again(
    peer: str, spec: Path, folder: Path, sets: Sequence[str], after: int
) -> dict[str, int]:
    process = start(peer, spec, folder, sets)
    while sum(count_completed(peer, folder).values()) < after and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, (folder / "output.txt").read_text()[-3000:]
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=10)
    before = count_completed(peer, folder)
    run(peer, spec, folder, sets)
    done = count_completed(peer, folder)
    return {
        "done_before": sum(before.values()),
        "again": sum(done.values()) - len(done),
        "distinct": len(done),
    }


def again_with_more(peer: str, spec: Path, folder: Path, sets: Sequence[str]) -> dict[str, int]:
    more = folder / spec.name
    text = spec.read_text()
    assert ", cpl_real]" in text
    more.write_text(text.replace(", cpl_real]", f", cpl_real, {ADDED}]"))
    before = count_completed(peer, folder)
    run(peer, more, folder, sets)
    done = count_completed(peer, folder) - before
    return {"again": sum(done[name] for name in before), "new": len(done.keys() - before.keys())}


def code_lines(file: Path) -> int:
    """Count the lines of a file without comments, docstrings and blank lines."""
    if file.suffix != ".py":
        lines = [line.strip() for line in file.read_text().splitlines()]
        return sum(bool(line) and not line.startswith("#") for line in lines)
    lines_of: set[int] = set()
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    statement_starts = True
    for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
        docstring = token.type == tokenize.STRING and statement_starts
        if token.type in silent:
            statement_starts = token.type != tokenize.COMMENT or statement_starts
        elif token.type != tokenize.ENDMARKER:
            if not docstring:
                lines_of |= set(range(token.start[0], token.end[0] + 1))
            statement_starts = False
    return len(lines_of)


def measure(peer: str, folder: Path, sets: Sequence[str], walls: Sequence[float]) -> dict[str, Any]:
    undisturbed, disturbed = folder / f"{peer}-0", folder / f"{peer}-killed"
    trials = len(count_completed(peer, undisturbed))
    kill = killed_and_run_again(peer, GRID, disturbed, sets, after=trials // 2)
    added = again_with_more(peer, GRID, undisturbed, sets)
    script = PEERS[peer]
    found = {
        "wall_s": round(median(walls), 1),
        "walls_s": [round(wall, 1) for wall in walls],
        "lines": code_lines(SCRIPTS / script if script else GRID),
        "trials": trials,
        "done_before_kill": kill["done_before"],
        "again_after_kill": kill["again"],
        "missing_after_kill": trials - kill["distinct"],
        "again_after_added_value": added["again"],
        "new_after_added_value": added["new"],
    }
    progress(peer, found)
    return found


def main() -> None:
    args = options(__doc__, whole=False, walls=1, only=[*PEERS])
    sets = () if args.whole else CUT
    peers = [peer for peer in PEERS if peer in ("airsweep", *args.only)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        turns = [(turn, peer) for turn in range(args.walls) for peer in peers]
        walls: dict[str, list[float]] = {peer: [] for peer in peers}
        for turn, peer in turns:
            walls[peer].append(run(peer, GRID, folder / f"{peer}-{turn}", sets))
            progress(peer, f"{walls[peer][-1]:.1f} s")
        found = {peer: measure(peer, folder, sets, walls[peer]) for peer in peers}
    baseline = found.get("joblib", found[peers[-1]])
    report(
        "peers",
        found["airsweep"]["wall_s"] / baseline["wall_s"],
        "a joblib loop on two workers",
        grid="peer_scripts/grid.yaml"
        if args.whole
        else f"peer_scripts/grid.yaml with {', '.join(CUT)}",
        shared_lines=code_lines(SCRIPTS / "work.py"),
        **found,
    )


if __name__ == "__main__":
    main()
