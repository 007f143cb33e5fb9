"""Precision: float32 is exact; in bf16 weights and losses stay float32, and ratios start at 1."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from agents.text.precision import Precision, mismatch
from tests.support import tiny
from tests.support.learning import make_trainer
from textenv import LanguageModel, shared
from textenv.models.comparison import bound

CPU = torch.device("cpu")


@pytest.fixture
def settings() -> dict[str, Any]:
    """A tiny task."""
    reference = LanguageModel(tiny.language_model("llama"), tiny.tokenizer(), (tiny.END,))
    rewarded = dict(reference=shared(reference), reward=lengths, prompts=tiny.PROMPTS)
    return rewarded | dict(max_prompt_tokens=16, max_new_tokens=12, kl_coef=0.1, device="cpu")


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    """Reward of a response."""
    return [len(response) / 4 for response in responses]


def log_ratios(trainer: Any, seed: int = 0) -> torch.Tensor:
    """Log-ratios of all generated tokens of a rollout before the first step, as the loss forms them."""
    collector, policy = trainer.collector, trainer.algorithm.networks.policy
    data = collector.collect(policy).data
    parts = []
    for batch in collector.micro_batches(data):
        with torch.no_grad(), collector.autocast():
            log_prob = policy.distribution(batch).log_prob(batch["action"])
        parts.append((log_prob - batch["action_log_prob"])[batch["mask"]])
    return torch.cat(parts)


@pytest.mark.parametrize("masks", [None, "top_k:50"])
def test_ratios_start_at_one(settings, masks):
    """In bf16 with recomputed log-probabilities as in float32; with sampled ones they are off by bfloat16's rounding."""
    settings |= dict(action_mask=masks)
    largest = {
        (precision, old): float(log_ratios(make_trainer(settings, precision=precision, old_log_probs=old)).abs().max())
        for precision in ("float32", "bf16")
        for old in ("sampled", "recomputed")
    }
    assert largest["float32", "sampled"] < 1e-4 and largest["float32", "recomputed"] < 1e-5
    assert largest["bf16", "recomputed"] < 1e-5 < 10 * largest["bf16", "recomputed"] + 1e-3 < largest["bf16", "sampled"]
    spread = 10.0  # of these models' logits
    assert largest["bf16", "sampled"] < bound(torch.bfloat16) * spread


def test_what_is_bfloat16(settings):
    """The sampling copy's weights alone. Trained weights, gradients, the optimizer's state and data are float32."""
    trainer: Any = make_trainer(settings, precision="bf16")
    iterations = list(trainer.iterate())
    networks = trainer.algorithm.networks.trained
    for parameter in (each for network in networks.values() for each in network.parameters()):
        assert parameter.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in trainer.optimizer.state[parameter].values())
    floats = [value for value in iterations[-1].rollout.data.values() if value.is_floating_point()]
    assert len(floats) > 5 and {value.dtype for value in floats} == {torch.float32}
    sampler = trainer.collector.precision.sampler
    assert sampler is not None and {parameter.dtype for parameter in sampler.parameters()} == {torch.bfloat16}


def test_the_sampling_copy_follows_the_actor(settings):
    """In place, to the bit of rounding, so that what was compiled or compared for it stays valid."""
    model, precision = tiny.language_model(), Precision("bf16", CPU)
    copy = precision.sampling_model(model)
    places = [parameter.data_ptr() for parameter in copy.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert precision.sampling_model(model) is copy
    assert [parameter.data_ptr() for parameter in copy.parameters()] == places
    for own, new in zip(copy.parameters(), model.parameters(), strict=True):
        assert torch.equal(own, new.bfloat16()) and not own.requires_grad
    assert Precision("float32", CPU).sampling_model(model) is model


def test_auto(settings):
    """Is float32 on a CPU, where nothing is recomputed and no mismatch reported; bf16 on CUDA, recomputed."""
    trainer: Any = make_trainer(settings)
    metrics = next(trainer.iterate()).metrics
    assert not {name for name in metrics if "mismatch" in name}
    assert trainer.collector.describe_precision() == {"precision": "float32", "old_log_probs": "sampled"}
    assert Precision("auto", torch.device("cuda")).name == "bf16"
    trainer = make_trainer(settings, precision="bf16")
    metrics = next(trainer.iterate()).metrics
    assert 0 < metrics["mismatch_mean"] < metrics["mismatch_max"] < 1 and 0.9 < metrics["effective_sample_size"] < 1
    summary = trainer.collector.describe_precision()
    assert summary["old_log_probs"] == "recomputed" and summary["mismatch_max"] == metrics["mismatch_max"]


def test_mismatch_by_hand():
    """Against a plain loop over generated tokens; what stands elsewhere does not count."""
    sampled, recomputed = torch.tensor([[-1.0, -2.0, math.nan], [-0.5, 7.0, 9.0]]), torch.zeros(2, 3)
    recomputed[0, :2], recomputed[1, 0] = torch.tensor([-1.1, -1.7]), -0.5
    mask = torch.tensor([[True, True, False], [True, False, False]])
    differences = [-0.1, 0.3, 0.0]
    weights = [math.exp(difference) for difference in differences]
    found = mismatch(sampled, recomputed, mask)
    assert found["mismatch_mean"] == pytest.approx(0.4 / 3, rel=1e-5)
    assert found["mismatch_max"] == pytest.approx(0.3, rel=1e-5)
    size = sum(weights) ** 2 / (3 * sum(weight**2 for weight in weights))
    assert found["effective_sample_size"] == pytest.approx(size, rel=1e-5)


def test_values_are_float32(settings):
    """The value head computes in float32 under autocast: values differ where bfloat16 would round them together."""
    trainer: Any = make_trainer(settings, precision="bf16")
    collector, critic = trainer.collector, trainer.algorithm.networks.critic
    with torch.no_grad():
        critic.head.bias.fill_(100.0)
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(0), std=0.01)
    data = collector.collect(trainer.algorithm.networks.policy).data
    with torch.no_grad(), collector.autocast():
        values = critic.values(data)
    assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())


def test_ambient_settings_return():
    """TF32 is on inside a bf16 run only, and off again after an error."""
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError), Precision("bf16", CPU).tensor_cores():
        assert torch.get_float32_matmul_precision() == "high"
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before
    with Precision("float32", CPU).tensor_cores():
        assert torch.get_float32_matmul_precision() == before


def test_rotary_frequencies_of_the_copy_are_the_models_own():
    """In bfloat16 they would turn position 500 by up to 0.2 radians; only what a folder holds is converted."""
    model = tiny.language_model("llama")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    copy = Precision("bf16", CPU).sampling_model(model)
    copied = dict(copy.named_buffers())
    assert any("inv_freq" in name for name in copied)
    assert all(
        torch.equal(copied[name], buffer) and copied[name].dtype == buffer.dtype for name, buffer in buffers.items()
    )


def test_old_values_are_of_the_precision_of_the_run(settings, monkeypatch):
    """They are read under autocast as those of the update are, so that their difference is the step's alone."""
    for precision in ("float32", "bf16"):
        trainer: Any = make_trainer(settings, precision=precision, critic="reference")
        critic, seen = trainer.algorithm.networks.critic, []
        plain = critic.all_states

        def noting(batch: Any, plain: Any = plain, seen: list = seen) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return plain(batch)

        monkeypatch.setattr(critic, "all_states", noting)
        next(trainer.iterate())
        assert set(seen) == {precision == "bf16"} and len(seen) >= 3
