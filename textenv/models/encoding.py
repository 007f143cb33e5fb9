"""Texts as token ids, the same in training and in use.

Many tokenizers put tokens of their own around a text: a start token, an end token, or both. Here a text has the start
tokens once and no end token, so that a model can continue it. Callers that need an end token add it themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

NEUTRAL = ":"  # stands for a prompt whose last token would reach into the response


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before every text, and those that it puts after it.

    Transformers has no call for them that all tokenizers have, so they are read off a text: the first of the vocabulary
    that has a token besides them.
    """
    around = list(tokenizer("").input_ids)  # both, where nothing is between them
    for text in (str(tokenizer.decode([token])) for token in range(len(tokenizer))):
        whole, bare = list(tokenizer(text).input_ids), list(tokenizer(text, add_special_tokens=False).input_ids)
        starts = range(len(whole) - len(bare) + 1)
        start = next((at for at in starts if whole[at : at + len(bare)] == bare), None)
        if start is not None and not set(bare) <= set(around):
            return whole[:start], whole[start + len(bare) :]
    return around, []  # no text has tokens of its own


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, after the tokenizer's start tokens and without its end tokens.

    A text that already begins with the start tokens, such as a rendered chat, does not get them twice. Whoever calls
    knows the model's width, so Transformers is not asked to warn of it.
    """
    if not texts:
        return []
    start, _ = added_tokens(tokenizer)
    rows = [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids]
    return [ids if ids[: len(start)] == start else [*start, *ids] for ids in rows]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """The tokens of each prompt, and those of a space and the response behind it, without an end token.

    The prompt is tokenized alone, as it is when a policy responds to it. The response is tokenized behind the prompt
    and cut at the boundary, because some tokenizers (SentencePiece) put a space before the first word of a text.

    Raises ValueError for a tokenizer that joins a text and the word after it in one token.
    """
    prompts = encode(tokenizer, [prompt for prompt, _ in pairs])
    wholes = encode(tokenizer, [f"{prompt} {response}" for prompt, response in pairs])
    return [
        (ids, whole[len(ids) :] if whole[: len(ids)] == ids else _behind_neutral(tokenizer, *pair))
        for pair, ids, whole in zip(pairs, prompts, wholes, strict=True)
    ]


def _behind_neutral(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[int]:
    """The tokens of a response, if a token of prompt and response together reaches over the boundary."""
    head, whole = encode(tokenizer, [NEUTRAL, f"{NEUTRAL} {response}"])
    if whole[: len(head)] == head:
        return whole[len(head) :]
    raise ValueError(
        f"the tokenizer has no boundary between the prompt {prompt[-60:]!r} and its response {response[:60]!r}: one "
        "token covers the end of the first and the start of the second. Use a tokenizer that splits texts at spaces."
    )


def end_with(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[int]:
    """Tokens with the end token once at their end. Raises ValueError for a tokenizer without one."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ValueError(f"the tokenizer needs one end token, got {end!r}; set tokenizer.eos_token.")
    return list(tokens) if list(tokens[-1:]) == [end] else [*tokens, end]


def check_ids(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], vocabulary: int, describe: Callable[[int], str]
) -> None:
    """Raise ValueError for the first token that a model of `vocabulary` ids has no row for.

    describe: the text of a row, by its index, for the message.
    """
    for index, ids in enumerate(rows):
        token = max(ids, default=0)
        if token >= vocabulary:
            raise ValueError(
                f"{describe(index)} has the token {tokenizer.convert_ids_to_tokens(token)!r} (id {token}), which was "
                f"added to the tokenizer and not to the model, which has {vocabulary} ids; remove it from the text, or "
                "call model.resize_token_embeddings(len(tokenizer)), train the new rows and save the model."
            )
