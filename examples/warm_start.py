"""Shared by the client examples: a policy that starts as the supervised model, and one way to measure it.

A client's networks read vectors. Here the vector is the language model's hidden state at the last token of the context,
and the layer that maps it to logits starts as the model's own. So every client starts where RLHF starts, at the
reference policy, and its gain is reported in standard deviations of the reference's scores.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Categorical

import textenv
from textenv.generation import generate, score_responses
from textenv.models.sampling import Sampling
from textenv.state import left_aligned

# The embedded reviews task with shorter responses. The environment pays its half of the penalty in the reward; each
# client says what stands for the policy's half. Everything runs on the CPU: models this small gain nothing on a GPU,
# and clients differ in where they put their networks.
HELD_OUT = "textenv.reviews.prompts:held_out_prompts"
SETTINGS: dict[str, Any] = {"max_new_tokens": 24, "kl_coef": 0.05, "device": "cpu"}


class Backbone(nn.Module):
    """The reference's transformer, texts [..., L] to hidden states [..., H]. Only the last `trainable` layers learn."""

    def __init__(self, trainable: int = 1) -> None:
        super().__init__()
        config = textenv.TextGenConfig(**SETTINGS, prompts=["unread"])
        reference: Any = textenv.build_task(config).load_reference().model
        self.body = copy.deepcopy(reference.transformer).requires_grad_(False)
        self.body.h[len(self.body.h) - trainable :].requires_grad_(True)
        self.width = reference.config.n_embd  # H
        self.output = reference.lm_head.weight / config.temperature  # [V, H]: the initial output layer of a policy

    def forward(self, input_ids: Any, attention_mask: Any) -> Tensor:
        """Hidden state [..., H] of the last real token of texts [..., L]: arrays or tensors, int or float."""
        shape, width = np.shape(input_ids)[:-1], np.shape(input_ids)[-1]
        ids, mask = (torch.as_tensor(array).reshape(-1, width).long() for array in (input_ids, attention_mask))
        ids, length = left_aligned(ids, mask)  # a causal model needs no mask for filling on the right
        hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state  # [B, l, H]
        return hidden[torch.arange(len(ids)), (length - 1).clamp_min(0)].view(*shape, self.width)

    def copy_output_layer(self, layer: nn.Linear) -> nn.Linear:
        """Set the weights of a layer, H to V, so that it gives the reference's logits; returns the layer."""
        with torch.no_grad():
            layer.weight.copy_(self.output)
            layer.bias.zero_()
        return layer

    def output_layer(self) -> nn.Linear:
        """A new layer, H to V, that gives the reference's logits."""
        return self.copy_output_layer(nn.Linear(self.width, len(self.output)))


class ActorCritic(nn.Module):
    """A policy and a critic on one backbone, for clients that take any module."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.actor, self.critic = self.backbone.output_layer(), nn.Linear(self.backbone.width, 1)

    @torch.no_grad()
    def act(self, observation: Any, infos: Any = None) -> NDArray:
        """A sampled token for each row."""
        return self(observation)[0].sample().numpy()

    def forward(self, observation: Any) -> tuple[Categorical, Tensor]:
        """Distribution of the next token and value of the context, for n rows."""
        hidden = self.backbone(observation["input_ids"], observation["attention_mask"])
        return Categorical(logits=self.actor(hidden), validate_args=False), self.critic(hidden)[:, 0]


@dataclass(frozen=True)
class Scores:
    """Responses and their scores."""

    values: NDArray[np.float64]
    responses: list[str]

    def __str__(self) -> str:
        return f"score {self.values.mean():+.2f}, standard deviation {self.values.std():.2f}"


@dataclass(frozen=True)
class Comparison:
    """Scores of a policy before and after training, and of the reference."""

    before: Scores
    after: Scores
    reference: Scores

    @property
    def gain(self) -> float:
        """Increase of the mean score, in standard deviations of the reference's scores."""
        return float((self.after.values.mean() - self.before.values.mean()) / self.reference.values.std())


Act = Callable[[dict[str, NDArray], dict[str, Any]], NDArray]  # observations and infos of n rows -> n tokens


def compare(act: Act, learn: Callable[[], object], episodes: int, settings: Mapping[str, Any] = SETTINGS) -> Comparison:
    """Score a policy on held-out prompts, train it, score it again, and print the comparison."""
    reference, before = score_reference(episodes, settings), score(act, episodes, settings)
    started = time.perf_counter()
    learn()
    seconds = time.perf_counter() - started
    comparison = Comparison(before, score(act, episodes, settings), reference)
    print(f"reference  {reference}\nbefore     {before}\nafter      {comparison.after}")
    print(f"gain: {comparison.gain:.2f} standard deviations of the reference's scores, in {seconds:.0f} seconds")
    print("\n".join(f"    {text.strip()!r}" for text in comparison.after.responses[:4]))
    return comparison


def score(act: Act, episodes: int, settings: Mapping[str, Any]) -> Scores:
    """Scores of one episode in each of `episodes` rows, on held-out prompts."""
    env = gym.make_vec("TextGen-v0", num_envs=episodes, **{**settings, "prompts": HELD_OUT, "kl_coef": 0})
    observation, infos = env.reset(seed=0)
    values, responses = np.full(episodes, np.nan), [""] * episodes
    while np.isnan(values).any():
        observation, _, _, _, infos = env.step(act(observation, infos))
        for row in np.flatnonzero(infos.get("_score", False) & np.isnan(values)):
            values[row], responses[row] = infos["score"][row], infos["response"][row]
    return Scores(values, responses)


def score_reference(episodes: int, settings: Mapping[str, Any]) -> Scores:
    """Scores of the supervised model itself on held-out prompts."""
    task = textenv.build_task(textenv.TextGenConfig(**{**settings, "prompts": HELD_OUT}))
    prompts = task.prompts.select([row % len(task.prompts) for row in range(episodes)])
    sampling, generator = Sampling(temperature=task.config.temperature), torch.Generator().manual_seed(0)
    state = generate(task, task.load_reference().model, prompts, sampling, generator).state
    scored = score_responses(task, state, prompts.texts)
    return Scores(scored.score.double().numpy(), scored.responses)
