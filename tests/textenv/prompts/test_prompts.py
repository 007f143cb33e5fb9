"""Prompts: where they come from, what else their rows hold, how texts and chats become padded tokens."""

import json
import sys
import types
from dataclasses import replace

import pytest

from tests.support import tiny
from textenv import TextGenConfig, build_task
from textenv.models.loading import shared
from textenv.prompts.sources import read_prompts
from textenv.prompts.tokenized import tokenize, tokenize_chats


@pytest.fixture
def module(monkeypatch):
    """An importable module `my_prompts` of functions."""
    made = types.ModuleType("my_prompts")
    made.good = lambda: ["one", "two"]  # type: ignore[attr-defined]
    made.text = lambda: "one"  # type: ignore[attr-defined]
    made.empty = lambda: []  # type: ignore[attr-defined]
    made.number = 7  # type: ignore[attr-defined]
    made.needy = lambda path: [path]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_prompts", made)
    return made


def write(folder, text):
    """A file of prompts."""
    path = folder / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_sources(tmp_path, module):
    """A list, a tuple, a shared list, a function by value or by name and a .jsonl give the same texts."""
    path = write(tmp_path, '{"prompt": "one"}\n\n{"prompt": "two"}\n')
    sources = [["one", "two"], ("one", "two"), shared(["one", "two"]), lambda: ["one", "two"]]
    for source in [*sources, "my_prompts:good", str(path), path]:
        rows = read_prompts(source)
        assert rows.prompts == ("one", "two") and rows.fields == {}


def test_unicode_lines(tmp_path):
    """A .jsonl is UTF-8, whatever the locale."""
    assert read_prompts(write(tmp_path, '{"prompt": "naïve ☃"}\n')).prompts == ("naïve ☃",)


def test_datasets_column():
    """A Hugging Face dataset, or a column of it, is a source of prompts."""
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    table = datasets.Dataset(pyarrow.table({"prompt": ["one", "two"]}), fingerprint="prompts")
    for source in (table["prompt"], shared(table["prompt"]), shared(table)):
        assert read_prompts(source).prompts == ("one", "two")


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
        ("my_prompts:number", "must name a function, got int"),
        ("my_prompts:text", "my_prompts:text must return a list of prompts, got str"),
        ("my_prompts:empty", "prompts are empty"),
        ("my_prompts:needy", "my_prompts:needy is called without arguments .*missing .*'path'.*default"),
        (lambda count: ["a"] * count, "<lambda> is called without arguments .*missing .*'count'"),
        ([], "prompts are empty"),
        (["a", 3], "prompts must be texts, chats .*; number 1 is a int: .3"),
        (b"ab", "prompts must be texts, chats .*; number 0 is a int"),
        (7, "prompts must be a list, .*got int; give one of these"),
        ({"prompt": ["a"]}, "prompts must be a list, .*got dict; give one of these"),
    ],
)
def test_bad_sources(module, source, says):
    """What is no source of prompts is refused with the remedy."""
    with pytest.raises(ValueError, match=says):
        read_prompts(source)


def test_an_error_inside_a_function_is_its_own():
    """A TypeError of the function's body is not taken for a missing argument."""

    def broken():
        return len(3)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match=r"has no len\(\)"):
        read_prompts(broken)


def test_bytes_that_are_not_utf_8(tmp_path):
    """A file in another encoding is refused by its line."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "a"}\n{"prompt": "naïve"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2: not UTF-8 .*byte 0xef.*save the file as UTF-8"):
        read_prompts(path)


def test_tables_that_are_no_source():
    """A dictionary of splits and a stream are refused with the kinds that are taken, and how to get one of them."""
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    table = datasets.Dataset(pyarrow.table({"prompt": ["one", "two"]}), fingerprint="prompts")
    kinds = r"a list, a path that ends in .jsonl, 'module:function', or a datasets.Dataset with a column 'prompt'"
    for source, remedy in [
        (
            datasets.DatasetDict(train=table, test=table),
            r"got DatasetDict; pick a split, such as prompts=table\['train'\]",
        ),
        (
            table.to_iterable_dataset(),
            r"got IterableDataset; make it a list, such as prompts=list\(table.take\(1000\)\)",
        ),
    ]:
        for given in (source, shared(source)):
            with pytest.raises(ValueError, match=f"{kinds}.*{remedy}"):
                read_prompts(given)


def test_tokenize():
    """Bytes as tokens, left-padded to P; the mask is true on the real ones."""
    tokenizer = tiny.tokenizer()
    prompts = tokenize(["ab", "abc<end>"], tokenizer, 5)
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
        prompts = tokenize(["ab<end>"], tiny.tokenizer(pad), 5)
        assert prompts.attention_mask.tolist() == [[False, False, True, True, True]]


def test_tokenize_leaves_the_tokenizer_alone():
    """The caller's tokenizer keeps its padding side and pad token."""
    tokenizer = tiny.tokenizer(None)
    before = (tokenizer.padding_side, tokenizer.pad_token, tokenizer.truncation_side)
    tokenize(["ab"], tokenizer, 5)
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
        tokenize(texts, tiny.tokenizer(), 5)


def test_bad_prompts_of_a_file(tmp_path):
    """A prompt from a file is named by its line as well, with blank lines between counted."""
    path = write(tmp_path, '{"prompt": "ok"}\n\n{"prompt": " "}\n')
    for read in (tokenize, tokenize_chats):
        rows = read_prompts(path)
        with pytest.raises(ValueError, match=r"prompt number 1 \(.*prompts.jsonl, line 3\) is empty"):
            read(rows.prompts, chat_tokenizer(), 32, rows.places)
        with pytest.raises(ValueError, match=r"prompt number 0 \(.*prompts.jsonl, line 1\) has .* tokens, more than"):
            read(rows.prompts[:1], chat_tokenizer(), 1, rows.places)
    assert read_prompts(["a", "b"]).places == ()  # a list's place is its number


# ---- rows with further fields

ROWS = [
    {"prompt": "2+2=", "answer": "4", "weight": 1.0},
    {"prompt": "3+3=", "answer": "6", "weight": 0.0},
    {"prompt": "4+4=", "answer": None, "weight": 2.5},
]


def test_fields(tmp_path, module):
    """Further fields of rows become fields, whatever the source; `select` and the device move carry them."""
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    lines = "\n".join(json.dumps(row) for row in ROWS)
    module.rows = lambda: ROWS
    table = datasets.Dataset(pyarrow.Table.from_pylist(ROWS), fingerprint="rows")
    for source in (ROWS, tuple(ROWS), str(write(tmp_path, lines)), "my_prompts:rows", table, lambda: table):
        rows = read_prompts(source)
        assert rows.prompts == ("2+2=", "3+3=", "4+4=")
        assert rows.fields == {"answer": ("4", "6", None), "weight": (1.0, 0.0, 2.5)}
    prompts = replace(tokenize(rows.prompts, tiny.tokenizer(), 8), fields=rows.fields)
    chosen = prompts.to(prompts.input_ids.device).select([2, 0, 2])
    assert chosen.fields == {"answer": (None, "4", None), "weight": (2.5, 1.0, 2.5)}
    assert chosen.texts == ("4+4=", "2+2=", "4+4=")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            [*ROWS[:2], {"prompt": "x"}],
            r"number 0 has \['answer', 'prompt', 'weight'\], number 2 has \['prompt'\]; give",
        ),
        ([ROWS[0], "x"], "all prompts must have the same fields.*number 1 has .'prompt'"),
        ([{"text": "x"}], 'prompts must be texts, chats .* or rows .*"prompt".*number 0 is a dict'),
        ([[]], "number 0 is a list"),
        ([[{"role": "user"}]], "number 0 is a list"),
        ([[{"role": "user", "content": 3}]], "number 0 is a list"),
        ([None], "number 0 is a NoneType"),
        ({"a", "b"}, "prompts must be a list.*got set"),
        (iter(["a"]), "prompts must be a list.*got list_iterator"),
        (lambda: {"a"}, "<lambda> must return a list of prompts, got set"),
    ],
)
def test_bad_rows(source, says):
    """Rows that differ in their fields, or hold no prompt, are refused by number; what has no order is no source."""
    with pytest.raises(ValueError, match=says):
        read_prompts(source)


def test_uneven_lines_and_tables(tmp_path):
    """A line with other fields is named by its line; a table that iterates over column names is refused."""
    path = write(tmp_path, '{"prompt": "a", "answer": 1}\n\n{"prompt": "b"}\n')
    with pytest.raises(ValueError, match=r"line 1 has \['answer', 'prompt'\], .*line 3 has \['prompt'\]"):
        read_prompts(path)
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match=r"must be a list.*got DataFrame"):
        read_prompts(pandas.DataFrame(ROWS))


# ---- chats

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m.role[0] }}]{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "so"}]


def chat_tokenizer():
    """A tokenizer that has a chat template, and writes an end token of its own after plain texts."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_chats():
    """A text is one message of the user; tokens are the template's, up to where the assistant speaks."""
    tokenizer = chat_tokenizer()
    prompts = tokenize_chats(["hi", CHAT], tokenizer, 32)
    rendered = ["[u]hi<end>[a]", "[u]hi<end>[a]yo<end>[u]so<end>[a]"]
    for row, text in enumerate(rendered):
        real = prompts.input_ids[row][prompts.attention_mask[row]].tolist()
        assert real == tokenizer(text).input_ids and tokenizer.decode(real) == text
    assert (prompts.input_ids == tiny.END).sum(1).tolist() == [1, 3]
    assert prompts.texts == ("hi", "hi\nyo\nso")  # what people and rewards read


def test_bad_chats():
    """No template, chats where chat is off, and what the template refuses: each gets a sentence."""
    with pytest.raises(ValueError, match=r"no chat template; choose a chat model .*or pass chat=False"):
        tokenize_chats(["hi"], tiny.tokenizer(), 32)
    with pytest.raises(ValueError, match=r"prompt number 1 is a chat .*pass chat=True"):
        tokenize(["hi", CHAT], tiny.tokenizer(), 32)
    with pytest.raises(ValueError, match=r"chat template refuses prompt number 1 \(no system role\); give messages"):
        tokenize_chats(["hi", [{"role": "system", "content": "x"}]], chat_tokenizer(), 32)
    with pytest.raises(ValueError, match="prompt number 0 is empty"):
        tokenize_chats([" "], chat_tokenizer(), 32)
    with pytest.raises(ValueError, match="prompt number 0 has 9 tokens, more than max_prompt_tokens=8"):
        tokenize_chats(["hi"], chat_tokenizer(), 8)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_chat_task(settings, tmp_path):
    """`chat=True` in the settings: the task's prompts, held-out ones and those of options go through the template."""
    folder = tiny.save(tiny.language_model("gpt2"), tmp_path)
    chat_tokenizer().save_pretrained(folder)
    settings = {**settings, "reference": folder, "prompts": ["hi", "you"], "chat": True}
    task = build_task(TextGenConfig(**settings))
    for prompts in (task.prompts, task.read_prompts(["hi"])):
        real = prompts.input_ids[0][prompts.attention_mask[0]]
        assert task.tokenizer.decode(real) == "[u]hi<end>[a]"
