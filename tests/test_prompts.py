"""Prompts: where they come from, how they are padded, in which order they are drawn."""

import sys
import types
from collections import Counter

import pytest

from tests import tiny
from textenv.loading import shared
from textenv.prompts import PromptSampler, read_prompts, tokenise


@pytest.fixture
def module(monkeypatch):
    """An importable module `my_prompts` of functions."""
    made = types.ModuleType("my_prompts")
    made.good = lambda: ["one", "two"]  # type: ignore[attr-defined]
    made.text = lambda: "one"  # type: ignore[attr-defined]
    made.empty = lambda: []  # type: ignore[attr-defined]
    made.number = 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_prompts", made)


def write(folder, text):
    """A file of prompts."""
    path = folder / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_sources(tmp_path, module):
    """A list, a tuple, a shared list, a function by value or by name and a .jsonl give the same texts."""
    path = write(tmp_path, '{"prompt": "one", "more": 1}\n\n{"prompt": "two"}\n')
    sources = [["one", "two"], ("one", "two"), shared(["one", "two"]), lambda: ["one", "two"]]
    for source in [*sources, "my_prompts:good", str(path), path]:
        assert read_prompts(source) == ["one", "two"]


def test_unicode_lines(tmp_path):
    """A .jsonl is UTF-8, whatever the locale."""
    assert read_prompts(write(tmp_path, '{"prompt": "naïve ☃"}\n')) == ["naïve ☃"]


def test_datasets_column():
    """A column of a Hugging Face dataset is a list of prompts."""
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    table = datasets.Dataset(pyarrow.table({"prompt": ["one", "two"]}), fingerprint="prompts")
    assert read_prompts(table["prompt"]) == ["one", "two"]
    assert read_prompts(shared(table["prompt"])) == ["one", "two"]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('{"prompt": "a"}\nnot json\n', "line 2: not JSON .*one object a line"),
        ('{"prompt": "a"}\n\n{"text": "b"}\n', 'line 3: no text in the field "prompt", got .*"text"'),
        ('{"prompt": 5}\n', 'line 1: no text in the field "prompt"'),
        ('["a"]\n', 'line 1: no text in the field "prompt"'),
        ("\n", "prompts are empty; give at least one"),
    ],
)
def test_bad_lines(tmp_path, lines, says):
    """A malformed file names its line."""
    path = write(tmp_path, lines)
    with pytest.raises(ValueError, match=says) as raised:
        read_prompts(str(path))
    assert str(path) in str(raised.value) or "empty" in says


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("missing.jsonl", "no prompts file at 'missing.jsonl'; give a .jsonl"),
        ("prompts.csv", "a path that ends in .jsonl, or 'module:function', got 'prompts.csv'"),
        ("my_prompts:absent", "'my_prompts:absent' names no importable function .*Python path"),
        ("no_such_module:f", "'no_such_module:f' names no importable function .*Python path"),
        ("my_prompts:number", "must name a function, got a int"),
        ("my_prompts:text", "my_prompts:text must return a list of prompts, got str"),
        ("my_prompts:empty", "prompts are empty"),
        ([], "prompts are empty"),
        (["a", 3], "prompts must be texts; number 1 is a int: 3"),
        (b"ab", "prompts must be texts; number 0 is a int"),
        (7, "prompts must be a list of texts.*got int"),
        ({"prompt": ["a"]}, "prompts must be a list of texts.*got dict"),
    ],
)
def test_bad_sources(module, source, says):
    """What is no source of prompts is refused with the remedy."""
    with pytest.raises(ValueError, match=says):
        read_prompts(source)


def test_tokenise():
    """Bytes as tokens, left-padded to P; the mask is true on the real ones."""
    tokenizer = tiny.tokenizer()
    prompts = tokenise(["ab", "abc<end>"], tokenizer, 5)
    a, b, c = tokenizer("abc").input_ids
    assert prompts.texts == ("ab", "abc<end>")
    assert prompts.input_ids.tolist() == [[tiny.PAD] * 3 + [a, b], [tiny.PAD, a, b, c, tiny.END]]
    assert prompts.attention_mask.tolist() == [[False] * 3 + [True] * 2, [False] + [True] * 4]
    chosen = prompts.select([1, 0, 1])
    assert chosen.texts == ("abc<end>", "ab", "abc<end>")
    assert chosen.input_ids.tolist() == prompts.input_ids[[1, 0, 1]].tolist()
    assert chosen.attention_mask.tolist() == prompts.attention_mask[[1, 0, 1]].tolist()


def test_pad_token_may_be_the_end_token():
    """With pad = end, and with no pad token at all, the mask alone says what is real."""
    for pad in ("<end>", None):
        prompts = tokenise(["ab<end>"], tiny.tokenizer(pad), 5)
        assert prompts.attention_mask.tolist() == [[False, False, True, True, True]]


def test_tokenise_leaves_the_tokenizer_alone():
    """The caller's tokenizer keeps its padding side and pad token."""
    tokenizer = tiny.tokenizer(None)
    before = (tokenizer.padding_side, tokenizer.pad_token, tokenizer.truncation_side)
    tokenise(["ab"], tokenizer, 5)
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.truncation_side) == before


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["ok", ""], "prompt number 1 is empty"),
        (["ok", "  \n"], "prompt number 1 is empty"),
        (["abcdefgh", "123456"], "prompt number 0 has 8 tokens, more than max_prompt_tokens=5 .*to 8"),
    ],
)
def test_bad_prompts(texts, says):
    """An empty prompt or one too long is refused, by number, before any episode."""
    with pytest.raises(ValueError, match=says):
        tokenise(texts, tiny.tokenizer(), 5)


def test_sampler_rounds():
    """Each prompt comes once a round, in another order every round, however the draws are cut."""
    sampler = PromptSampler(7, seed=0)
    drawn = [index for count in (3, 5, 1, 12) for index in sampler.draw(count)]
    rounds = [drawn[start : start + 7] for start in (0, 7, 14)]
    assert all(Counter(one) == Counter(range(7)) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2] and rounds[0] != list(range(7))
    assert len(PromptSampler(3, seed=0).draw(8)) == 8


def test_sampler_seed_and_resume():
    """Same seed, same draws; a sampler that takes back a saved state goes on where it was."""
    first, second = PromptSampler(50, seed=1), PromptSampler(50, seed=1)
    assert first.draw(70) == second.draw(70) != PromptSampler(50, seed=2).draw(70)
    saved = first.state_dict()
    onward = first.draw(90)
    resumed = PromptSampler(50, seed=9)
    resumed.load_state_dict(saved)
    assert resumed.draw(90) == onward
    resumed.load_state_dict(saved)  # the state that was saved is a copy, not a view
    assert resumed.draw(90) == onward
