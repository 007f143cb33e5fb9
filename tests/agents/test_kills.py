"""Runs that are killed, terminated or out of disk at random moments and resumed end as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.learning import same
from tests.support.runs import flags, rows, saved, start

pytestmark = pytest.mark.slow

FORK = multiprocessing.get_context("forkserver")  # its processes have the libraries imported already
FORK.set_forkserver_preload(["agents.__main__", "torch.utils.tensorboard", "torch._dynamo"])
ITERATIONS = 5
CARTPOLE = ["--env", "CartPole-v1", "--env-arg", "max_episode_steps=50", "--evaluation-episodes", "2"]
SHORT = ["--iterations", str(ITERATIONS), "--checkpoint-every", "1", "--num-envs", "2", "--steps", "64"]
NORMALIZED = ["--algorithm", "ppo", "--normalize-observation", "--normalize-reward"]
REPLAY = ["--algorithm", "dqn", "--buffer-size", "4000", "--learning-starts", "100", "--gradient-steps", "8"]


@pytest.fixture(scope="module", params=["text", "control", "replay"])
def job(request, folders) -> list[str]:
    """Flags of a short run that saves after every iteration."""
    if request.param == "text":
        settings = dict(reference=folders["gpt2"], reward=folders["gpt2_reward"], prompts=tiny.PROMPTS, device="cpu")
        normalized = dict(score_normalization="running", prompt_sampling="prioritized", max_new_tokens=8)
        return flags(settings | normalized, iterations=ITERATIONS)
    return [*CARTPOLE, *SHORT, *(NORMALIZED if request.param == "control" else REPLAY)]


class Bench:
    """Starts one kind of run again and again in a folder; knows how it ends undisturbed."""

    def __init__(self, folder: Path, job: list[str]) -> None:
        self.folder, self.job, self.log = folder, job, folder / "log"
        for name in ("first", "whole"):  # the first one also imports the libraries
            started = time.monotonic()
            assert self.begin(name).wait() == 0, self.output()
            self.seconds = time.monotonic() - started
        self.expected = saved(folder / "whole")

    def begin(self, name: str, *more: str, root: Path | None = None) -> Started:
        """Start a run, new or with --resume."""
        run = (root or self.folder) / name
        return Started(self.log, ["train", "--run", str(run), *(more or self.job)])

    def output(self) -> str:
        """What the runs wrote since the last call."""
        text = self.log.read_text(encoding="utf-8") if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return text

    def finish(self, run: Path) -> bool:
        """Resume a run to its end and compare. False if it had stopped before its first checkpoint."""
        self.output()
        code = self.begin(run.name, "--resume", root=run.parent).wait()
        output = self.output()
        if code:
            assert "no run in" in output or "no checkpoint in" in output, output
            return False
        assert same(saved(run), self.expected)
        assert [row["iteration"] for row in rows(run)] == [*range(1, ITERATIONS + 1)]
        assert json.loads((run / "summary.json").read_bytes())["iterations"] == ITERATIONS
        leftovers = [path.name for path in run.iterdir() if path.name.endswith(".new")]
        assert not leftovers
        shutil.rmtree(run)
        return True


class Started:
    """A process of a run."""

    def __init__(self, log: Path, arguments: list[str]) -> None:
        self.process = FORK.Process(target=start, args=(log, arguments))
        self.process.start()

    def wait(self) -> int:
        """Its exit code; minus the signal that killed it."""
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        return code

    def signal_after(self, seconds: float, number: int, since: Path | None = None) -> int:
        """Send a signal, `seconds` after a file is there, or after the start; returns the exit code."""
        while since is not None and not since.exists() and self.process.exitcode is None:
            self.process.join(0.002)
        self.process.join(seconds)
        if self.process.exitcode is None:
            assert self.process.pid is not None
            os.kill(self.process.pid, number)
        return self.wait()


@pytest.fixture(scope="module")
def bench(job, tmp_path_factory) -> Bench:
    """The run of this job."""
    return Bench(tmp_path_factory.mktemp("bench"), job)


@pytest.mark.parametrize(("number", "times"), [(signal.SIGKILL, 18), (signal.SIGTERM, 5)], ids=["kill", "terminate"])
def test_killed_at_random_moments(bench, number, times):
    """Killed at any moment and resumed (and half of the times killed again), the last state is the same, to the bit.

    SIGTERM ends a run with exit code 143 and says how to go on.
    """
    moments, stopped, resumed = random.Random(int(number)), 0, 0
    for trial in range(times):
        run = bench.folder / f"{number}-{trial}"
        # Two thirds are stopped after the first checkpoint, however busy the machine is; the others at any moment.
        since = run / "checkpoint.pt" if trial % 3 else None
        code = bench.begin(run.name).signal_after(moments.uniform(0.0, 0.6) * bench.seconds, number, since)
        output = bench.output()
        assert code in (0, -number, 128 + number), output
        if code == 128 + number and (run / "metrics.jsonl").exists() and not (run / "summary.json").exists():
            assert "stopped. The last checkpoint is good: continue from it with --run" in output
        assert "Traceback" not in output
        if trial % 2 and (run / "checkpoint.pt").exists():
            bench.begin(run.name, "--resume").signal_after(moments.uniform(0.0, 1.0) * bench.seconds, number)
        stopped += code != 0
        if run.exists():
            resumed += bench.finish(run)
    assert stopped >= 1 and resumed >= times / 2  # the moments were in the middle of something


def test_a_full_disk_at_random_moments(bench, tmp_path):
    """A disk that is full at any moment ends the run in a sentence; with room again it ends as it would have."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        assert bench.begin("whole", root=disk).wait() == 0
        needed = sum(path.stat().st_size for path in (disk / "whole").rglob("*") if path.is_file())
        shutil.rmtree(disk / "whole")
        free, full = shutil.disk_usage(disk).free, 0
        moments = random.Random(0)
        for trial in range(6):
            run, ballast = disk / f"{trial}", disk / "ballast"
            ballast.write_bytes(bytes(free - int(moments.uniform(0.0, 1.5) * needed)))
            code, output = bench.begin(run.name, root=disk).wait(), bench.output()
            ballast.unlink()
            assert code in (0, 1), output  # not killed by SIGBUS
            assert code == 0 or "cannot be written: No space left on device. Make room" in output, output
            assert "Traceback" not in output, output
            full += code
            if run.exists():
                assert bench.finish(run)
        assert full >= 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_real_process_is_terminated(tmp_path):
    """SIGTERM, as a cluster sends it, ends `python -m agents` with exit code 143 and the way to go on."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "agents", "train", "--run", "a run", *CARTPOLE, "--iterations", "100000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not (tmp_path / "a run/metrics.jsonl").exists():
        time.sleep(0.1)
    process.terminate()
    message = process.communicate()[1].decode()
    assert process.returncode == 143 and "Traceback" not in message
    assert "stopped. The last checkpoint is good: continue from it with --run 'a run' --resume." in message


STOPPED_BY_A_THREAD = """
import os, signal, sys, threading
import agents.__main__ as program
real = threading.Thread.start
def start(thread):
    real(thread)
    if "ThreadPool" in thread.name:
        os.kill(os.getpid(), signal.SIGTERM)
threading.Thread.start = start
signal.signal(signal.SIGTERM, program.terminate)
program.main(["supervised", "--base", sys.argv[1], "--data", "data.jsonl", "--output", "out"])
"""


def test_a_stop_among_threads_ends_the_process(folders, tmp_path):
    """SIGTERM while a library starts threads, to load weights, leaves none that waits forever."""
    (tmp_path / "data.jsonl").write_text('{"text": "a b"}\n{"text": "c d"}\n{"text": "e"}\n')
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STOPPED_BY_A_THREAD, folders["gpt2"]]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=100)
    assert ended.returncode == 143 and "stopped." in ended.stderr and "Traceback" not in ended.stderr, ended.stderr


ASCII = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="")


@pytest.mark.parametrize("system", [ASCII, ASCII | dict(PYTHONIOENCODING="cp1252")], ids=["ascii", "cp1252"])
def test_a_real_terminal_without_arrows(system, folders, tmp_path):
    """A run whose prompts are not ASCII, on a system that is: it ends with exit code 0 and all its results."""
    root = Path(__file__).parents[2]
    settings = dict(reference=folders["gpt2"], reward=folders["gpt2_reward"], device="cpu", max_new_tokens=4)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "café →"}\n{"prompt": "日本"}\n', encoding="utf-8")
    command = [sys.executable, "-m", "agents", "train", "--run", "run", *flags(settings | {"prompts": "prompts.jsonl"})]
    environment = os.environ | system | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr.decode("utf-8", "replace")
    assert b"\\u2192" in result.stdout
    assert {"summary.json", "samples.md", "curves.png", "credit.png", "actor"} <= set(os.listdir(tmp_path / "run"))
    command = [sys.executable, "-m", "agents", "generate", "--run", "run", "--prompt", "日", "--samples", "1"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert result.returncode == 0 and b"] \\u65e5" in result.stdout, result.stderr.decode("utf-8", "replace")
