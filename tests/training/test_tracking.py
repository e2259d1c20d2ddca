"""What a run sends to its trackers, read back from each of them; nothing leaves this machine."""

import json
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stepfold.config import load_config
from stepfold.errors import UserError
from stepfold.training import tracking
from stepfold.training.tracking import PROJECT, RUNS, Trackers, check_trackers

SETTINGS = {"seed": 0, "training": {"steps": 3, "trackers": ["tensorboard"]}, "space": {"kind": None}}
RESULT = {
    "teacher": {"20": {"accuracy": 0.9, "hash": "abc"}},
    "student": {"1": {"accuracy": 0.5}, "2": {"accuracy": 0.6, "fd": None}},
}
SCORES = {"teacher/20 steps/accuracy": 0.9, "student/1 step/accuracy": 0.5, "student/2 steps/accuracy": 0.6}


@pytest.fixture(autouse=True)
def quiet_wires(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Every address outside this machine that a test connects to; and trackers that write here."""
    outside: list[Any] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, to: Any) -> Any:
        if isinstance(to, tuple) and to[0] not in ("127.0.0.1", "localhost", "::1"):
            outside.append(to)
        return connect(self, to)

    monkeypatch.setattr(socket.socket, "connect", watched)
    for name in (*tracking.QUIET, "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    PartialState()  # a run's accelerator has made it
    return outside


def preview(folder: Path) -> Path:
    path = folder / "previews" / "step_000002.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(path)
    return path


def track(name: str, folder: Path) -> None:
    """Two steps, a stop, and a third one with the end of the run."""
    folder.mkdir()
    first = Trackers([name], folder, SETTINGS)
    first.add({"step": 0, "loss": 4.0, "nonfinite": "loss"}, 1)
    first.add({"step": 1, "loss": 3.0}, 2)
    first.add_preview(preview(folder), 2)
    first.end()
    again = Trackers([name], folder, SETTINGS)
    again.add({"step": 2, "loss": 2.0}, 3)
    again.add_scores(RESULT)
    again.end()


def needs(name: str) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed; pip install {name}")


def test_tensorboard_has_curves_previews_and_scores(tmp_path: Path, quiet_wires: list[Any]) -> None:
    track("tensorboard", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert set(events.Tags()["scalars"]) == {"loss", *SCORES}
    for name, value in SCORES.items():
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars(name)] == [(3, value)]
    (image,) = events.Images("preview")
    assert (image.step, image.width, image.height) == (2, 4, 4)
    assert not (tmp_path / "run" / RUNS).exists()
    assert quiet_wires == []


def test_wandb_stays_offline_and_goes_on_with_its_run(tmp_path: Path, quiet_wires: list[Any]) -> None:
    needs("wandb")
    track("wandb", tmp_path / "run")
    run = json.loads((tmp_path / "run" / RUNS).read_text())["wandb"]
    written = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in written] == [f"run-{run}.wandb"] * len(written) and written
    data = b"".join(path.read_bytes() for path in written)
    for name in ("loss", "training.steps", *SCORES):
        assert name.encode() in data, name
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/preview*.png"))
    assert quiet_wires == []


def test_mlflow_goes_on_with_its_run(tmp_path: Path, quiet_wires: list[Any]) -> None:
    needs("mlflow")
    from mlflow import MlflowClient

    track("mlflow", tmp_path / "run")
    client = MlflowClient()
    experiment = client.get_experiment_by_name(PROJECT)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "run" / RUNS).read_text())["mlflow"]
    loss = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((each.step, each.value) for each in loss) == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert {name: value for name, value in run.data.metrics.items() if name != "loss"} == SCORES
    assert run.data.params["training.steps"] == "3" and run.info.status == "FINISHED"
    assert [each.path for each in client.list_artifacts(run.info.run_id, "previews")] == ["previews/step_000002.png"]
    assert quiet_wires == []


def test_trackio_goes_on_with_its_run(tmp_path: Path, quiet_wires: list[Any]) -> None:
    needs("trackio")
    track("trackio", tmp_path / "run")
    from trackio.sqlite_storage import SQLiteStorage

    run = json.loads((tmp_path / "run" / RUNS).read_text())["trackio"]
    assert SQLiteStorage.get_runs(PROJECT) == [run]
    rows = SQLiteStorage.get_logs(PROJECT, run)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert [row["step"] for row in rows if "preview" in row] == [2]
    assert SCORES.items() <= rows[-1].items()
    assert quiet_wires == []


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(["tensorboard"])
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"training\.trackers has wandb, which is not installed; pip install wandb, or"):
        check_trackers(["wandb", "mlflow"])


def test_a_tracker_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Locked:
        def __init__(self, *args: object, **options: object) -> None: ...

        def start(self) -> None:
            raise RuntimeError("api_key not configured\nlong story")

    monkeypatch.setattr(tracking, "WandBTracker", Locked)
    with pytest.raises(UserError, match=r"has wandb, which does not start \(api_key not configured\); set what"):
        Trackers(["wandb"], tmp_path, SETTINGS)


def test_names_of_trackers_are_checked() -> None:
    assert load_config("demo", ["training.trackers=[mlflow, wandb]"]).training.trackers == ("mlflow", "wandb")
    assert load_config("demo").training.trackers == ("tensorboard",)
    with pytest.raises(UserError, match=r"training\.trackers.*tensorboard.*mlflow"):
        load_config("demo", ["training.trackers=[comet]"])
