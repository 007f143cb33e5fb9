"""The objects that a `TextGenConfig` names, built and checked together, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from textenv.config import DTYPES, TextGenConfig
from textenv.masks.build import MaskContext, build_masks
from textenv.masks.masks import TokenMask
from textenv.models.language_model import LanguageModel
from textenv.models.loading import check_room, load_causal_lm, load_config, load_tokenizer, unwrap
from textenv.prompts.samplers import PromptSampler, make_sampler
from textenv.prompts.sources import PromptRows, read_prompts
from textenv.prompts.tokenized import Prompts, pad_token_id, tokenize, tokenize_chats
from textenv.reviews.prompts import train_prompts
from textenv.reviews.weights import REWARD_MODEL, SUPERVISED
from textenv.rewards.base import Reward
from textenv.rewards.build import RewardContext, build_reward, check_fields
from textenv.rewards.normalization import Normalizer, make_normalizer, paid_part_names


@dataclass(frozen=True)
class Task:
    """A decision process, ready to run: what the environment, the fast path and the learners share."""

    config: TextGenConfig
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int  # V
    stop_token_ids: tuple[int, ...]
    reference: LanguageModel | None  # None where kl_coef is 0
    reward: Reward
    normalizer: Normalizer | None  # None where scores are paid as the reward gives them
    prompts: Prompts
    device: torch.device
    masks: tuple[TokenMask, ...] = ()  # which tokens may come next; all must agree

    @property
    def pad_token_id(self) -> int:
        """What fills empty columns. It means nothing: masks say what is real."""
        return pad_token_id(self.tokenizer)

    @property
    def width(self) -> int:
        """L, columns of an observation."""
        return self.config.width

    @property
    def score_part_names(self) -> tuple[str, ...]:
        """The keys of `score_parts`."""
        return paid_part_names(self.reward, self.normalizer)

    def without_normalization(self) -> Task:
        """The same task with scores as the reward gives them: running statistics neither move nor blur a comparison."""
        return replace(self, normalizer=None)

    def with_frozen_statistics(self) -> Task:
        """The same task with scores as they are paid now: running statistics stay what they are."""
        return self if self.normalizer is None else replace(self, normalizer=self.normalizer.with_frozen_statistics())

    def load_reference(self) -> LanguageModel:
        """The reference, loaded even where `kl_coef` is 0 and the environment never runs it."""
        return self.reference or _load_reference(self.config, self.device)

    def read_prompts(self, source: Any) -> Prompts:
        """Prompts from any source that the argument `prompts` takes, as this task's models and reward read them."""
        rows = read_prompts(source)
        check_fields(self.reward, rows.fields)
        return _tokenize(rows, self.config, self.tokenizer).to(self.device)

    def prompt_sampler(self, prompts: Prompts, default: str) -> PromptSampler:
        """The strategy that the settings name, or else the default, over these prompts."""
        strategy = self.config.prompt_sampling or default
        return make_sampler(strategy, len(prompts), prompts.fields.get("weight"), self.config.group_size)


def build_task(config: TextGenConfig) -> Task:
    """Loads models and prompts. Raises ValueError for all that would fail later."""
    rows = read_prompts(train_prompts if config.prompts is None else config.prompts)
    make_sampler(config.prompt_sampling or "uniform", len(rows.prompts), rows.fields.get("weight"), 1)  # may refuse
    given = unwrap(config.reference)
    device = config.torch_device()
    if isinstance(given, LanguageModel) and config.device == "auto":
        device = given.device
    if config.kl_coef > 0 or isinstance(given, LanguageModel):
        reference = _load_reference(config, device)
        tokenizer, vocabulary, stops = reference.tokenizer, reference.vocabulary, reference.stop_token_ids
        check_room("reference", reference.model.config, config.width)
    else:
        name = _reference_name(given)
        tokenizer, model_config = load_tokenizer(name), load_config(name)
        stops = _stop_token_ids(name, config, tokenizer)
        vocabulary = model_config.get_text_config().vocab_size
        check_room("reference", model_config, config.width)
        reference = None
    _check_stop_token_ids(stops, vocabulary)
    default = (str(REWARD_MODEL), "reviews")
    reward = build_reward(config.reward, RewardContext(config, tokenizer, vocabulary, device, default))
    normalizer = make_normalizer(config)
    paid_part_names(reward, normalizer)  # refuses names that collide
    check_fields(reward, rows.fields)
    parts = MaskContext(
        tokenizer, stops, vocabulary, reference=lambda: (reference or _load_reference(config, device)).model
    )
    return Task(
        config=config,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        stop_token_ids=stops,
        reference=reference if config.kl_coef > 0 else None,
        reward=reward,
        normalizer=normalizer,
        prompts=_task_prompts(rows, config, tokenizer).to(device),
        device=device,
        masks=build_masks(config.action_mask, parts),
    )


def _task_prompts(rows: PromptRows, config: TextGenConfig, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """`_tokenize`, whose errors say whose prompts they are about where the user gave a reference and no prompts."""
    try:
        return _tokenize(rows, config, tokenizer)
    except ValueError as error:
        if config.prompts is not None or config.reference is None:
            raise
        raise ValueError(
            f"{error} These prompts are the embedded task's, as none were given; give your own with prompts=... "
            "(--env-arg prompts=... on the command line)."
        ) from error


def _tokenize(rows: PromptRows, config: TextGenConfig, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    read = tokenize_chats if config.chat else tokenize
    return replace(read(rows.prompts, tokenizer, config.max_prompt_tokens, rows.places), fields=rows.fields)


def _reference_name(given: Any) -> str:
    if given is None:
        return str(SUPERVISED)
    if isinstance(given, str):
        return given
    raise ValueError(
        f"reference must be a folder, a hub name or textenv.shared(LanguageModel(...)), got {type(given).__name__}."
    )


def _load_reference(config: TextGenConfig, device: torch.device) -> LanguageModel:
    given = unwrap(config.reference)
    if isinstance(given, LanguageModel):
        if given.model.training:
            raise ValueError("the reference is in train mode, where dropout blurs it; call model.eval() first.")
        stops = given.stop_token_ids if config.stop_token_ids is None else tuple(config.stop_token_ids)
        return replace(given, stop_token_ids=stops)
    name = _reference_name(given)
    tokenizer = load_tokenizer(name)
    stops = _stop_token_ids(name, config, tokenizer)
    return LanguageModel(load_causal_lm(name, device, DTYPES[config.dtype]), tokenizer, stops)


def _stop_token_ids(name: str, config: TextGenConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The given ones, else those of the generation config, the model config or the tokenizer."""
    if config.stop_token_ids is not None:
        found: Any = config.stop_token_ids
    else:
        sources = (_generation_end(name), load_config(name).get_text_config().eos_token_id, tokenizer.eos_token_id)
        found = next((source for source in sources if source is not None), None)
    return tuple(found) if isinstance(found, Sequence) else (() if found is None else (found,))


def _generation_end(name: str) -> Any:
    try:
        return GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # a model may come without one
        return None


def _check_stop_token_ids(ids: Sequence[Any], vocabulary: int) -> None:
    if not ids:
        raise ValueError(
            "the reference has no end token, so no response could end by itself; pass stop_token_ids=[...], or "
            "set eos_token_id in its generation_config.json."
        )
    if not all(type(one) is int and 0 <= one < vocabulary for one in ids):
        raise ValueError(f"stop_token_ids must be token ids, from 0 to {vocabulary - 1}, got {list(ids)}.")
