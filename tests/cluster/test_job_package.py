"""Job packages: their files and variables, and errors before a cluster is contacted."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from orchestrator.cluster import job_package
from orchestrator.cluster.job_package import pack
from orchestrator.errors import Refused
from orchestrator.planning import read_request
from tests.helpers.golden import check_refusals
from tests.helpers.plugins import MARGIN
from tests.helpers.sweeps import environment, run_command, write_sweep

ROOT = Path(__file__).parents[2]
SHARED = "/shared/runs"
PACK = """
import sys
from pathlib import Path
from orchestrator.planning import read_request
from orchestrator.cluster.job_package import pack
pack(read_request(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture
def spec(tmp_path) -> Path:
    return write_sweep(tmp_path / "elsewhere", "small", "fixed: {method: zero_shot}\n")


def packed(checkout: Path, spec: Path, to: Path) -> set[str]:
    """Pack a sweep from a checkout; returns the packed files."""
    to.mkdir()
    variables = environment(PYTHONPATH=str(checkout))
    command = [sys.executable, "-c", PACK, str(spec), str(to)]
    run_command(command, cwd=spec.parent, env=variables)
    return {str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()}


def checkout_in(folder: Path) -> Path:
    skip = shutil.ignore_patterns("__pycache__")
    for package in ("air_core", "orchestrator"):
        shutil.copytree(ROOT / package, folder / package, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def big(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as handle:
        handle.truncate(size)


def test_a_checkout_sends_its_code_and_the_sweep_but_no_other_file(tmp_path, spec):
    checkout = checkout_in(tmp_path / "checkout")
    big(checkout / "runs" / "mlflow.db", 2 << 30)
    big(checkout / "weights.safetensors", 2 << 30)
    for secret in (checkout / ".env", checkout / "orchestrator" / ".env", spec.parent / ".env"):
        secret.write_text("PASSWORD=x\n")
    big(spec.parent / "photos" / "1.png", 2 << 30)
    big(checkout / "air_core" / "__pycache__" / "old.pyc", 10)
    files = packed(checkout, spec, tmp_path / "sent")
    listing = ["git", "ls-files", "-co", "--exclude-standard", "--", "air_core", "orchestrator"]
    tracked = run_command(listing, cwd=ROOT)
    assert files == {*tracked.stdout.split(), "sweeps/small.yaml"}
    assert (tmp_path / "sent" / "sweeps" / "small.yaml").read_text() == spec.read_text()


def test_an_installed_airsweep_sends_only_the_sweep_and_its_plugins(tmp_path, spec):
    checkout = checkout_in(tmp_path / "installed")
    (checkout / "pyproject.toml").unlink()
    (spec.parent / "own").mkdir()
    (spec.parent / "own" / "margin.py").write_text(MARGIN)
    spec.write_text(f"{spec.read_text()}plugins: [own/margin.py]\n")
    assert packed(checkout, spec, tmp_path / "sent") == {
        *("sweeps/small.yaml", "sweeps/own/margin.py")
    }
    (spec.parent / "own" / "margin.py").rename(tmp_path / "margin.py")
    spec.write_text(spec.read_text().replace("own/", "../"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match=r"outside of the folder of .*; put it beside the sweep"):
        pack(read_request(spec), tmp_path / "empty")


def test_a_job_has_absolute_paths_the_tracker_of_this_environment_and_variables(spec, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    request = read_request(spec, sets=["dataset=folder:/shared/leaves"])
    options = job_package.job_options(request, SHARED, Path("/data"), None)
    assert options[:4] == ["--store", SHARED, "--data-root", "/data"]
    assert options[4:6] == ["--tracking-uri", "http://mlflow:5000"]
    options = job_package.job_options(request, SHARED, None, "none")
    assert options[2:4] == ["--tracking-uri", "none"]
    sent = job_package.job_variables(request, ["AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI=other"])
    assert (sent["AWS_ENDPOINT_URL"], sent["MLFLOW_TRACKING_URI"]) == ("http://minio:9000", "other")


def test_refusals_equal_the_golden_messages_and_show_no_password(spec, command, monkeypatch):
    """All but those about the address come before the cluster is contacted."""
    monkeypatch.chdir(spec.parent)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("SERVER", "http://me:hunter2@host")
    text = spec.read_text()
    Path("commented.yaml").write_text(f"# see http://me:hunter2@host\n{text}")

    def submit(*words):
        options = words if "--store" in words else (*words, "--store", SHARED)
        sweep = () if "commented.yaml" in words else (spec,)
        done = command("submit", *sweep, *options)
        assert "hunter2" not in done[2]
        return done

    values = ("dataset=folder:my_images", "test_dataset=folder:~/other", "iterations=-1")
    weights = ("backbone=ViT-B-32@clip.safetensors", "generator=./sd15")
    secrets = ("MLFLOW_TRACKING_PASSWORD", "HF_TOKEN=hunter2", "SERVER", "A=x://b:hunter2@c")
    addresses = ("ray://head:10001", "head:6379", "http://me:hunter2@head:8265")
    check_refusals(
        "messages/submit.txt",
        submit,
        *(("--set", value) for value in (*values, *weights)),
        *(("--store", store) for store in ("runs", "s3://me:hunter2@bucket")),
        ("--data-root", "data"),
        *(("--tracking-uri", uri) for uri in ("sqlite:///mlflow.db", "http://me:hunter2@host")),
        *(("--env", variable) for variable in (*secrets, "NOT_SET_ANYWHERE", "=x")),
        ("commented.yaml",),
        ("--no-wait",),
        *(("--address", address) for address in (*addresses, "http://127.0.0.1:1")),
    )
