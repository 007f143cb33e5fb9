"""JSONL files: what is read, and what is refused with file and line, for prompts and for training data."""

from __future__ import annotations

import pytest

from textenv.json_lines import read_json_lines
from textenv.prompts.sources import read_prompts
from textenv.training.data import read_rows


def test_values_and_places(tmp_path):
    """Every line that is not blank, by its number; a byte-order mark, CRLF and a missing last newline change nothing."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n [1.5, "\xc3\xaf", null]')
    assert read_json_lines(path, "{}") == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 3", [1.5, "\xef", None])]
    path.write_bytes(b"")
    assert read_json_lines(path, "{}") == []


DEEP = "[" * 101 + "]" * 101
BAD = {
    "1e999": "the number 1e999 is not finite, or too large",
    "-1e999": "the number -1e999 is not finite",
    "NaN": "the number NaN is not finite",
    "-Infinity": "the number -Infinity is not finite",
    "1" * 400: "the number 11111111111111111111 is not finite, or too large",
    "1" * 5000: "the number 11111111111111111111 is not finite, or too large",
    DEEP: "nested deeper than 100 levels",
    "[" * 100_000 + "]" * 100_000: "nested deeper than 100 levels",
    '{"a":' * 100_000: "nested deeper than 100 levels",
    '"\\ud83d"': "surrogates not allowed",
    '"\xe9"': "not UTF-8",
}


@pytest.mark.parametrize("value", BAD, ids=lambda value: value[:12])
@pytest.mark.parametrize("read", [read_prompts, read_rows])
def test_bad_values(tmp_path, read, value):
    """Numbers that are not finite or absurd, deep nesting and half characters are refused by file and line."""
    path = tmp_path / "a.jsonl"
    good = '{"prompt": "a", "text": "b", "label": 1, "more": 0}\n\n'
    path.write_bytes(f'{good}{{"prompt": "a", "text": "b", "label": 1, "more": {value}}}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"a.jsonl, line 3: .*{BAD[value]}"):
        read(path)


def test_depth_and_numbers_that_are_read(tmp_path):
    """A hundred levels, brackets in texts, and the largest numbers are no mistake."""
    path = tmp_path / "a.jsonl"
    lines = ["[" * 100 + "]" * 100, '"' + "[" * 200 + '"', "1e308", "9" * 308, "0." + "1" * 400]
    path.write_text("\n".join(lines))
    assert [len(str(value)) for _, value in read_json_lines(path, "{}")] == [200, 200, 6, 308, 18]


def test_a_file_that_cannot_be_read(tmp_path):
    """A folder, and a name that no file can have, are refused."""
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"a.jsonl' cannot be read .*give a .jsonl file"):
        read_json_lines(tmp_path / "a.jsonl", "{}")
    for read, says in ((read_prompts, "no prompts file at"), (read_rows, "no training data at")):
        for name in (str(tmp_path / "a.jsonl"), "a" * 5000 + ".jsonl", "a\0.jsonl"):
            with pytest.raises(ValueError, match=says):
                read(name)
