"""PPO against another implementation: TRL 1.12's PPOTrainer on the same models, responses and old log-probabilities.

tests/golden/trl_ppo.json holds TRL's numbers, computed in float64, for eight ragged prompts and two texts: `full`, where
every response fills the budget (λ = 0.95), and `ragged`, where all responses but one stop by an end token, most of them
early (λ = 1). The policy trains on them for two epochs of two minibatches. The old log-probabilities are the reference's
plus a wave, so ratios, clips and the penalty act from the first step.

Here the real collector, prepare and trainer take the same responses, in float32. Two of TRL's conventions differ from
this project's, and `TRLStylePPO` follows TRL:

- advantages are whitened by the unbiased deviation (n − 1);
- where a response ends early, the score is paid one step after the end token, and the critic learns the value of that
  state too. With γ = λ = 1 this changes no advantage.

TRL clips no gradients, so the trainer's bound is out of reach. Its temperature is 1e-7 above the one it is given, which
the golden file has corrected for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad

import agents.text.rollout
from agents.algorithms.ppo import PPO, PPOConfig
from agents.config import TrainConfig
from agents.interfaces import Loss
from agents.text.collector import TextCollector
from agents.text.config import TextConfig
from agents.text.networks import TextNetworkFactory
from agents.trainer import Trainer
from tests.support.oracle_models import classifier, language_model, projections, word_tokenizer, words
from textenv import LanguageModel, TextGenConfig, build_task, shared
from textenv.generation import Generation
from textenv.rewards.reward_model import RewardModel
from textenv.state import start
from textenv.task import Task

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "trl_ppo.json").read_text())
SETTINGS, SIZES = GOLDEN["settings"], GOLDEN["sizes"]
END, PAD, R = SIZES["eos_token_id"], SIZES["pad_token_id"], 6
# Float32 against float64. The largest difference seen is 1.4e-6.
CLOSE = dict(atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Run:
    """What one implementation computed, under TRL's names."""

    rollout: dict[str, Tensor]  # [B, R] each, and `scores` [B]
    mask: Tensor  # bool [B, R]
    steps: list[dict[str, Any]]  # policy_loss, value_loss, clipped, gradient (projections)
    weights: dict[str, Tensor]  # projections after the last step


def one_past(mask: Tensor) -> Tensor:
    """The first column after each response, where the budget leaves one. Bool [B, R]."""
    return pad(mask, (1, 0))[:, :-1] & ~mask


def pulled_back(values: Tensor, mask: Tensor) -> Tensor:
    """Moves what stands one step past the end onto the last token, and drops what comes later. [B, R]."""
    last = mask & ~pad(mask[:, 1:], (0, 1))
    beyond = (values * one_past(mask)).sum(1, keepdim=True)
    return values.where(mask, 0.0) + beyond * last


class TRLStylePPO(PPO):
    """PPO under TRL's conventions. It records every optimizer step."""

    def __init__(self, config: PPOConfig, networks: TextNetworkFactory) -> None:
        super().__init__(config, networks)
        self.steps: list[dict[str, Any]] = []
        self.clipped = 0  # tokens since the last optimizer step whose loss the clip changed

    def prepare(self, rollout: TensorDict) -> dict[str, float]:
        metrics = super().prepare(rollout)
        tokens, beyond = int(rollout["mask"].sum()), one_past(rollout["mask"])
        rollout["advantage"] = rollout["advantage"] * ((tokens - 1) / tokens) ** 0.5
        values = self.networks.state_values(rollout)[:, :-1]  # [B, R]
        rollout["state_value"] = rollout["state_value"].where(~beyond, values)
        rollout["value_target"] = rollout["value_target"].where(~beyond, rollout["score"][:, None])
        return metrics

    def loss(self, batch: TensorDict) -> Iterator[Loss]:
        (policy, diagnostics), _ = super().loss(batch)
        mask, advantage = batch["mask"], batch["advantage"]
        tokens, beyond = mask.sum(), one_past(mask)
        wider = self._value_loss(TensorDict({**batch, "mask": mask | beyond}, batch_size=batch.batch_size))
        ratio = (self.networks.actor.distribution(batch).log_prob(batch["action"]) - batch["action_log_prob"]).exp()
        self.clipped += int(((policy["policy_loss"] > -ratio * advantage) & mask).sum())
        yield policy | {"value_loss": pulled_back(wider, mask) * tokens / (tokens + beyond.sum())}, diagnostics

    def before_step(self, *_: Any) -> None:
        """A hook of the optimizer."""
        gradients = {name: parameter.grad for name, parameter in named_parameters(self).items()}
        self.steps.append(dict(gradient=projections(gradients), clipped=self.clipped))
        self.clipped = 0

    def after_step(self, metrics: dict[str, float]) -> None:
        self.steps[-1] |= {name: metrics[name] for name in ("policy_loss", "value_loss")}


def named_parameters(algorithm: PPO) -> dict[str, torch.nn.Parameter]:
    """The trained parameters under TRL's names."""
    critic: Any = algorithm.networks.critic
    groups = [
        ("actor.", algorithm.networks.policy.model),
        ("critic.transformer.", critic.backbone),
        ("critic.score.", critic.head),
    ]
    return {prefix + name: one for prefix, module in groups for name, one in module.named_parameters()}


def rollout_of(data: TensorDict) -> dict[str, Tensor]:
    """A prepared rollout under TRL's names."""
    return dict(
        logprobs=data["action_log_prob"],
        ref_logprobs=data["reference_log_prob"],
        kl=data["kl"],
        scores=data["score"],
        rewards=data["reward"],
        values=data["state_value"],
        raw_advantages=data["raw_advantage"],
        advantages=data["advantage"],
        returns=data["value_target"],
    )


def make_task() -> Task:
    """The models and prompts of the golden file as an environment, with one column of padding in every row."""
    tokenizer = word_tokenizer(END, PAD, SIZES["vocab_size"])
    return build_task(
        TextGenConfig(
            reference=shared(LanguageModel(language_model(SIZES), tokenizer, (END,))),
            reward=shared(RewardModel(classifier(SIZES))),
            prompts=[words(prompt) for prompt in GOLDEN["prompts"]],
            kl_coef=SETTINGS["kl_coef"],
            temperature=SETTINGS["temperature"],
            max_prompt_tokens=max(map(len, GOLDEN["prompts"])) + 1,
            max_new_tokens=R,
            device="cpu",
        )
    )


def make_trainer(name: str) -> Trainer:
    """A trainer of PPO with TRL's settings. The value head's bias is 0.5, so that V(s_T) is not the score."""
    # In `ragged` a minibatch is read at once: its value loss counts the states past the ends in all its rows.
    task, text = make_task(), TextConfig(rollout_size=8, micro_batch_tokens={"full": 20, "ragged": 1000}[name])
    rates = {rate: SETTINGS[rate] for rate in ("learning_rate", "critic_learning_rate")}
    config = TrainConfig(iterations=1, minibatch_size=4, schedule="constant", max_grad_norm=1e9, **rates)
    own = {setting: SETTINGS[setting] for setting in ("gamma", "clip", "value_clip")}
    algorithm = TRLStylePPO(PPOConfig(epochs=2, lmbda=GOLDEN["lmbda"][name], **own), TextNetworkFactory(task, text))
    torch.nn.init.constant_(algorithm.networks.critic.head.bias, 0.5)
    trainer = Trainer(config, algorithm, TextCollector(task, task.prompts, text, seed=0))
    trainer.optimizer.register_step_pre_hook(algorithm.before_step)
    return trainer


def given_responses(name: str, task: Task) -> Generation:
    """The golden file's responses, as if the policy had sampled them."""
    prompts, lengths = task.prompts, torch.tensor(GOLDEN["lengths"][name])
    answer, log_prob = torch.tensor(GOLDEN[name]["answer"]), torch.tensor(GOLDEN[name]["old_log_prob"])
    state = start(prompts.input_ids, prompts.attention_mask, R, task.pad_token_id)
    for t in range(R):
        state = state.append(answer[:, t], t < lengths)
    return Generation(state, log_prob.where(state.response_mask, 0.0), None)


def run_ours(name: str) -> Run:
    """One iteration of the real loop. Only the responses and the orders of prompts and rows are given."""
    trainer, orders = make_trainer(name), iter(GOLDEN["order"])
    generation = given_responses(name, trainer.collector.task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.collector.sampler, "draw", lambda generator, count: list(range(count)))
        patch.setattr(agents.text.rollout, "generate", lambda *_: generation)
        patch.setattr(torch, "randperm", lambda count, **_: torch.tensor(next(orders)))
        (iteration,) = trainer.iterate()
    data = iteration.rollout.data
    return Run(rollout_of(data), data["mask"], trainer.algorithm.steps, projections(weights_of(trainer.algorithm)))


def weights_of(algorithm: PPO) -> dict[str, Tensor]:
    """All weights, with 0 for the biases of attention keys.

    A key's bias changes no attention, so its gradient is 0. Float32 makes it noise, which Adam scales up to whole steps.
    """
    weights = {name: parameter.detach().clone() for name, parameter in named_parameters(algorithm).items()}
    for name, weight in weights.items():
        if name.endswith("attn.c_attn.bias"):
            weight.chunk(3)[1].zero_()  # of queries, keys and values
    return weights


def read_theirs(name: str) -> Run:
    """TRL's numbers, with the score where this project pays it: at the end token."""
    golden = GOLDEN[name]
    keys = ("logprobs", "ref_logprobs", "scores", "rewards", "values", "advantages", "returns")
    rollout = {key: torch.tensor(golden[key], dtype=torch.float64) for key in keys}
    mask = ~torch.tensor(golden["padding_mask"])
    rollout["kl"] = rollout["logprobs"] - rollout["ref_logprobs"]
    rollout["rewards"] = pulled_back(rollout["rewards"], mask)
    rollout["raw_advantages"] = rollout["returns"] - rollout["values"]
    steps = [step | dict(gradient=as_tensors(step["gradient"])) for step in golden["steps"]]
    return Run(rollout, mask, steps, as_tensors(golden["weights"]))


def as_tensors(pairs: dict[str, list[float]]) -> dict[str, Tensor]:
    """The golden file's projections in float64."""
    return {name: torch.tensor(pair, dtype=torch.float64) for name, pair in pairs.items()}


@pytest.fixture(scope="module", params=["full", "ragged"])
def runs(request) -> tuple[Run, Run]:
    """Ours and TRL's, of one text."""
    return run_ours(request.param), read_theirs(request.param)


def test_the_rollout_is_trls(runs):
    """Log-probabilities, KL, scores, penalized rewards, values, advantages before and after whitening, and value targets."""
    ours, theirs = runs
    assert torch.equal(ours.mask, theirs.mask) and set(ours.rollout) == set(theirs.rollout)
    for key, expected in theirs.rollout.items():
        found = ours.rollout[key].double()
        if found.dim() > 1:
            found, expected = found[ours.mask], expected[ours.mask]
        torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def test_every_loss_is_trls(runs):
    """In each of the four steps: the mean policy loss, the mean value loss, and how many tokens the clip acted on."""
    ours, theirs = runs
    for key in ("policy_loss", "value_loss"):
        assert [step[key] for step in ours.steps] == pytest.approx([step[key] for step in theirs.steps], abs=1e-5), key
    assert [step["clipped"] for step in ours.steps] == [step["clipped"] for step in theirs.steps]
    assert all(step["clipped"] for step in ours.steps)  # or the clip would not be tested


@pytest.mark.parametrize("network", ["actor", "critic"])
def test_every_gradient_is_trls(runs, network):
    """In each of the four steps, the gradient of every parameter, relative to the network's largest."""
    ours, theirs = runs
    for ours_step, theirs_step in zip(ours.steps, theirs.steps, strict=True):
        found, expected = ours_step["gradient"], theirs_step["gradient"]
        assert set(found) == set(expected)
        names = [name for name in expected if name.startswith(network)]
        scale = max(float(expected[name].abs().max()) for name in names)
        for name in names:
            torch.testing.assert_close(
                found[name] / scale,
                expected[name] / scale,
                atol=1e-5,
                rtol=0,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def test_the_trained_weights_are_trls(runs):
    """After two epochs, both networks' weights: optimizer and learning rates included."""
    ours, theirs = runs
    assert set(ours.weights) == set(theirs.weights)
    for name, expected in theirs.weights.items():
        torch.testing.assert_close(ours.weights[name], expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
