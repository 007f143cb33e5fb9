"""The settings of the environment, which are the arguments of `gym.make("TextGen-v0", ...)`, validated once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from textenv.settings import check_types

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = ("reference", "reward", "prompts", "reward_label")  # texts, even if they look like numbers
MEAN, MIN = "mean", "min"  # how the members of an ensemble become one score; a number κ is mean − κ · std
PROMPT_SAMPLING = ("uniform", "shuffle", "weighted", "prioritized")


@dataclass(frozen=True, kw_only=True)
class TextGenConfig:
    """The settings that define the decision process.

    `reference`, `reward` and `prompts` are set together. Without any it is the embedded task, product reviews; beside
    parts of your own, "reviews" names the embedded task's.

    `help("textenv.env.TextGenEnv")` explains each setting at length.
    """

    reference: str | Any = None  # frozen language model: folder, hub name, or textenv.shared(model, tokenizer)
    reward: str | Callable | Mapping[str, float] | Any = None  # reward model, function, or {name: weight}
    reward_label: str | None = None  # the label whose log-odds are the score, if the reward model has several
    reward_ensemble: float | str = MEAN  # an ensemble's score: "mean", "min", or the κ of mean − κ · std
    reward_timeout: float | None = None  # seconds per call of a reward function; None is no limit
    score_normalization: str = "none"  # "none", "fixed" (by the mean and std below) or "running"
    score_mean: float = 0.0  # what the normalization "fixed" subtracts from a score
    score_std: float = 1.0  # what the normalization "fixed" divides a score by
    score_clip: float | None = None  # clips the final score to ± this
    prompts: str | Sequence[Any] | Any = None  # list, .jsonl path (field "prompt"), or "module:function"
    # "uniform", "shuffle", "weighted" or "prioritized"; None lets the caller choose: the environments sample uniformly,
    # the learners in shuffled rounds
    prompt_sampling: str | None = None
    group_size: int = 1  # G, consecutive episodes on the same prompt
    chat: bool = False  # format prompts with the tokenizer's chat template
    chat_template_kwargs: Mapping[str, Any] | None = None  # variables of the template, as in {"enable_thinking": False}
    kl_coef: float = 0.1  # β, weight of the penalty; 0: the environment runs no reference
    max_prompt_tokens: int = 24  # P; prompts are left-padded to it
    max_new_tokens: int = 48  # R; the token budget of a response
    temperature: float = 0.7  # of the reference's and the actor's distribution, as in Ziegler et al. 2019
    action_mask: str | Sequence | Callable | Any = None  # which tokens may come next, as in top_k:20; None is off
    stop_token_ids: Sequence[int] | None = None  # tokens that end a response; None is the model's own end tokens
    dtype: str = "float32"  # of the frozen models' weights
    device: str = "auto"  # of all models: "cpu", "cuda", or "auto", which is CUDA if available

    def __post_init__(self) -> None:
        check_types(self, but=("prompts",))  # whose entries stay as they are
        for name in ("max_prompt_tokens", "max_new_tokens", "group_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if self.kl_coef < 0:
            raise ValueError(
                f"kl_coef must be 0 or more, got {self.kl_coef}: a negative weight would reward "
                "leaving the reference. Use 0 to turn the penalty off."
            )
        if self.temperature <= 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; 1.0 is the model's own distribution."
            )
        if self.prompt_sampling is not None and self.prompt_sampling not in PROMPT_SAMPLING:
            raise ValueError(
                f"prompt_sampling must be None or one of {list(PROMPT_SAMPLING)}, got {self.prompt_sampling!r}."
            )
        _check_template_arguments(self)
        if isinstance(self.stop_token_ids, str):
            raise ValueError(
                f"stop_token_ids must be a list of token ids, or None for the model's own, got {self.stop_token_ids!r}."
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {self.dtype!r}.")
        _check_scores(self)

    @property
    def width(self) -> int:
        """L = P + R, the width of an observation."""
        return self.max_prompt_tokens + self.max_new_tokens

    def torch_device(self) -> torch.device:
        """The device that `device` names. Raises ValueError for one that this machine or process does not have."""
        # Without this, "auto" would quietly be the CPU, and "cuda" not of this machine.
        if self.device != "cpu" and torch.cuda._is_in_bad_fork():
            raise ValueError(
                f"device={self.device!r} in a process that was forked from one that uses CUDA, and so has none. "
                "Start it otherwise (Gymnasium's \"async\": vector_kwargs={'context': 'spawn'}), or set device='cpu'."
            )
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            tensor = torch.zeros(1, device=self.device)
            tensor.cpu()  # raises where a device holds no numbers ("meta")
            return tensor.device
        except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"device must be 'auto', 'cpu' or a 'cuda[:N]' of this machine, got {self.device!r}."
            ) from error


def _check_template_arguments(config: TextGenConfig) -> None:
    arguments = config.chat_template_kwargs
    if arguments is None:
        return
    if not all(isinstance(name, str) for name in arguments):
        raise ValueError(
            f"chat_template_kwargs must be a mapping of names to values, or None, got {arguments!r}; write for "
            'instance {"enable_thinking": False}.'
        )
    try:
        json.dumps(dict(arguments), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"chat_template_kwargs must hold what JSON can, so that env.spec can be saved, got {arguments!r} ({error})."
        ) from error


def _check_scores(config: TextGenConfig) -> None:
    check_combine(config.reward_ensemble, "reward_ensemble")
    for name in ("reward_timeout", "score_std", "score_clip"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            optional = ", or None for no limit" if name != "score_std" else ""
            raise ValueError(f"{name} must be above 0{optional}, got {value}.")
    if config.score_normalization not in ("none", "fixed", "running"):
        raise ValueError(
            f"score_normalization must be 'none', 'fixed' or 'running', got {config.score_normalization!r}."
        )


def check_combine(combine: float | str, setting: str) -> None:
    """Raise ValueError that names the setting for what does not say how an ensemble's members become one score."""
    known = combine in (MEAN, MIN) if isinstance(combine, str) else _is_weight(combine)
    if not known:
        raise ValueError(
            f"{setting} must be 'mean', 'min', or the κ of mean − κ · std, a number of 0 or more, got {combine!r}."
        )


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def read_settings(settings: Mapping[str, Any]) -> TextGenConfig:
    """The keyword arguments of `gym.make` as a TextGenConfig. Raises TypeError for an unknown name."""
    known = [field.name for field in fields(TextGenConfig)]
    for name in settings:
        if name not in known:
            matches = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {matches[0]!r}?" if matches else "."
            raise TypeError(f"TextGen-v0 has no argument {name!r}{hint} It takes {', '.join(known)} and render_mode.")
    return TextGenConfig(**settings)
