"""`profile`: the phases add up, operations are those of the formula, and the trace names the phases."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
import torch

from agents.__main__ import main
from agents.reporting import profile
from agents.reporting.phases import observed, phase
from tests.support import tiny
from tests.support.learning import make_trainer
from textenv import LanguageModel, shared


@pytest.fixture
def trainer() -> Any:
    """A trainer of a tiny task whose responses all have 12 tokens."""
    reference = LanguageModel(tiny.language_model(), tiny.tokenizer(), (tiny.END,))
    task = dict(reference=shared(reference), reward=ones, prompts=["abcd"], stop_token_ids=[299], temperature=0.1)
    return make_trainer(
        task | dict(max_prompt_tokens=4, max_new_tokens=12, kl_coef=0.1, device="cpu"),
        algorithm=dict(epochs=2),
        critic="reference",
    )


def ones(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward."""
    return [1.0] * len(prompts)


def test_phases(trainer, tmp_path):
    """All phases of an iteration once, whose seconds with the rest are the iteration's, and a trace that shows them."""
    measured = profile.profile_iterations(trainer, tmp_path / "trace.json.gz")
    assert [part.name for part in measured.phases] == ["decode", "score", "prepare", "update", "optimizer", "rest"]
    assert all(part.seconds > 0 for part in measured.phases)
    assert sum(part.seconds for part in measured.phases) == pytest.approx(measured.seconds, rel=1e-3)
    assert measured.peak_bytes > 2**20 and measured.peak == (0.0, 0.0)
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"decode", "score", "prepare", "update", "optimizer"} <= names


def test_operations(trainer, tmp_path):
    """Those of an update are 6 per weight and token, forward and backward, of the matrices that each token meets."""
    measured = profile.profile_iterations(trainer, tmp_path / "trace.json.gz")
    update = next(part for part in measured.phases if part.name == "update")
    trunk = 2 * 12 * 32**2  # weights of two blocks: 4 H² of attention and 8 H² of the feed-forward network
    read, epochs = measured.steps / 12 * 15, 2  # tokens of a text that predict something
    expected = epochs * 6 * (2 * trunk * read + 32 * 300 * measured.steps)  # actor and critic; the head of the actor
    assert update.operations == pytest.approx(expected, rel=0.12)  # attention itself is not in the formula


def test_bytes_of_decoding(trainer):
    """Against a loop over rows and steps: every step reads all weights, and each row's keys and values so far."""
    data = trainer.collector.collect(trainer.algorithm.networks.policy).data
    model = trainer.algorithm.networks.policy.model
    weights = 4 * sum(each.numel() for each in model.parameters())
    steps = int(data["mask"].sum(1).max())
    expected = steps * weights
    for row in range(len(data)):
        length = int(data["mask"][row].sum())
        prompt = int(data["attention_mask"][row].sum()) - length
        for step in range(length):
            expected += (prompt + step) * 2 * 2 * 32 * 4  # keys and values of two layers of width 32, float32
    assert profile.decode_bytes(trainer, data) == pytest.approx(expected)


def test_command(tmp_path, monkeypatch, capsys):
    """`profile` takes the flags of `train`, prints the table, and writes it and the trace to a new folder."""
    monkeypatch.chdir(tmp_path)
    small = ["--steps", "4", "--num-envs", "2", "--minibatch-size", "8", "--epochs", "1"]
    main(["profile", "--run", "one", "--env", "CartPole-v1", *small])
    printed = capsys.readouterr().out
    assert "optimizer" in printed and "frames/s" in printed and "ui.perfetto.dev" in printed
    numbers = json.loads((tmp_path / "one/profile.json").read_text(encoding="utf-8"))
    assert [part["name"] for part in numbers["phases"]] == ["play", "prepare", "update", "optimizer", "rest"]
    assert (tmp_path / "one/trace.json.gz").stat().st_size > 1000
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["profile.json", "trace.json.gz"]  # no tracker
    with pytest.raises(SystemExit, match="already exists"):
        main(["profile", "--run", "one", "--env", "CartPole-v1", *small])


def test_a_profile_that_fails_leaves_no_folder(tmp_path, monkeypatch, capsys):
    """So that the same command may be tried again."""
    small = ["--steps", "4", "--num-envs", "2", "--minibatch-size", "8", "--epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(profile, "profile_iterations", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["profile", "--run", str(tmp_path / "one"), "--env", "CartPole-v1", *small])
    assert not (tmp_path / "one").exists()


def test_known_devices(monkeypatch):
    """The longest name counts: an L40S is no L4."""
    cuda = torch.device("cuda")
    for name, peak in [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 0.0),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert profile.peak_of(cuda)[0] == peak


def test_a_phase_ends_with_an_error():
    """Observers are told, and are gone after their block."""
    seen = []

    class Noting:
        """Notes what it is told."""

        def begin(self, name):
            seen.append(name)

        def end(self, name):
            seen.append(f"end {name}")

    with observed(Noting()), pytest.raises(ZeroDivisionError), phase("a"):
        raise ZeroDivisionError
    with phase("b"):
        pass
    assert seen == ["a", "end a"]
