"""The page of samples shows texts as they are, and chooses them as it says."""

import re
from itertools import pairwise

import pytest
from markdown_it import MarkdownIt

from agents.text.evaluation import Evaluation
from agents.text.samples import LONGEST, escaped, write_samples

HARMFUL = [
    "<script>alert(1)</script>",
    "# a heading\n- a list\n1. numbers\n2) more\n+ plus\n=====\n-----\n***",
    "```\ncode\n```\n~~~",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "> a quote\n    indented code",
    "![picture](http://example.org/x.png) [link](javascript:alert(1)) <http://example.org> http://example.org",
    "[a]: http://example.org\n*emphasis* __strong__ `code` ~~gone~~ &amp; &#60; $x$ back\\slash \\",
    "---\ntitle: front matter\n---",
    "👩‍💻 שלום",
]


def evaluation(score, gold=None, responses=None, prompts=None):
    """An evaluation of prompts P0, P1, ... with these scores."""
    count = len(score)
    return Evaluation(
        prompts=prompts or [f"P{row}" for row in range(count)],
        responses=responses or [f"R{row}" for row in range(count)],
        score=score,
        gold=gold,
        kl=[0.5] * count,
        length=[7] * count,
        stopped=[row % 2 == 0 for row in range(count)],
    )


def inner(text):
    """The tokens of a Markdown text with tables, and their children."""
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        yield token
        yield from token.children or []


def sections(page):
    """The numbers of the prompts under each heading."""
    parts = re.split(r"^## (.*)$", page, flags=re.MULTILINE)[1:]
    return {
        title: [int(n) for n in re.findall(r"^### Prompt (\d+)$", part, flags=re.MULTILINE)]
        for title, part in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.mark.parametrize("text", HARMFUL)
def test_texts_are_shown_and_not_read(text):
    """A text is one paragraph of plain text and line breaks, with every character but repeated spaces."""
    tokens = list(inner("> " + escaped(text).replace("\n", "\n> ")))
    types = {token.type for token in tokens}
    assert types <= {f"{kind}_{end}" for kind in ("blockquote", "paragraph") for end in ("open", "close")} | {
        *("inline", "text", "hardbreak", "text_special")
    }
    assert sum(token.type == "paragraph_open" for token in tokens) == 1
    shown = "".join("\n" if token.type == "hardbreak" else token.content for token in tokens if token.type != "inline")
    assert shown == "\n".join(" ".join(line.split()) for line in text.splitlines())


def test_control_characters_are_named():
    """Escape sequences cannot reach a terminal, and no override turns the rest of a line around."""
    assert escaped("\x1b[31mred \u202eback") == "\\<U+001B\\>\\[31mred \\<U+202E\\>back"


def test_a_page_of_harmful_texts_keeps_its_structure(tmp_path):
    """The page's headings are its own, whatever prompts and responses hold, and none of it is HTML or a link."""
    texts = evaluation([0.0] * len(HARMFUL), responses=HARMFUL, prompts=HARMFUL[::-1])
    write_samples(tmp_path / "samples.md", texts, texts, "settings with <b>HTML</b>")
    tokens = list(inner((tmp_path / "samples.md").read_text(encoding="utf-8")))
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert [text for text in headings if not text.startswith("Prompt ")] == [
        "The same held-out prompts, before and after training",
        *("As they come", "The score rose most", "The score fell most", "The lowest scores after training"),
    ]
    assert not {"html_block", "html_inline", "link_open", "image", "fence", "code_block"} & {t.type for t in tokens}


def test_choices_are_as_stated(tmp_path):
    """Rises, falls, lowest gold scores, and scores that rose while gold fell, in the stated order."""
    before = evaluation([0.0] * 8, gold=[3.0] * 8)
    after = evaluation([1.0, 2.0, 3.0, 4.0, -1.0, -2.0, 0.0, 5.0], gold=[2.0, 4.0, 1.0, 3.0, 0.0, 2.0, 3.0, 2.5])
    write_samples(tmp_path / "samples.md", before, after, "settings")
    page = (tmp_path / "samples.md").read_text(encoding="utf-8")
    assert sections(page) == {
        "As they come": [1, 2, 3, 4, 5, 6],
        "The score rose most": [8, 4, 3, 2],
        "The score fell most": [6, 5, 7, 1],
        "The lowest gold scores after training": [5, 3, 1, 6],
        "The score rose and the gold score fell": [3, 1, 8],
    }
    assert "with 3 of 8 prompts" in page
    assert "| before | +0.00 | +3.00 | 0.5 | 7 | a stop token |" in page
    assert "| after | -2.00 | +2.00 | 0.5 | 7 | the budget |" in page  # of prompt 6
    assert "| after | +1.50 | +2.19 | 0.5 | 7.0 | 50% | 0% |" in page  # means: 12/8 and 17.5/8


def test_long_texts_are_cut(tmp_path):
    """A response of many tokens shows its beginning and says how much is missing; a prompt shows its end."""
    response, prompt = "a" * LONGEST + "b" * 7, "c" * 5 + "d" * LONGEST
    long = evaluation([0.0], responses=[response], prompts=[prompt])
    write_samples(tmp_path / "samples.md", long, long, "settings")
    page = (tmp_path / "samples.md").read_text(encoding="utf-8")
    assert "*(7 more characters after this)*" in page and "*(5 more characters before this)*" in page
    assert "ab" not in page and "cd" not in page and f"> {'a' * LONGEST}\n" in page
