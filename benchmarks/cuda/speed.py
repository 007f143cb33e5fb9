"""Decoding speed compared with Hugging Face's generate and the memory bandwidth, and the cost of a PPO update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from agents.algorithms.ppo import PPO, PPOConfig
from agents.config import TrainConfig
from agents.reporting.profile import peak_of
from agents.text.config import TextConfig
from agents.text.experiment import TextExperiment
from agents.trainer import Trainer
from benchmarks.cuda.scale import (
    Row,
    Scale,
    free,
    parameters_of,
    peak_memory,
    random_model,
    seconds_of,
    task_for,
)
from textenv.generation import generate, score_responses
from textenv.models.decoding import Decoding
from textenv.models.sampling import Sampling
from textenv.task import Task

# Settings of an update by the name in the table.
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": dict(precision="float32"),
    "bf16": dict(precision="bf16"),
    "bf16, checkpointing": dict(precision="bf16", gradient_checkpointing=True),
    "bf16, adapters": dict(precision="bf16", lora_rank=16),
}


def decode(scale: Scale) -> Iterator[Row]:
    """Decode with random bfloat16 weights: fixed lengths, and ragged lengths that average a third of the budget."""
    for name in scale.models:
        model = random_model(name, scale.vocabularies[0], scale.device, torch.bfloat16)
        many = (
            3 * scale.vocabularies[0] // scale.response
        )  # number of stop ids: each token stops with probability 3 / R
        for rows, stops in [*((rows, 1) for rows in scale.rows), (scale.rows[-1], many)]:
            task = task_for(model, scale, rows, tuple(range(stops)))
            kind = "fixed" if stops == 1 else "ragged"
            yield from _decoders(f"{name}, {rows} rows, {kind}", task, model, rows, scale)
        del model, task
        free(scale.device)


def _decoders(case: str, task: Task, model: PreTrainedModel, rows: int, scale: Scale) -> Iterator[Row]:
    prompts = task.prompts.select(range(rows))
    generator = torch.Generator(scale.device).manual_seed(0)
    fixed = len(task.stop_token_ids) == 1

    def ours(decoding: Decoding) -> int:
        return int(generate(task, model, prompts, Sampling(), generator, decoding).state.length.sum())

    def theirs() -> int:
        texts: Any = model.generate(  # type: ignore[operator]
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask.long(),
            do_sample=True,
            top_k=0,
            max_new_tokens=scale.response,
            eos_token_id=None if fixed else list(task.stop_token_ids),
            pad_token_id=0,
        )
        return int(_lengths(texts[:, scale.prompt :], len(task.stop_token_ids), fixed).sum())

    state = generate(task, model, prompts, Sampling(), generator).state
    bound = _roofline(model, rows, scale)
    methods = {
        "ours": partial(ours, Decoding()),
        "ours, captured": partial(ours, Decoding(compile=True)),
        "generate": theirs,
    }
    for method, call in methods.items():
        speed = _speed(call, scale)
        row: Row = {"case": f"{case}: {method}", "tokens_per_second": speed}
        yield row | ({"share_of_roofline": speed / bound} if fixed and bound else {})
    seconds, _ = seconds_of(lambda: score_responses(task, state, prompts.texts), scale.device)
    yield {"case": f"{case}: scoring", "tokens_per_second": int(state.length.sum()) / seconds}


def _lengths(tokens: torch.Tensor, stops: int, fixed: bool) -> torch.Tensor:
    """Tokens up to and including the first stop id, [B]. tokens: [B, R]; ids below `stops` stop."""
    if fixed:
        return torch.full((len(tokens),), tokens.shape[1])
    stopped = (tokens < stops).long()
    return torch.where(stopped.any(1), stopped.argmax(1) + 1, tokens.shape[1])


def _speed(call: Callable[[], int], scale: Scale) -> float:
    """Median tokens per second, after a warm-up call."""
    call()
    speeds = []
    for _ in range(scale.repeats):
        seconds, tokens = seconds_of(call, scale.device)
        speeds.append(tokens / seconds)
    return median(speeds)


def _roofline(model: PreTrainedModel, rows: int, scale: Scale) -> float:
    """Tokens per second if a step took only as long as reading weights and cache once; 0 for an unknown GPU."""
    bandwidth = peak_of(scale.device)[1]
    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = config.hidden_size // config.num_attention_heads
    cache = rows * (scale.prompt + scale.response / 2) * 2 * heads * width * config.num_hidden_layers * 2
    return bandwidth * rows / (2 * parameters_of(model) + cache)


def update(scale: Scale) -> Iterator[Row]:
    """Rollout and update time of a PPO iteration of one epoch, in each precision, and with what saves memory."""
    for name in scale.models:
        for vocabulary in scale.vocabularies:
            for variant, changes in VARIANTS.items():
                case = f"{name}, vocabulary {vocabulary:,}, {variant}"
                try:
                    yield {"case": case} | _iteration(name, vocabulary, changes, scale)
                except (torch.cuda.OutOfMemoryError, ValueError) as error:  # ValueError: peft is not installed
                    yield {"case": case, "error": str(error)[:200]}
                free(scale.device)


def _iteration(name: str, vocabulary: int, changes: dict[str, Any], scale: Scale) -> Row:
    model = random_model(name, vocabulary, scale.device, torch.bfloat16)
    task = task_for(model, scale, scale.update_rows, (0,))
    config = TrainConfig(iterations=2, minibatch_size=scale.update_rows // 2)
    micro_batch = max(scale.update_rows // 4, 1) * (scale.prompt + scale.response)
    sizes: dict[str, Any] = dict(rollout_size=scale.update_rows, micro_batch_tokens=micro_batch, evaluation_prompts=1)
    settings = TextConfig(**sizes, **changes)
    experiment = TextExperiment(config, settings, task)
    with peak_memory(scale.device) as memory:
        trainer = Trainer(config, PPO(PPOConfig(epochs=1), experiment.network_factory), experiment.collector)
        iterations = [iteration.metrics for iteration in trainer.iterate()]
    last = iterations[-1]
    seconds = last["seconds"] - last["rollout_seconds"]
    tokens = scale.update_rows * (scale.prompt + scale.response)
    # Per token: actor and critic forward and backward, 6 N each, and the critic's forward in `prepare`, 2 N.
    operations = 14 * parameters_of(model) * tokens
    peak = peak_of(scale.device)[0]
    row: Row = {"update_seconds": seconds, "rollout_seconds": last["rollout_seconds"], **memory}
    return row | ({"mfu": operations / seconds / peak} if peak else {})
