"""Sizes of the measurements: full on a GPU, small without one."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from textenv import LanguageModel, TextGenConfig, build_task, shared
from textenv.models.loading import load_tokenizer
from textenv.prompts.tokenized import Prompts
from textenv.reviews.weights import SUPERVISED
from textenv.task import Task

Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Sizes of all measurements."""

    device: torch.device
    models: tuple[str, ...]  # keys of SHAPES
    vocabularies: tuple[int, ...]
    rows: tuple[int, ...]  # responses generated in parallel
    prompt: int  # P
    response: int  # R
    repeats: int
    update_rows: int  # responses per PPO iteration
    job: tuple[str, ...]  # command-line flags of the embedded job
    train_seconds: float  # training time of `sums`


def scale_of(device: torch.device) -> Scale:
    """Full sizes on CUDA, small sizes elsewhere."""
    if device.type == "cuda":
        return Scale(device, ("124M", "1B"), (50_257, 151_936), (64, 256), 32, 128, 1, 64, (), 60.0)
    job = ("--iterations", "1", "--rollout-size", "8", "--minibatch-size", "8", "--evaluation-prompts", "4")
    return Scale(device, ("tiny",), (512,), (2,), 4, 4, 1, 4, job, 5.0)


def _gpt2(layers: int, width: int, vocabulary: int) -> GPT2Config:
    return GPT2Config(n_layer=layers, n_embd=width, n_head=max(width // 64, 1), vocab_size=vocabulary, n_positions=256)


def _llama(vocabulary: int) -> LlamaConfig:
    """The shape of Llama-3.2-1B with another vocabulary size."""
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        vocab_size=vocabulary,
    )


SHAPES: dict[str, Callable[[int], Any]] = {
    "tiny": lambda vocabulary: _gpt2(2, 32, vocabulary),
    "124M": lambda vocabulary: _gpt2(12, 768, vocabulary),
    "1B": _llama,
}


def random_model(name: str, vocabulary: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen model with random weights, in eval mode. name: a key of `SHAPES`."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(SHAPES[name](vocabulary), dtype=dtype)
    return model.eval().requires_grad_(False)


def reward_length(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that takes no time."""
    return [len(response) / 100 for response in responses]


def task_for(model: PreTrainedModel, scale: Scale, rows: int, stops: tuple[int, ...]) -> Task:
    """A task with the model as reference and random prompts without padding."""
    tokenizer = load_tokenizer(str(SUPERVISED))
    config = TextGenConfig(
        reference=shared(LanguageModel(model, tokenizer, stops)),
        reward=shared(reward_length),
        prompts=[f"The {number}" for number in range(rows + 2)],
        max_prompt_tokens=scale.prompt,
        max_new_tokens=scale.response,
        temperature=1.0,
    )
    task = build_task(config)
    ids = torch.randint(len(stops), task.vocabulary, (rows + 2, scale.prompt), device=task.device)
    return replace(task, prompts=Prompts(task.prompts.texts, ids, torch.ones_like(ids, dtype=torch.bool)))


def parameters_of(model: torch.nn.Module) -> int:
    """Number of parameters of the model."""
    return sum(parameter.numel() for parameter in model.parameters())


def seconds_of(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of a call, including all of its kernels, and its result."""
    synchronize(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - started, result


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Yield a dict that holds `peak_gib` after the block; it stays empty on a CPU."""
    measured: dict[str, float] = {}
    free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield measured
    if device.type == "cuda":
        measured["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30


def free(device: torch.device) -> None:
    """Free unused memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def finite(tensors: list[Tensor]) -> bool:
    """Whether all values of all tensors are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
