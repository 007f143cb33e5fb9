"""Settings of learning on text that all algorithms share, and of `generate`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch

from agents.config import check_choice, check_counts
from textenv.kl import ESTIMATORS, EXACT, UNITS
from textenv.settings import check_types
from textenv.unread import Unread, refuse_unread

CRITICS = ("auto", "reward-model", "reference", "scratch")
PRECISIONS = ("auto", "float32", "bf16")
SHARDS = ("none", FULL := "full")
OLD_LOG_PROBS = ("auto", "sampled", "recomputed")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How responses are sampled, penalized and evaluated."""

    rollout_size: int = 128  # responses per rollout
    decode_slots: int | None = None  # responses written at a time, the others wait: less memory; default: all of them
    # compile the step of decoding: faster after the first rollouts; on CUDA capture it as a graph: faster at once, and
    # the cache stays in memory; default: True on CUDA, unless shard is full
    compile: bool | None = None
    # tokens per forward pass, prompts and padding included; affects speed and memory, not gradients; default: 1,024 on
    # a CPU, 16,384 elsewhere
    micro_batch_tokens: int | None = None
    gradient_checkpointing: bool = False  # compute each layer again in the backward pass: less memory, more time
    # under torchrun: none (every process has all weights), or full (each has a part, with its gradients and optimizer
    # state, and gathers one layer at a time: less memory, more traffic; networks with adapters then share no trunk)
    shard: str = "none"
    # of actor and critic: float32, bf16 (bfloat16 products, float32 weights), or auto (bf16 on CUDA, else float32)
    precision: str = "auto"
    # old log-probabilities of ratios: sampled, recomputed by the training forward, or auto (recomputed in bf16)
    old_log_probs: str = "auto"
    mask_refresh: int = 20  # iterations between copies of the actor into a mask policy (NLPO); 0: never
    # initial critic: reward-model, reference, scratch, or auto (reward-model if its tokens match, else reference)
    critic: str = "auto"
    # rank of adapters (LoRA) that actor and critic train in place of weights; learning rates ten times those of whole
    # weights are usual; 0: all weights are trained
    lora_rank: int = 0
    kl_estimator: str = "k1"  # penalty in the reward: k1, k2, k3 or exact; only k1 has the KL's gradient
    kl_controller: str = "fixed"  # fixed, or adaptive: β starts at kl_coef and moves to keep the KL at kl_target
    kl_target: float | None = None  # KL in nats per kl_unit that an adaptive β aims for
    kl_horizon: int = 1_280  # responses in which a KL 20% off target changes β by about 20%
    kl_unit: str = "response"  # unit of kl_target: nats per response or per token
    evaluation_prompts: int = 256  # held-out prompts evaluated before and after training
    # evaluation prompts: .jsonl or module:function; default: the embedded task's, or a random part of the prompts
    held_out: str | None = None
    # module:function(prompts, responses) giving gold scores, reported but not optimized; default: the embedded task's
    gold: str | None = None

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        Unread(
            ("mask_refresh",),
            lambda job: not job.experiment.collector.mask_policies,
            "no mask of the environment has a policy that could be refreshed; give --env.action-mask top_k:20 or "
            "so, or leave it out.",
        ),
        Unread(
            ("old_log_probs",),
            lambda job: not job.learner.ratios,
            "the algorithm has no ratios to old probabilities; leave it out.",
        ),
        Unread(("critic",), lambda job: "critic" not in job.trained, "the algorithm has no critic; leave it out."),
        Unread(
            ("lora_rank",),
            lambda job: not job.learner.on_policy,
            "the algorithm's Q-networks train all their weights; leave it out, or choose an algorithm that learns from "
            "its own rollouts.",
        ),
        Unread(
            ("kl_estimator", "kl_controller"),
            lambda job: not job.learner.on_policy,
            "the algorithm learns from a replay buffer, with the environment's own kl_coef and the exact KL of its "
            "policy; leave kl_estimator and kl_controller at their defaults.",
        ),
        Unread(
            ("kl_estimator", "kl_controller"),
            lambda job: job.factory.alpha == 0,
            "the environment's kl_coef is 0, so there is no penalty to estimate; give --env.kl-coef 0.1 or so, or "
            "leave them out.",
        ),
        Unread(
            ("kl_estimator",),
            lambda job: job.settings.kl_controller == "fixed" and vars(job.algorithm).get("kl_loss", "none") != "none",
            "the KL is in the loss, by the estimator that kl_loss names; set kl_loss=none for a KL in the reward, or "
            "leave kl_estimator out.",
        ),
        Unread(
            ("kl_target", "kl_horizon", "kl_unit"),
            lambda job: job.settings.kl_controller == "fixed",
            "the weight of the KL is fixed; set kl_controller=adaptive, or leave them out.",
        ),
    )

    def compiles(self, device: torch.device) -> bool:
        """Whether the step of decoding is compiled on this device."""
        return device.type == "cuda" and self.shard != FULL if self.compile is None else self.compile

    def __post_init__(self) -> None:
        check_types(self)
        self._check_kl()
        check_counts(self, ("rollout_size", "evaluation_prompts", "kl_horizon"))
        check_counts(self, [name for name in ("micro_batch_tokens", "decode_slots") if getattr(self, name) is not None])
        check_choice(self, "critic", CRITICS)
        check_choice(self, "precision", PRECISIONS)
        check_choice(self, "shard", SHARDS)
        check_choice(self, "old_log_probs", OLD_LOG_PROBS)
        if self.shard == FULL and self.compile:
            raise ValueError("compile remembers where weights lie, and with shard='full' they move; leave one out.")
        if self.mask_refresh < 0:
            raise ValueError(f"mask_refresh must be 0 (never) or more, got {self.mask_refresh}.")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be 0 (no adapters) or more, got {self.lora_rank}; 16 is usual.")
        if self.lora_rank and self.critic == "scratch":
            raise ValueError(
                f"critic='scratch' starts from random weights, and with lora_rank={self.lora_rank} they would never be "
                "trained. Choose --critic reference, or leave one of them out."
            )

    def _check_kl(self) -> None:
        check_choice(self, "kl_estimator", (*ESTIMATORS, EXACT))
        check_choice(self, "kl_controller", ("fixed", "adaptive"))
        check_choice(self, "kl_unit", UNITS)
        if self.kl_controller == "adaptive" and not (self.kl_target is not None and 0 < self.kl_target < math.inf):
            raise ValueError(
                f"an adaptive kl_controller needs a kl_target above 0, in nats per {self.kl_unit} (kl_unit), got "
                f"{self.kl_target}; 6 nats per response is usual."
            )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """The prompt, and how a trained policy samples responses to it."""

    prompt: str  # text to respond to
    samples: int = 3  # number of responses
    temperature: float | None = None  # sampling temperature; default: the run's own
    top_k: int = 0  # sample from the k likeliest tokens; 0: all, 1: greedy
    top_p: float = 1.0  # sample from the likeliest tokens with this total probability
    seed: int = 0  # seed of the sampling
    color: Literal["none", "penalty", "advantage"] = "none"  # color tokens by KL penalty or advantage

    UNREAD: ClassVar[tuple[Unread, ...]] = (
        Unread(
            ("temperature", "top_k", "top_p"),
            lambda config: config.color != "none",
            "--color uses the sampling of the training run; leave out --temperature, --top-k and --top-p.",
        ),
        Unread(
            ("temperature", "top_p", "seed"),
            lambda config: config.top_k == 1,
            "top_k=1 takes the likeliest token; leave them out, or raise top_k.",
        ),
    )

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, ("samples",))
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be 0 or more and below 2^63, got {self.seed}.")
        refuse_unread(self.UNREAD, vars(self), [{field.name: field.default for field in fields(self)}], self)
