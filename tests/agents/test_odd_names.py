"""Folders and files whose names look like something else: a function, a number, two words."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest

from agents import checkpoint, run
from agents.config import TrainConfig
from agents.control.experiment import ControlExperiment
from agents.text.experiment import TextExperiment, make_task
from tests.support import tiny
from textenv.training.reward_model import load_base

NAMES = ["a:b", "3", "1e5", "true", "my model", "evaluate:x:y", "-4", "2024_01"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and prompts under each of the names."""
    folder = tmp_path_factory.mktemp("names")
    model, reward = tiny.language_model(), tiny.reward_model()
    for name in NAMES:
        tiny.save(model, folder / name)
        tiny.save(reward, folder / "rewards" / name)
        (folder / f"{name}.jsonl").write_text('{"prompt": "ab"}\n', encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_names(folder, monkeypatch, name):
    """As reference, reward, weighted reward and prompts, from Python (text or path) and on the command line."""
    monkeypatch.chdir(folder)
    sizes = dict(max_prompt_tokens=4, max_new_tokens=3, device="cpu")
    texts: dict[str, Any] = dict(reference=name, prompts=f"{name}.jsonl")
    monkeypatch.setattr("sys.path", [str(folder)])
    paths = {key: Path(value) for key, value in texts.items()}
    tasks = [
        gym.make("TextGen-v0", **sizes, **texts, reward=f"rewards/{name}").unwrapped.task,
        gym.make("TextGen-v0", **sizes, **paths, reward={Path("rewards", name): 1.0}).unwrapped.task,
    ]
    arguments = [*(f"{key}={value}" for key, value in (texts | sizes).items()), f"reward=rewards/{name}"]
    tasks.append(make_task(TrainConfig(env_arg=tuple(arguments))))
    monkeypatch.chdir(folder / "rewards")
    arguments = [f"reference=../{name}", f"prompts=../{name}.jsonl", f"reward={name}"]
    tasks.append(make_task(TrainConfig(env_arg=(*arguments, *(f"{key}={value}" for key, value in sizes.items())))))
    assert [task.prompts.texts for task in tasks] == [("ab",)] * 4
    assert [task.reward.part_names for task in tasks] == [(f"rewards/{name}",)] * 3 + [(name,)]
    assert load_base(name, seed=0)[0].config.num_labels == 1


def test_texts_on_the_command_line():
    """Arguments that are texts stay texts; their lists, mappings and null are read, and so are all other numbers."""
    config = TrainConfig(env_arg=("reward=1e5", "reference=null", 'prompts=["a"]', "kl_coef=1e5", "reward_label=1"))
    texts = ("reference", "reward", "prompts", "reward_label")
    assert config.env_arguments(texts) == {
        "reward": "1e5",
        "reference": None,
        "prompts": ["a"],
        "kl_coef": 1e5,
        "reward_label": "1",
    }
    assert config.env_arguments()["reward"] == 1e5  # another environment's `reward` may be a number
    for absurd in ("1" * 5000, "[" * 100_000):
        assert TrainConfig(env_arg=(f"reward={absurd}",)).env_arguments() == {"reward": absurd}


def test_hints_for_the_shell(tmp_path):
    """The commands in results and notes can be pasted into a shell, whatever the run's folder is called."""
    folder = tmp_path / "it's my run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    numbers = dict.fromkeys(
        [f"{name}_{when}" for name in ("score", "length", "return") for when in ("before", "after")]
        + ["score_std_before", "return_std_after", "kl_per_response", "seconds", "frames_per_second"],
        1.0,
    )
    summary: dict[str, Any] = numbers | dict(tokens=1, frames=1, evaluation_episodes=1)
    lines = [
        *TextExperiment.result_lines(SimpleNamespace(), summary, folder),  # type: ignore[arg-type]
        *ControlExperiment.result_lines(SimpleNamespace(_resets=lambda _: ""), summary, folder),  # type: ignore[arg-type]
    ]
    (folder / checkpoint.FILE).touch()
    with pytest.raises(ValueError, match="stop") as stopped, run._resumable(folder, True):
        raise ValueError("stop")
    lines += stopped.value.__notes__
    commands = [line[line.index("--run") :] for line in lines if "--run" in line]
    assert [shlex.split(command)[:2] for command in commands] == [["--run", str(folder)]] * 3
