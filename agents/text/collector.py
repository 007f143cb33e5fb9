"""Writes responses for a trainer: which prompts come next, what the penalty weighs, when masks are renewed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import nn

from agents.text.config import TextConfig
from agents.text.evaluation import Gold, mean, rate
from agents.text.networks import language_model_of
from agents.text.rollout import Penalty, TextRollout, collect, make_controller, trim
from textenv.masks.masks import MaskPolicy
from textenv.prompts.tokenized import Prompts
from textenv.task import Task

FOR_PEOPLE = ("td_error", "raw_advantage", "kl")  # what pictures show and no learner reads


class TextCollector:
    """One rollout of responses after another: see `agents.interfaces.Collector`."""

    unit = "tokens"

    def __init__(self, task: Task, prompts: Prompts, config: TextConfig, seed: int, gold: Gold | None = None) -> None:
        check_groups(config, task)
        self.task, self.prompts, self.config, self.gold = task, prompts, config, gold
        self.controller = make_controller(config, task.config.kl_coef)  # of β
        self.mask_policies = [mask for mask in task.masks if isinstance(mask, MaskPolicy)]
        for mask in self.mask_policies:
            mask.refresh(task.load_reference().model)  # its own weights from the start, for checkpoints to fill
        self.sampler = task.prompt_sampler(prompts, "shuffle")
        self.prompt_generator = np.random.default_rng(seed)
        self.sampling_generator = torch.Generator(task.device).manual_seed(seed)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The mask policies' models."""
        models = {f"mask_policy_{index}": mask.model for index, mask in enumerate(self.mask_policies)}
        return {name: model for name, model in models.items() if model is not None}

    def collect(self, policy: nn.Module) -> TextRollout:
        """One rollout of responses by the language model in `policy`."""
        indices = self.sampler.draw(self.prompt_generator, self.config.rollout_size)
        prompts, rows = self.prompts.select(indices), self.config.micro_batch_size
        rollout = collect(self.task, language_model_of(policy), prompts, self.sampling_generator, rows, self.penalty())
        self.sampler.update(indices, rollout.data["score"].tolist())
        if self.task.reference is not None:
            kl, lengths = rollout.data["kl"], rollout.data["mask"].sum(1)
            rollout.metrics.update(self.controller.update(float(kl.sum()), int(lengths.sum()), len(lengths)))
        if self.gold is not None:
            texts = list(rollout.prompts)
            rollout.metrics["gold"] = mean(rate(self.gold, texts, rollout.scored.responses))
        return rollout

    def rows(self, data: TensorDict) -> TensorDict:
        """Whole responses."""
        return data.exclude(*FOR_PEOPLE)

    def split(self, minibatch: TensorDict) -> Iterator[TensorDict]:
        """Rows of like length share a micro-batch: less padding to compute."""
        for rows in minibatch["mask"].sum(1).argsort().split(self.config.micro_batch_size):
            yield trim(minibatch[rows])

    def learned(self, policy: nn.Module, iteration: int) -> None:
        """Renews mask policies now and then (NLPO)."""
        if self.config.mask_refresh and iteration % self.config.mask_refresh == 0:
            for mask in self.mask_policies:
                mask.refresh(language_model_of(policy))

    def penalty(self) -> Penalty:
        """What the next rollout pays for its distance from the reference."""
        return Penalty(coef=self.controller.coef, estimator=self.config.kl_estimator)

    def state_dict(self) -> dict[str, Any]:
        """β, the prompts' order, generators and running statistics."""
        state = {
            "kl_controller": self.controller.state_dict(),
            "sampler": self.sampler.state_dict(),
            "prompt_generator": json.dumps(self.prompt_generator.bit_generator.state),
            "sampling_generator": self.sampling_generator.get_state(),
        }
        if self.task.normalizer is not None:
            state["score_statistics"] = self.task.normalizer.statistics.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.controller.load_state_dict(state["kl_controller"])
        self.sampler.load_state_dict(state["sampler"])
        self.prompt_generator.bit_generator.state = json.loads(state["prompt_generator"])
        self.sampling_generator.set_state(state["sampling_generator"].cpu())
        if self.task.normalizer is not None:
            self.task.normalizer.statistics.load_state_dict(state["score_statistics"])


def check_groups(config: TextConfig, task: Task) -> None:
    """Refuses rollouts that would cut a group of responses to one prompt in two."""
    if config.rollout_size % task.config.group_size:
        raise ValueError(
            f"a rollout must hold whole groups; got rollout_size={config.rollout_size} and group_size="
            f"{task.config.group_size}. Make rollout_size a multiple of group_size."
        )
