"""MLflow's database file in a store: reads, corrects and serves it without importing MLflow."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from pathlib import Path

from orchestrator.reporting.tables import COLUMNS
from orchestrator.tracking_uri import ARTIFACTS, DATABASE

LOOPBACK = "127.0.0.1"
# A shared view of MLflow's table of runs. Without it, the table has no column of a metric.
VIEW = "airsweep"
# It has the columns of `airsweep table`, and the runs of sweeps and settings without the trials.
# Bounds have no best/test/accuracy, so its order leaves them below all methods.
ORDER = "best/test/accuracy"
METRICS = (
    *(ORDER, *(column.metric for column in COLUMNS if "table" in column.on)),
    *("test/accuracy", "test/accuracy_low", "test/accuracy_high", "n", "gain"),
)
TAGS = ("air.sweep", "air.best_classifier", "air.classifier")
VISIBLE = (*(f"tags.`{name}`" for name in TAGS), *(f"metrics.`{name}`" for name in METRICS))
VIEW_STATE = {
    "selectedColumns": VISIBLE,
    "columnOrder": VISIBLE,
    "columnWidths": dict.fromkeys(VISIBLE, 150),  # pixels
    "searchFilter": "tags.`air.kind` != 'trial'",
    "orderByKey": f"metrics.`{ORDER}`",
    "orderByAsc": False,
}
EXPERIMENT_TAGS = {
    f"mlflow.sharedViewState.{VIEW}": json.dumps(VIEW_STATE),
    "mlflow.experimentKind": "custom_model_development",  # MLflow opens it at its runs
}
# Environment of `serve_command`: no job runner beside the server, no telemetry, no deprecation
# warnings of MLflow's own code.
SERVER_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def serve_command(store: Path, port: int) -> list[str]:
    """The command that serves a store's database and artifacts to this machine alone: every client
    could change and delete all runs.

    Run it with SERVER_ENVIRONMENT and in a new process group: MLflow's worker process keeps the
    port if only the main process is killed.
    """
    folder = store.resolve()
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", LOOPBACK, "--port", str(port), "--workers", "1"),
        *("--uvicorn-opts", "--log-level warning"),  # no line for each request
        *("--backend-store-uri", f"sqlite:///{folder / DATABASE}"),
        *("--serve-artifacts", "--artifacts-destination", str(folder / ARTIFACTS)),
    ]


def check_database(path: Path) -> None:
    """Check that a file is an sqlite database: with a broken one MLflow retries for two minutes.

    Corrects the paths of its artifacts if they were moved together.

    Raises:
        OSError: it is not, or it cannot be corrected.
    """
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA schema_version")
            _correct_artifact_paths(connection, path)
    except sqlite3.Error as error:
        raise OSError(f"{path}: {error}") from error


def artifact_location(database: Path, experiment: str) -> str:
    """The folder with the artifacts of an experiment, beside the database file.

    It is a plain path, so `mlflow ui` and MLflow's clients find the artifacts without a server of
    airsweep.
    """
    return str(database.parent / ARTIFACTS / experiment)


def run_tables(database: Path) -> list[str]:
    """The pages with the runs of each experiment of airsweep, that of the latest run first.

    They show the columns of `VIEW_STATE`.
    """
    query = (
        "SELECT e.experiment_id FROM experiments e JOIN runs r USING (experiment_id)"
        " WHERE e.name LIKE 'air/%' AND e.lifecycle_stage = 'active'"
        " GROUP BY e.experiment_id ORDER BY max(r.start_time) DESC"
    )
    with contextlib.closing(sqlite3.connect(database)) as connection:
        found = connection.execute(query).fetchall()
    # Without the parameter `workflowType`, MLflow opens its page for prompts.
    page = f"runs?workflowType=machine_learning&viewStateShareKey={VIEW}"
    return [f"#/experiments/{experiment}/{page}" for (experiment,) in found]


def digest_in(database: Path, project: str, sweep: str) -> str | None:
    """The tag `air.digest` of a sweep's run that has ended; None: there is none."""
    query = (
        "SELECT d.value FROM runs r JOIN experiments e USING (experiment_id)"
        " JOIN tags k ON k.run_uuid = r.run_uuid AND k.key = 'air.kind' AND k.value = 'sweep'"
        " JOIN tags s ON s.run_uuid = r.run_uuid AND s.key = 'air.sweep' AND s.value = ?"
        " JOIN tags d ON d.run_uuid = r.run_uuid AND d.key = 'air.digest'"
        " WHERE e.name = ? AND r.lifecycle_stage = 'active' AND r.status <> 'RUNNING'"
    )
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(database)) as open_:
        found = open_.execute(query, (sweep, f"air/{project}")).fetchone()
        return found and str(found[0])
    return None


def _correct_artifact_paths(connection: sqlite3.Connection, database: Path) -> None:
    """Correct the paths of artifacts after a move: MLflow keeps absolute paths and has no call to
    change them."""
    query = "SELECT experiment_id, name, artifact_location FROM experiments WHERE name LIKE 'air/%'"
    if not connection.execute("PRAGMA table_info(experiments)").fetchall():
        return  # MLflow has not created its tables
    for experiment, name, stored in connection.execute(query).fetchall():
        current = artifact_location(database, name)
        if stored == current or not stored.endswith(f"/{ARTIFACTS}/{name}"):
            continue
        with connection:  # one transaction
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                (current, experiment),
            )
            connection.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?)"
                " WHERE experiment_id = ? AND instr(artifact_uri, ?) = 1",
                (current, len(stored) + 1, experiment, stored),
            )
