"""Collects responses for a trainer: the order of prompts, the weight of the penalty, refreshes of mask policies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import nn

from agents.text.config import TextConfig
from agents.text.networks import language_model_of
from agents.text.rollout import Penalty, TextRollout, collect, make_controller, trim
from textenv.masks.masks import MaskPolicy
from textenv.prompts.tokenized import Prompts
from textenv.task import Task

REPORT_ONLY = ("td_error", "raw_advantage", "kl", "step_score")  # keys that pictures show and no learner reads


class TextCollector:
    """Collects rollouts of responses: see `agents.interfaces.Collector`."""

    unit = "tokens"

    def __init__(self, task: Task, prompts: Prompts, config: TextConfig, seed: int) -> None:
        check_groups(config, task)
        self.task, self.prompts, self.config = task, prompts, config
        self.controller = make_controller(config, task.config.kl_coef)  # of β
        self.mask_policies = [mask for mask in task.masks if isinstance(mask, MaskPolicy)]
        for mask in self.mask_policies:
            mask.refresh(task.load_reference().model)  # so that it has weights of its own for a checkpoint to restore
        self.sampler = task.prompt_sampler(prompts, "shuffle")
        self.prompt_generator = np.random.default_rng(seed)
        self.sampling_generator = torch.Generator(task.device).manual_seed(seed)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The models of the mask policies."""
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
        return rollout

    def training_rows(self, data: TensorDict) -> TensorDict:
        """Whole responses, without the keys for the report."""
        return data.exclude(*REPORT_ONLY)

    def micro_batches(self, minibatch: TensorDict) -> Iterator[TensorDict]:
        """Responses of similar length together, which saves padding."""
        for rows in minibatch["mask"].sum(1).argsort().split(self.config.micro_batch_size):
            yield trim(minibatch[rows])

    def after_update(self, policy: nn.Module, iteration: int) -> None:
        """Refresh mask policies every `mask_refresh` iterations (NLPO)."""
        if self.config.mask_refresh and iteration % self.config.mask_refresh == 0:
            for mask in self.mask_policies:
                mask.refresh(language_model_of(policy))

    def penalty(self) -> Penalty:
        """The penalty of the next rollout."""
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
        """Restore the state returned by `state_dict`."""
        self.controller.load_state_dict(state["kl_controller"])
        self.sampler.load_state_dict(state["sampler"])
        self.prompt_generator.bit_generator.state = json.loads(state["prompt_generator"])
        self.sampling_generator.set_state(state["sampling_generator"].cpu())
        if self.task.normalizer is not None:
            self.task.normalizer.statistics.load_state_dict(state["score_statistics"])


def check_groups(config: TextConfig, task: Task) -> None:
    """Raise ValueError if a rollout would split a group of responses to one prompt."""
    if config.rollout_size % task.config.group_size:
        raise ValueError(
            f"a rollout must hold whole groups; got rollout_size={config.rollout_size} and group_size="
            f"{task.config.group_size}. Make rollout_size a multiple of group_size."
        )
