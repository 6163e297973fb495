"""`airsweep doctor` as a job of a cluster, which looks at itself. Knows none of its checks."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.asked import Asked
from orchestrator.lineage import PACKAGES, ROOT
from orchestrator.place import Refused
from orchestrator.variables import environment

STARTED = 300.0  # seconds that a cluster has to run the job
POLL = 0.5


def looked_by_job(
    address: str, sweep: Asked | None, options: Sequence[str], python: str = "python"
) -> dict[str, Any]:
    """What `doctor --cluster --json` says, run on a cluster.

    Args:
        address: http://<head>:8265.
        options: of the command, beside the sweep.
        python: the cluster's.

    Raises:
        Refused: the cluster takes no job, or the job said nothing.
    """
    words = [python, "-m", "orchestrator", "doctor"]
    with TemporaryDirectory(prefix="airsweep-doctor-") as folder:
        if (ROOT / "pyproject.toml").is_file():  # else the cluster has what is installed there
            for package in PACKAGES:
                leave = shutil.ignore_patterns("__pycache__", ".*")
                shutil.copytree(ROOT / package, Path(folder, package), ignore=leave)
            shutil.copyfile(ROOT / "pyproject.toml", Path(folder, "pyproject.toml"))
        if sweep is not None:
            Path(folder, "sweeps").mkdir()
            file = Path("sweeps", Path(sweep.spec.source).name)
            Path(folder, file).write_text(sweep.spec.text)
            words.append(str(file))
            words += [word for value in sweep.sets for word in ("--set", value)]
            words += [word for value in sweep.only for word in ("--only", value)]
        command = shlex.join([*words, "--cluster", "--json", *options])
        with _told(address):
            return _said(*_run(address, command, folder))


def _run(address: str, command: str, folder: str) -> tuple[str, str, int | None]:
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    names = ("AIRSWEEP_PROJECT", "AIRSWEEP_USER")
    passed = {name: os.environ[name] for name in names if name in os.environ}
    runtime_env = {"working_dir": folder, "env_vars": passed}
    job = client.submit_job(entrypoint=command, runtime_env=runtime_env)
    give_up = time.monotonic() + STARTED
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() > give_up:
            client.stop_job(job)
            raise Refused(
                f"{address}: {job} did not end within {STARTED:.0f} s; is the cluster full?"
            )
        time.sleep(POLL)
    info = client.get_job_info(job)
    return client.get_job_logs(job), str(info.message), info.driver_exit_code


def _said(log: str, message: str, code: int | None) -> dict[str, Any]:
    """What is in a job's log, where Ray's lines may stand before and after it."""
    lines = log.splitlines()
    if code in (0, 3) and "{" in lines and "}" in lines:
        last = len(lines) - lines[::-1].index("}")
        found: dict[str, Any] = json.loads("\n".join(lines[lines.index("{") : last]))
        return found
    told = next((line for line in reversed(lines) if line.strip()), message.partition("\n")[0])
    raise Refused(
        f"the job on the cluster ended without an answer ({told}); is airsweep with all it needs "
        "in the Python that is first on the head's path?"
    )


@contextmanager
def _told(address: str) -> Iterator[None]:
    """
    Raises:
        Refused: what Ray's client has raised, in a sentence.
    """
    from ray.exceptions import AuthenticationError

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it tells each of its steps
    try:
        # Ray prefers these to what it is given.
        with environment({"RAY_API_SERVER_ADDRESS": address, "RAY_ADDRESS": address}):
            yield
    except AuthenticationError:
        raise Refused(
            f"the cluster at {address} lets us not in; if it demands a token, export "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE with the one of that cluster"
        ) from None
    except (ConnectionError, RuntimeError, ValueError) as problem:
        if isinstance(problem, Refused):
            raise
        said = f"{problem}".strip().partition("\n")[0]
        raise Refused(
            f"no cluster takes jobs at {address} ({said}); allowed: http://<head>:8265, the "
            "address of its dashboard, or <head>:6379 from one of its machines"
        ) from problem
    finally:
        logging.disable(before)
