"""Every registered learner: it solves a task with a known answer, trains by its name alone, and resumes exactly.

A new algorithm is covered by its line in the dict; what it needs to do so in seconds goes into `SETTINGS`.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import run
from agents.__main__ import main
from agents.algorithms.registry import ALGORITHMS, find_algorithm
from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.config import TrainConfig
from agents.presets import defaults
from agents.reporting import plots
from agents.text.config import TextConfig
from tests.support.learning import make_trainer, same, weights

AGENTS = Path(__file__).parents[3] / "agents"
PRESETS = AGENTS / "presets.py"

# What a learner needs to be done here in seconds; its own settings stand under `algorithm`.
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": dict(algorithm=dict(epochs=2)),
    # Its pace depends on rounding: after 20 iterations 1.4 on one machine, 3.2 to 3.9 on others.
    "grpo": dict(iterations=32),
    "dqn": dict(algorithm=dict(learning_starts=8)),
    "sac": dict(algorithm=dict(learning_starts=8)),
}


def settings_of(name: str) -> dict[str, Any]:
    """The learner's own settings for these tests."""
    return SETTINGS.get(name, {}).get("algorithm", {})


@pytest.fixture
def letters(folders) -> dict:
    """A task with a known answer: the score counts the letter r, which the reference writes once in a hundred."""
    return dict(
        reference=folders["gpt2"],
        reward=lambda prompts, responses: [float(response.count("r")) for response in responses],
        prompts=["a", "bc"],
        kl_coef=0.01,
        max_prompt_tokens=2,
        max_new_tokens=4,
        stop_token_ids=[256],
        temperature=1.0,
        group_size=4,
        device="cpu",
    )


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_it_learns_a_known_answer(letters, name):
    """The rewarded letter, one of four at first in few responses, comes to fill much of each."""
    quick = dict(iterations=14, rollout_size=32, minibatch_size=16, micro_batch_tokens=640, schedule="constant")
    quick |= dict(learning_rate=5e-3, critic_learning_rate=3e-3)
    trainer = make_trainer(letters, learner=name, **(quick | SETTINGS.get(name, {})))
    scores = [iteration.metrics["score"] for iteration in trainer.iterate()]
    assert sum(scores[:2]) / 2 < 0.3
    assert sum(scores[-3:]) / 3 > 1.5


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_resumed_equals_uninterrupted(letters, tmp_path, name):
    """A run stopped after one iteration and resumed ends with the same weights, to the bit, as one never stopped."""
    trainers = [make_trainer(letters, settings_of(name), name) for _ in range(3)]
    whole, stopped, resumed = trainers
    expected = [iteration.metrics["score"] for iteration in whole.iterate()]
    scores = [next(stopped.iterate()).metrics["score"]]
    save_checkpoint(tmp_path, stopped)
    load_checkpoint(tmp_path, resumed)
    scores += [iteration.metrics["score"] for iteration in resumed.iterate()]
    assert scores == expected
    for part in ("trained", "targets"):
        for network in getattr(whole.algorithm.networks, part):
            first, second = (
                weights(getattr(trainer.algorithm.networks, part)[network]) for trainer in (whole, resumed)
            )
            assert same(first, second)
    assert not same(weights(whole.algorithm.networks.policy), weights(stopped.algorithm.networks.policy))


Parts = tuple[TrainConfig, TextConfig, Any]


def small_run(name: str, folder: Path) -> Parts:
    """A run on the embedded task of one iteration, by name."""
    config, text, algorithm = defaults("TextGen-v0", name)
    env_arg = (*config.env_arg, "max_new_tokens=6", "device=cpu")
    return (
        dataclasses.replace(config, run=str(folder), iterations=1, minibatch_size=8, env_arg=env_arg),
        dataclasses.replace(text, rollout_size=8, micro_batch_tokens=160, evaluation_prompts=8),
        dataclasses.replace(algorithm, **settings_of(name)),
    )


def flags(parts: Parts) -> list[str]:
    """The command line's words for what is not the preset's; a tuple's new items come after the preset's."""
    words = []
    for part, preset in zip(parts, defaults("TextGen-v0", parts[0].algorithm), strict=True):
        for field in dataclasses.fields(part):
            value, known, flag = getattr(part, field.name), getattr(preset, field.name), field.name.replace("_", "-")
            if isinstance(value, tuple):
                words += [word for one in value[len(known) :] for word in (f"--{flag}", str(one))]
            elif value != known:
                words += (
                    [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
                )
    return words


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_it_trains_by_name(tmp_path, monkeypatch, name):
    """The name is all it takes, in Python and on the command line, and both leave the same run, to the last digit."""
    monkeypatch.setattr(plots, "draw_curves", lambda *_: None)  # a second each, and no algorithm's own
    configs = small_run(name, tmp_path / "python")
    summary = run.train(*configs)
    assert summary["algorithm"] == name and torch.isfinite(torch.tensor(summary["score_after"]))
    for result in ("credit.png", "samples.md", "actor/model.safetensors", "summary.json"):
        assert (tmp_path / "python" / result).stat().st_size > 0
    monkeypatch.setattr(plots, "draw_credit", lambda *_: None)
    main(["train", "--algorithm", name, *flags(small_run(name, tmp_path / "words"))])
    rows = [(tmp_path / folder / "metrics.jsonl").read_text().splitlines() for folder in ("python", "words")]
    assert untimed(rows[0][-1]) == untimed(rows[1][-1])
    assert json.loads((tmp_path / "words/summary.json").read_text())["score_after"] == summary["score_after"]


def untimed(row: str) -> dict[str, float]:
    """The numbers of an iteration that do not depend on the clock."""
    return {name: value for name, value in json.loads(row).items() if "second" not in name}


def test_unknown_algorithms_are_told_the_known_ones(capsys):
    """An unknown name is refused with the list of the known ones, in Python and on the command line."""
    listed = ", ".join(sorted(ALGORITHMS))
    with pytest.raises(ValueError, match=f"no algorithm 'sarsa'; known are {listed}"):
        find_algorithm("sarsa")
    with pytest.raises(SystemExit, match=f"no algorithm 'sarsa'; known are {listed}"):
        main(["train", "--algorithm", "sarsa"])


def names_in(source: str, names: set[str]) -> set[str]:
    """Which names occur in a file's strings, imports and identifiers; docstrings and comments are for people."""
    tree = ast.parse(source)
    found, prose = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(node.value)  # a docstring
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            found.append(node.value)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found += [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        elif isinstance(node, ast.Name | ast.Attribute):
            found.append(node.id if isinstance(node, ast.Name) else node.attr)
    words = {word for text in found for word in re.findall(r"[a-z0-9]+", text.lower().replace("config", ""))}
    return words & names


def test_the_reader_of_names_reads():
    """The test below can fail: strings, imports and identifiers are all seen, and prose is not."""
    source = '"""Like SAC."""\nfrom agents.algorithms.dqn import a\nif name == "ppo":\n    x = A2CConfig()  # rloo\n'
    assert names_in(source, {"ppo", "dqn", "a2c", "rloo", "sac"}) == {"ppo", "dqn", "a2c"}


def test_no_algorithm_is_named_outside_its_file():
    """Swapping the algorithm changes no file: names are in the dict, the presets and an algorithm's own files alone."""
    named = {}
    for path in AGENTS.rglob("*.py"):
        if path.parent == AGENTS / "algorithms" or path == PRESETS:
            continue
        found = names_in(path.read_text(encoding="utf-8"), set(ALGORITHMS))
        if found:
            named[str(path.relative_to(AGENTS))] = found
    assert named == {"config.py": {"ppo"}}  # the default of `--algorithm`


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_no_algorithm_knows_another(name):
    """A learner's file names no other learner: what they share has files of its own."""
    _, learner = find_algorithm(name)
    path = AGENTS / "algorithms" / f"{learner.__module__.rpartition('.')[2]}.py"
    assert names_in(path.read_text(encoding="utf-8"), set(ALGORITHMS)) <= {name}
