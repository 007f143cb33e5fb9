"""The model card of the embedded task: measures the weights in a folder and writes its README.md.

The build ends with it; `python -m textenv.reviews.card` measures again without training.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from textenv.config import TextGenConfig
from textenv.reviews.gold import gold
from textenv.reviews.measure import SURE, as_pairs, compare, measure_reward_model, measure_supervised
from textenv.reviews.prompts import HELD_OUT, TRAIN, held_out_prompts
from textenv.reviews.sampling import MAX_NEW_TOKENS, Sample, sample_responses
from textenv.training.reward_model import score_tokens

_HEAD = """# The embedded task: product reviews

Two small models, their tokenizer, and the grammar and rater that they were made with. This project made all of it;
no other text or weights went in. The build writes this page: edit `card.py`, not the page.

| what | where |
|---|---|
| supervised model: GPT-2, 4 layers, width 128, trained on reviews that the grammar wrote | `supervised/` |
| reward model: the same backbone with one scalar head, trained on noisy choices of the gold rater | `reward_model/` |
| grammar: data | `grammar/aspects.py`, `grammar/products.py`, `grammar/words.py` |
| grammar: clauses and whole reviews | `grammar/forms.py`, `grammar/clauses.py`, `grammar/writer.py` |
| parser and gold rater: the true quality of any text | `grammar/parser.py`, `gold.py` |
| prompts: training and held-out sets, disjoint | `prompts.py` |

A choice between two responses to one prompt goes to the first with probability
`sigmoid((gold(first) - gold(second)) / {noise})`. Training used the {train} training prompts only. All figures
below are measured on the {held_out} held-out prompts, at the task's temperature of {temperature} unless noted
otherwise.

Rebuild: `python -m textenv.reviews.build` (seed {seed}); measure again: `python -m textenv.reviews.card`.
Equal versions, threads and machine give equal weights. Elsewhere rounding differs, and the figures move by more than
their sampling error: in stage 1 AdamW's part keeps a constant learning rate, so the last steps decide how long the
responses are. Stages 1 and 2 done again by commands (`materials.py`): the loss on 2,048 held-out reviews is 0.907 nats
a token of the responses (0.911 here; the difference is 0.003 ± 0.002), the samples are longer (23.5 tokens; reviews
have 26) and parse less often (92.1%), with a gold score of 1.56. That reward model orders the pairs of this page right
as often: 76.5% noisy, 81.6% true, 92.9% sure, correlation 0.803. PPO on both
ends at a gold score of 3.08 (3.03 to 3.17, seeds 0, 1, 2), on the models here at 3.08 (2.99 to 3.14).

Targets set before training: 90% of the samples parse, and the reward model orders 85% of the pairs right that the
rater is at least 90% sure of. Both hold at the task's temperature. Neither holds at temperature 1, where a small
model samples unlikely tokens more often; the task's temperature was chosen after a first training had shown this.
"""

_FIGURES = (  # name, format, meaning; the suffix _hot marks a figure at temperature 1
    ("parsing", "{:.1%}", "supervised samples that end within {budget} new tokens and parse, of {samples:.0f}"),
    ("parsing_hot", "{:.1%}", "the same at temperature 1"),
    ("finished", "{:.1%}", "supervised samples that end within {budget} new tokens"),
    ("distinct", "{:.1%}", "distinct texts among the supervised samples"),
    ("tokens_mean", "{:.1f}", "tokens of a supervised sample, end token included, mean"),
    ("gold_mean", "{:.2f}", "gold score of the supervised samples, mean (standard deviation {gold_deviation:.2f})"),
    ("supervised_loss", "{:.3f}", "training loss of the supervised model, nats a token, mean over training"),
    ("accuracy_noisy", "{:.1%}", "reward model agrees with the rater's noisy choice, {test_pairs:.0f} held-out pairs"),
    ("ceiling", "{:.1%}", "Bayes ceiling: the noisy choice agrees with the order of the gold scores (same pairs)"),
    ("accuracy_true", "{:.1%}", "reward model agrees with the order of the gold scores (pairs that differ)"),
    ("accuracy_sure", "{:.1%}", "the same on the {sure_pairs:.0f} pairs where the rater is at least {sure:.0%} sure"),
    ("accuracy_sure_hot", "{:.1%}", "the same on {sure_pairs_hot:.0f} such pairs sampled at temperature 1"),
    ("correlation", "{:.3f}", "correlation of reward-model score and gold score over the held-out samples"),
    ("score_mean", "{:.2f}", "reward-model score of held-out samples, mean (standard deviation {score_deviation:.2f})"),
    ("megabytes", "{:.2f}", "both folders together, MB (10^6 bytes)"),
    ("supervised_minutes", "{:.1f}", "minutes of stage 1, the supervised model, on {threads} CPU threads"),
    ("reward_minutes", "{:.1f}", "minutes of stage 2, samples, choices and reward model"),
)  # fmt: skip

RECORD = "training.json"  # settings, losses and times of the build, which the weights do not hold
TEMPERATURE = TextGenConfig.temperature  # the task's own
SEED = 1  # of the held-out samples and of the rater's choices among them


def measure(folder: Path = Path(__file__).parent) -> dict[str, float]:
    """Measure the weights in a folder on held-out prompts, and write its card. Returns the figures.

    Args:
        folder: The output of a build: supervised/, reward_model/ and training.json. README.md is overwritten.
    """
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    figures, samples = measure_at(folder, TEMPERATURE, record["settings"]["noise"])
    hot, _ = measure_at(folder, 1.0, record["settings"]["noise"])
    figures |= {f"{name}_hot": value for name, value in hot.items()}
    write_card(folder, {**record, **figures}, samples[:10])
    return figures


def measure_at(folder: Path, temperature: float, noise: float) -> tuple[dict[str, float], list[Sample]]:
    """Figures of both models, on four samples per held-out prompt. Returns figures and samples."""
    model = AutoModelForCausalLM.from_pretrained(folder / "supervised")
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "supervised")
    held_out = sample_responses(model, tokenizer, held_out_prompts() * 4, SEED, temperature)
    quarter = len(held_out_prompts())
    rows = [held_out[i * quarter : (i + 1) * quarter] for i in range(4)]
    tests = compare([*zip(rows[0], rows[1], strict=True), *zip(rows[2], rows[3], strict=True)], noise, SEED)
    scores = score_tokens(reward_model, as_pairs(tokenizer, tests).sequences())
    return measure_supervised(held_out) | measure_reward_model(tests, scores.tolist(), noise), held_out


def write_card(folder: Path, figures: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Write the folder's README.md: its contents, how they were made, and their figures."""
    settings = figures["settings"]
    head = _HEAD.format(
        noise=settings["noise"], seed=settings["seed"], train=TRAIN, held_out=HELD_OUT, temperature=TEMPERATURE
    )
    values = {**figures, "megabytes": folder_megabytes(folder)}
    known = {**values, "budget": MAX_NEW_TOKENS, "sure": SURE, "threads": settings["threads"]}
    rows = [f"| {value.format(values[name])} | {text.format(**known)} |" for name, value, text in _FIGURES]
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers", "accelerate")}
    parts = (
        head,
        "## Figures\n",
        "| | |\n|---|---|\n" + "\n".join(rows) + "\n",
        '"Sure" means that the rater picks one of the two with a probability of at least '
        f"{SURE:.0%}, that is, their gold scores differ by at least {settings['noise']} ln {SURE / (1 - SURE):.0f}.\n",
        "## Samples of the supervised model\n",
        _samples(samples),
        "## Settings\n",
        f"{values['reviews']:.0f} reviews, {values['pairs']:.0f} preference pairs. Python {platform.python_version()}, "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ".\n",
        f"```json\n{json.dumps(settings, indent=1)}\n```",
    )
    (folder / "README.md").write_text("\n".join(parts) + "\n", encoding="utf-8")


def folder_megabytes(folder: Path) -> float:
    """The size of both models' folders, in 10^6 bytes."""
    files = (p for name in ("supervised", "reward_model") for p in (folder / name).rglob("*") if p.is_file())
    return sum(file.stat().st_size for file in files) / 1e6


def _samples(samples: Sequence[Sample]) -> str:
    scores = gold([s.prompt for s in samples], [s.text for s in samples])
    rows = [f"| {score:.2f} | {s.prompt} | {s.text.strip()} |" for s, score in zip(samples, scores, strict=True)]
    return "| gold | prompt | response |\n|---|---|---|\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    import tyro

    print(json.dumps(tyro.cli(measure), indent=1))
