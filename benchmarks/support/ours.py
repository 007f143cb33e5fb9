"""This library's side of every comparison. What a new setting of the library would change stands here alone."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from agents.algorithms.ppo import PPO
from agents.config import TrainConfig
from agents.interfaces import Rollout
from agents.presets import defaults
from agents.text.config import TextConfig
from agents.text.experiment import TextExperiment
from agents.trainer import Trainer
from textenv.generation import Generation, ScoredResponses, generate, score_responses
from textenv.models.decoding import Decoding
from textenv.models.sampling import Sampling
from textenv.prompts.tokenized import Prompts
from textenv.state import TextState
from textenv.task import Task

# Ways to generate: further keyword arguments of `generate`, by the name in the tables.
GENERATE: dict[str, dict[str, Any]] = {"ours": {}, "ours, compiled": {"decoding": Decoding(compile=True)}}


def write(
    task: Task, model: PreTrainedModel, prompts: Prompts, generator: torch.Generator, way: str = "ours"
) -> Generation:
    """One response to each prompt at the task's temperature. way: a key of `GENERATE`."""
    sampling = Sampling(temperature=task.config.temperature)
    return generate(task, model, prompts, sampling, generator, **GENERATE[way])


def score(task: Task, state: TextState, prompts: Prompts) -> ScoredResponses:
    """Scores and reference log-probabilities of responses to these prompts."""
    return score_responses(task, state, prompts.texts)


def micro_batch(rows: int, width: int) -> dict[str, Any]:
    """The setting that puts about `rows` texts of `width` tokens through the networks at once."""
    return {"micro_batch_tokens": rows * width}


def read_flags(flags: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE settings of training as a dictionary; a VALUE is a Python literal or text."""
    settings = {}
    for flag in flags:
        name, _, value = flag.partition("=")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


def configure(settings: Mapping[str, Any], reference: Any) -> tuple[TrainConfig, TextConfig, Any]:
    """PPO's preset for a reference, changed by settings of any of its three parts."""
    parts: tuple[Any, ...] = defaults("TextGen-v0", "ppo", {"reference": reference})
    unknown = set(settings) - {field.name for part in parts for field in fields(part)}
    if unknown:
        raise ValueError(f"training has no setting {sorted(unknown)}; `python -m agents train --help` lists them.")
    train, text, ppo = (
        replace(part, **{field.name: settings[field.name] for field in fields(part) if field.name in settings})
        for part in parts
    )
    return train, text, ppo


class Tapped:
    """A collector that calls a function after each of its rollouts, before the update begins."""

    def __init__(self, collector: Any, after_rollout: Callable[[], None]) -> None:
        self.collector, self.after_rollout = collector, after_rollout

    def __getattr__(self, name: str) -> Any:
        return getattr(self.collector, name)

    def collect(self, policy: nn.Module) -> Rollout:
        """One rollout of the policy."""
        rollout = self.collector.collect(policy)
        self.after_rollout()
        return rollout


def trainer_on(task: Task, settings: Mapping[str, Any], after_rollout: Callable[[], None]) -> Trainer:
    """PPO's trainer on a task that is built already. One prompt is held out, so the task has one more than rows."""
    train, text, ppo = configure({**settings, "evaluation_prompts": 1}, reference="a model of its own")
    experiment = TextExperiment(train, text, task)
    collector: Any = Tapped(experiment.collector, after_rollout)
    return Trainer(train, PPO(ppo, experiment.network_factory), collector)
