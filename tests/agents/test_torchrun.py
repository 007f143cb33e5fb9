"""`torchrun ... -m agents train` from the shell: one run by several processes, which fail and go on together."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from agents.checkpoint import FILE
from tests.support.learning import same
from tests.support.rank import free_port

ROOT = Path(__file__).parents[2]
SMALL = ["--rollout-size", "16", "--minibatch-size", "8", "--evaluation-prompts", "16", "--checkpoint-every", "1"]
SMALL += ["--schedule", "constant", "--env-arg", "device=cpu", "--env-arg", "max_new_tokens=8"]
BAD = """
import os, time
calls = []
def last(act):
    def reward(prompts, responses):
        calls.append(responses)
        if len(calls) > 2 and os.environ.get("RANK") == "1":
            return act()
        return [float(len(text)) for text in responses]
    return reward
def fail():
    raise ValueError("no more")
raises = last(fail)
hangs = last(lambda: time.sleep(1000))
short = last(lambda: [1.0])
ends = last(lambda: os._exit(7))
once = last(lambda: os._exit(7) if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else [1.0] * len(calls[-1]))
"""

pytestmark = pytest.mark.slow


def command_of(ranks: int, *arguments: object, restarts: int = 0) -> list[str]:
    """The command line; `--` keeps torchrun from reading --run as one of its own options."""
    sizes = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    start = ["-m", "torch.distributed.run", *sizes, "-m", "--", "agents"]
    return [sys.executable, *(start if ranks > 1 else ["-m", "agents"]), *map(str, arguments)]


def environment(folder: Path) -> dict[str, str]:
    """One thread, and modules from `folder`."""
    settings = {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | settings


def train(ranks: int, folder: Path, *arguments: object, restarts: int = 0) -> subprocess.CompletedProcess:
    """A small run on the embedded task in `folder`/run."""
    command = command_of(ranks, "train", "--run", folder / "run", *SMALL, *arguments, restarts=restarts)
    return subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False, timeout=300
    )


def metrics(folder: Path) -> list[dict]:
    """The metrics of every iteration, without times."""
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if "second" not in key} for line in lines]


def left_behind(folder: Path) -> list[psutil.Process]:
    """Processes that still train in `folder`."""
    return [each for each in psutil.process_iter(["cmdline"]) if str(folder / "run") in (each.info["cmdline"] or [])]


def test_two_processes_one_run(tmp_path):
    """Two processes write one folder, with the numbers of one. Either goes on from what the other has left."""
    folders = [tmp_path / name for name in ("one", "two")]
    for ranks, folder in enumerate(folders, 1):
        folder.mkdir()
        ended = train(ranks, folder, "--iterations", 2)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("iteration 2/2") == 1  # one reports
    one, two = map(metrics, folders)
    for first, second in zip(one, two, strict=True):
        assert first == pytest.approx(second, rel=1e-3, abs=1e-4)
    for ranks, folder in ((2, folders[0]), (1, folders[1])):
        ended = train(ranks, folder, "--iterations", 3, "--resume")
        assert ended.returncode == 0 and len(metrics(folder)) == 3, ended.stderr
    assert metrics(folders[0])[2] == pytest.approx(metrics(folders[1])[2], rel=1e-2, abs=1e-2)  # the same prompts
    command = command_of(1, "evaluate", "--run", folders[1] / "run")
    ended = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "score" in ended.stdout


def test_resumed_equals_uninterrupted(tmp_path):
    """Two processes that stop after an iteration and go on end with the weights of two that never stop, to the bit."""
    states = []
    for name, parts in (("whole", [3]), ("stopped", [1, 3])):
        (tmp_path / name).mkdir()
        for iterations in parts:
            resume = ["--resume"] if (tmp_path / name / "run").exists() else []
            assert train(2, tmp_path / name, "--iterations", iterations, *resume).returncode == 0
        states.append(torch.load(tmp_path / name / "run" / FILE, weights_only=True)["policy"])
    assert same(*(list(state.values()) for state in states))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("raises", "rank 1: ValueError: reward 'bad:raises' raised ValueError: no more"),
        ("short", "rank 1: ValueError: reward 'bad:short'"),
        ("hangs", "another rank is gone, or took longer than rank_timeout"),
        ("ends", "stopped"),  # by the lost connection, or by torchrun, whichever is noticed first
    ],
)
def test_one_rank_fails(tmp_path, reward, message):
    """All processes end, and the first says why and how to go on. One process then goes on with a good reward."""
    (tmp_path / "bad.py").write_text(BAD, encoding="utf-8")
    task = [f"reward=bad:{reward}", "reference=reviews", "prompts=reviews", "max_prompt_tokens=24"]
    flags = [part for each in task for part in ("--env-arg", each)]
    started = time.monotonic()
    ended = train(2, tmp_path, *flags, "--iterations", 4, "--rank-timeout", 10)
    assert ended.returncode != 0 and time.monotonic() - started < 120
    assert message in ended.stderr and "--resume" in ended.stderr
    assert not left_behind(tmp_path)
    ended = train(1, tmp_path, *flags, "--iterations", 4, "--resume")
    assert ended.returncode == 0 and len(metrics(tmp_path)) == 4, ended.stderr


def test_it_goes_on_by_itself(tmp_path):
    """Under --max-restarts torchrun starts all processes again, and they go on from the checkpoint."""
    (tmp_path / "bad.py").write_text(BAD, encoding="utf-8")
    task = ["reward=bad:once", "reference=reviews", "prompts=reviews", "max_prompt_tokens=24"]
    flags = [part for each in task for part in ("--env-arg", each)]
    ended = train(2, tmp_path, *flags, "--iterations", 4, "--rank-timeout", 10, restarts=1)
    assert ended.returncode == 0, ended.stderr
    assert [row["iteration"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    assert ended.stdout.count("iteration 4/4") == 1 and ended.stdout.count("iteration 1/4") == 1


def test_two_nodes(tmp_path):
    """Two torchruns of one process each, which find each other over the network, do one run."""
    port, flags = free_port(), ["train", "--run", str(tmp_path / "run"), *SMALL, "--iterations", "2"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
    nodes = [
        subprocess.Popen(
            [*command, "--local-addr", "127.0.0.1", "-m", "--", "agents", *flags],
            cwd=tmp_path,
            env=environment(tmp_path),
        )
        for _ in range(2)
    ]
    assert [node.wait(200) for node in nodes] == [0, 0]
    assert [row["iteration"] for row in metrics(tmp_path)] == [1, 2]


def test_killed_at_any_moment(tmp_path):
    """Whichever process is killed, and when: none is left behind, and the run goes on from its last checkpoint."""
    moments, done = random.Random(0), 0
    for _ in range(6):
        resume = ["--resume"] if (tmp_path / "run" / FILE).exists() else []
        command = command_of(2, "train", "--run", tmp_path / "run", *SMALL, "--iterations", 12, "--rank-timeout", 10)
        process = subprocess.Popen(
            [*command, *resume], cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(8, 16))
        ranks = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if ranks:
            psutil.Process(moments.choice(ranks).pid).send_signal(signal.SIGKILL)
        process.wait(90)
        assert not left_behind(tmp_path)
        if (tmp_path / "run" / FILE).exists():
            before, done = done, int(torch.load(tmp_path / "run" / FILE, weights_only=True)["iteration"])
            assert done >= before
    ended = train(2, tmp_path, "--iterations", 12, *(["--resume"] if (tmp_path / "run").exists() else []))
    assert ended.returncode == 0, ended.stderr
    assert [row["iteration"] for row in metrics(tmp_path)] == list(range(1, 13))
