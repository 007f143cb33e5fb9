"""Functions of logits, such as log-probabilities, without logits of a whole batch in memory.

With a vocabulary of 150,000 tokens, the logits of one batch are larger than the model. So the forward stops before the
head, hidden states are kept at generated tokens alone, and the head reads them a part at a time. Where gradients are
needed, the backward pass forms the logits of each part again (`torch.utils.checkpoint`), one part at a time as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from textenv.models.language_model import at_head, output_width
from textenv.models.sampling import chosen_log_probs
from textenv.state import left_aligned

PART = 2**24  # logits formed at a time: 64 MB in float32
TEST_LOGIT = 100.0  # of the comparison: soft caps of 15 to 50 change it

# What models do to the output of their head: the name of a number in their configuration, and the function.
AFTER_HEAD: list[tuple[str, Callable[..., Tensor]]] = [
    ("final_logit_softcapping", lambda logits, n: torch.tanh(logits / n) * n),  # Gemma 2 and 3
    ("final_logit_softcapping", lambda logits, n: torch.tanh(logits.float() / n) * n),  # Gemma 4
    ("logit_scale", lambda logits, n: logits * n),  # Cohere
    ("logits_scaling", lambda logits, n: logits / n),  # Granite
    ("lm_head_multiplier", lambda logits, n: logits * n),  # Falcon-H1
]


@dataclass(frozen=True)
class Logits:
    """Logits at N states that are not formed yet: what the head reads there, and the head.

    A caller may put more behind the head, such as a mask, by another `head` with further inputs.
    """

    hidden: Tensor  # [N, H]
    head: Callable[..., Tensor]  # hidden states [n, H], and a part of each further input, to logits [n, V]
    width: int  # V
    further: tuple[Tensor, ...] = ()  # [N, ...] each


def read_logits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Logits:
    """The logits from which generated tokens were chosen, in the order of `mask.nonzero()`.

    input_ids: int64 [B, L], left-padded; attention_mask: [B, L], true or 1 = a token; mask: bool [B, R], true = the
    response's token is generated.
    """
    ids, _ = left_aligned(input_ids, attention_mask)
    rows, steps = mask.nonzero(as_tuple=True)  # [N] each
    prompts = attention_mask[:, : input_ids.shape[1] - mask.shape[1]].sum(1)  # [B]
    _, hidden = at_head(
        model, ids[:, : max(ids.shape[1] - 1, 1)]
    )  # the last token of the longest text predicts nothing
    return Logits(hidden[rows, (prompts[rows] - 1 + steps).clamp_min(0)], _head_of(model), output_width(model))


def map_states(function: Callable[..., Tensor], logits: Sequence[Logits], *others: Tensor) -> Tensor:
    """`function` of the logits of N states, a part of the states at a time.

    function: takes logits [n, V] of each of `logits`, and a part [n, ...] of each of `others`; returns [n, ...]. It may
    be called again for the gradients. Returns [N, ...].
    """

    def part(*inputs: Tensor) -> Tensor:
        rest = iter(inputs)
        formed = [each.head(*islice(rest, 1 + len(each.further))) for each in logits]
        return function(*formed, *rest)

    inputs = [*(tensor for each in logits for tensor in (each.hidden, *each.further)), *others]
    size = max(PART // max(each.width for each in logits), 1)
    if len(inputs[0]) <= size:
        return part(*inputs)
    # `split` and not slices: the backward of a slice fills a tensor of the whole size.
    parts = zip(*(each.split(size) for each in inputs), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([part(*each) for each in parts])
    # Nothing here draws random numbers, so their state need not be kept.
    kept: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(part, *each, **kept) for each in parts])


def log_probs_at(logits: Logits, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probability of one token at each state. tokens: int64 [N]. Returns float32 [N]."""
    return map_states(lambda formed, chosen: chosen_log_probs(formed, chosen, temperature), [logits], tokens)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values [N, ...] of the true places of mask [B, R], in the order of `mask.nonzero()`; zero elsewhere.

    Returns [B, R, ...].
    """
    # Each place's row in `values`, after a row of zeros. On a GPU, `mask.nonzero()` would wait for all work so far.
    rows = mask.flatten().cumsum(0).view(mask.shape) * mask  # [B, R]
    return torch.cat([values.new_zeros(1, *values.shape[1:]), values])[rows]


_after: WeakKeyDictionary[PreTrainedModel, Callable[[Tensor], Tensor] | None] = WeakKeyDictionary()


def _head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """A model's logits as a function of the hidden states that its head reads, [n, H] to [n, V].

    The head and what the model does to its output, where that is known; otherwise the model's own forward, of one
    token, in which these hidden states take the place of that token's.
    """
    head = model.get_output_embeddings()
    if not knows_head(model):
        return lambda hidden: at_head(model, _one_token(model), lambda _: hidden[None])[0][0]
    after: Any = _after[model]
    return lambda hidden: after(head(hidden))  # type: ignore[misc]


def knows_head(model: PreTrainedModel) -> bool:
    """Whether a model's logits can be formed from hidden states without its forward. Found out once per model."""
    if model not in _after:
        _after[model] = _after_head(model)
    return _after[model] is not None


@torch.no_grad()
def _after_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    """What a model does to the output of its head; None if it is none of the known functions.

    The forward gets test values in the place of the head's output, so that the weights do not matter.
    """
    head: Any = model.get_output_embeddings()
    raw = torch.linspace(-TEST_LOGIT, TEST_LOGIT, output_width(model), device=model.device)
    values: list[Tensor] = []
    reader = threading.get_ident()  # frozen models are shared, and other threads may be reading

    def replace(module: Any, inputs: Any, output: Tensor) -> Tensor:
        if threading.get_ident() != reader:
            return output
        values.append(raw.to(output.dtype).expand_as(output))
        return values[-1]

    hook = head.register_forward_hook(replace)
    try:
        logits: Tensor = model(input_ids=_one_token(model), use_cache=False).logits
    finally:
        hook.remove()
    numbers = vars(model.config.get_text_config())
    known: list[Callable[[Tensor], Tensor]] = [lambda logits: logits]
    known += [partial(function, n=numbers[name]) for name, function in AFTER_HEAD if numbers.get(name)]
    return next((each for each in known if torch.equal(each(values[0]), logits)), None)


def _one_token(model: PreTrainedModel) -> Tensor:
    return torch.zeros(1, 1, dtype=torch.long, device=model.device)
