"""Folders and files whose names look like something else: a function, a number, two words."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest

from agents import checkpoint, run
from agents.__main__ import main
from agents.config import TrainConfig
from agents.control.experiment import ControlExperiment
from agents.play import load_player
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


TOO_LONG = [300, 5000]  # one name, and a whole path: the system's limits are 255 and 4,096
EMBEDDED = dict.fromkeys(("reference", "reward", "prompts"), "reviews")


def refused(*arguments):
    """The sentence of a command that is refused."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert str(end.value.code).startswith("error: ")
    return str(end.value.code)


def arguments_of(**parts):
    """Arguments of `gym.make` as flags."""
    return [word for name, value in parts.items() for word in ("--env-arg", f"{name}={value}")]


@pytest.mark.parametrize("length", TOO_LONG)
@pytest.mark.parametrize("part", EMBEDDED)
def test_parts_whose_names_are_too_long(part, length):
    """They are what is not there: in Python and on the command line."""
    parts = EMBEDDED | {part: "x" * length + (".jsonl" if part == "prompts" else "")}
    with pytest.raises(ValueError, match=r"no model configuration in|no prompts file at"):
        gym.make("TextGen-v0", **parts, device="cpu")
    assert "x" * 50 in refused("train", *arguments_of(**parts, device="cpu"))


@pytest.mark.parametrize("length", TOO_LONG)
def test_files_whose_names_are_too_long(tmp_path, monkeypatch, length):
    """Every name on the command line that is read, and every one that is written, before any work."""
    monkeypatch.chdir(tmp_path)
    name, there = "x" * length, "no/" * 3 + "x" * length
    assert "no prompts file at" in refused("train", *arguments_of(device="cpu"), "--held-out", f"{name}.jsonl")
    with pytest.raises(ValueError, match="there is no policy in"):
        load_player(name, gym.make("TextGen-v0", device="cpu"))
    for flags in (["train", "--resume"], ["evaluate"], ["generate", "--prompt", "a"], ["play"]):
        assert "no run in" in refused(*flags, "--run", name)
    rows = [{"prompt": f"p{row}", "chosen": "a", "rejected": "b"} for row in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    good = {"--base": "base", "--data": "pairs.jsonl", "--output": "model"}
    for flag, says in (
        ("--base", "no model configuration in"),
        ("--data", "no training data at"),
        ("--output", "cannot be written: File name too long; choose another output folder"),
    ):
        assert says in refused("reward-model", *(word for pair in (good | {flag: name}).items() for word in pair))
    with pytest.MonkeyPatch.context() as patch:
        for work in ("agents.run.build", "agents.run.load_policy", "agents.play.load_config"):
            patch.setattr(work, None)
        for new in (name, there):
            for command in (
                ["train", "--run"],
                ["evaluate", "--run", "a", "--output"],
                ["play", "--run", "a", "--video"],
            ):
                message = refused(*command, new)
                assert "cannot be written: File name too long; choose another --" in message or (
                    command[0] == "evaluate" and new == there and "is no folder; create it first" in message
                )
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
