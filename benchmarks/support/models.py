"""Language models of many sizes, and tasks around them with a reward model of the same shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)

from textenv import LanguageModel, TextGenConfig, build_task, shared
from textenv.models.loading import load_causal_lm, load_tokenizer, quietly
from textenv.prompts.tokenized import Prompts
from textenv.reviews.weights import SUPERVISED
from textenv.rewards.reward_model import RewardModel
from textenv.task import Task

EMBEDDED, SMOLLM2 = "embedded", "SmolLM2-135M"
POSITIONS = 1024
# Larger than usual weights, so that the next token is not uniform and some ids are hardly ever sampled.
INIT = 0.1
SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def _gpt2(layers: int, width: int, vocabulary: int) -> GPT2Config:
    return GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=max(width // 64, 1),
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        initializer_range=INIT,
        **SPECIAL,
    )


def _llama(layers: int, width: int, heads: tuple[int, int], vocabulary: int) -> LlamaConfig:
    """heads: of queries, and of keys and values."""
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        vocab_size=vocabulary,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=INIT,
        **SPECIAL,
    )


SHAPES: dict[str, Callable[[], Any]] = {
    "GPT-2, 0.2M": lambda: _gpt2(2, 64, 1024),
    "Llama, 1M": lambda: _llama(4, 128, (2, 1), 2048),
    "GPT-2, 10M": lambda: _gpt2(6, 320, 8192),
    "Llama, 25M": lambda: _llama(12, 384, (6, 2), 16384),
    "Llama, 135M": lambda: _llama(30, 576, (9, 3), 49152),
    "GPT-2, 1M": lambda: _gpt2(4, 128, 1024),
    "tiny trunk, vocabulary 151,936": lambda: _gpt2(2, 64, 151_936),
}


def random_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A frozen float32 model with random weights. name: a key of `SHAPES`."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(SHAPES[name]()).float().eval().requires_grad_(False)


def random_reward_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """A frozen float32 classifier with one output and random weights. config: a language model's."""
    torch.manual_seed(seed)
    values = {key: value for key, value in config.to_dict().items() if key not in ("id2label", "label2id")}
    config = AutoConfig.for_model(**values, num_labels=1)
    return AutoModelForSequenceClassification.from_config(config).float().eval().requires_grad_(False)


def parameters_of(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def language_model(name: str, smollm2: Path | None = None, stops: tuple[int, ...] = ()) -> LanguageModel:
    """A language model by its key in `SHAPES`, or `SMOLLM2` from the folder."""
    if name == SMOLLM2:
        assert smollm2 is not None
        folder = str(smollm2)
        return LanguageModel(load_causal_lm(folder, torch.device("cpu"), torch.float32), load_tokenizer(folder), stops)
    return LanguageModel(random_model(name), load_tokenizer(str(SUPERVISED)), stops)


def embedded_task(**settings: Any) -> Task:
    """The embedded task, with its own models and prompts."""
    return build_task(TextGenConfig(device="cpu", **settings))


def task_of(
    language: LanguageModel,
    rows: int,
    prompt: int,
    response: int,
    *,
    reward: Any = None,
    shortest: int | None = None,
) -> Task:
    """A task with random prompts, in which the language model is the reference.

    prompt, response: P and R; reward: by default a reward model of the same shape; shortest: prompt lengths are drawn
    from here to P, by default all are P. Responses end at the language model's stop ids, by default at the id that it
    likes least, which it hardly ever writes.
    """
    if not language.stop_token_ids:
        language = replace(language, stop_token_ids=(least_likely_id(language.model),))
    reward = reward or RewardModel(random_reward_model(language.model.config))
    config = TextGenConfig(
        reference=shared(language),
        reward=shared(reward),
        prompts=[f"The {number}" for number in range(rows)],
        max_prompt_tokens=prompt,
        max_new_tokens=response,
        temperature=1.0,
        device="cpu",
    )
    task = build_task(config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(task.vocabulary, (rows, prompt), generator=generator)
    lengths = torch.randint(shortest or prompt, prompt + 1, (rows, 1), generator=generator)
    mask = torch.arange(prompt) >= prompt - lengths  # left-padded
    return replace(task, prompts=Prompts(task.prompts.texts, ids, mask))


@torch.no_grad()
def least_likely_id(model: PreTrainedModel, rows: int = 4, width: int = 64) -> int:
    """The id whose largest logit, relative to its row's, over random texts is the least."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (rows, width), generator=generator)
    return int(model(input_ids=ids).logits.float().log_softmax(-1).flatten(0, 1).amax(0).argmin())


def lengths_with(tokens: Tensor, stopping: Tensor) -> Tensor:
    """Lengths [B] of responses [B, R] if the ids marked in `stopping`, bool [V], ended them."""
    stopped = stopping[tokens]
    return torch.where(stopped.any(1), stopped.int().argmax(1) + 1, tokens.shape[1])


def stops_for_mean(tokens: Tensor, vocabulary: int, mean: float) -> tuple[int, ...]:
    """Ids at which responses [B, R], written without stopping, would end after `mean` tokens on average.

    They are the first ones of a random order of all ids.
    """
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(2))
    few, many = 1, vocabulary
    while many - few > 1:
        middle = (few + many) // 2
        stopping = torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, order[:middle], True)
        if float(lengths_with(tokens, stopping).float().mean()) > mean:
            few = middle
        else:
            many = middle
    return tuple(order[:many].tolist())


def stop_for_mean(tokens: Tensor, vocabulary: int, mean: float) -> int:
    """The single id at which responses [B, R], written without stopping, would end nearest to `mean` on average."""

    def distance(token: int) -> float:
        stopping = torch.zeros(vocabulary, dtype=torch.bool)
        stopping[token] = True
        return abs(float(lengths_with(tokens, stopping).float().mean()) - mean)

    return min(tokens.unique().tolist(), key=distance)


def classifier(model: PreTrainedModel) -> PreTrainedModel:
    """A classifier with one output on the language model's backbone: its own weights, and a random head."""
    scorer: Any = random_reward_model(model.config)
    scorer.base_model.load_state_dict(model.base_model.state_dict())
    return scorer


def with_positions(source: Path, target: Path, width: int) -> None:
    """Write the GPT-2 in the folder `source` to `target` with positions for `width` tokens, by repeating its own."""
    kind: Any = AutoModelForCausalLM if source == SUPERVISED else AutoModelForSequenceClassification
    model = kind.from_pretrained(source)
    table = model.transformer.wpe.weight.data
    # The embedded models say use_cache=False, and leave it to generation_config.json, which is not copied.
    longer = kind.from_config(AutoConfig.from_pretrained(source, n_positions=width, use_cache=True))
    weights = model.state_dict()
    repeats = -(-width // len(table))
    weights["transformer.wpe.weight"] = table.repeat(repeats, 1)[:width]
    longer.load_state_dict(weights, strict=False)
    with quietly():
        longer.save_pretrained(target)
        load_tokenizer(str(source)).save_pretrained(target)
