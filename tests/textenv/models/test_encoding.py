"""Texts as tokens: start tokens once, no appended end tokens, responses tokenized behind their prompts."""

from __future__ import annotations

import pytest
from transformers import ByT5Tokenizer, PerceiverTokenizer

from tests.support import tiny, tiny_tokenizers
from textenv.models.encoding import added_tokens, check_ids, encode, encode_pairs, end_with

KINDS = {
    "WordPiece": tiny_tokenizers.wordpiece,
    "SentencePiece": tiny_tokenizers.metaspace,
    "SentencePiece without an end": lambda: tiny_tokenizers.metaspace(end=""),
    "bytes with an end": tiny_tokenizers.byte_level,
    "bytes between ends": lambda: tiny_tokenizers.byte_level("<end>", "<end>"),
    "bytes alone": lambda: tiny_tokenizers.byte_level("", ""),
}
AROUND = {
    "WordPiece": (["[CLS]"], ["[SEP]"]),
    "SentencePiece": (["<s>"], ["</s>"]),
    "SentencePiece without an end": (["<s>"], []),
    "bytes with an end": ([], ["<end>"]),
    "bytes between ends": (["<end>"], ["<end>"]),
    "bytes alone": ([], []),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_start_and_end(kind):
    """What the tokenizer adds before a text stays, what it adds after it goes."""
    tokenizer = KINDS[kind]()
    start, end = (tokenizer.convert_tokens_to_ids(tokens) for tokens in AROUND[kind])
    assert added_tokens(tokenizer) == (start, end)
    for text in ("the cat", "a", "it is late ."):
        assert [*encode(tokenizer, [text])[0], *end] == tokenizer(text).input_ids
    assert encode(tokenizer, []) == []


@pytest.mark.parametrize(
    ("tokenizer", "around"),
    [
        (tiny_tokenizers.words(), (["<s>"], ["</s>"])),
        (tiny_tokenizers.words(end=""), (["<s>"], [])),
        (tiny_tokenizers.words(unknown=None), (["<s>"], ["</s>"])),
        (tiny_tokenizers.words(unknown="<s>"), (["<s>"], ["</s>"])),
        (tiny_tokenizers.words(unknown="</s>"), (["<s>"], ["</s>"])),
        (ByT5Tokenizer(), ([], ["</s>"])),
        (PerceiverTokenizer(), (["[CLS]"], ["[SEP]"])),
    ],
)
def test_start_and_end_do_not_hang_on_a_letter(tokenizer, around):
    """A tokenizer of words that knows no letter keeps its start token; so do slow tokenizers, written in Python."""
    start, end = (tokenizer.convert_tokens_to_ids(tokens) for tokens in around)
    assert added_tokens(tokenizer) == (start, end)
    assert [*encode(tokenizer, ["the cat"])[0], *end] == tokenizer("the cat").input_ids


@every_kind
def test_a_text_that_has_its_start_token(kind):
    """A rendered text that begins with the start token does not get a second one; its own end token stays."""
    tokenizer = KINDS[kind]()
    start, end = AROUND[kind]
    plain = encode(tokenizer, ["the cat"])[0]
    rendered = encode(tokenizer, ["".join(start) + "the cat" + "".join(end)])[0]
    assert rendered[: len(start)] == tokenizer.convert_tokens_to_ids(start)
    for name in {*start, *end}:
        assert tokenizer.convert_ids_to_tokens(rendered).count(name) == [*start, *end].count(name)
    assert (
        tokenizer.decode(rendered, skip_special_tokens=True).split()
        == tokenizer.decode(plain, skip_special_tokens=True).split()
    )


@every_kind
@pytest.mark.parametrize("prompt", ["the cat", "it is late :", "two words more "])
def test_a_response_behind_its_prompt(kind, prompt):
    """Prompt and response are the tokens of the whole text, cut where the prompt, tokenized alone, ends."""
    tokenizer = KINDS[kind]()
    (alone, response), (again, other) = encode_pairs(tokenizer, [(prompt, "the dog ran"), (prompt, "a dog")])
    assert alone == again == encode(tokenizer, [prompt])[0]
    assert alone + response == encode(tokenizer, [f"{prompt} the dog ran"])[0]
    text = tokenizer.decode(alone + other, skip_special_tokens=True)
    assert text.split() == f"{prompt} a dog".split()


def test_one_space_under_sentencepiece():
    """The first word of a response has one space, and not the one that SentencePiece puts before a text besides."""
    tokenizer = tiny_tokenizers.metaspace()
    _, response = encode_pairs(tokenizer, [("the cat", "sat on")])[0]
    assert tokenizer.convert_ids_to_tokens(response)[0].startswith("▁s")
    assert "".join(tokenizer.convert_ids_to_tokens(response)) == "▁sat▁on"


def joining_tokenizer():
    """A tokenizer that knows two spaces as one token, and so joins a prompt's last space and a response's first."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["  "])
    return tokenizer


def test_a_token_over_the_boundary():
    """Where one token would cover the end of a prompt and the start of a response, the policy's own tokens are taken."""
    tokenizer = joining_tokenizer()
    prompt, response = encode_pairs(tokenizer, [("a ", "b")])[0]
    assert (prompt, response) == (tokenizer("a ").input_ids, tokenizer(" b").input_ids)
    tokenizer.add_tokens([": "])
    with pytest.raises(ValueError, match=r"no boundary between the prompt 'a ' and its response 'b'.*splits texts"):
        encode_pairs(tokenizer, [("a ", "b")])


def test_end_token_once():
    """A text that ends with the end token does not get another; a tokenizer without one is refused."""
    tokenizer = tiny.tokenizer()
    assert end_with(tokenizer, [5]) == end_with(tokenizer, [5, tiny.END]) == [5, tiny.END]
    assert end_with(tokenizer, []) == [tiny.END]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"needs one end token, got None; set tokenizer.eos_token"):
        end_with(tokenizer, [5])


def test_tokens_without_a_row():
    """An added token that the model lacks is named, with the text that has it."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<think>"])
    rows = [tokenizer("a").input_ids, tokenizer("a<think>").input_ids]
    check_ids(tokenizer, rows, 259, str)
    with pytest.raises(
        ValueError, match=r"text 1 has the token '<think>' \(id 258\), .*not to the model.*258 ids; remove"
    ):
        check_ids(tokenizer, rows, 258, lambda index: f"text {index}")
