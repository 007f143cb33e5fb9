"""Prompts: their sources, the further fields of rows, and the tokenization of texts and chats."""

import json
import sys
import types
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest

from tests.support import tiny, tiny_tokenizers
from textenv import LanguageModel, TextGenConfig, build_task
from textenv.models.language_model import shared
from textenv.prompts.sources import read_prompts
from textenv.prompts.tokenized import PromptTokenizer, pad_token_id


@pytest.fixture
def module(monkeypatch):
    """An importable module `my_prompts` of functions."""
    module = types.ModuleType("my_prompts")
    module.good = lambda: ["one", "two"]  # type: ignore[attr-defined]
    module.text = lambda: "one"  # type: ignore[attr-defined]
    module.empty = lambda: []  # type: ignore[attr-defined]
    module.number = 7  # type: ignore[attr-defined]
    module.needs_path = lambda path: [path]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_prompts", module)
    return module


def tokenize(prompts, tokenizer, width, places=()):
    """Texts as prompts of a model that has a row for every token."""
    return PromptTokenizer(tokenizer, len(tokenizer), width)(prompts, places)


def tokenize_chats(prompts, tokenizer, width, places=(), **arguments):
    """Chats as prompts of such a model; arguments: of the template."""
    return PromptTokenizer(tokenizer, len(tokenizer), width, True, arguments)(prompts, places)


def write(folder, text):
    """A prompts.jsonl with this text."""
    path = folder / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def test_sources(tmp_path, module):
    """A list, a tuple, a shared list, a function, a function's name and a .jsonl file give the same prompts."""
    path = write(tmp_path, '{"prompt": "one"}\n\n{"prompt": "two"}\n')
    sources = [["one", "two"], ("one", "two"), shared(["one", "two"]), lambda: ["one", "two"]]
    for source in [*sources, "my_prompts:good", str(path), path]:
        rows = read_prompts(source)
        assert rows.prompts == ("one", "two") and rows.fields == {}


def test_unicode_lines(tmp_path):
    """A .jsonl file is read as UTF-8, whatever the locale."""
    assert read_prompts(write(tmp_path, '{"prompt": "naïve ☃"}\n')).prompts == ("naïve ☃",)


def test_datasets_column():
    """A Hugging Face dataset, or a column of it, is a source of prompts."""
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    table = datasets.Dataset(pyarrow.table({"prompt": ["one", "two"]}), fingerprint="prompts")
    for source in (table["prompt"], shared(table["prompt"]), shared(table)):
        assert read_prompts(source).prompts == ("one", "two")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "a"}\nnot json\n', "line 2: not JSON .*one object per line"),
        ('{"prompt": "a"}\n\n{"body": "b"}\n', "line 3: no text in the field .prompt., .*got .*'body'"),
        ('{"prompt": 5}\n', 'line 1: no text in the field "prompt"'),
        ('["a"]\n', 'line 1: no text in the field "prompt"'),
        ("\n", "prompts are empty; give at least one"),
    ],
)
def test_bad_lines(tmp_path, lines, message):
    """An error about a file names the path and the line."""
    path = write(tmp_path, lines)
    with pytest.raises(ValueError, match=message) as raised:
        read_prompts(str(path))
    assert str(path) in str(raised.value) or "empty" in message


def test_clashing_fields(tmp_path):
    """A field with the name of an argument of a reward that takes all fields is refused by its line, at `make`."""
    path = write(tmp_path, '\n{"prompt": "a", "responses": "b"}\n')

    def takes_all(prompts, responses, **fields):
        return [0.0] * len(prompts)

    def positional(prompts, responses, /, **fields):
        return [float(len(fields))] * len(prompts)

    model = shared(LanguageModel(tiny.language_model(), tiny.tokenizer(), (tiny.END,)))
    arguments = dict(reference=model, prompts=path, max_prompt_tokens=4, device="cpu")
    says = r"'takes_all' takes all fields of the prompts, and their field 'responses' \(.*prompts.jsonl, line 2\) has the name"
    with pytest.raises(ValueError, match=says):
        gym.make("TextGen-v0", **arguments, reward=takes_all)
    env = gym.make("TextGen-v0", **arguments, reward=positional)
    env.reset(seed=0)
    assert env.step(tiny.END)[-1]["score"] == 1.0
    with pytest.raises(
        ValueError, match=r"needs the prompts' field 'answer', and they have .*\(.*prompts.jsonl, line 2\)"
    ):
        gym.make("TextGen-v0", **arguments, reward="textenv.rewards.library:exact_match")


def test_half_a_character():
    """A text that no encoding can write is refused by its number, in lists, chats and the template's output."""
    for tokenize_any, prompt in ((tokenize, "a\ud83d"), (tokenize_chats, [{"role": "user", "content": "a\ud83d"}])):
        with pytest.raises(ValueError, match=r"prompt number 1 has half a character, '.ud83d', .*remove it"):
            tokenize_any(["a", prompt], chat_tokenizer(), 32)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "no prompts file at 'missing.jsonl'; give a .jsonl"),
        ("prompts.csv", "a path that ends in .jsonl, or 'module:function', got 'prompts.csv'"),
        ("my_prompts:absent", "'my_prompts:absent' names no importable function .*Python path"),
        ("no_such_module:f", "'no_such_module:f' names no importable function .*Python path"),
        ("my_prompts:number", "must name a function, got int"),
        ("my_prompts:text", "my_prompts:text must return a list of prompts, got str"),
        ("my_prompts:empty", "prompts are empty"),
        ("my_prompts:needs_path", "my_prompts:needs_path is called without arguments .*missing .*'path'.*default"),
        (lambda count: ["a"] * count, "<lambda> is called without arguments .*missing .*'count'"),
        ([], "prompts are empty"),
        (["a", 3], "prompts must be texts, chats .*; number 1 has type int: .3"),
        (b"ab", "prompts must be texts, chats .*; number 0 has type int"),
        (7, "prompts must be a list, .*got int; give one of these"),
        ({"prompt": ["a"]}, "prompts must be a list, .*got dict; give one of these"),
    ],
)
def test_bad_sources(module, source, message):
    """Anything else is refused with the remedy."""
    with pytest.raises(ValueError, match=message):
        read_prompts(source)


def test_error_inside_a_function_passes_through():
    """A TypeError of the function's body is not mistaken for a missing argument."""

    def broken():
        return len(3)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match=r"has no len\(\)"):
        read_prompts(broken)


def test_other_encodings(tmp_path):
    """A file that is not UTF-8 is refused; the error names the line."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "a"}\n{"prompt": "naïve"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2: not UTF-8 .*byte 0xef.*save the file as UTF-8"):
        read_prompts(path)


def test_other_datasets_types():
    """A DatasetDict and an IterableDataset are refused, with how to get a source of prompts from them."""
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
        for passed in (source, shared(source)):
            with pytest.raises(ValueError, match=f"{kinds}.*{remedy}"):
                read_prompts(passed)


def test_tokenize():
    """Texts become left-padded tokens of width P (here one per byte); the mask is true on real tokens."""
    tokenizer = tiny.tokenizer()
    prompts = tokenize(["ab", "abc<end>"], tokenizer, 5)
    a, b, c = tokenizer("abc").input_ids
    assert prompts.texts == ("ab", "abc<end>")
    assert prompts.input_ids.tolist() == [[tiny.PAD] * 3 + [a, b], [tiny.PAD, a, b, c, tiny.END]]
    assert prompts.attention_mask.tolist() == [[False] * 3 + [True] * 2, [False] + [True] * 4]
    selected = prompts.select([1, 0, 1])
    assert selected.texts == ("abc<end>", "ab", "abc<end>")
    assert selected.input_ids.tolist() == prompts.input_ids[[1, 0, 1]].tolist()
    assert selected.attention_mask.tolist() == prompts.attention_mask[[1, 0, 1]].tolist()


def test_pad_token_may_be_the_end_token():
    """With pad = end, and without a pad token, the mask still marks the real tokens."""
    for pad in ("<end>", None):
        prompts = tokenize(["ab<end>"], tiny.tokenizer(pad), 5)
        assert prompts.attention_mask.tolist() == [[False, False, True, True, True]]


def test_tokenize_does_not_change_the_tokenizer():
    """The caller's tokenizer keeps its padding side and pad token."""
    tokenizer = tiny.tokenizer(None)
    before = (tokenizer.padding_side, tokenizer.pad_token, tokenizer.truncation_side)
    tokenize(["ab"], tokenizer, 5)
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.truncation_side) == before


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["ok", ""], "prompt number 1 is empty"),
        (["ok", "  \n"], "prompt number 1 is empty"),
        (["abcdefgh", "123456"], "prompt number 0 has 8 tokens, more than max_prompt_tokens=5 .*to 8"),
    ],
)
def test_bad_prompts(texts, message):
    """An empty or too long prompt is refused when it is tokenized; the error names its number."""
    with pytest.raises(ValueError, match=message):
        tokenize(texts, tiny.tokenizer(), 5)


def test_bad_prompts_of_a_file(tmp_path):
    """An error about a prompt from a file also names its line, with blank lines counted."""
    path = write(tmp_path, '{"prompt": "ok"}\n\n{"prompt": " "}\n')
    for read in (tokenize, tokenize_chats):
        rows = read_prompts(path)
        with pytest.raises(ValueError, match=r"prompt number 1 \(.*prompts.jsonl, line 3\) is empty"):
            read(rows.prompts, chat_tokenizer(), 32, rows.places)
        with pytest.raises(ValueError, match=r"prompt number 0 \(.*prompts.jsonl, line 1\) has .* tokens, more than"):
            read(rows.prompts[:1], chat_tokenizer(), 1, rows.places)
    assert read_prompts(["a", "b"]).places == ()  # an entry of a list is named by its number


@pytest.mark.parametrize("kind", ["wordpiece", "metaspace", "byte_level"])
def test_prompts_do_not_end(kind):
    """The end token that a tokenizer appends does not belong to a prompt; its start token is, once, also if the text has it."""
    tokenizer = getattr(tiny_tokenizers, kind)()
    start, end = {"wordpiece": ("[CLS]", "[SEP]"), "metaspace": ("<s>", "</s>"), "byte_level": ("", "<end>")}[kind]
    prompts = tokenize(["the cat", f"{start}the cat"], tokenizer, 9)
    for row in (0, 1):
        tokens = tokenizer.convert_ids_to_tokens(prompts.input_ids[row][prompts.attention_mask[row]].tolist())
        assert (tokens.count(start), tokens.count(end)) == (int(bool(start)), 0)
        assert not start or tokens[0] == start


def test_filling(monkeypatch):
    """A pad token that the model has no row for is replaced by 0, in prompts and in the environment's observations."""
    tokenizer = tiny.tokenizer("<filling>")
    assert tokenizer.pad_token_id == 258
    assert [pad_token_id(tokenizer, vocabulary) for vocabulary in (258, 259)] == [0, 258]
    assert PromptTokenizer(tokenizer, 258, 3)(["a"]).input_ids[0, :2].tolist() == [0, 0]
    monkeypatch.setitem(tiny.GPT2, "vocab_size", 258)
    model = LanguageModel(tiny.language_model(), tokenizer, (tiny.END,))
    env = gym.make("TextGen-v0", reference=shared(model), reward=len_reward, prompts=["a"], max_prompt_tokens=3)
    ids = env.reset(seed=0)[0]["input_ids"]
    assert ids.max() < 258 and ids[:2].tolist() == [0, 0] and np.isfinite(env.step(65)[1])


def len_reward(prompts, responses):
    """The length of each response."""
    return [float(len(response)) for response in responses]


def test_added_tokens_that_the_model_lacks(tmp_path):
    """A prompt with a token that was added to the tokenizer alone is refused by its number, its line and the token."""
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<think>"])
    path = write(tmp_path, '{"prompt": "a"}\n{"prompt": "b<think>"}\n')
    rows = read_prompts(path)
    for chat in (False, True):
        says = (
            r"prompt number 1 \(.*prompts.jsonl, line 2\) \('b<think>'\) has the token '<think>' \(id 258\), .*258 ids"
        )
        with pytest.raises(ValueError, match=says):
            PromptTokenizer(tokenizer, 258, 32, chat)(rows.prompts, rows.places)
        assert len(PromptTokenizer(tokenizer, 259, 32, chat)(rows.prompts, rows.places)) == 2


# ---- rows with further fields

ROWS = [
    {"prompt": "2+2=", "answer": "4", "weight": 1.0},
    {"prompt": "3+3=", "answer": "6", "weight": 0.0},
    {"prompt": "4+4=", "answer": None, "weight": 2.5},
]


def test_fields(tmp_path, module):
    """Further fields are read from every source; `select` and `to` keep them."""
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    lines = "\n".join(json.dumps(row) for row in ROWS)
    module.rows = lambda: ROWS
    table = datasets.Dataset(pyarrow.Table.from_pylist(ROWS), fingerprint="rows")
    for source in (ROWS, tuple(ROWS), str(write(tmp_path, lines)), "my_prompts:rows", table, lambda: table):
        rows = read_prompts(source)
        assert rows.prompts == ("2+2=", "3+3=", "4+4=")
        assert rows.fields == {"answer": ("4", "6", None), "weight": (1.0, 0.0, 2.5)}
    prompts = replace(tokenize(rows.prompts, tiny.tokenizer(), 8), fields=rows.fields)
    selected = prompts.to(prompts.input_ids.device).select([2, 0, 2])
    assert selected.fields == {"answer": (None, "4", None), "weight": (2.5, 1.0, 2.5)}
    assert selected.texts == ("4+4=", "2+2=", "4+4=")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            [*ROWS[:2], {"prompt": "x"}],
            r"number 0 has \['answer', 'prompt', 'weight'\], number 2 has \['prompt'\]; give",
        ),
        ([ROWS[0], "x"], "all prompts must have the same fields.*number 1 has .'prompt'"),
        ([{"body": "x"}], 'prompts must be texts, chats .* or rows .*"prompt".*number 0 has type dict'),
        ([{"prompt": "a"}, {"text": "b"}], "all prompts must have the same fields"),
        ([{"messages": "hi"}], "messages must be a list of messages, got a text at number 0"),
        ([{"messages": [{"role": "system", "content": "be kind"}]}], "must have one of the user.*number 0 has none"),
        ([[]], "number 0 has type list"),
        ([[{"role": "user"}]], "number 0 has type list"),
        ([[{"role": "user", "content": 3}]], "number 0 has type list"),
        ([None], "number 0 has type NoneType"),
        ({"a", "b"}, "prompts must be a list.*got set"),
        ([{"prompt": "a", 1: 2}], "the fields of a prompt must have names; number 0 has the field 1"),
        (iter(["a"]), "prompts must be a list.*got list_iterator"),
        (lambda: {"a"}, "<lambda> must return a list of prompts, got set"),
    ],
)
def test_bad_rows(source, message):
    """Rows with different fields or without a prompt are refused by number; so are unordered sources and iterators."""
    with pytest.raises(ValueError, match=message):
        read_prompts(source)


def test_prompts_by_other_names(tmp_path):
    """A column of texts, and a chat of a training set: the policy gets what is before the answer, and no answer."""
    chat = [{"role": role, "content": text} for role, text in zip("suaua", "12345", strict=True)]
    names = {"s": "system", "u": "user", "a": "assistant"}
    chat = [{**message, "role": names[message["role"]]} for message in chat]
    read = read_prompts([{"messages": chat, "id": 7}])
    assert [message["content"] for message in read.prompts[0]] == ["1", "2", "3", "4"] and read.fields == {"id": (7,)}
    assert read_prompts([{"messages": chat[:2]}]).prompts == (chat[:2],)
    assert read_prompts(write(tmp_path, '{"text": "a", "label": 1}\n')).prompts == ("a",)
    both = read_prompts([{"prompt": "a", "messages": chat, "text": "b"}])
    assert both.prompts == ("a",) and both.fields == {"messages": (chat,), "text": ("b",)}


def test_uneven_lines_and_tables(tmp_path):
    """A row of a file with other fields is named by its line; a DataFrame is refused: it iterates over column names."""
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
    """A tokenizer with a chat template."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_chats():
    """A text is one message of the user; the template writes the tokens, up to where the assistant speaks."""
    tokenizer = chat_tokenizer()
    prompts = tokenize_chats(["hi", CHAT], tokenizer, 32)
    rendered = ["[u]hi<end>[a]", "[u]hi<end>[a]yo<end>[u]so<end>[a]"]
    for row, text in enumerate(rendered):
        real = prompts.input_ids[row][prompts.attention_mask[row]].tolist()
        assert real == tokenizer(text).input_ids and tokenizer.decode(real) == text
    assert (prompts.input_ids == tiny.END).sum(1).tolist() == [1, 3]
    assert prompts.texts == ("hi", "hi\nyo\nso")  # the texts for rewards and reports


def test_bad_chats():
    """A missing template, a chat with chat off, and messages that the template refuses: each error has its remedy."""
    with pytest.raises(ValueError, match=r"no chat template; choose a chat model .*or pass chat=False"):
        tokenize_chats(["hi"], tiny.tokenizer(), 32)
    with pytest.raises(ValueError, match=r"prompt number 1 is a chat .*pass chat=True"):
        tokenize(["hi", CHAT], tiny.tokenizer(), 32)
    with pytest.raises(ValueError, match=r"chat template refuses prompt number 1 \(no system role\); use the roles"):
        tokenize_chats(["hi", [{"role": "system", "content": "x"}]], chat_tokenizer(), 32)
    with pytest.raises(ValueError, match="prompt number 0 is empty"):
        tokenize_chats([" "], chat_tokenizer(), 32)
    with pytest.raises(ValueError, match="prompt number 0 has 9 tokens, more than max_prompt_tokens=8"):
        tokenize_chats(["hi"], chat_tokenizer(), 8)


def test_one_start_token_in_chats():
    """The template's start token is the only one, though the tokenizer would add one and an end token too."""
    tokenizer = tiny_tokenizers.metaspace()
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    prompts = tokenize_chats(["the cat"], tokenizer, 9)
    tokens = tokenizer.convert_ids_to_tokens(prompts.input_ids[0][prompts.attention_mask[0]].tolist())
    assert (tokens.count("<s>"), tokens[0], tokens.count("</s>")) == (1, "<s>", 0)


THINKING = "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}{{ tools[0].name if tools }}"


def test_template_arguments():
    """Arguments reach the template; those that it does not read, or that the environment decides, are refused."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = THINKING

    def text(**arguments):
        prompts = tokenize_chats(["hi"], tokenizer, 32, **arguments)
        return tokenizer.decode(prompts.input_ids[0][prompts.attention_mask[0]])

    assert text() == text(enable_thinking=False) == "hi"
    assert text(enable_thinking=True) == "hi<think>"
    assert text(tools=[{"name": "clock"}]) == "hiclock"
    for name, says in [
        ("enable_thinkin", "has 'enable_thinkin', which the reference's chat template does not read"),
        ("tokenize", "has 'tokenize', which the environment decides; leave it out"),
        ("messages", "has 'messages', which the environment decides"),
        ("add_generation_prompt", "has 'add_generation_prompt', which the environment decides"),
    ]:
        with pytest.raises(ValueError, match=says):
            text(**{name: True})


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_template_arguments_of_the_environment(settings, tmp_path):
    """`gym.make` takes them as a mapping that JSON can hold, with `chat=True`, for its prompts and those of `reset`."""
    folder = tiny.save(tiny.language_model("gpt2"), tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = THINKING
    tokenizer.save_pretrained(folder)
    settings = {**settings, "reference": folder, "prompts": ["hi"]}
    env = gym.make("TextGen-v0", **settings, chat=True, chat_template_kwargs={"enable_thinking": True})
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    for env_, options in ((env, None), (env, {"prompt": "hi"}), (again, None)):
        observation, _ = env_.reset(seed=0, options=options)
        assert tokenizer.decode(observation["input_ids"][observation["attention_mask"] > 0]) == "hi<think>"
    for value, says in [
        (3, "chat_template_kwargs must be a mapping or None, got 3"),
        ({1: 2}, "chat_template_kwargs must be a mapping of names"),
        ({"enable_thinking": object()}, "chat_template_kwargs must hold what JSON can"),
        ({"enable_thinking": float("nan")}, "chat_template_kwargs must hold what JSON can"),
    ]:
        with pytest.raises(ValueError, match=says):
            gym.make("TextGen-v0", **settings, chat=True, chat_template_kwargs=value)


def test_templates_that_fail():
    """Whatever a template raises names the prompt; so does one that is not valid."""
    for template, says in [
        ("{{ 1 // 0 }}", "division|modulo"),
        ("{% if %}", "Expected an expression"),
        ("{{ 'a' + 1 }}", "str"),
    ]:
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=rf"the chat template refuses prompt number 0 \(.*({says}).*\); use"):
            tokenize_chats(["hi"], tokenizer, 32)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_chat_task(settings, tmp_path):
    """With `chat=True` the template applies to the task's prompts and to all that `Task.read_prompts` reads."""
    folder = tiny.save(tiny.language_model("gpt2"), tmp_path)
    chat_tokenizer().save_pretrained(folder)
    settings = {**settings, "reference": folder, "prompts": ["hi", "you"], "chat": True}
    task = build_task(TextGenConfig(**settings))
    for prompts in (task.prompts, task.read_prompts(["hi"])):
        real = prompts.input_ids[0][prompts.attention_mask[0]]
        assert task.tokenizer.decode(real) == "[u]hi<end>[a]"
