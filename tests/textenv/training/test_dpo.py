"""DPO and IPO: losses and gradients equal to plain loops, ragged, and to TRL's trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support import tiny
from tests.support.oracle_models import language_model, projections
from textenv.training.dpo import (
    LOSSES,
    Pairs,
    Preference,
    PreferenceConfig,
    dpo_loss,
    fit,
    ipo_loss,
    margins,
    measure_pairs,
    pair_batch,
    pair_log_probs,
    reference_log_probs,
)
from textenv.training.loop import Job, LoopConfig

PAIRS = [
    Preference([65, 66, 67], [68], [69, 70, 71, 72, 256]),
    Preference([80], [81, 82, 83, 256], [84, 256]),
    Preference([90, 91, 92, 93, 94], [95, 96, 256], [97, 98, 99, 100]),
]
BETA, TEMPERATURE = 0.2, 0.7


def plain_log_prob(
    model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], temperature: float
) -> Tensor:
    """Log π of one response by the model's own unpadded forward, token by token."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0] / temperature
    total = torch.zeros(())
    for step, token in enumerate(response):
        row = logits[len(prompt) - 1 + step]
        total = total + row[token] - row.exp().sum().log()
    return total


def plain_loss(model: PreTrainedModel, reference: PreTrainedModel, loss: str, smoothing: float = 0.0) -> Tensor:
    """The mean loss over PAIRS as the papers write it."""
    total = torch.zeros(())
    for pair in PAIRS:
        ratios, lengths = [], [len(pair.chosen), len(pair.rejected)]
        for response in (pair.chosen, pair.rejected):
            with torch.no_grad():
                base = plain_log_prob(reference, pair.prompt, response, TEMPERATURE)
            ratios.append(plain_log_prob(model, pair.prompt, response, TEMPERATURE) - base)
        if loss == "dpo":
            probability = 1 / (1 + (-BETA * (ratios[0] - ratios[1])).exp())
            total = total - (1 - smoothing) * probability.log() - smoothing * (1 - probability).log()
        elif loss == "ipo":
            total = total + (ratios[0] - ratios[1] - 1 / (2 * BETA)) ** 2
        else:
            total = total + (ratios[0] / lengths[0] - ratios[1] / lengths[1] - 1 / (2 * BETA)) ** 2
    return total / len(PAIRS)


def gradients(loss: Tensor, model: PreTrainedModel) -> dict[str, Tensor]:
    """The gradient of every parameter."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("loss", "smoothing"), [("dpo", 0.0), ("dpo", 0.1), ("ipo", 0.0), ("ipo-mean", 0.0)])
def test_losses_are_plain_loops(kind: str, loss: str, smoothing: float) -> None:
    """Value and gradient of every loss on ragged pairs equal those of unpadded forwards, one token at a time."""
    model, reference = tiny.language_model(kind, 0), tiny.language_model(kind, 3)
    batch = pair_batch(PAIRS)
    base = reference_log_probs(reference, PAIRS, TEMPERATURE, batch_size=2)
    log_prob = pair_log_probs(model, batch, TEMPERATURE)
    ours = LOSSES[loss](log_prob, base.T.flatten(), batch.mask.sum(1), BETA, smoothing).mean()
    theirs = plain_loss(model, reference, loss, smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    found, expected = gradients(ours, model), gradients(theirs, model)
    assert set(found) == set(expected)
    scale = max(float(each.abs().max()) for each in expected.values())
    for name in expected:
        torch.testing.assert_close(found[name] / scale, expected[name] / scale, rtol=0, atol=1e-5, msg=name)


def test_log_probs_of_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities and gradients are the same where the logits are formed a part at a time."""
    model, batch = tiny.language_model(), pair_batch(PAIRS)
    whole = pair_log_probs(model, batch)
    whole_gradients = gradients(whole.sum(), model)
    monkeypatch.setattr("textenv.models.logits.PART", 3 * tiny.VOCABULARY)
    parts = pair_log_probs(model, batch)
    torch.testing.assert_close(parts, whole)
    for name, gradient in gradients(parts.sum(), model).items():
        torch.testing.assert_close(gradient, whole_gradients[name], rtol=1e-4, atol=1e-4, msg=name)


def test_losses_by_hand() -> None:
    """At a margin of 0 DPO's loss is log 2 and IPO's (1/2β)²; DPO falls for ever, IPO's goal is 1/(2β)."""
    zero = torch.zeros(1)
    assert float(dpo_loss(zero, 0.1)) == pytest.approx(math.log(2))
    assert float(dpo_loss(torch.tensor([10.0]), 0.1)) == pytest.approx(math.log(1 + math.exp(-1)))
    assert float(ipo_loss(zero, 0.1)) == pytest.approx(25.0)
    assert float(ipo_loss(torch.tensor([5.0]), 0.1)) == 0.0
    assert float(dpo_loss(torch.tensor([-2e4]), 1.0)) == pytest.approx(2e4)  # log σ does not overflow
    assert margins(torch.tensor([3.0, 1.0, 2.0, 5.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])).tolist() == [1.0, -4.0]


def test_the_optimum_of_smoothed_choices() -> None:
    """With a share ε of flipped choices DPO's loss is least where βh is the log-odds of the choices, log((1 − ε)/ε)."""
    margin = torch.tensor([0.0], requires_grad=True)
    optimizer = torch.optim.Adam([margin], lr=0.05)
    for _ in range(2000):
        optimizer.zero_grad()
        dpo_loss(margin, 0.5, 0.2).sum().backward()
        optimizer.step()
    assert margin.item() == pytest.approx(math.log(0.8 / 0.2) / 0.5, abs=1e-3)


# ---- against TRL 1.12's DPOTrainer

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "trl_dpo.json").read_text(encoding="utf-8"))
SETTINGS = GOLDEN["settings"]


@pytest.mark.parametrize(("ours", "theirs"), [("dpo", "dpo"), ("ipo-mean", "ipo")])
def test_steps_are_trls(ours: str, theirs: str) -> None:
    """Losses, margins and gradients of four steps, and the weights after them, equal those of TRL's DPOTrainer.

    The golden file holds TRL's numbers in float64, of ragged pairs and tiny GPT-2s by formula. Its IPO divides each
    log-ratio by the response's length.
    """
    pairs = [Preference(**pair) for pair in GOLDEN["pairs"]]
    model, reference = (language_model(GOLDEN["sizes"], phase) for phase in (0.0, 2.0))
    base = reference_log_probs(reference, pairs)
    optimizer = torch.optim.SGD(model.parameters(), lr=SETTINGS["learning_rate"][theirs])
    size, beta = SETTINGS["batch_size"], SETTINGS["beta"]
    starts = [*range(0, len(pairs), size)] * SETTINGS["epochs"]
    for start, step in zip(starts, GOLDEN[theirs]["steps"], strict=True):
        batch, rows = pair_batch(pairs[start : start + size]), base[start : start + size].T.flatten()
        log_prob = pair_log_probs(model, batch)
        loss = LOSSES[ours](log_prob, rows, batch.mask.sum(1), beta, 0.0).mean()
        assert float(loss) == pytest.approx(step["loss"], rel=1e-5)  # float32 against float64
        assert beta * float(margins(log_prob, rows).mean()) == pytest.approx(step["rewards/margins"], abs=1e-5)
        _assert_projections(gradients(loss, model), step["gradient"])
        optimizer.step()
    _assert_projections(dict(model.named_parameters()), GOLDEN[theirs]["weights"])


def _assert_projections(tensors: dict[str, Any], expected: dict[str, list[float]]) -> None:
    found = projections({name: tensor.detach() for name, tensor in tensors.items()})
    assert set(found) == set(expected)
    scale = max(abs(number) for pair in expected.values() for number in pair)
    for name, pair in expected.items():
        assert [float(number) / scale for number in found[name]] == pytest.approx(
            [number / scale for number in pair], abs=1e-5
        ), name


# ---- training


def _learned(config: PreferenceConfig, job: Job | None = None) -> tuple[PreTrainedModel, dict[str, list[float]]]:
    """A tiny model trained to prefer one token to another, and its numbers on the pairs."""
    model = tiny.language_model()  # with dropout in its configuration
    pairs = [Preference([65 + i % 7, 66], [90, 97 + i % 5, 256], [91, 97 + i % 3, 98, 256]) for i in range(16)]
    data, objective = Pairs(pairs, reference_log_probs(model, pairs, TEMPERATURE)), (BETA, TEMPERATURE)
    before = measure_pairs(model, data, config, objective)
    assert before["loss"] == pytest.approx([math.log(2)] * 16) or config.loss != "dpo"
    assert before["margin"] == pytest.approx([0.0] * 16, abs=1e-5)
    fit(model, data, config, objective, job)
    return model, measure_pairs(model, data, config, objective)


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_training_learns_the_pairs(loss: str) -> None:
    """Every pair's margin grows; IPO's goes to its goal 1/(2β) = 2.5 nats, DPO's beyond it."""
    config = PreferenceConfig(loss=loss, learning_rate=3e-3, epochs=20, batch_size=8, max_length=16)
    margin = _learned(config)[1]["margin"]
    assert min(margin) > 2.0
    assert max(margin) < 3.0 if loss == "ipo" else max(margin) > 3.0


def test_accumulated_gradients() -> None:
    """The weights are the same where a step's pairs are forwarded in parts."""
    settings = dict(learning_rate=1e-3, epochs=2, batch_size=8, max_length=16)
    whole, parts = (
        _learned(PreferenceConfig(**settings, gradient_accumulation=count))[1]["margin"]  # type: ignore[arg-type]
        for count in (1, 4)
    )
    assert parts == pytest.approx(whole, abs=1e-3)
    assert max(whole) > 0.1


def test_checkpoints_of_tied_weights(tmp_path: Path) -> None:
    """A training with checkpoints ends at the same weights as one without."""
    config = PreferenceConfig(learning_rate=1e-3, epochs=2, batch_size=8, max_length=16)
    job = Job(tmp_path / "out", {"seed": 0}, LoopConfig(save_every=2))
    assert _learned(config, job)[1] == _learned(config)[1]
    assert list((tmp_path / "out" / "training").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"loss": "slic"}, "loss must be one of dpo, ipo, ipo-mean, got 'slic'"),
        ({"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\)"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "read by loss='dpo' alone"),
        ({"held_out_pairs": 0.0}, "held_out_pairs must lie in"),
        ({"batch_size": 0}, "batch_size must be positive"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], says: str) -> None:
    """Settings that are out of range, or would do nothing, are refused in a sentence."""
    with pytest.raises(ValueError, match=says):
        PreferenceConfig(**wrong)
