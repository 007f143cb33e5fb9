"""Collects rollouts of responses for the trainer: draws prompts, and keeps all that a run of text goes on with.

That is the order of the prompts, the random streams, the controller of the penalty's weight β, the models of action
masks, running statistics of scores, and the precision in which responses are sampled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import PreTrainedModel

from agents.ranks import ALONE, Ranks
from agents.reporting.phases import phase
from agents.seeds import seed_of, torch_generator
from agents.text.config import FULL, TextConfig
from agents.text.lora import merged_model
from agents.text.networks import TokenDistribution, distribution_of, language_model_of
from agents.text.precision import Precision, mismatch
from agents.text.rollout import Penalty, TextRollout, collect, trim
from agents.text.sharding import in_step, twin_of, whole
from textenv.kl import AdaptiveKL, Controller, FixedKL
from textenv.masks.masks import MaskPolicy
from textenv.models.decoding import Decoding
from textenv.prompts.tokenized import Prompts
from textenv.rewards.normalization import RAW
from textenv.state import batches, own_settings, pass_tokens
from textenv.task import Task

READ = ("input_ids", "attention_mask", "action", "mask", "allowed_ids", "allowed_inside")  # by an actor
# Keys that no loss reads.
REPORT_ONLY = (
    *("td_error", "raw_advantage", "kl", "penalty", "step_score", "score", "raw_final_score", "token_score", "entropy"),
)
# Keys that no learner from replay needs. It forms rewards when rows are sampled, from raw scores if there are any.
NOT_REPLAYED = ("kl", "score", "action_log_prob", "entropy")


class TextCollector:
    """Collects rollouts of responses: see `agents.interfaces.Collector`."""

    unit = "tokens"

    def __init__(
        self,
        task: Task,
        prompts: Prompts,
        config: TextConfig,
        seed: int,
        ratios: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        """ratios: whether the learner divides by old probabilities."""
        check_groups(config, task)
        self.task, self.prompts, self.config, self.ranks = task, prompts, config, ranks
        # The KL is reported where β is 0 too: a score is bought with it, and evaluations need the reference anyway.
        self.measured = task.with_reference()
        self.in_step = config.shard == FULL
        self.precision = Precision(config.precision, task.device)
        self.decoding = Decoding(slots=config.decode_slots, compile=config.compiles(task.device))
        choice = config.old_log_probs
        self.recompute = ratios and (choice == "recomputed" or (choice == "auto" and self.precision.half))
        self.controller = make_controller(config, task.config.kl_coef)  # of β
        self.mask_policies = [mask for mask in task.masks if isinstance(mask, MaskPolicy)]
        with whole(*[task.load_reference().model] * bool(self.mask_policies)):
            for mask in self.mask_policies:
                mask.refresh(task.load_reference().model)  # so that it has weights of its own, which a checkpoint holds
        self.mismatch: dict[str, float] = {}  # of the latest rollout, if log-probabilities are recomputed
        self.sampler = task.prompt_sampler(prompts, "shuffle")
        self.prompt_generator = np.random.default_rng(seed_of(seed, "prompts"))
        self.sampling_generator = torch_generator(seed, "sampling", task.device)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The models of the mask policies."""
        models = {f"mask_policy_{index}": mask.model for index, mask in enumerate(self.mask_policies)}
        return {name: model for name, model in models.items() if model is not None}

    def collect(self, policy: nn.Module) -> TextRollout:
        """One rollout of responses by the language model in `policy`."""
        indices = self.sampler.draw(self.prompt_generator, self.config.rollout_size)
        prompts, tokens = self.prompts.select(indices), self.config.micro_batch_tokens
        with self.precision.tensor_cores():
            model = self.sampling_model(policy)
            generator, how = self.sampling_generator, (self.penalty(), self.decoding, self.ranks)
            rollout = collect(self.measured, model, prompts, generator, tokens, *how)
        if self.recompute:
            with phase("recompute"):
                self.mismatch = self._recompute_log_probs(policy, rollout.data)
            rollout.metrics.update(self.mismatch)
        # Raw scores: normalized ones of different times are in different units.
        raw = rollout.scored.score if self.task.normalizer is None else rollout.scored.score_parts[RAW]
        self.sampler.update(indices, raw.tolist())
        kl, lengths = rollout.data["kl"], rollout.data["mask"].sum(1)
        rollout.metrics.update(self.controller.update(float(kl.sum()), int(lengths.sum()), len(lengths)))
        return rollout

    def sampling_model(self, policy: nn.Module) -> PreTrainedModel:
        """The model that writes the responses of a policy, with its present weights (inside `whole` if sharded)."""
        return twin_of(policy) or self.precision.sampling_model(language_model_of(policy))

    def _recompute_log_probs(self, policy: nn.Module, data: TensorDict) -> dict[str, float]:
        """Replace `action_log_prob` by that of the training forward. Returns the metrics of the difference."""
        sampled = data["action_log_prob"]
        recomputed = self._read(policy, data, lambda chosen, batch: chosen.log_prob(batch["action"]))
        data["action_log_prob"] = recomputed
        return mismatch(sampled, recomputed, data["mask"])

    def entropies(self, policy: nn.Module, data: TensorDict) -> Tensor:
        """The entropy of what each token was drawn from, by the training forward: nats, [B, R], zero elsewhere."""
        return self._read(policy, data, lambda chosen, batch: chosen.entropy())

    @own_settings()
    def _read(self, policy: Any, data: TensorDict, number: Callable[[TokenDistribution, TensorDict], Tensor]) -> Tensor:
        """A number of the policy's distribution at every generated token, [B, R]; each rank reads its own rows."""
        mask, own = data["mask"], self.ranks.share(len(data))

        def read() -> Tensor:
            rows: Any = data.select(*READ, strict=False)
            rows["row"] = torch.arange(len(rows), device=mask.device)
            numbers = torch.zeros(mask.shape, device=mask.device)
            for batch in self._parts(rows[own], rows):
                with self.autocast():
                    part = number(distribution_of(policy, batch), batch)
                numbers[batch["row"], : part.shape[1]] += part
            return numbers[own]

        return torch.cat(self.ranks.each(read, in_step=self.in_step)).to(mask.device)

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of the run, for one forward of trained networks."""
        return self.precision.autocast()

    def describe_precision(self) -> dict[str, Any]:
        """For the summary: the precision, where ratios start from, and the latest mismatch if that was recomputed."""
        return {
            "precision": self.precision.name,
            "old_log_probs": "recomputed" if self.recompute else "sampled",
            **self.mismatch,
        }

    def training_rows(self, data: TensorDict) -> TensorDict:
        """Whole responses, without the keys for the report."""
        return data.exclude(*REPORT_ONLY)

    def replay_rows(self, data: TensorDict) -> TensorDict:
        """Whole responses with their scores before normalization."""
        unused = (*NOT_REPLAYED, "step_score") if self.task.normalizer is not None else NOT_REPLAYED
        return data.exclude(*unused)

    def from_replay(self, rows: TensorDict) -> TensorDict:
        """Rows with `step_score`, the final score normalized by the present statistics."""
        if (normalizer := self.task.normalizer) is not None:
            final = normalizer.normalized(rows["raw_final_score"])  # [B]
            rows["step_score"] = rows["token_score"] + final[:, None].where(rows["done"], 0.0)
        return rows

    def micro_batches(self, minibatch: TensorDict) -> Iterator[TensorDict]:
        """Texts of similar length together, which saves padding; `micro_batch_tokens` in each part."""
        return self._parts(self.ranks.deal(minibatch), minibatch)

    def _parts(self, own: TensorDict, every: TensorDict) -> Iterator[TensorDict]:
        """This rank's rows in parts; then, where networks are sharded, one of all rows with an empty mask, in vain."""
        attention, width = own["attention_mask"], own["mask"].shape[1]
        halves = attention.split([attention.shape[1] - width, width], 1)
        lengths = torch.stack([half.sum(1) for half in halves]).cpu()  # [2, B], the only wait for the device
        tokens = self.config.micro_batch_tokens or pass_tokens(self.task.device)
        parts = batches(lengths.sum(0), tokens) if len(own) else []
        for rows in in_step(parts, self.ranks) if self.in_step else parts:
            if rows is None:
                idle: Any = every[:1]
                idle["mask"] = torch.zeros_like(idle["mask"])
                yield idle
            else:
                yield trim(own[rows.to(attention.device)], *lengths[:, rows].amax(1).tolist())

    def after_update(self, policy: nn.Module, iteration: int) -> None:
        """Refresh mask policies every `mask_refresh` iterations (NLPO)."""
        if self.config.mask_refresh and iteration % self.config.mask_refresh == 0:
            for mask in self.mask_policies:
                mask.refresh(merged_model(policy))

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
            "mismatch": self.mismatch,
        }
        if self.task.normalizer is not None:
            state["score_statistics"] = self.task.normalizer.statistics.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.load_statistics(state)
        self.sampler.load_state_dict(state["sampler"])
        self.mismatch = state["mismatch"]
        self.prompt_generator.bit_generator.state = json.loads(state["prompt_generator"])
        self.sampling_generator.set_state(state["sampling_generator"].cpu())

    def load_statistics(self, state: dict[str, Any]) -> None:
        """Restore β and the statistics of scores alone."""
        self.controller.load_state_dict(state["kl_controller"])
        if self.task.normalizer is not None:
            self.task.normalizer.statistics.load_state_dict(state["score_statistics"])


def check_groups(config: TextConfig, task: Task) -> None:
    """Raise ValueError if a rollout would split a group of responses to one prompt."""
    if config.rollout_size % task.config.group_size:
        raise ValueError(
            f"a rollout must hold whole groups; got rollout_size={config.rollout_size} and group_size="
            f"{task.config.group_size}. Make rollout_size a multiple of group_size."
        )


def make_controller(config: TextConfig, kl_coef: float) -> Controller:
    """The controller of β, which starts at the environment's `kl_coef`."""
    if config.kl_controller == "fixed" or kl_coef == 0:  # a run with an adaptive β of 0 is refused: TextConfig.UNREAD
        return FixedKL(kl_coef)
    assert config.kl_target is not None  # TextConfig checks it
    return AdaptiveKL(kl_coef, config.kl_target, config.kl_horizon, config.kl_unit)
