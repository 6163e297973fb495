"""`airsweep doctor` as a job of a cluster, which looks at itself. Knows none of its checks."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.asked import Asked
from orchestrator.parcel import code_here, pack
from orchestrator.place import Refused
from orchestrator.submit import Cluster, ClusterLost, Job
from orchestrator.sweep import option_words

STARTED = 300.0  # seconds that a cluster has to run the job
PASSED = ("AIRSWEEP_PROJECT", "AIRSWEEP_USER")


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
        parcel = pack(sweep, Path(folder), code_here())
        if sweep is not None:
            words += [parcel.spec, *option_words(sweep.sets, sweep.only, smoke=False)]
        command = shlex.join([*words, "--cluster", "--json", *options])
        env = {name: os.environ[name] for name in PASSED if name in os.environ}
        try:
            return _said(*Cluster(address).run(command, parcel, env, STARTED))
        except ClusterLost as problem:
            raise Refused(f"no cluster takes jobs there: {problem}") from problem


def _said(log: str, job: Job) -> dict[str, Any]:
    """What is in a job's log, where Ray's lines may stand before and after it."""
    lines = log.splitlines()
    if job.exit_code in (0, 3) and "{" in lines and "}" in lines:
        last = len(lines) - lines[::-1].index("}")
        found: dict[str, Any] = json.loads("\n".join(lines[lines.index("{") : last]))
        return found
    said = next((line for line in reversed(lines) if line.strip()), job.message.partition("\n")[0])
    raise Refused(
        f"the job on the cluster ended without an answer ({said}); is airsweep with all it needs "
        "in the Python that is first on the head's path?"
    )
