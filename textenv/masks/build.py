"""Builds the masks that `action_mask` names. A mask says which tokens may come next.

`gym.make("TextGen-v0", action_mask=...)` takes, and on the command line `--env.action-mask ...` for the strings:

| `action_mask` | allows |
|---|---|
| `None` | every token; masks are off |
| `"special"` | no special tokens except the stop tokens, and no ids that the tokenizer never writes |
| `"top_k:N"`, `"top_p:P"` | the likeliest tokens of a mask policy: the mask of NLPO (Ramamurthy et al. 2023) |
| `"words:A,B,..."` | these words, with single spaces between them |
| `"regex:PATTERN"` | tokens after which the response can still match the whole pattern |
| `"module:function"`, a function | the ids that `f(prompt: str, response_ids: list[int])` returns |
| an object | the tokens that its `allowed` marks, if it follows the `TokenMask` protocol (see masks.py) |
| a list or tuple of these | the tokens that all of its masks allow |

`textenv.shared(mask)` passes a function, an object or a list through `gym.make` without a copy, alone or inside a list.

A mask policy starts as the reference and follows the actor: the trainer copies the actor's weights into it every
`--mask-refresh` iterations. It needs a reference model even where `kl_coef` is 0.

A mask of your own needs no base class:

    class NoRepeat:
        name = "no_repeat"
        model = None  # or a language model with the logits that `allowed` needs

        def allowed(self, contexts):  # -> bool [b, V], or [V] for all rows; true = may come next
            allowed = torch.ones(len(contexts.prompts), 1024, dtype=torch.bool)
            for row, ids in enumerate(contexts.responses()):
                allowed[row, ids[-1:]] = False
            return allowed

    env = gym.make("TextGen-v0", action_mask=[textenv.shared(NoRepeat()), "special"])

The environment shows the mask in `info["action_mask"]` and by `action_masks()`. It accepts forbidden tokens too, so
that clients without masks still work. The learners in `agents` obey the mask and record the masked log-probability.
Where the masks leave no token, the stop tokens are allowed. Masks never change the reward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textenv.masks.masks import AllowedIds, MaskPolicy, NoSpecialTokens, Pattern, TokenMask, word_list
from textenv.models.loading import check_room, load_function, unwrap
from textenv.models.probe import check_causal
from textenv.models.sampling import Sampling


@dataclass(frozen=True)
class MaskContext:
    """The parts of a task that its masks are built from."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    vocabulary: int  # V
    width: int  # L
    reference: Callable[[], PreTrainedModel]  # called only if a mask policy needs a model to start from


def build_masks(source: Any, context: MaskContext) -> tuple[TokenMask, ...]:
    """Build the masks that `action_mask` names, in order; a token must pass all of them.

    source: any form in the module's table. Raises ValueError for anything else.
    """
    source = unwrap(source)
    if source is None:
        return ()
    if isinstance(source, list | tuple):
        return tuple(mask for member in source for mask in build_masks(member, context))
    if isinstance(source, str):
        return (_build_named(source, context),)
    if isinstance(source, type):
        raise ValueError(f"action_mask is the class {source.__name__}; pass an instance of it, or a function.")
    if isinstance(source, TokenMask):
        _check_mask(source, context)
        return (source,)
    if callable(source):
        name = getattr(source, "__name__", type(source).__name__)
        return (AllowedIds(cast(Any, source), name, context.vocabulary),)
    raise ValueError(f"action_mask must be {_FORMS}, or a list of these; got {type(source).__name__}.")


_FORMS = (
    "'special', 'top_k:N', 'top_p:P', 'words:A,B,...', 'regex:PATTERN', 'module:function', a function "
    "f(prompt, response_ids) -> allowed ids, or an object that follows TokenMask (name, model, allowed)"
)


def _check_mask(mask: TokenMask, context: MaskContext) -> None:
    """Refuse a live mask that would fail, or be wrong, at the first token."""
    model = mask.model
    if model is None:
        return
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"action mask {mask.name!r} has a model of type {type(model).__name__}; `model` must be a causal "
            "PreTrainedModel or None."
        )
    if model.training:
        raise ValueError(
            f"action mask {mask.name!r} has a model in train mode, so dropout changes its logits; call model.eval() "
            "first."
        )
    embeddings: Any = model.get_output_embeddings()
    if embeddings is None:
        raise ValueError(
            f"action mask {mask.name!r} has a {type(model).__name__}, which has no output embeddings; `model` must "
            "be a causal PreTrainedModel or None."
        )
    width = embeddings.weight.shape[0]
    if width != context.vocabulary:
        raise ValueError(
            f"action mask {mask.name!r} has a model of {width} token ids, and the vocabulary has "
            f"{context.vocabulary}; give it a model with the policy's vocabulary."
        )
    check_room(f"model of action mask {mask.name!r}", model.config, context.width)
    check_causal(model, f"model of action mask {mask.name!r}", context.width)


def _build_named(name: str, context: MaskContext) -> TokenMask:
    kind, colon, rest = name.partition(":")
    if name == "special":
        return NoSpecialTokens(context.tokenizer, context.stop_token_ids, context.vocabulary)
    if kind in ("top_k", "top_p") and colon:
        return MaskPolicy(context.reference(), _parse_keep(kind, rest))
    if kind in ("regex", "words") and rest:
        pattern = rest if kind == "regex" else word_list(rest.split(","))
        return Pattern(pattern, context.tokenizer, context.stop_token_ids, context.vocabulary)
    if colon and kind and rest and kind not in ("regex", "words"):
        return AllowedIds(load_function(name), name, context.vocabulary)
    raise ValueError(f"action_mask must be {_FORMS}, or a list of these; got {name!r}.")


def _parse_keep(kind: str, value: str) -> Sampling:
    try:
        keep = Sampling(top_k=int(value)) if kind == "top_k" else Sampling(top_p=float(value))
    except ValueError as error:
        raise ValueError(f"action_mask '{kind}:{value}' is not valid: {error}") from error
    if not keep.top_k and keep.top_p == 1:
        raise ValueError(f"action_mask '{kind}:{value}' keeps every token; leave it out, or keep fewer.")
    return keep
