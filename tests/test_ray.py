"""Ray, in an environment of its own (`make test-ray`): rewards in actors, and training by Ray Train's workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from textenv.rewards.functions import FunctionReward, per_response
from textenv.rewards.ray_pool import RayActors, ray_actors

ROOT = Path(__file__).parents[1]
SMALL = ["--rollout-size", "16", "--minibatch-size", "8", "--evaluation-prompts", "16", "--iterations", "2"]
SMALL += ["--checkpoint-every", "1", "--env-arg", "device=cpu", "--env-arg", "max_new_tokens=8"]
REWARDS = """
import os
import textenv

@textenv.ray_actors(count=2)
class Judge:
    def __init__(self):
        self.started = os.getpid()

    def __call__(self, prompts, responses):
        assert os.getpid() == self.started != int(os.environ["TRAINER"])
        return [float(len(response)) for response in responses]

def plain(prompts, responses):
    return [float(len(response)) for response in responses]
"""


def batch_of(reply, texts: list[str], **fields) -> object:
    """A reward's view of a batch of texts."""
    import torch

    from tests.support import tiny
    from textenv.rewards.base import ResponseBatch
    from textenv.state import TextState

    ids = torch.ones(len(texts), 2, dtype=torch.long)
    state = TextState.from_masks(ids, ids.bool(), ids[:, :1].bool())
    batch = ResponseBatch(texts, state, torch.ones(len(texts), dtype=torch.bool), tiny.tokenizer(), fields)
    vars(batch)["responses"] = texts  # as if these had been decoded
    return batch


def test_rows_keep_their_order():
    """Two actors score halves of a batch, with the prompts' fields; fewer rows than actors, and none, are scored too."""
    pytest.importorskip("ray")

    @ray_actors(count=2)
    class Weighted:
        def __init__(self):
            self.process = os.getpid()

        def __call__(self, prompts, responses, weight):
            assert os.getpid() == self.process
            return [len(text) * factor for text, factor in zip(responses, weight, strict=True)]

    reward = FunctionReward(Weighted, "weighted")
    assert reward.fields.required == ("weight",)
    for texts in (["a", "bb", "ccc"], ["a"]):
        weight = [10.0, 20.0, 30.0][: len(texts)]
        expected = [len(text) * factor for text, factor in zip(texts, weight, strict=True)]
        assert reward(batch_of(reward, texts, weight=weight)).final.tolist() == expected
    assert Weighted([], [], weight=[]) == []
    Weighted.stop()


def test_errors_are_those_of_any_function():
    """What the function raises, nonsense, a dead actor and a call over the limit are errors that name the reward."""
    pytest.importorskip("ray")

    def fails(prompts, responses):
        raise KeyError("no such answer")

    def short(prompts, responses):
        return [1.0]

    def dies(prompts, responses):
        os._exit(3)

    messages = {fails: "raised KeyError: 'no such answer'", short: "1 numbers for 2 responses", dies: "lost an actor"}

    class NoModel:
        def __init__(self):
            raise OSError("no weights")

        def __call__(self, prompts, responses):
            return []

    messages[NoModel] = "raised OSError: no weights"
    for function, message in messages.items():
        reward = FunctionReward(ray_actors()(function), "mine")
        with pytest.raises(ValueError, match=rf"reward 'mine' .*{message}"):
            reward(batch_of(reward, ["a", "b"]))


def test_more_gpus_than_there_are():
    """A pool that could never start is refused, and not waited for."""
    pytest.importorskip("ray")
    reward = FunctionReward(ray_actors(count=3, num_gpus=500)(lambda prompts, responses: [1.0]), "mine")
    with pytest.raises(ValueError, match="3 actors need 1500 GPUs"):
        reward(batch_of(reward, ["a"]))


def test_a_call_that_hangs_is_abandoned():
    """A call over `reward_timeout` is an error, and the next call has new actors."""
    pytest.importorskip("ray")

    def sometimes(prompts, responses):
        if responses == ["hang"]:
            time.sleep(1000)
        return [1.0] * len(responses)

    actors = ray_actors()(sometimes)
    reward = FunctionReward(actors, "mine", timeout=20.0)
    assert reward(batch_of(reward, ["a"])).final.tolist() == [1.0]
    first = actors.pool.actors[0]
    reward.timeout = 1.0
    with pytest.raises(ValueError, match="reward 'mine' took longer than reward_timeout"):
        reward(batch_of(reward, ["hang"]))
    reward.timeout = 20.0
    assert reward(batch_of(reward, ["a"])).final.tolist() == [1.0]
    assert actors.pool.actors[0] != first
    actors.stop()


def test_bad_counts_and_no_ray(monkeypatch):
    """A number of actors that is none is refused; without Ray the first call says how to install it."""
    with pytest.raises(ValueError, match="ray_actors takes a number of actors, 1 or more, got 0"):
        ray_actors(count=0)

    async def later(prompts, responses):
        return [1.0]

    for wrong in (later, per_response()(len)):
        with pytest.raises(ValueError, match=r"takes a plain function f\(prompts, responses"):
            ray_actors()(wrong)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'textenv\[ray\]'"):
        RayActors(len, 1, {})(["a"], ["b"])


def run(folder: Path, *command: object) -> subprocess.CompletedProcess:
    """A command in `folder`, where the rewards are."""
    (folder / "judges.py").write_text(REWARDS, encoding="utf-8")
    names = {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRAINER": "0"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        **dict(cwd=folder, env=os.environ | names, capture_output=True, encoding="utf-8", check=False, timeout=400),
    )


def metrics(folder: Path) -> list[dict]:
    """The metrics of every iteration, without times."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if "second" not in key} for line in lines]


def test_a_run_with_a_reward_in_actors(tmp_path):
    """`--env-arg reward=judges:Judge` trains with the numbers of the same function in the trainer's process."""
    pytest.importorskip("ray")
    parts = [part for each in ("reference", "prompts") for part in ("--env-arg", f"{each}=reviews")]
    for name, reward in (("actors", "Judge"), ("here", "plain")):
        flags = ["--run", tmp_path / name, *SMALL, *parts, "--env-arg", f"reward=judges:{reward}"]
        ended = run(tmp_path, "-m", "agents", "train", *flags)
        assert ended.returncode == 0, ended.stderr
    for actors, here in zip(metrics(tmp_path / "actors"), metrics(tmp_path / "here"), strict=True):
        assert {name.replace("Judge", "plain"): value for name, value in actors.items()} == pytest.approx(here)


def test_workers_of_ray_train(tmp_path):
    """Two workers of `examples/ray_train.py` write one run, with the numbers of one process."""
    pytest.importorskip("ray.train")
    ended = run(tmp_path, ROOT / "examples" / "ray_train.py", "--run", tmp_path / "two", "--", *SMALL)
    assert ended.returncode == 0, ended.stderr
    ended = run(tmp_path, "-m", "agents", "train", "--run", tmp_path / "one", *SMALL)
    assert ended.returncode == 0, ended.stderr
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
    ended = run(
        tmp_path, ROOT / "examples" / "ray_train.py", "--run", tmp_path / "two", "--", *SMALL, "--shard", "most"
    )
    assert ended.returncode and "shard must be one of none, full" in ended.stderr + ended.stdout
