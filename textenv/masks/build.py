"""From what `action_mask` names to masks, checked when the task is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textenv.masks.masks import AllowedIds, MaskPolicy, NoSpecialTokens, Pattern, TokenMask, word_list
from textenv.models.loading import load_function, unwrap
from textenv.models.sampling import Sampling


@dataclass(frozen=True)
class MaskContext:
    """What masks are built from."""

    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    vocabulary: int
    reference: Callable[[], PreTrainedModel]  # called where a mask policy needs a model to start from


def build_masks(given: Any, parts: MaskContext) -> tuple[TokenMask, ...]:
    """The masks that `action_mask` names: one, or several of which all must agree."""
    given = unwrap(given)
    if given is None:
        return ()
    if isinstance(given, list | tuple):
        return tuple(mask for one in given for mask in build_masks(one, parts))
    if isinstance(given, str):
        return (_named(given, parts),)
    if isinstance(given, NoSpecialTokens | MaskPolicy | AllowedIds | Pattern):
        return (given,)
    if callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        return (AllowedIds(cast(Any, given), name, parts.vocabulary),)
    raise ValueError(f"action_mask must be {_FORMS}, or a list of these; got {type(given).__name__}.")


_FORMS = (
    "'special', 'top_k:N', 'top_p:P', 'words:A,B,...', 'regex:PATTERN', 'module:function' or a function "
    "f(prompt, response_ids) -> allowed ids"
)


def _named(name: str, parts: MaskContext) -> TokenMask:
    kind, colon, rest = name.partition(":")
    if name == "special":
        return NoSpecialTokens(parts.tokenizer, parts.stop_token_ids, parts.vocabulary)
    if kind in ("top_k", "top_p") and colon:
        return MaskPolicy(parts.reference(), _kept(kind, rest))
    if kind in ("regex", "words") and rest:
        pattern = rest if kind == "regex" else word_list(rest.split(","))
        return Pattern(pattern, parts.tokenizer, parts.stop_token_ids, parts.vocabulary)
    if colon and kind and rest and kind not in ("regex", "words"):
        return AllowedIds(load_function(name), name, parts.vocabulary)
    raise ValueError(f"action_mask must be {_FORMS}, or a list of these; got {name!r}.")


def _kept(kind: str, value: str) -> Sampling:
    try:
        keep = Sampling(top_k=int(value)) if kind == "top_k" else Sampling(top_p=float(value))
    except ValueError as error:
        raise ValueError(f"action_mask {kind}:{value} is no such mask: {error}") from error
    if not keep.top_k and keep.top_p == 1:
        raise ValueError(f"action_mask '{kind}:{value}' keeps every token; leave it out, or keep fewer.")
    return keep
