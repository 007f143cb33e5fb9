"""Sample responses and summary numbers, before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents.reporting.files import write_text
from agents.text.evaluation import Evaluation, mean


def write_samples(path: Path, before: Evaluation, after: Evaluation, count: int = 20) -> None:
    """Write a Markdown page of responses to the same held-out prompts, before and after training."""
    lines = ["# The same held-out prompts, before and after training", ""]
    for row, prompt in enumerate(before.prompts[:count]):
        lines += [f"## {_line(prompt)}", ""]
        for name, evaluation in (("before", before), ("after", after)):
            numbers = f"score {evaluation.score[row]:+.2f}"
            if evaluation.gold is not None:
                numbers += f", gold {evaluation.gold[row]:+.2f}"
            numbers += f", KL {evaluation.kl[row]:.1f}"
            lines += [f"**{name}** ({numbers})", "", f"> {_line(evaluation.responses[row])}", ""]
    write_text(path, "\n".join(lines))


def make_summary(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Summary of a run on held-out prompts: scores, gold scores, KL and lengths, before and after training."""
    first, last = before.summary(), after.summary()
    summary = {
        "score_before": first["score"],
        "score_after": last["score"],
        "score_std_before": first["score_std"],
        "score_std_after": last["score_std"],
    }
    if before.gold is not None and after.gold is not None:
        summary |= {"gold_before": mean(before.gold), "gold_after": mean(after.gold)}
    summary["kl_per_response"] = last["kl_per_response"]
    for name in ("length", "stopped", "distinct_bigrams"):
        summary |= {f"{name}_before": first[name], f"{name}_after": last[name]}
    return summary | {"evaluation_prompts": len(before.prompts)}


def _line(text: str) -> str:
    return " ".join(text.split()) or "(empty)"
