"""Registers bundles in MLflow as models that classify base64 images."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import air_core.bundle.preprocessing
import air_core.datasets.images
from air_core.bundle.checks import ONNX
from air_core.bundle.manifest import Manifest, read_bundle
from orchestrator.environment import environment
from orchestrator.errors import TrackerUnreachable
from orchestrator.redact import without_credentials
from orchestrator.reporting.selection import report_line
from orchestrator.tracking_uri import resolve_uri

MAX_SHOWN = 500  # characters of class names in a description
# Modules that `served_model` needs; both import nothing of airsweep.
MODULES = (air_core.bundle.preprocessing, air_core.datasets.images)
PACKAGES = ("mlflow", "numpy", "onnxruntime", "pandas", "pillow")


def register_bundle(folder: Path, name: str, uri: str | None, store: Path) -> None:
    """Log a bundle's `model.onnx` to the MLflow run of its trial, and register a version of it.

    Args:
        folder: of the bundle.
        name: of the registered model; created if it does not exist.
        uri: a tracking URI; see `resolve_uri`.
        store: folder of the store.

    Raises:
        ValueError: the bundle has no `model.onnx`, tracking is off, MLflow has no run of the trial,
            or refuses access.
        TrackerUnreachable: MLflow does not answer.
    """
    manifest = read_bundle(folder)
    try:
        version = _registered(manifest, name, uri, store)
    except (ValueError, TrackerUnreachable) as problem:
        raise type(problem)(
            f"{problem}. The bundle in {folder} is complete: to register it later, repeat the "
            "command with --force"
        ) from None
    report_line(
        f"model:    {version}; serve it with `mlflow models serve -m {version} --env-manager local`"
    )


def _registered(manifest: Manifest, name: str, uri: str | None, store: Path) -> str:
    """URI of the registered version, such as `models:/digits/1`; see `register_bundle`."""
    from orchestrator.tracking._runs import (  # first: it configures MLflow
        artifact_repository,
        connect,
        explained_errors,
    )

    key, classifier = str(manifest.content.lineage["trial_key"]), manifest.selected()
    address, database = resolve_uri(uri, store)
    shown = without_credentials(address)
    with explained_errors(shown, f"the model {name}"), TemporaryDirectory() as scratch:
        client = connect(address, database)
        query = f"tags.`air.kind` = 'trial' and tags.`air.trial_key` = '{key}'"
        latest = ["attributes.start_time DESC"]
        experiments = client.search_experiments(filter_string="name LIKE 'air/%'")
        ids = [experiment.experiment_id for experiment in experiments]
        if not ids or not (found := client.search_runs(ids, query, order_by=latest, max_results=1)):
            raise ValueError(
                f"MLflow at {shown} has no run of the trial {key[:12]}; send its sweep with "
                "`airsweep run`, then register again"
            )
        run = found[0].info
        _save(manifest, Path(scratch, "model"))
        # Versions of other classifiers of this trial are in other folders.
        path = f"model-{manifest.content.files[ONNX][:12]}"
        artifacts = artifact_repository(run.artifact_uri, client.tracking_uri)
        artifacts.log_artifacts(str(Path(scratch, "model")), path)
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        made = client.create_model_version(
            name,
            f"{run.artifact_uri}/{path}",
            run.run_id,
            tags={"air.trial_key": key, "air.classifier": classifier},
            description=" ".join(
                [
                    *filter(None, [manifest.content.cautions.get(classifier)]),
                    f"{classifier} classifier of {len(manifest.classnames)} classes: "
                    f"{', '.join(manifest.classnames)[:MAX_SHOWN]}",
                ]
            ),
        )
    return f"models:/{name}/{made.version}"


def _save(manifest: Manifest, folder: Path) -> None:
    """Write an MLflow model from code: `served_model`, the modules that it needs, the ONNX file."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, DataType, Object, Property

    pair = [Property("class", DataType.string), Property("probability", DataType.double)]
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image")]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "class"),
                ColSpec(DataType.double, "probability"),
                ColSpec(Array(Object(pair)), "top"),
            ]
        ),
        params=ParamSchema([ParamSpec("topk", DataType.long, 3)]),
    )
    package = folder.with_name("airsweep_model")
    package.mkdir()
    (package / "__init__.py").touch()
    for module in MODULES:
        assert module.__file__
        shutil.copy(module.__file__, package)
    with environment({"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}):
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"onnx": str(manifest.onnx_file())},
            code_paths=[str(package)],
            signature=signature,
            pip_requirements=[f"{name}=={version(name)}" for name in PACKAGES],
            metadata={"classnames": list(manifest.classnames), "classifier": manifest.selected()},
        )
