"""`decode_slots` and `compile` reach the decoder, in rollouts and in evaluations, and change no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from agents.text import evaluation, rollout
from agents.text.config import TextConfig
from tests.support.learning import make_trainer
from textenv.generation import generate
from textenv.models.decoding import Decoding


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_slots(settings, monkeypatch):
    """Three slots for eight responses give the rollout of eight."""
    given = []

    def noting(*arguments: Any, **named: Any) -> Any:
        given.append(arguments[5])
        return generate(*arguments, **named)

    monkeypatch.setattr(rollout, "generate", noting)
    data = []
    for slots in (None, 3):
        trainer: Any = make_trainer(settings, decode_slots=slots)
        data.append(trainer.collector.collect(trainer.algorithm.networks.policy).data)
    assert given == [Decoding(), Decoding(slots=3)]
    assert torch.equal(data[0]["input_ids"], data[1]["input_ids"]) and bool(data[0]["mask"].any())
    torch.testing.assert_close(data[0]["action_log_prob"], data[1]["action_log_prob"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_compile(settings, monkeypatch):
    """Is passed on; the compiled step itself is tested beside the decoder."""
    given = []

    def noting(*arguments: Any) -> Any:
        given.append(arguments[5])
        return generate(*arguments[:5])

    monkeypatch.setattr(rollout, "generate", noting)
    trainer: Any = make_trainer(settings, compile=True)
    collector, policy = trainer.collector, trainer.algorithm.networks.policy
    collector.collect(policy)
    evaluation.evaluate(collector.task, policy.model, collector.prompts, None, 0, decoding=collector.decoding)
    assert given == [Decoding(compile=True)] * 2


@pytest.mark.parametrize(
    ("device", "changes", "compiled"),
    [
        ("cuda:0", {}, True),
        ("cuda", {"shard": "full"}, False),
        ("cuda", {"compile": False}, False),
        ("cpu", {}, False),
        ("cpu", {"compile": True}, True),
    ],
)
def test_where_it_is_the_default(device, changes, compiled):
    """Graphs take no time worth mentioning, so CUDA has them unasked; a compiler on a CPU takes seconds."""
    assert TextConfig(**changes).compiles(torch.device(device)) is compiled


def test_refused():
    """No slots at all."""
    with pytest.raises(ValueError, match="decode_slots must be at least 1, got 0"):
        TextConfig(decode_slots=0)
