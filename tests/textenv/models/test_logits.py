"""Logits that are never whole: values and gradients are those of whole logits, and memory holds a part of them."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.support import tiny
from textenv.models import logits as module
from textenv.models.language_model import response_logits
from textenv.models.logits import log_probs_at, map_states, read_logits, spread
from textenv.state import TextState, batches

SIZES: dict[str, Any] = dict(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CAPS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "gemma2": dict(final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "cohere": dict(logit_scale=0.7),
    "granite": dict(logits_scaling=1.7),
    "falcon_h1": dict(lm_head_multiplier=1.3, mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32, mamba_d_state=8),
}


def model_of(kind: str) -> Any:
    """A tiny model whose caps and scales change its logits much."""
    if not CAPS[kind]:
        return tiny.language_model(kind)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | CAPS[kind]))
    return tiny._sharpen(model)


def ragged_state() -> TextState:
    """Four texts of different prompts and responses; the second row's response has a token that is not generated."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (4, 14), generator=generator)
    columns, prompts, responses = (
        torch.arange(14),
        torch.tensor([[6], [2], [4], [1]]),
        torch.tensor([[8], [5], [1], [3]]),
    )
    attention = (columns >= 6 - prompts) & (columns < 6 + responses)
    generated = attention[:, 6:].clone()
    generated[1, 2] = False
    return TextState.from_masks(ids, attention, generated)


def whole_log_probs(model: Any, state: TextState) -> torch.Tensor:
    """The plain form, from logits of all response columns."""
    logits = response_logits(model, state.input_ids, state.attention_mask, state.prompt_width)
    chosen = (logits.float() / 0.7).log_softmax(-1).gather(-1, state.response_ids[..., None])[..., 0]
    return chosen.where(state.response_mask, 0.0)


def lean_log_probs(model: Any, state: TextState) -> torch.Tensor:
    mask = state.response_mask
    logits = read_logits(model, state.input_ids, state.attention_mask, mask)
    return spread(log_probs_at(logits, state.response_ids[mask], 0.7), mask)


def gradients(model: Any, value: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of all weights of a function that is not linear in `value`."""
    return list(torch.autograd.grad((value.sin() * torch.arange(1, 9)).sum(), list(model.parameters())))


def assert_equal_gradients(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    largest = max(float(each.abs().max()) for each in expected)
    assert largest > 1e-2
    for own, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(own, plain, rtol=0, atol=2e-5 * largest)


@pytest.mark.parametrize("part", [2**24, 3 * 300])
@pytest.mark.parametrize("kind", CAPS)
def test_equals_whole_logits(monkeypatch, kind, part):
    """In value and gradient, with soft caps and scales, in one part and in parts of three states."""
    monkeypatch.setattr(module, "PART", part)
    model, state = model_of(kind), ragged_state()
    expected, found = whole_log_probs(model, state), lean_log_probs(model, state)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert_equal_gradients(gradients(model, found), gradients(model, expected))
    assert module._after[model] is not None  # the lean way is really taken


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_what_a_model_does_after_its_head(kind):
    """Is told from the identity and from its likes, at any weights: those of a new model hardly reach a cap."""
    model = model_of(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)
    ids = torch.ones(1, 3, dtype=torch.long)
    read_logits(model, ids, ids, torch.ones(1, 1, dtype=torch.bool))
    after, raw = module._after[model], torch.tensor([40.0])
    expected = {"gemma2": torch.tanh(raw / 3) * 3, "granite": raw / 1.7}
    assert after is not None and torch.equal(after(raw), expected[kind])


def test_unknown_function_after_the_head(monkeypatch):
    """A model that does something else to its head's output is read by its own forward, with the same numbers."""
    model, state = tiny.language_model("llama"), ragged_state()
    plain = model.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        output = plain(*arguments, **named)
        output.logits = output.logits.sinh()
        return output

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(module, "PART", 3 * 300)
    expected, found = whole_log_probs(model, state), lean_log_probs(model, state)
    assert module._after[model] is None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(gradients(model, found), gradients(model, expected))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return result


def test_memory_holds_a_part(monkeypatch):
    """No tensor of an update is larger than a part, or than the weights, in the forward or in the backward pass."""
    vocabulary, texts = 3000, 40
    monkeypatch.setattr(module, "PART", 4 * vocabulary)
    sizes: dict[str, Any] = tiny.GPT2 | dict(vocab_size=vocabulary)
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    ids, mask = torch.randint(0, vocabulary, (texts, 60)), torch.ones(texts, 40, dtype=torch.bool)
    with Largest() as largest:
        logits = read_logits(model, ids, torch.ones_like(ids), mask)
        entropy = map_states(lambda formed: torch.distributions.Categorical(logits=formed).entropy(), [logits])
        entropy.sum().backward()
    assert largest.numbers < texts * 40 * vocabulary / 10  # the trunk has up to 320,000 numbers, whole logits 4,800,000


def test_two_models_at_once(monkeypatch):
    """A function of the logits of two models, such as the exact KL, gets the same states of both."""
    models, state = [tiny.language_model(seed=seed) for seed in (0, 1)], ragged_state()
    texts = (state.input_ids, state.attention_mask)

    def kl(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (own.softmax(-1) * (own.log_softmax(-1) - other.log_softmax(-1))).sum(-1)

    with torch.no_grad():
        whole = kl(*(response_logits(model, *texts, state.prompt_width) for model in models))
        monkeypatch.setattr(module, "PART", 2 * 300)
        found = map_states(kl, [read_logits(model, *texts, state.response_mask) for model in models])
    torch.testing.assert_close(spread(found, state.response_mask), whole.where(state.response_mask, 0.0))


def test_batches():
    """Every row once, shortest texts first, at most so many tokens with padding, and no batch that could be merged."""
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 40, 100, 10_000):
        length = torch.randint(0, 60, (50,), generator=generator)
        parts = batches(length, tokens)
        assert sorted(row for part in parts for row in part.tolist()) == list(range(50))
        areas = [len(part) * int(length[part].max()) for part in parts]
        assert all(area <= tokens or len(part) == 1 for area, part in zip(areas, parts, strict=True))
        for part, following in pairwise(parts):
            assert length[part].max() <= length[following].min()
            assert (len(part) + 1) * int(length[following[0]]) > tokens


def test_another_thread_reads_while_the_head_is_looked_at(monkeypatch):
    """The test values that take the place of the head's output are seen by the thread that looks alone."""
    model, ids = tiny.language_model(), torch.arange(5)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    found, plain = [], model.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        if named["input_ids"].shape == (1, 1):  # the forward of the look

            def read() -> None:
                with torch.no_grad():
                    found.append(plain(input_ids=ids).logits)

            other = threading.Thread(target=read)
            other.start()
            other.join()
        return plain(*arguments, **named)

    monkeypatch.setattr(model, "forward", forward)
    read_logits(model, ids, torch.ones_like(ids), torch.ones(1, 2, dtype=torch.bool))
    assert len(found) == 1 and torch.equal(found[0], expected) and module._after[model] is not None
