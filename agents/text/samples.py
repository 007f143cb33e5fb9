"""Sample responses and summary numbers, before and after training."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from agents.text.evaluation import Evaluation, mean
from textenv.training.files import write_text

FIRST, EACH = 6, 4  # pairs in the first section, and in each of the others
LONGEST = 2000  # characters of a text on the page
# Marks of inline Markdown and HTML; "://" would become a link, and a dollar sign begins math.
INLINE = re.compile(r"[\\`*_\[\]<>&|~$]|:(?=//)")
DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # embeddings, overrides and isolates
AT_START = re.compile(r"^(\d*)([-+=#.)])")  # marks of lists, headings and rules


def write_samples(path: Path, before: Evaluation, after: Evaluation, settings: str) -> None:
    """Write a Markdown page of responses to the same held-out prompts, before and after training.

    settings: those of the run, in a line. Texts are escaped, so that nothing in them is Markdown or HTML.
    """
    lines = [
        "# The same held-out prompts, before and after training",
        "",
        escaped(settings),
        "",
        f"One response was sampled to each of {len(before.prompts)} held-out prompts, with the same random numbers "
        "before and after. The KL is a response's log π − log π_ref, in nats, which may be negative. The means:",
        "",
        *_table(("before", "after"), [_means(before), _means(after)]),
    ]
    for title, explanation, rows in _sections(before, after):
        lines += ["", f"## {title}", "", explanation]
        for row in rows:
            lines += _pair(row, before, after)
    write_text(path, "\n".join(lines) + "\n")


def sample_rows(before: Evaluation, after: Evaluation, count: int = 20) -> list[dict[str, Any]]:
    """The responses of the page as rows of a table."""
    names = ["score", "kl", *["gold"] * (before.gold is not None and after.gold is not None)]
    rows: list[dict[str, Any]] = []
    for row, prompt in enumerate(before.prompts[:count]):
        cells: dict[str, Any] = {"prompt": prompt}
        for when, evaluation in (("before", before), ("after", after)):
            cells |= {when: evaluation.responses[row]}
            cells |= {f"{name}_{when}": getattr(evaluation, name)[row] for name in names}
        rows.append(cells)
    return rows


def make_summary(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Summary of a run on held-out prompts: scores, gold scores, KL and lengths, before and after training."""
    first, last = before.summary(), after.summary()
    summary: dict[str, Any] = {}
    for name in ("score", "score_std"):
        if name in first and name in last:
            summary |= {f"{name}_before": first[name], f"{name}_after": last[name]}
    if before.gold is not None and after.gold is not None:
        summary |= {"gold_before": mean(before.gold), "gold_after": mean(after.gold)}
    summary["kl_per_response"] = last["kl_per_response"]
    for name in ("length", "stopped", "distinct_bigrams"):
        summary |= {f"{name}_before": first[name], f"{name}_after": last[name]}
    return summary | {"evaluation_prompts": len(before.prompts)}


def escaped(text: str) -> str:
    """A text as Markdown that shows it: line by line, with every mark escaped and runs of spaces as one.

    Control characters, and those that change the direction of what follows, are shown by their number.
    """
    visible = "".join(
        character if character.isspace() or not _controls(character) else f"<U+{ord(character):04X}>"
        for character in text
    )
    lines = (" ".join(line.split()) for line in visible.splitlines())
    marked = (AT_START.sub(r"\1\\\2", INLINE.sub(r"\\\g<0>", line)) for line in lines if line)
    return "\\\n".join(marked)  # a backslash at its end breaks a line


def _controls(character: str) -> bool:
    """Whether it is a control character, half a surrogate pair, or one that changes the direction of a text."""
    return unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in DIRECTIONS


def _sections(before: Evaluation, after: Evaluation) -> Iterable[tuple[str, str, list[int]]]:
    """Sections: title, how its prompts were chosen, and their numbers. A prompt may be in several."""
    everyone = range(len(before.prompts))
    yield "As they come", f"The first {len(everyone[:FIRST])} prompts, whatever came of them.", list(everyone[:FIRST])
    if not before.score:
        yield "Furthest from the reference after training", "Largest KL first.", _lowest([-kl for kl in after.kl])
    rise = [last - first for first, last in zip(before.score, after.score, strict=True)]
    if rise:
        yield "The score rose most", "Largest rise first.", sorted(everyone, key=lambda row: -rise[row])[:EACH]
        yield "The score fell most", "Largest fall first.", _lowest(rise)
    if rise and after.gold is None:
        yield "The lowest scores after training", "Lowest first.", _lowest(after.score)
    if before.gold is None or after.gold is None:
        return
    yield "The lowest gold scores after training", "Lowest first.", _lowest(after.gold)
    change = [last - first for first, last in zip(before.gold, after.gold, strict=True)]
    if not rise:
        yield "The gold score fell most", "Largest fall first.", _lowest(change)
        return
    apart = [row for row in everyone if rise[row] > 0 > change[row]]
    explanation = (
        f"So it was with {len(apart)} of {len(everyone)} prompts: the reward liked what the gold rater did not. "
        "Largest fall of the gold score first."
    )
    yield "The score rose and the gold score fell", explanation, sorted(apart, key=lambda row: change[row])[:EACH]


def _lowest(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda row: values[row])[:EACH]


def _means(evaluation: Evaluation) -> dict[str, str]:
    numbers = evaluation.summary()
    gold = {} if evaluation.gold is None else {"gold score": f"{numbers['gold']:+.2f}"}
    score = {"score": f"{numbers['score']:+.2f}"} if evaluation.score else {}
    return {
        **score,
        **gold,
        "KL": f"{numbers['kl_per_response']:z.1f}",
        "tokens": f"{numbers['length']:.1f}",
        "ended by a stop token": f"{numbers['stopped']:.0%}",
        "distinct word pairs": f"{numbers['distinct_bigrams']:.0%}",
    }


def _numbers(evaluation: Evaluation, row: int) -> dict[str, str]:
    gold = {} if evaluation.gold is None else {"gold score": f"{evaluation.gold[row]:+.2f}"}
    score = {"score": f"{evaluation.score[row]:+.2f}"} if evaluation.score else {}
    return {
        **score,
        **gold,
        "KL": f"{evaluation.kl[row]:z.1f}",
        "tokens": str(evaluation.length[row]),
        "ended by": "a stop token" if evaluation.stopped[row] else "the budget",
    }


def _pair(row: int, before: Evaluation, after: Evaluation) -> list[str]:
    """A prompt, its two responses and their numbers."""
    prompt = before.prompts[row]
    lines = ["", f"### Prompt {row + 1}", "", *_quote(prompt[-LONGEST:], len(prompt) - LONGEST, "before this")]
    lines += ["", *_table(("before", "after"), [_numbers(before, row), _numbers(after, row)])]
    for name, evaluation in (("Before", before), ("After", after)):
        response = evaluation.responses[row]
        lines += ["", f"{name}:", "", *_quote(response[:LONGEST], len(response) - LONGEST, "after this")]
    return lines


def _quote(text: str, missing: int, where: str) -> list[str]:
    """A text as a block quote, and how many characters of it are missing."""
    lines = [f"> {line}" for line in (escaped(text) or "*(empty)*").splitlines()]
    return lines if missing <= 0 else [*lines, ">", f"> *({missing} more characters {where})*"]


def _table(names: Sequence[str], rows: Sequence[dict[str, str]]) -> list[str]:
    lines = ["| | " + " | ".join(rows[0]) + " |", "|---|" + "---|" * len(rows[0])]
    return lines + [f"| {name} | " + " | ".join(row.values()) + " |" for name, row in zip(names, rows, strict=True)]
