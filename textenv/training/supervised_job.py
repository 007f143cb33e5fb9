"""Stage 1 as a command does it: from a JSONL file to a folder with a model, its held-out loss, samples and a card."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from textenv.models.decoding import decodes_from_cache
from textenv.models.language_model import position_limit
from textenv.models.loading import load_stop_token_ids, load_tokenizer, load_trainable_lm, quietly, without_report
from textenv.models.probe import check_causal
from textenv.training.card import CURVE, Card, Number, draw_curve, fenced, mean_and_error, write_card
from textenv.training.data import Row, read_supervised
from textenv.training.loop import LOOP, Job, LoopConfig, Trained, file_hash, prompt_key, split_rows, started_with
from textenv.training.supervised import (
    Rows,
    SupervisedConfig,
    encode_supervised,
    fit,
    greatest_length,
    losses_of_rows,
    some_rows,
)

SAMPLES = 4  # held-out prompts on the card
SAMPLE_TOKENS = 80  # of a response on the card
TEXT_PROMPT = 8  # tokens of a text without a prompt that stand for one on the card
CURVE_ROWS = 256  # held-out rows measured during the training


@dataclass(frozen=True)
class SupervisedReport:
    """The results of supervised fine-tuning. Losses are in nats per token that has a loss, on held-out rows."""

    train_rows: int
    held_out_rows: int
    left_out_rows: int  # without a token that has a loss within the greatest length
    loss_before: float
    loss_after: float
    change: float  # of the loss
    change_error: float | None  # its standard error, over prompts; None for one prompt


@dataclass(frozen=True)
class _Material:
    """Model and rows, ready to train."""

    base: str
    data: Path
    chats: bool
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]
    training: Rows
    held_out: Rows
    width: int  # the most tokens of a row
    clusters: list[str]  # the prompt of each held-out row
    left_out: int


def train_supervised(
    base: str | Path,
    data: str | Path,
    output: str | Path,
    config: SupervisedConfig,
    loop: LoopConfig = LOOP,
) -> SupervisedReport:
    """Fine-tune a model and save it with its tokenizer and a card. Returns its loss on held-out rows.

    Args:
        base: Folder or hub name of a decoder-only causal language model.
        data: JSONL of {text}, of {prompt, response} or of {messages}; see data.py.
        output: New or empty folder.
        config: Settings of the training.
        loop: How it is run.

    Raises ValueError, before training, for data or a base that cannot be read or an output that cannot be written.
    """
    base, data, output = str(base), Path(data), Path(output)
    parts = split_rows(read_supervised(data), config.held_out, config.seed)
    job = Job(output, started_with(data, base, config), loop)
    job.check()
    material = _prepare(base, data, parts, config)
    before, samples_before = _losses(material, config), _samples(material, config.seed)
    watched = some_rows(material.held_out, CURVE_ROWS, config.seed)
    print(
        f"{len(material.training.kept)} rows to train on, with {material.training.tokens} tokens that have a loss; "
        f"{len(material.held_out.kept)} held out; {material.left_out} left out, which have none",
        flush=True,
    )

    def measure() -> dict[str, float]:
        losses = losses_of_rows(material.model, watched, _forward(config))
        return {"held_out_loss": losses.sum().item() / watched.tokens}

    with job.held():
        trained = fit(material.model, material.training, config, job, measure)
        numbers = _numbers(material, before, _losses(material, config))
        samples = _show(samples_before, _samples(material, config.seed))
        with quietly():
            material.model.save_pretrained(output)
        material.tokenizer.save_pretrained(output)
        draw_curve(output / CURVE, trained.history, _LINES, "nats per token")
        write_card(output, _card(material, config, trained, numbers, samples))
        job.finish()
    return _report(material, numbers, output)


_LINES = {"loss": "training", "held_out_loss": f"held-out, at most {CURVE_ROWS} rows"}


def _forward(config: SupervisedConfig) -> int:
    return config.batch_size // config.gradient_accumulation


def _prepare(base: str, data: Path, parts: Sequence[Sequence[Row]], config: SupervisedConfig) -> _Material:
    model, tokenizer = load_trainable_lm(base), load_tokenizer(base)
    stops = load_stop_token_ids(base, tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, width = model.to(device), max(2, greatest_length(model, config))  # type: ignore[arg-type]
    with without_report():  # the check reads random tokens, the pad token among them, and Transformers warns of it
        check_causal(model, "base", width)  # one that sees later tokens would learn to copy them, at a loss near 0
    training, held_out = (
        encode_supervised(model, tokenizer, [(row.get("prompt"), row["response"]) for row in rows], config, stops)
        for rows in parts
    )
    clusters = [prompt_key(parts[1][index]) for index in held_out.kept]
    left_out = sum(map(len, parts)) - len(training.kept) - len(held_out.kept)
    return _Material(
        base=base,
        data=data,
        chats=not isinstance(parts[0][0]["response"], str),
        model=model,
        tokenizer=tokenizer,
        stops=stops,
        training=training,
        held_out=held_out,
        width=width,
        clusters=clusters,
        left_out=left_out,
    )


def _losses(material: _Material, config: SupervisedConfig) -> list[float]:
    """The summed loss of each held-out row."""
    return losses_of_rows(material.model, material.held_out, _forward(config)).tolist()


def _numbers(material: _Material, before: list[float], after: list[float]) -> list[Number]:
    tokens = [float(sum(scored)) for scored in material.held_out.scored]
    change = [new - old for new, old in zip(after, before, strict=True)]
    rows = f"held-out loss, nats per token, {len(tokens)} rows, {sum(tokens):.0f} tokens"
    values = (
        ("loss_before", before, f"{rows}, before training"),
        ("loss_after", after, "the same after training"),
        ("change", change, "its change, row by row"),
    )
    return [Number(name, *mean_and_error(sums, material.clusters, tokens), meaning) for name, sums, meaning in values]


def _samples(material: _Material, seed: int) -> list[tuple[str, str, str]]:
    """Held-out prompts, with the response in the data and a sampled one, as texts."""
    rows = material.held_out.encoded
    places = sorted(random.Random(seed).sample(range(len(rows)), min(SAMPLES, len(rows))))
    texts = []
    for place in places:
        ids = rows[place].ids
        prompt = ids[: rows[place].prompt or max(1, min(TEXT_PROMPT, len(ids) // 2))]
        written = _continue(material, prompt, seed)
        texts.append(tuple(_text(material.tokenizer, part) for part in (prompt, ids[len(prompt) :], written)))
    return texts


@torch.inference_mode()
def _continue(material: _Material, prompt: list[int], seed: int) -> list[int]:
    """A response sampled at temperature 1. Leaves the random numbers of the training alone."""
    model, stops = material.model.eval(), list(material.stops)
    room = min(SAMPLE_TOKENS, (position_limit(model) or len(prompt) + SAMPLE_TOKENS) - len(prompt))
    if room < 1:
        return []
    ends = {"eos_token_id": stops, "pad_token_id": stops[0]} if stops else {}
    cache = decodes_from_cache(model, material.width)
    options = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, max_new_tokens=room, use_cache=cache, **ends)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), _sampling_with(model, options):
        torch.manual_seed(seed)  # generate() uses the global generator
        ids = torch.tensor([prompt], device=model.device)
        written = model.generate(ids, options, attention_mask=torch.ones_like(ids))  # type: ignore[operator]
    return written[0, len(prompt) :].tolist()


@contextmanager
def _sampling_with(model: PreTrainedModel, options: GenerationConfig) -> Iterator[None]:
    """Set how the model samples, for a while. Options of its own, such as num_beams, fill in what a call leaves out."""
    own, model.generation_config = model.generation_config, options
    try:
        yield
    finally:
        model.generation_config = own


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def _show(before: Sequence[tuple[str, str, str]], after: Sequence[tuple[str, str, str]]) -> str:
    """The samples of the untrained and of the trained model, as Markdown."""
    parts = []
    for (prompt, data, old), (_, _, new) in zip(before, after, strict=True):
        texts = (("prompt", prompt), ("before", old), ("after", new), ("data", data))
        parts += [f"{name}:\n\n{fenced(text)}" for name, text in texts] + ["---"]
    return "\n\n".join(parts[:-1])


def _card(material: _Material, config: SupervisedConfig, trained: Trained, numbers: list[Number], samples: str) -> Card:
    chat = " --env.chat" if material.chats else ""
    rows = {
        "file": material.data.name,
        "training rows": len(material.training.kept),
        "held-out rows": len(material.held_out.kept),
        "rows left out": material.left_out,
        "SHA-256": file_hash(material.data),
    }
    return Card(
        title="A supervised model",
        about="A causal language model, fine-tuned on texts by `python -m agents supervised`. The held-out rows have "
        f"prompts that no training row has. Losses are on {_LOSS_ON[config.loss_on]}.",
        base=material.base,
        data=rows,
        settings=asdict(config),
        numbers=numbers,
        sections=[
            ("Loss", f"![training and held-out loss over the steps]({CURVE})"),
            ("Samples", f"Of held-out prompts, at temperature 1, at most {SAMPLE_TOKENS} tokens.\n\n{samples}"),
        ],
        use="python -m agents train --env.reference THIS_FOLDER --env.reward MODULE:FUNCTION "
        f"--env.prompts FILE.jsonl{chat}",
        record={"history": trained.history, "seconds": trained.seconds, "steps": trained.history[-1]["step"]},
    )


_LOSS_ON = {"responses": "responses alone, with the tokens that end them", "all": "prompts and responses"}


def _report(material: _Material, numbers: Sequence[Number], output: Path) -> SupervisedReport:
    before, after, change = numbers
    error = "" if change.error is None else f" (change {change.value:+.4f} ± {change.error:.4f})"
    rows = len(material.held_out.kept)
    print(
        f"held-out loss {before.value:.4f} -> {after.value:.4f} nats per token{error} on {rows} rows; saved to {output}"
    )
    return SupervisedReport(
        len(material.training.kept), rows, material.left_out, before.value, after.value, change.value, change.error
    )
