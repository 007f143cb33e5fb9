"""The one training loop: roll out, prepare, update. A generator of metrics that does no input or output."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from agents.advantages import masked_mean
from agents.algorithms import find_algorithm
from agents.config import TrainConfig
from agents.networks import language_model_of, make_actor, make_critic
from agents.penalty import Penalty, make_controller
from agents.rollout import Rollout, collect, trim
from textenv.masks import MaskPolicy
from textenv.prompts import Prompts
from textenv.task import Task


@dataclass(frozen=True)
class Iteration:
    """What one pass of the loop gives: numbers to plot and responses to read."""

    number: int  # from 1
    metrics: dict[str, float]
    rollout: Rollout


class Trainer:
    """Actor, critic, optimiser and everything random, and the loop over them."""

    def __init__(self, config: TrainConfig, algorithm_config: Any, task: Task, prompts: Prompts) -> None:
        self.config, self.task, self.prompts = config, task, prompts
        self.controller = make_controller(config, task.config.kl_coef)  # of β
        self.actor, self.critic = make_actor(task), make_critic(task)
        _, algorithm = find_algorithm(config.algorithm)
        self.algorithm = algorithm(algorithm_config, self.actor, self.critic)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.actor.parameters()), "initial_lr": config.learning_rate},
                {"params": list(self.critic.parameters()), "initial_lr": config.critic_learning_rate},
            ],
            lr=config.learning_rate,
            weight_decay=0.0,
        )
        self.mask_policies = [mask for mask in task.masks if isinstance(mask, MaskPolicy)]
        for mask in self.mask_policies:
            mask.refresh(language_model_of(self.actor))  # its own weights from the start, for checkpoints to fill
        check_groups(config, task)
        self.sampler = task.prompt_sampler(prompts, "shuffle")
        self.prompt_generator = np.random.default_rng(config.seed)
        self.sampling_generator = torch.Generator(task.device).manual_seed(config.seed)
        self.shuffling_generator = torch.Generator().manual_seed(config.seed)
        self.iteration = 0  # passes of the loop so far
        self.tokens = 0  # response tokens sampled so far
        self.seconds = 0.0  # spent in the loop so far

    def iterate(self) -> Iterator[Iteration]:
        """Goes on from `self.iteration` to the configured number of iterations."""
        while self.iteration < self.config.iterations:
            yield self._iterate()

    def state_dict(self) -> dict[str, Any]:
        """All that is not a weight and is needed to go on as if never stopped."""
        state = {
            "iteration": self.iteration,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "kl_controller": self.controller.state_dict(),
            "sampler": self.sampler.state_dict(),
            "prompt_generator": json.dumps(self.prompt_generator.bit_generator.state),
            "sampling_generator": self.sampling_generator.get_state(),
            "shuffling_generator": self.shuffling_generator.get_state(),
        }
        if self.task.normaliser is not None:
            state["score_statistics"] = self.task.normaliser.statistics.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.iteration, self.tokens = int(state["iteration"]), int(state["tokens"])
        self.seconds = float(state["seconds"])
        self.controller.load_state_dict(state["kl_controller"])
        self.sampler.load_state_dict(state["sampler"])
        self.prompt_generator.bit_generator.state = json.loads(state["prompt_generator"])
        self.sampling_generator.set_state(state["sampling_generator"].cpu())
        self.shuffling_generator.set_state(state["shuffling_generator"].cpu())
        if self.task.normaliser is not None:
            self.task.normaliser.statistics.load_state_dict(state["score_statistics"])

    def penalty(self) -> Penalty:
        """What the next rollout pays for its distance from the reference."""
        return Penalty(coef=self.controller.coef, estimator=self.config.kl_estimator)

    def _iterate(self) -> Iteration:
        started = time.perf_counter()
        indices = self.sampler.draw(self.prompt_generator, self.config.rollout)
        prompts = self.prompts.select(indices)
        model = language_model_of(self.actor)
        penalty = self.penalty()
        rollout = collect(self.task, model, prompts, self.sampling_generator, self.config.micro_batch, penalty)
        self.sampler.update(indices, rollout.data["score"].tolist())
        sampled = time.perf_counter()
        metrics = rollout_metrics(rollout.data) | part_metrics(rollout.judgement.score_parts)
        if self.task.reference is not None:
            metrics |= kl_metrics(rollout.data) | {"kl_coef": penalty.coef}
            kl, lengths = rollout.data["kl"], rollout.data["mask"].sum(1)
            metrics |= self.controller.update(float(kl.sum()), int(lengths.sum()), len(lengths))
        metrics |= self.algorithm.prepare(rollout.data, self.config.micro_batch)
        metrics |= self._update(
            rollout.data.exclude("td_error", "raw_advantage", "kl")
        )  # the learner needs none of them
        tokens = int(rollout.data["mask"].sum())
        seconds = time.perf_counter() - started
        self.iteration += 1
        self.tokens += tokens
        self.seconds += seconds
        if self.config.mask_refresh and self.iteration % self.config.mask_refresh == 0:
            for mask in self.mask_policies:
                mask.refresh(model)
        metrics |= {
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "rollout_seconds": sampled - started,
            "tokens": float(self.tokens),
        }
        return Iteration(self.iteration, metrics, rollout)

    def _update(self, rollout: TensorDict) -> dict[str, float]:
        remaining = 1 - self.iteration / self.config.iterations
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * remaining
        totals: dict[str, list[float]] = defaultdict(list)
        for _ in range(self.algorithm.config.epochs):
            order = torch.randperm(len(rollout), generator=self.shuffling_generator).to(rollout.device)
            for rows in order.split(self.config.minibatch):
                for name, value in self._step(rollout[rows]).items():
                    totals[name].append(value)
        return {name: sum(values) / len(values) for name, values in totals.items()}

    def _step(self, minibatch: TensorDict) -> dict[str, float]:
        """One optimiser step on the mean over all valid tokens, however they are split."""
        length = minibatch["mask"].sum(1)  # [B]
        valid = length.sum()
        metrics: dict[str, float] = defaultdict(float)
        # Rows of like length share a micro-batch: less padding to compute.
        for rows in length.argsort().split(self.config.micro_batch):
            terms, diagnostics = self.algorithm.loss(trim(minibatch[rows]))
            share = length[rows].sum() / valid
            (torch.stack(list(terms.values())).sum() * share).backward()
            for name, value in (terms | diagnostics).items():
                metrics[name] += float(value.detach() * share)
        for name, network in (("actor", self.actor), ("critic", self.critic)):
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), self.config.max_grad_norm)
            if not torch.isfinite(norm):
                raise ValueError(
                    f"the {name}'s gradient is {float(norm)} in iteration {self.iteration + 1}; nothing was changed by "
                    "it, and the last checkpoint is good. Look at the scores, or lower learning_rate."
                )
            metrics[f"{name}_grad_norm"] = float(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.algorithm.after_step()
        return dict(metrics)


def check_groups(config: TrainConfig, task: Task) -> None:
    """Refuses rollouts that would cut a group of responses to one prompt in two."""
    if config.rollout % task.config.group_size:
        raise ValueError(
            f"a rollout must hold whole groups; got rollout={config.rollout} and group_size="
            f"{task.config.group_size}. Make rollout a multiple of group_size."
        )


def rollout_metrics(data: TensorDict) -> dict[str, float]:
    """What the sampled responses show of the policy, before it is updated.

    Entropy is the mean of −log π over the sampled tokens, in nats a token.
    """
    mask = data["mask"]
    return {
        "score": float(data["score"].mean()),
        "score_std": float(data["score"].std(correction=0)),
        "shaped_return": float(data["shaped_reward"].sum(1).mean()),
        "entropy": float(-masked_mean(data["action_log_prob"], mask)),
        "length": float(mask.sum(1).float().mean()),
    }


def part_metrics(parts: dict[str, Tensor]) -> dict[str, float]:
    """The mean of what each reward gave, as `score/NAME`; nothing where there is one, which the score shows already.

    parts: float32 [B] each.
    """
    return {f"score/{name}": float(part.mean()) for name, part in parts.items()} if len(parts) > 1 else {}


def kl_metrics(data: TensorDict) -> dict[str, float]:
    """KL of the policy to the reference in nats, by the k1 estimator whatever the penalty is made of."""
    log_ratio = (data["action_log_prob"] - data["reference_log_prob"]).where(data["mask"], 0.0)  # [B, R]
    return {
        "kl_per_response": float(log_ratio.sum(1).mean()),
        "kl_per_token": float(log_ratio.sum() / data["mask"].sum()),
    }
