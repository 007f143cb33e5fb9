"""What a run is said to need is what it has: counts by equality, sizes against files and a measured process."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agents.__main__ import main
from agents.algorithms.registry import find_algorithm
from agents.checkpoint import FILE
from agents.config import TrainConfig
from agents.presets import defaults
from agents.replay import free_memory
from agents.reporting.estimate import estimate, free_disk, read_models, sentence, start_lines, warnings
from agents.text.config import TextConfig
from benchmarks.estimate import Settings, cases, run
from benchmarks.estimate import main as main_of_benchmark
from tests.support import tiny
from tests.support.learning import make_trainer
from tests.support.runs import train
from textenv import TextGenConfig


@pytest.fixture
def settings(folders) -> dict:
    """Arguments of a small task with a reward model."""
    models = dict(reference=folders["gpt2"], reward=folders["gpt2_reward"], prompts=tiny.PROMPTS)
    return models | dict(max_prompt_tokens=16, max_new_tokens=4, device="cpu", group_size=2)


def needs_of(settings: dict, learner: str = "ppo", ranks: int = 1, **changes):
    """The estimate of a run."""
    config = TrainConfig(algorithm=learner)
    return estimate(config, TextConfig(**changes), find_algorithm(learner)[0](), TextGenConfig(**settings), ranks)


def item(items, name: str):
    """The one item of a name."""
    (found,) = [each for each in items if each.name.startswith(name)]
    return found


@pytest.mark.parametrize(
    ("learner", "changes"),
    [
        *((learner, {}) for learner in ("ppo", "rloo", "dqn", "sac")),
        *(("ppo", changes) for changes in ({"lora_rank": 4}, {"critic": "reference"})),
        ("rloo", {"lora_rank": 4}),
    ],
)
def test_what_is_trained_is_counted(settings, learner, changes):
    """By name and number as in a trainer of the same settings, for every kind of learner; with adapters them alone."""
    trained = {
        each.name.removesuffix(", trained"): each.parameters
        for each in needs_of(settings, learner, **changes).held
        if each.name.endswith(", trained")
    }
    networks = make_trainer(settings, learner=learner, **changes).algorithm.networks
    assert trained == {name: sum(map(torch.numel, net.parameters())) for name, net in networks.trained.items()}
    if networks.targets:
        targets = sum(weight.numel() for net in networks.targets.values() for weight in net.parameters())
        assert item(needs_of(settings, learner).held, "target").parameters == targets


def test_sizes_by_hand(settings):
    """4 bytes a weight, 8 of moments and 4 of a gradient; activations and keys by the formulas of the module."""
    needs = needs_of(settings, rollout_size=8, micro_batch_tokens=100)
    actor, critic = (item(needs.held, name).parameters for name in ("actor", "critic"))
    assert item(needs.held, "actor").bytes == 4 * actor and item(needs.held, "AdamW").bytes == 8 * (actor + critic)
    assert item(needs.update, "gradients").bytes == 4 * (actor + critic)
    assert item(needs.update, "activations").bytes == 4 * 100 * 2 * (16 * 32 + 5 * 128)  # two layers of width 32
    assert item(needs.rollout, "keys").bytes == 4 * 8 * 20 * 2 * 2 * 32
    assert item(needs.disk, "checkpoint").bytes == 12 * (actor + critic)
    assert needs.memory == sum(each.bytes for each in (*needs.held, *needs.update))


def test_what_the_settings_save(settings):
    """Every setting that the warning names lowers the sum."""
    base = needs_of(settings).memory
    for changes in ({"lora_rank": 2}, {"gradient_checkpointing": True}, {"micro_batch_tokens": 64}):
        assert needs_of(settings, **changes).memory < base, changes
    assert needs_of(settings | {"dtype": "bfloat16"}).memory < base
    large = dict(rollout_size=4096, micro_batch_tokens=1)
    assert needs_of(settings, decode_slots=8, **large).memory < needs_of(settings, **large).memory
    halved = needs_of(settings, ranks=2, shard="full")
    assert item(halved.held, "AdamW").bytes == item(needs_of(settings).held, "AdamW").bytes // 2


def test_graphs_keep_their_caches(settings, monkeypatch):
    """On CUDA keys and values stay, unless nothing is captured; evaluations write as many responses at a time."""
    monkeypatch.setattr(TextGenConfig, "torch_device", lambda _: torch.device("cuda"))
    for prompts, caches in ((4, [8, 4]), (8, [8]), (24, [8]), (27, [8, 3])):
        sizes = dict(rollout_size=8, evaluation_prompts=prompts, precision="float32")
        kept, not_kept = needs_of(settings, **sizes), needs_of(settings, compile=False, **sizes)
        row = item(not_kept.rollout, "keys").bytes // 8
        assert [each.bytes // row for each in kept.held if each.name.startswith("keys")] == caches
        assert [each.name for each in kept.rollout] == ["logits of a step"]
        assert kept.memory == not_kept.memory + sum(caches) * row  # the peak is that of an update


def test_rewards_of_every_kind(settings):
    """Functions and metrics hold no model; a sum holds each of its models."""
    model = settings["reward"]
    for reward, count in (("a:f", 0), ("evaluate:bleu:bleu", 0), ({model: 1.0, "a:f": 2.0}, 1), (model, 1)):
        assert len(read_models(TextGenConfig(**settings | {"reward": reward})).rewards) == count


def test_a_run_says_what_it_needs(settings, tmp_path, capsys, monkeypatch):
    """In a line at the start; its checkpoint is then as large as was said."""
    monkeypatch.setattr("agents.reporting.plots.draw_curves", lambda *_: None)
    monkeypatch.setattr("agents.reporting.plots.draw_credit", lambda *_: None)
    train(tmp_path / "run", settings, iterations=1)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Needs about 0.0" in printed and "of disk (" in printed and "warning" not in printed
    said = item(needs_of(settings).disk, "checkpoint").bytes
    assert (tmp_path / "run" / FILE).stat().st_size == pytest.approx(said, rel=0.2)  # names and generators beside it


def test_an_estimate_alone(settings, tmp_path, capsys, monkeypatch):
    """`--estimate` prints a table and starts nothing; control has no models, and a missing one is named."""
    monkeypatch.chdir(tmp_path)
    task = ["--env.reference", settings["reference"], "--env.reward", "a:b", "--env.prompts", "c:d"]
    main(["train", "--run", "run", "--estimate", *task])
    printed = capsys.readouterr().out
    assert "actor, trained" in printed and "Needs about" in printed and not list(tmp_path.iterdir())
    for arguments, says in (
        (["--env", "CartPole-v1"], "CartPole-v1 has none; leave --estimate out"),
        (
            ["--env.reference", "nowhere", "--env.reward", "a:b", "--env.prompts", "c:d"],
            "no model configuration in 'nowhere'",
        ),
    ):
        with pytest.raises(SystemExit, match=says):
            main(["train", "--estimate", *arguments])


def test_an_estimate_of_a_run_that_was_started_elsewhere(settings, tmp_path, capsys, monkeypatch):
    """Its models are found from where it was started, as when it goes on."""
    monkeypatch.setattr("agents.reporting.plots.draw_curves", lambda *_: None)
    monkeypatch.setattr("agents.reporting.plots.draw_credit", lambda *_: None)
    shutil.copytree(settings["reference"], tmp_path / "first" / "lm")
    monkeypatch.chdir(tmp_path / "first")
    train(Path("run"), settings | {"reference": "lm"}, iterations=1)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    main(["train", "--run", "first/run", "--resume", "--estimate"])
    assert "actor, trained" in capsys.readouterr().out


def test_what_does_not_fit_is_said(settings, tmp_path):
    """Memory and disk apart, with the settings that lower them; none where all is well or nothing is known."""
    needs = needs_of(settings)
    assert warnings(needs, needs.memory, needs.room) == [] == warnings(needs, None, needs.room)
    (memory,), (disk,) = warnings(needs, needs.memory - 1, needs.room), warnings(needs, None, needs.room - 1)
    assert "--lora-rank" in memory and "--micro-batch-tokens" in memory and "more disk than is free" in disk
    assert "of memory beside" in sentence(needs, None, 0)
    unknown = replace(defaults("TextGen-v0", "ppo")[0], env_arg=("reference=nowhere", "reward=a:b", "prompts=c:d"))
    assert start_lines(unknown, TextConfig(), find_algorithm("ppo")[0](), 1, tmp_path) == []


def test_what_is_free(tmp_path):
    """Of this machine: some memory where the system says so, and the disk of a folder that is not there yet."""
    memory = free_memory(torch.device("cpu"))
    assert memory is None or memory > 0
    assert free_disk(tmp_path / "a" / "b") == pytest.approx(free_disk(tmp_path), rel=0.1) and free_disk(tmp_path) > 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells a process's memory")
def test_against_a_measured_process(tmp_path):
    """The main job, 1M parameters: memory beyond the libraries within a half of it, and the checkpoint's size within 3%.

    So small a run holds much besides its models and their states.
    """
    (case,) = cases(Settings(lora_ranks=(0,)), tmp_path)
    numbers = run(case["job"], tmp_path)
    assert numbers["estimated_memory_bytes"] == pytest.approx(numbers["memory_bytes"], rel=0.5)
    assert numbers["estimated_checkpoint_bytes"] == pytest.approx(numbers["checkpoint_bytes"], rel=0.03)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells a process's memory")
def test_the_benchmark(tmp_path):
    """It runs at small sizes, with and without adapters, whose checkpoint is small."""
    main_of_benchmark(Settings(quick=True, output=tmp_path))
    whole, adapted = json.loads((tmp_path / "estimate.json").read_text(encoding="utf-8"))["rows"]
    assert (whole["lora_rank"], adapted["lora_rank"]) == (0, 16)
    assert adapted["checkpoint_bytes"] < whole["checkpoint_bytes"] / 3
    for row in (whole, adapted):
        ratio = row["estimated_checkpoint_bytes"] / row["checkpoint_bytes"]
        assert row["checkpoint, estimated / measured"] == ratio == pytest.approx(1, abs=0.1)
        assert row["memory_bytes"] > row["checkpoint_bytes"]
    assert (tmp_path / "estimate.png").stat().st_size > 10_000
