"""The rows that the trainings take: TRL's formats and our own, and their tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import tiny
from textenv.training.data import encode_exchanges, read_rows, read_supervised

TEMPLATE = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
GENERATION = "{% if add_generation_prompt %}[a]{% endif %}"
FORGETFUL = "{% for m in messages %}[{{ m.role[0] }}]{% if loop.last %}{{ m.content }}{% endif %}<end>{% endfor %}"


def user(content):
    """A message of the user."""
    return {"role": "user", "content": content}


def bot(content):
    """A message of the assistant."""
    return {"role": "assistant", "content": content}


def _file(folder: Path, *rows) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _chats(template: str = TEMPLATE):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b", "id": 1}, {"prompt": "p", "chosen": "a", "rejected": "b"}),
        (
            {"prompt": [user("p")], "chosen": [bot("a")], "rejected": [bot("b")]},
            {"prompt": [user("p")], "chosen": [bot("a")], "rejected": [bot("b")]},
        ),
        (  # the prompt is what both begin with; UltraFeedback has its text in `prompt` besides
            {"prompt": "p", "chosen": [user("p"), bot("a")], "rejected": [user("p"), bot("b")]},
            {"prompt": [user("p")], "chosen": [bot("a")], "rejected": [bot("b")]},
        ),
        (
            {
                "chosen": [user("p"), bot("x"), user("q"), bot("a")],
                "rejected": [user("p"), bot("x"), user("q"), bot("b")],
            },
            {"prompt": [user("p"), bot("x"), user("q")], "chosen": [bot("a")], "rejected": [bot("b")]},
        ),
    ],
)
def test_preferences(tmp_path: Path, row: dict, read: dict) -> None:
    """TRL's four forms of a preference, standard or conversational, with an explicit or an implicit prompt."""
    assert read_rows(_file(tmp_path, row, row)) == [read, read]


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"text": "t", "label": 1}, {"response": "t"}),
        ({"prompt": "p", "text": "t", "label": 1}, {"prompt": "p", "response": "t"}),
        ({"prompt": "p", "response": "r"}, {"prompt": "p", "response": "r"}),
        ({"prompt": "p", "completion": "r"}, {"prompt": "p", "response": "r"}),
        ({"prompt": [user("p")], "completion": [bot("r")]}, {"prompt": [user("p")], "response": [bot("r")]}),
        (
            {"messages": [user("p"), bot("r"), user("q"), bot("s")], "prompt": "p"},
            {"prompt": [user("p")], "response": [bot("r"), user("q"), bot("s")]},
        ),
    ],
)
def test_supervised_rows(tmp_path: Path, row: dict, read: dict) -> None:
    """Texts, prompts and responses, and chats, in our names and in TRL's."""
    assert read_supervised(_file(tmp_path, row)) == [read]


@pytest.mark.parametrize(
    ("read", "rows", "says"),
    [
        (read_rows, [{"chosen": [user("p")], "rejected": [user("p"), bot("a")]}], "line 1: .*begin with the same"),
        (read_rows, [{"chosen": [bot("a")], "rejected": [bot("b")]}], "line 1: .*begin with the same"),
        (
            read_rows,
            [{"prompt": [user("p")], "chosen": "a", "rejected": "b"}],
            "line 1: prompt must be a string, .* as chats, all",
        ),
        (
            read_rows,
            [{"prompt": [user("p")], "chosen": [bot("a")], "rejected": "b"}],
            "line 1: rejected must be a list",
        ),
        (
            read_rows,
            [{"prompt": [user("p")], "chosen": [user("a")], "rejected": [bot("b")]}],
            "chosen must begin and end",
        ),
        (
            read_rows,
            [{"chosen": "a", "rejected": "b"}, {"prompt": [user("p")], "chosen": [bot("a")], "rejected": [bot("b")]}],
            "line 2: the file mixes rows of pairs and of pairs .chats.",
        ),
        (read_supervised, [{"messages": [user("p")]}], "line 1: messages must have one of the role assistant"),
        (read_supervised, [{"messages": [bot("p")]}], "line 1: messages must have one of the role assistant"),
        (read_supervised, [{"messages": "hi"}], "line 1: messages must be a list of messages"),
        (read_supervised, [{"prompt": "p", "answer": "r"}], r"needs text, .*got fields \['answer', 'prompt'\]"),
        (read_supervised, [{"text": "t"}, {"prompt": "p", "response": "r"}], "line 2: the file mixes rows"),
        (
            read_supervised,
            [{"text": None}],
            "line 1: text must be a string, got None. Write a text, or leave the row out",
        ),
        (read_supervised, [3], "line 1: needs an object with fields, got int"),
    ],
)
def test_bad_rows(tmp_path: Path, read, rows: list, says: str) -> None:
    """What cannot be understood is refused with its line, before anything is loaded."""
    with pytest.raises(ValueError, match=says):
        read(_file(tmp_path, *rows))


def test_texts() -> None:
    """A response is put a space after its prompt and ends with the end token; a text has no prompt."""
    tokenizer = tiny.tokenizer()
    pair, text = encode_exchanges(tokenizer, [("ab", "c"), (None, "xyz")])
    assert tokenizer.decode(pair.ids) == "ab c<end>" and pair.prompt == 2
    assert pair.written == [False, False, True, True, True]
    assert tokenizer.decode(text.ids) == "xyz<end>" and text.prompt == 0 and all(text.written)


def test_turns_of_the_assistant() -> None:
    """Every turn of the assistant is marked with its end token and without the header and the line break after it."""
    tokenizer = _chats()
    chat = ([user("hi")], [bot("yo"), user("so"), bot("no"), user("left out")])
    (row,) = encode_exchanges(tokenizer, [chat], [tiny.END])
    assert tokenizer.decode(row.ids) == "[u]hi<end>\n[a]yo<end>\n[u]so<end>\n[a]no<end>"
    spans = "".join("#" if mark else "." for mark in row.written)  # one token a character, and one for <end>
    assert spans == "." * 10 + "###" + "." * 11 + "###"
    assert tokenizer.decode(row.ids[: row.prompt]) == "[u]hi<end>\n[a]"


def test_what_follows_a_stop_token_is_not_written() -> None:
    """Some templates write more behind the last turn, as Phi's do: no policy does, and no turn is refused for it."""
    tokenizer = _chats(TEMPLATE + "{% if not add_generation_prompt %}!{% endif %}")
    for chat, text in (
        (([user("hi")], [bot("yo")]), "[u]hi<end>\n[a]yo<end>"),
        (([user("hi")], [bot("yo"), user("so"), bot("no")]), "[u]hi<end>\n[a]yo<end>\n[u]so<end>\n[a]no<end>"),
    ):
        (row,) = encode_exchanges(tokenizer, [chat], [tiny.END])
        assert tokenizer.decode(row.ids) == text and sum(row.written) == 3 * len(chat[1][::2])


def test_a_token_over_the_border() -> None:
    """A line break before an answer and one in it may be one token: the policy goes on from what it was given."""
    tokenizer = _chats(TEMPLATE.replace("]{{ m", "]\n{{ m").replace("prompt %}[a]", "prompt %}[a]\n"))
    tokenizer.add_tokens(["\n\n"])
    (row,) = encode_exchanges(tokenizer, [([user("hi")], [bot("\nyo")])], [tiny.END])
    line = tokenizer("\n").input_ids
    assert len(tokenizer("\n\n").input_ids) == 1
    assert row.ids[row.prompt - 1 : row.prompt + 1] == [*line, *line] and sum(row.written) == 4
    assert tokenizer.decode(row.ids) == "[u]\nhi<end>\n[a]\n\nyo<end>"


def test_variables_of_the_template() -> None:
    """They are the environment's `chat_template_kwargs`: prompts are written alike everywhere."""
    tokenizer = _chats("{{ mood }}" + TEMPLATE)
    (row,) = encode_exchanges(tokenizer, [([user("hi")], [bot("yo")])], [tiny.END], {"mood": "fine"})
    assert tokenizer.decode(row.ids) == "fine[u]hi<end>\n[a]yo<end>"


def test_the_end_of_a_chat() -> None:
    """A template without an end token gets it; one that writes another token that stops the model does not."""
    tokenizer = _chats(
        "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    chat = ([user("hi")], [bot("yo!")])
    bang = tokenizer("!").input_ids[0]
    ends = [encode_exchanges(tokenizer, [chat], stops)[0] for stops in ([tiny.END], [bang])]
    assert [tokenizer.decode(row.ids) for row in ends] == ["[u]hi\n[a]yo!<end>", "[u]hi\n[a]yo!"]
    assert [sum(row.written) for row in ends] == [4, 3]


def test_an_end_token_that_is_white_space() -> None:
    """A line break that stops the model is found by its text, and not cut off with what follows a turn."""
    tokenizer = _chats(TEMPLATE.replace("<end>", ""))
    line = tokenizer("\n").input_ids[0]
    (row,) = encode_exchanges(tokenizer, [([user("hi")], [bot("yo"), user("so"), bot("a\nb")])], [line])
    assert tokenizer.decode(row.ids) == "[u]hi\n[a]yo\n[u]so\n[a]a\n" and sum(row.written) == 3 + 2


def test_an_end_id_without_a_token() -> None:
    """A model's vocabulary may be larger than the tokenizer's, and name such an id as an end: no text has it."""
    tokenizer, chat = _chats(), ([user("hi")], [bot("yo")])
    missing = len(tokenizer) + 40
    assert encode_exchanges(tokenizer, [chat], [tiny.END, missing]) == encode_exchanges(tokenizer, [chat], [tiny.END])


def test_templates_that_cannot_be_used() -> None:
    """No template, one that forgets earlier turns, and one that refuses a role: each in a sentence."""
    chat = ([user("hi")], [bot("yo"), user("so"), bot("no")])
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        encode_exchanges(tiny.tokenizer(), [chat])
    with pytest.raises(ValueError, match=r"writes earlier turns of a chat differently .*in 'no'"):
        encode_exchanges(_chats(FORGETFUL.replace("loop.last", "loop.last or loop.first") + GENERATION), [chat])
    with pytest.raises(ValueError, match=r"begins a response differently where it asks for one .*in 'yo'"):
        encode_exchanges(_chats(TEMPLATE.replace("prompt %}[a]", "prompt %}[a]<think>")), [chat])
    with pytest.raises(ValueError, match=r"refuses a chat of the roles \['user'.*no bots"):
        encode_exchanges(_chats("{{ raise_exception('no bots') }}"), [chat])
