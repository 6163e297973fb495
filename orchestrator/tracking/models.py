"""Registers bundles in MLflow as models that classify base64 images."""

from __future__ import annotations

import base64
import hashlib
import shutil
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from posixpath import normpath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import air_core.bundle.preprocessing
import air_core.datasets.images
from orchestrator.environment import environment
from orchestrator.redact import without_credentials
from orchestrator.tracking.database import check_database
from orchestrator.tracking_uri import resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

MAX_NAME = 256  # characters of a model name, in MLflow's database
# Modules that `served_model` needs; both import nothing of airsweep.
MODULES = (air_core.bundle.preprocessing, air_core.datasets.images)
PACKAGES = ("mlflow", "numpy", "onnxruntime", "pandas", "pillow")


def check_model_name(name: str) -> None:
    """Check the name of a model before anything is written.

    Raises:
        ValueError: MLflow would refuse it.
    """
    unique = normpath(name) == name and not name.startswith(".")
    if not name.strip() or not unique or "/" in name or ":" in name or len(name) > MAX_NAME:
        raise ValueError(
            f"MLflow does not accept the model name {name[:MAX_NAME]!r}; allowed: 1 to {MAX_NAME} "
            "characters without / and :, and no dot at the start"
        )


def register_model(onnx: Path, name: str, uri: str | None, store: Path) -> str:
    """Log a bundle's `model.onnx` to the MLflow run of its trial, and register a version of it.

    Args:
        onnx: the file, which the caller has checked.
        name: of the registered model; created if it does not exist.
        uri: a tracking URI, as for `make_tracker`.
        store: folder of the store.

    Returns:
        URI of the version, such as `models:/digits/1`.

    Raises:
        ValueError: tracking is off, MLflow has no run of the trial, or refuses name or access.
        TrackerUnreachable: MLflow does not answer.
    """
    check_model_name(name)
    address, database = resolve_uri(uri, store)
    from orchestrator.tracking._runs import (  # first: it configures MLflow
        artifact_repository,
        explained_errors,
    )

    # isort: split
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    shown = without_credentials(address)
    if database is not None and not database.exists():
        raise ValueError(f"{database} does not exist: nothing was tracked in this store yet")
    content = onnx.read_bytes()
    about = onnx_metadata(content)
    with explained_errors(shown, f"the model {name}"), TemporaryDirectory() as scratch:
        if database is not None:
            check_database(database)
        client = MlflowClient(address)
        run = _run_of(client, about["lineage"]["trial_key"], shown)
        folder = Path(scratch, "model")
        _save(onnx, about, folder)
        # Versions of other classifiers of this trial are in other folders.
        path = f"model-{hashlib.sha256(content).hexdigest()[:12]}"
        artifacts = artifact_repository(run.info.artifact_uri, address)
        artifacts.log_artifacts(str(folder), path)  # type: ignore[no-untyped-call]
        try:
            _create_name(client, name)
            made = client.create_model_version(
                name,
                f"{run.info.artifact_uri}/{path}",
                run.info.run_id,
                tags={
                    "air.trial_key": about["lineage"]["trial_key"],
                    "air.classifier": about["classifier"],
                },
                description=f"{about['classifier']} classifier of {len(about['classnames'])} "
                f"classes: {', '.join(about['classnames'])[:500]}",
            )
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise ValueError(f"MLflow at {shown} refuses the model {name!r}: {error}") from error
    return f"models:/{name}/{made.version}"


def onnx_metadata(content: bytes) -> dict[str, Any]:
    """Class names, classifier and lineage of a `model.onnx`."""
    from air_core.bundle.onnx import OnnxModel

    model = OnnxModel(content, "model.onnx")
    return {
        "classnames": model.classnames,
        "classifier": model.classifier,
        "lineage": model.lineage,
        "size": model.preprocess["size"],
    }


def _run_of(client: MlflowClient, key: str, address: str) -> Run:
    """The run of a trial; of several, the latest.

    Raises:
        ValueError: there is none.
    """
    experiments = [
        e.experiment_id for e in client.search_experiments(filter_string="name LIKE 'air/%'")
    ]
    query = f"tags.`air.kind` = 'trial' and tags.`air.trial_key` = '{key}'"
    order = ["attributes.start_time DESC"]
    found = (
        client.search_runs(experiments, query, max_results=1, order_by=order) if experiments else []
    )
    if not found:
        raise ValueError(
            f"MLflow at {address} has no run of the trial {key[:12]}; send its sweep with "
            "`airsweep mlflow reconcile`, then register again"
        )
    run: Run = found[0]
    return run


def _create_name(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _save(onnx: Path, about: dict[str, Any], folder: Path) -> None:
    """Write an MLflow model from code: `served_model`, the modules that it needs, the ONNX file."""
    import mlflow.pyfunc
    import pandas
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
            artifacts={"onnx": str(onnx)},
            code_paths=[str(package)],
            signature=signature,
            input_example=pandas.DataFrame({"image": [_example(about["size"])]}),
            pip_requirements=[f"{name}=={version(name)}" for name in PACKAGES],
            metadata={"classnames": list(about["classnames"]), "classifier": about["classifier"]},
        )


def _example(size: list[int]) -> str:
    """A grey PNG of this height and width in base64."""
    from PIL import Image

    content = BytesIO()
    Image.new("RGB", (size[1], size[0]), (128, 128, 128)).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()
