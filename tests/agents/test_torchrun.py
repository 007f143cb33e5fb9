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
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from agents.checkpoint import FILE
from agents.reporting.dumps import read_rollouts
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
        if len(calls) > 3 and os.environ.get("RANK") == "1":
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

FULL = ("--shard", "full")

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


@pytest.mark.parametrize("flags", [(), FULL, (*FULL, "--lora-rank", "4"), (*FULL, "--precision", "bf16")])
def test_two_processes_one_run(tmp_path, flags):
    """Two processes write one folder, with the numbers of one. Either goes on from what the other has left.

    In bf16 the first rollout alone is compared: after it, rounding turns the last of eight bits of some weights.
    """
    folders = [tmp_path / name for name in ("one", "two")]
    for ranks, folder in enumerate(folders, 1):
        folder.mkdir()
        ended = train(ranks, folder, "--iterations", 2, "--dump-rollouts", 1, *of(ranks, flags))
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("iteration 2/2") == 1  # one reports
        assert len(os.listdir(folder / "run" / "tensorboard")) == 1
    one, two = map(metrics, folders)
    assert len(one) == len(two) == 2
    if "bf16" in flags:
        one, two = ([{name: rows[0][name] for name in ("score", "entropy", "length")}] for rows in (one, two))
    for first, second in zip(one, two, strict=True):
        assert first == pytest.approx(second, rel=1e-3, abs=1e-4)
    dumped = [[row for row in read_rollouts(folder / "run") if row["iteration"] == 1] for folder in folders]
    assert len(dumped[0]) == len(dumped[1]) == 16  # the rows of both ranks
    assert [row["response_ids"] for row in dumped[0]] == [row["response_ids"] for row in dumped[1]]
    for ranks, folder in ((2, folders[0]), (1, folders[1])):
        ended = train(ranks, folder, "--iterations", 3, "--resume")
        assert ended.returncode == 0 and len(metrics(folder)) == 3, ended.stderr
    last = [metrics(folder)[2] for folder in folders]  # of the same prompts
    assert "bf16" in flags or last[0] == pytest.approx(last[1], rel=1e-2, abs=1e-2)
    command = command_of(1, "evaluate", "--run", folders[1] / "run")
    ended = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "score" in ended.stdout
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder / "run" / "actor", dtype="auto")
        assert type(model).__name__ == "GPT2LMHeadModel" and model.dtype == torch.float32
        assert (folder / "run" / "adapter" / "adapter_config.json").exists() == ("--lora-rank" in flags)


def test_a_mistake_is_said_once(tmp_path):
    """A wrong flag is explained by one process, and help printed once."""
    ended = train(2, tmp_path, "--lerning-rate", "1e-3")
    assert ended.returncode and (ended.stdout + ended.stderr).count("Unrecognized options ─") == 1
    ended = train(2, tmp_path, "--help")
    assert ended.stdout.count("usage: ") == 1


def of(ranks: int, flags: tuple[str, ...]) -> tuple[str, ...]:
    """The flags for as many processes: one by itself cannot share weights out."""
    return tuple(flag for flag in flags if ranks > 1 or flag not in FULL)


@pytest.mark.parametrize("flags", [(), FULL])
def test_resumed_equals_uninterrupted(tmp_path, flags):
    """Two processes that stop after an iteration and go on end with the weights of two that never stop, to the bit."""
    states = []
    for name, parts in (("whole", [3]), ("stopped", [1, 3])):
        (tmp_path / name).mkdir()
        for iterations in parts:
            resume = ["--resume"] if (tmp_path / name / "run").exists() else []
            assert train(2, tmp_path / name, "--iterations", iterations, *resume, *flags).returncode == 0
        states.append(load_file(tmp_path / name / "run" / "actor" / "model.safetensors"))
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
@pytest.mark.parametrize("shard", [(), FULL])
def test_one_rank_fails(tmp_path, reward, message, shard):
    """All processes end, and the first says why and how to go on. One process then goes on with a good reward."""
    (tmp_path / "bad.py").write_text(BAD, encoding="utf-8")
    task = [f"reward=bad:{reward}", "reference=reviews", "prompts=reviews", "max_prompt_tokens=24"]
    flags = [part for each in task for part in ("--env-arg", each)]
    started = time.monotonic()
    ended = train(2, tmp_path, *flags, *shard, "--iterations", 4, "--rank-timeout", 10)
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
    for trial in range(20):
        resume = ["--resume"] if (tmp_path / "run" / FILE).exists() else []
        command = command_of(2, "train", "--run", tmp_path / "run", *SMALL, "--iterations", 40, "--rank-timeout", 10)
        command += FULL * (trial % 2)
        process = subprocess.Popen(
            [*command, *resume], cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(8, 16))
        ranks = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if ranks:
            for each in ranks if trial % 5 == 4 else [moments.choice([psutil.Process(process.pid), *ranks])]:
                each.send_signal(signal.SIGKILL)  # a rank, torchrun, or all of them
        process.wait(600)
        deadline = time.monotonic() + 60
        while left_behind(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not left_behind(tmp_path)
        if (tmp_path / "run" / FILE).exists():
            before, done = done, int(torch.load(tmp_path / "run" / FILE, weights_only=True)["iteration"])
            assert done >= before
    ended = train(2, tmp_path, "--iterations", 40, *(["--resume"] if (tmp_path / "run").exists() else []))
    assert ended.returncode == 0, ended.stderr
    assert [row["iteration"] for row in metrics(tmp_path)] == list(range(1, 41))
