"""Trackers for real, where they work offline: what each of them holds after a run. `make test-trackers` has them all."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CARTPOLE = ["--env", "CartPole-v1", "--env-arg", "max_episode_steps=50", "--evaluation-episodes", "2", "--seed", "7"]
SHORT = ["--iterations", "4", "--checkpoint-every", "3", "--num-envs", "2", "--steps", "64", "--epochs", "1"]
# Ends a run in its fourth iteration, after the third's checkpoint and the report of the fourth.
STOPPING = """
import sys
from agents import run
from agents.__main__ import main

def stop(folder, trainer, experiment):
    if trainer.iteration == 4:
        raise KeyboardInterrupt
    return original(folder, trainer, experiment)

original, run._save_when_due = run._save_when_due, stop
main(sys.argv[1:])
"""
# Stops the server, whose process is the first argument, when the second iteration begins.
SERVER_ENDS = """
import os, signal, sys
from agents.__main__ import main
from agents.trainer import Trainer

def iterate(trainer, watch):
    if trainer.iteration == 1:
        os.killpg(int(sys.argv[1]), signal.SIGKILL)
    return original(trainer, watch)

original, Trainer._iterate = Trainer._iterate, iterate
main(sys.argv[2:])
"""


def started(folder: Path, *command: str, code: int = 0, **environment: str) -> str:
    """A command in the folder `work`, whose home is beside it and empty. Returns what it printed."""
    for name in ("work", "home"):
        (folder / name).mkdir(exist_ok=True)
    names = {"PYTHONPATH": str(ROOT), "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "TRACKIO", "MLFLOW"))}
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=folder / "work",
        env=kept | names | {"MPLCONFIGDIR": str(folder)} | environment,
        **dict(stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=False, timeout=400),
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """The metrics of a run by iteration."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {row.pop("iteration"): row for row in rows}


# ---- what each service holds: history as (step, values) in order, settings, and names of pictures and tables

Held = tuple[list[tuple[int, dict[str, float]]], dict[str, Any], set[str]]


def held_by_wandb(run: Path, _: dict[str, str]) -> Held:
    """Of all offline runs in the folder, which are one to the service: their ids are equal."""
    from wandb.proto import wandb_internal_pb2

    history, settings, others, ids = [], {}, set(), set()
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for content in records(path.read_bytes()):
            record: Any = wandb_internal_pb2.Record.FromString(content)
            ids |= {record.run.run_id} - {""}
            for item in record.run.config.update:
                settings[item.key] = json.loads(item.value_json)
            for item in record.config.update:
                settings[item.key] = json.loads(item.value_json)
            keys = [(item, [*item.nested_key] or [item.key]) for item in record.history.item]
            others |= {key[0] for _, key in keys if key[1:] == ["_type"]}  # of a picture or a table
            numbers = {key[0]: json.loads(item.value_json) for item, key in keys if len(key) == 1}
            if numbers:
                history.append((int(numbers["_step"]), numbers))
    assert len(ids) == 1 and ids == {json.loads((run / "trackers.json").read_bytes())["wandb"]}
    return history, settings, others


def records(content: bytes) -> list[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    assert content[:4] == b":W&B"
    position, found, parts = 7, [], b""
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        part = content[position + 7 : position + 7 + size]
        parts = part if kind in (1, 2) else parts + part  # whole, first, middle, last
        found += [parts] if kind in (1, 4) else []
        position += 7 + size
    return found


READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
(record,) = SQLiteStorage.get_run_records("textenv")
name = record["name"]
print("@" + json.dumps([SQLiteStorage.get_logs("textenv", name), SQLiteStorage.get_run_config("textenv", name)]))
"""


def held_by_trackio(run: Path, environment: dict[str, str]) -> Held:
    """As trackio itself reads it."""
    output = started(run.parents[1], "-c", READ_TRACKIO, **{"TRACKIO_DIR": str(run / "trackio")} | environment)
    logs, settings = json.loads(output.partition("@")[2].splitlines()[0])
    history, others = [], set()
    for row in logs:
        others |= {name for name, value in row.items() if isinstance(value, dict)}
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        if numbers:
            history.append((row["step"], numbers))
    return history, settings, others


def held_by_mlflow(run: Path, environment: dict[str, str]) -> Held:
    """As MLflow's client reads it."""
    from mlflow import MlflowClient

    client = MlflowClient(environment.get("MLFLOW_TRACKING_URI", f"sqlite:///{run / 'mlflow/mlflow.db'}"))
    identity = json.loads((run / "trackers.json").read_bytes())["mlflow"]
    stored = client.get_run(identity)
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", run.name)
    steps: dict[int, dict[str, float]] = {}
    for name in stored.data.metrics:
        for metric in client.get_metric_history(identity, name):
            assert name not in steps.setdefault(metric.step, {})
            steps[metric.step][name] = metric.value
    pictures = {Path(each.path).stem for each in client.list_artifacts(identity, "pictures")}
    tables = {each.path[:7] for each in client.list_artifacts(identity) if each.path == "samples-00004.json"}
    return sorted(steps.items()), stored.data.params, pictures | tables


def held_by_tensorboard(run: Path, _: dict[str, str]) -> Held:
    """As TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance=dict(tensors=0, scalars=0)).Reload()
    steps: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for scalar in events.Scalars(name):
            assert name not in steps.setdefault(scalar.step, {})
            steps[scalar.step][name] = scalar.value
    texts = {name.removesuffix("/text_summary"): events.Tensors(name)[-1] for name in events.Tags()["tensors"]}
    settings = json.loads(texts.pop("settings").tensor_proto.string_val[0])
    return sorted(steps.items()), settings, {*texts, *events.Tags()["images"]}


HELD: dict[str, Callable[[Path, dict[str, str]], Held]] = {
    "tensorboard": held_by_tensorboard,
    "wandb": held_by_wandb,
    "trackio": held_by_trackio,
    "mlflow": held_by_mlflow,
}


def check(held: Held, run: Path) -> None:
    """All metrics, each iteration once; settings; the pictures and the table of the end."""
    history, settings, others = held
    expected = metrics(run)
    assert list(expected) == [1, 2, 3, 4]
    rows = [row for row in history if "seconds" in row[1]]
    assert [step for step, _ in rows] == [1, 2, 3, 4]
    for step, values in rows:
        assert {name: values[name] for name in expected[step] if "second" not in name} == pytest.approx(
            {name: value for name, value in expected[step].items() if "second" not in name}, rel=1e-6
        )
    shown = {name: str(settings[name]) for name in ("algorithm", "seed", "env.max_episode_steps", "learning_rate")}
    stored = json.loads((run / "config.json").read_bytes())["train"]
    assert shown == {"algorithm": "ppo", "seed": "7", "env.max_episode_steps": "50"} | {
        "learning_rate": str(stored["learning_rate"])
    }
    assert {"curves", "samples"} <= others


@pytest.mark.parametrize("name", HELD)
def test_a_run_that_stops_and_goes_on(tmp_path, name):
    """One run of the service, with everything once. Nothing is written outside the run folder, and nobody is asked."""
    pytest.importorskip(name)
    flags = ["train", "--run", "a run", *CARTPOLE, *SHORT, "--tracker", name]
    output = started(tmp_path, "-c", STOPPING, *flags, code=130)
    assert "The last checkpoint is good" in output and "has failed" not in output
    output = started(tmp_path, "-m", "agents", "train", "--run", "a run", "--resume")
    assert "has failed" not in output
    check(HELD[name](tmp_path / "work" / "a run", {}), tmp_path / "work" / "a run")
    assert os.listdir(tmp_path / "work") == ["a run"] and not list((tmp_path / "home").rglob("*"))


def test_several_at_once_with_samples_of_text(tmp_path):
    """Every tracker that is installed gets a run on text, with its samples, from one command; then none gets one."""
    names = [name for name in HELD if name == "tensorboard" or is_installed(name)]
    small = ["--rollout-size", "16", "--minibatch-size", "8", "--evaluation-prompts", "3", "--iterations", "1"]
    flags = [*small, "--env-arg", "max_new_tokens=6", "--env-arg", "device=cpu"]
    started(tmp_path, "-m", "agents", "train", "--run", "text", *flags, *(f"--tracker={name}" for name in names))
    run = tmp_path / "work" / "text"
    samples = (run / "samples.md").read_text(encoding="utf-8")
    for name in names:
        content = b"".join(path.read_bytes() for path in sorted(run.rglob("*")) if belongs(path, run, name))
        for line in samples.splitlines():
            if line.startswith("> "):
                assert line[2:].strip('"').encode() in content, (name, line)
    started(tmp_path, "-m", "agents", "train", "--run", "no", *flags, "--tracker", "none")
    assert not {"tensorboard", "wandb", "trackio", "mlflow", "trackers.json"} & set(os.listdir(run.parent / "no"))


def belongs(path: Path, run: Path, name: str) -> bool:
    """Whether a file is the tracker's."""
    return path.is_file() and path.relative_to(run).parts[0] == name


def is_installed(name: str) -> bool:
    """Whether the tracker's package can be imported; importing them all is slow."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


TWO_RUNS = """
import os, sys
from pathlib import Path
from agents.reporting.trackers import Trackers
for name in ("first", "second"):
    Path(name).mkdir()
    with Trackers(print) as trackers:
        trackers.open([sys.argv[1]], Path(name), 0)
        trackers.configure({"seed": 1, "hidden": [64, 64]})
        trackers.scalars(1, {"score/mine.py:f//<é>": 0.5})  # rewards have any names
assert not {"TRACKIO_DIR", "MLFLOW_TRACKING_URI"} & set(os.environ)
"""


@pytest.mark.parametrize("name", HELD)
def test_two_runs_of_one_process(tmp_path, name):
    """Each has its own folder; trackio, which keeps the first's until the process ends, refuses the second."""
    pytest.importorskip(name)
    output = started(tmp_path, "-c", TWO_RUNS, name, code=int(name == "trackio"))
    assert ("ValueError: the tracker trackio cannot be started" in output) == (name == "trackio")
    assert "has failed" not in output
    assert os.listdir(tmp_path / "work" / "first") and (name == "trackio" or os.listdir(tmp_path / "work" / "second"))


def test_a_service_that_goes_away(tmp_path):
    """A server that ends in the middle is told once, and the run ends with all of its own; one that never was is refused."""
    pytest.importorskip("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--artifacts-destination", str(tmp_path)]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        *store,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    impatient = {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    try:
        wait_for(port, server)
        flags = ["train", *CARTPOLE, *SHORT, "--tracker", "mlflow", "--tracker", "tensorboard"]
        output = started(tmp_path, "-c", SERVER_ENDS, str(server.pid), *flags, "--run", "run", **impatient)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert output.count("note: the tracker mlflow has failed and is left out from now on") == 1
    assert "has failed" not in output.replace("mlflow has failed", "") and "Traceback" not in output
    run = tmp_path / "work" / "run"
    check(held_by_tensorboard(run, {}), run)
    assert json.loads((run / "summary.json").read_bytes())["iterations"] == 4
    output = started(tmp_path, "-m", "agents", *flags, "--run", "new", code=1, **impatient)
    assert "error: the tracker mlflow cannot be started (" in output and "choose another --tracker" in output
    assert not (tmp_path / "work" / "new").exists()


def wait_for(port: int, server: subprocess.Popen) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not start")
