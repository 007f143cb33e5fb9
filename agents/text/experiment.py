"""A TextGen environment prepared for learning: its task, networks, collector, measurements and results."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from torch import nn

from agents.algorithms.registry import find_algorithm
from agents.config import TrainConfig, id_of
from agents.ranks import ALONE, Ranks
from agents.reporting import plots
from agents.reporting.errors import is_ours
from agents.reporting.plots import BLUE, CRITIC, GRAY, GREEN, LOSSES, ORANGE, RED, Panel
from agents.seeds import evaluation_seed
from agents.text.collector import TextCollector
from agents.text.config import TextConfig
from agents.text.evaluation import Evaluation, evaluate, find_gold, mean, rate, split_prompts
from agents.text.fingerprints import HELD_OUT, fingerprints, save_prompts
from agents.text.lora import merged_model, save_adapter
from agents.text.networks import TextNetworkFactory, language_model_of
from agents.text.policy import export_policy
from agents.text.rollout import TextRollout, collect
from agents.text.samples import make_summary, write_samples
from agents.trainer import Trainer
from textenv.config import NAMES, TextGenConfig
from textenv.env import TextGenEnv
from textenv.prompts.tokenized import Prompts
from textenv.task import Task, is_embedded

EQUAL = 1e-6  # a smaller standard deviation of float32 scores, relative to their mean, is rounding error
FAR = 1.0  # nats a response; two iterations that wreck a model of 135M weights move it by six

PANELS: tuple[Panel, ...] = (
    (
        "What is optimized, and what is true",
        "score",
        (("score", "score", BLUE), ("score/raw", "score before normalization", GRAY), ("gold", "gold score", ORANGE)),
    ),
    ("Distance from the reference", "nats a response", (("kl_per_response", "KL", RED),)),
    ("Entropy", "nats a token", (("entropy", "entropy", GREEN),)),
    ("Length", "tokens a response", (("length", "length", GRAY),)),
    LOSSES,
    CRITIC,
)


class TextExperiment:
    """See `agents.interfaces.Experiment`."""

    def __init__(
        self,
        config: TrainConfig,
        settings: TextConfig,
        task: Task | None = None,
        held_out: str | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """task: instead of the one that `gym.make` builds from `config.env`.

        held_out: file of the prompts to evaluate on, instead of a split of the task's: for a run that has trained.
        """
        check_minibatch(config, settings)
        self.config, self.settings, self.ranks = config, settings, ranks
        self.task = make_task(config) if task is None else task
        if held_out is None:
            self.prompts, self.held_out = split_prompts(self.task, settings, config.seed)
        else:
            self.prompts, self.held_out = self.task.prompts, self.task.read_prompts(held_out)
        self.gold = find_gold(self.task, settings)
        self.network_factory = TextNetworkFactory(self.task, settings, config.seed, ranks)
        ratios = find_algorithm(config.algorithm)[1].ratios
        self.collector = TextCollector(self.task, self.prompts, settings, config.seed, ratios, ranks)

    def describe(self) -> str:
        """Device, prompts, reward, penalty, adapters and the amount of work."""
        task, rank = self.task, self.settings.lora_rank
        adapters = f"adapters of rank {rank}; " if rank else ""
        return (
            f"({task.device}): {len(self.prompts)} prompts, {len(self.held_out)} held out; reward {task.reward.name}, "
            f"kl_coef {task.config.kl_coef:g} ({describe_kl(self.settings)}); {adapters}"
            f"{self.config.iterations} iterations of {self.settings.rollout_size} responses."
        )

    def fingerprints(self) -> dict[str, str]:
        """Of the reference, the tokenizer, reward models and prompts."""
        return fingerprints(self.task, self.prompts, self.held_out)

    def save_prompts(self, folder: Path) -> None:
        """Write held_out.jsonl, except for the embedded task's own prompts."""
        if not is_embedded(self.task.config.prompts) or self.settings.held_out is not None:
            save_prompts(folder / HELD_OUT, self.held_out)

    def evaluate(self, policy: nn.Module) -> Evaluation:
        """One response to each held-out prompt, with the same seed every time."""
        batch = (self.settings.rollout_size, self.settings.micro_batch_tokens)
        with self.collector.precision.tensor_cores():
            model = self.collector.sampling_model(policy)
            how = (batch, self.collector.decoding, self.ranks)
            return evaluate(self.task, model, self.held_out, self.gold, evaluation_seed(), *how)

    def summarize(self, evaluation: Evaluation) -> dict[str, float]:
        """Means over the prompts."""
        return evaluation.summary()

    def report_metrics(self, rollout: TextRollout) -> dict[str, float]:
        """The gold score of a rollout, if the task has one."""
        if self.gold is None:
            return {}
        return {"gold": mean(rate(self.gold, list(rollout.prompts), rollout.scored.responses))}

    def progress_line(self, metrics: dict[str, float]) -> str:
        """Score, gold score, KL and speed."""
        gold = f"  gold {metrics['gold']:+.2f}" if "gold" in metrics else ""
        kl = f"  KL {metrics['kl_per_response']:.1f}" if "kl_per_response" in metrics else ""
        return f"score {metrics['score']:+.2f}{gold}{kl}  {metrics['tokens_per_second']:.0f} tokens/s"

    def remarks(self, number: int, metrics: dict[str, float]) -> list[str]:
        """A line if the first update has moved the policy far.

        Measured by the next rollout's KL to the reference, or without one by the KL between the updates of the first
        iteration, which is less than that of the whole.
        """
        if self.task.reference is not None:
            moved = metrics["kl_per_response"] if number == 2 else 0.0
        else:
            moved = metrics.get("approx_kl", 0.0) * metrics["length"] if number == 1 else 0.0
        if moved <= FAR or is_embedded(self.task.config.reference):
            return []
        config = self.config
        rates = f"learning_rate={config.learning_rate:g}, critic_learning_rate={config.critic_learning_rate:g}"
        return [
            f"The first iteration has moved the policy by {moved:.1f} nats a response. Beyond about {FAR:g}, a "
            f"pretrained model soon forgets how to write; watch the responses, or lower the learning rates ({rates}; "
            "for the language model 1e-6 is usual)."
        ]

    def write_results(self, folder: Path, trainer: Trainer, before: Evaluation, after: Evaluation) -> dict[str, Any]:
        """The language model with its tokenizer, its adapter, samples before and after, and one response's credit."""
        policy, credit = trainer.algorithm.networks.policy, assign_credit(trainer, self.held_out)  # by all ranks
        if not self.ranks.first:
            return {}
        export_policy(merged_model(policy), self.task, folder / "actor")
        save_adapter(policy, folder / "adapter")
        write_samples(folder / "samples.md", before, after)
        plots.draw_credit(folder / "credit.png", credit)
        return make_summary(before, after) | self.collector.describe_precision()

    def panels(self) -> tuple[Panel, ...]:
        """The panels of the learning curves."""
        return PANELS

    def result_lines(self, summary: dict[str, Any], folder: Path) -> list[str]:
        """Score, gold score, KL, and the files to look at."""
        lines = [
            f"score {summary['score_before']:+.2f} → {summary['score_after']:+.2f} ({describe_gain(summary)})",
            f"KL {summary['kl_per_response']:.1f} nats a response, length {summary['length_before']:.0f} → "
            f"{summary['length_after']:.0f} tokens, {summary['tokens']} tokens in {summary['seconds']:.0f} s",
            f"read {folder}/samples.md, look at {folder}/curves.png and credit.png, try: "
            f'python -m agents generate --run {shlex.quote(str(folder))} --prompt "..."',
        ]
        if "gold_before" in summary:
            lines.insert(1, f"gold  {summary['gold_before']:+.2f} → {summary['gold_after']:+.2f}")
        return lines


def describe_gain(summary: dict[str, Any]) -> str:
    """The gain of the score in standard deviations of the score before, unless that is a rounding error."""
    before, std = summary["score_before"], summary["score_std_before"]
    if std <= EQUAL * max(1.0, abs(before)):
        return "all scores were equal before"
    return f"{(summary['score_after'] - before) / std:+.1f} standard deviations"


def reopen_text(config: TrainConfig, settings: TextConfig, folder: Path) -> TextExperiment:
    """Open the environment of a run again, to measure its policy."""
    held_out = folder / HELD_OUT
    return TextExperiment(
        available(config, folder), settings, held_out=str(held_out) if os.path.isfile(held_out) else None
    )


def available(config: TrainConfig, folder: Path) -> TrainConfig:
    """The settings of a run with the prompts and the device that are here.

    The evaluation's prompts come from the run's folder, if they are there: those that the run trained on may be gone.
    So may the device that its settings name.
    """
    arguments = gym.spec(id_of(config.env)).kwargs | config.env_arguments(texts=NAMES)
    held_out, prompts, changes = folder / HELD_OUT, arguments.get("prompts"), {}
    if os.path.isfile(held_out) and prompts is not None and not is_embedded(prompts):
        changes["prompts"] = str(held_out)
    if not _is_here(arguments.get("device", "auto")):
        changes["device"] = "auto"
    items = (f"{name}={json.dumps(value)}" for name, value in changes.items())
    return replace(config, env_arg=(*config.env_arg, *items))


def _is_here(device: str) -> bool:
    try:
        return bool(TextGenConfig(device=device).torch_device())
    except ValueError:
        return False


def assign_credit(trainer: Trainer, held_out: Prompts) -> plots.Credit:
    """The credit of each token in one response to a held-out prompt: of eight, the one of median length."""
    collector, policy = trainer.collector, trainer.algorithm.networks.policy
    assert isinstance(collector, TextCollector)
    # Running statistics must not change.
    task, penalty = collector.task.with_frozen_statistics(), collector.penalty()
    generator = torch.Generator(task.device).manual_seed(evaluation_seed())
    # Whole groups, for the learners that compare the responses to a prompt.
    prompts = held_out.select(
        [row // task.config.group_size % len(held_out) for row in range(8 * task.config.group_size)]
    )
    tokens, how = collector.config.micro_batch_tokens, (penalty, collector.decoding, trainer.ranks)
    rollout = collect(task, language_model_of(policy), prompts, generator, tokens, *how)
    trainer.algorithm.prepare(rollout.data)
    lengths = rollout.data["mask"].sum(1)
    row = int(lengths.argsort()[len(lengths) // 2])
    data = rollout.data[row]
    curves = {
        "penalty β·KL": (penalty.coef * data["kl"], RED),
        "value V(s)": (data.get("state_value", None), BLUE),
        "TD error δ": (data.get("td_error", None), ORANGE),
        "advantage A": (data.get("raw_advantage", None), GREEN),
    }
    return plots.Credit(
        prompt=prompts.texts[row],
        tokens=[repr(task.tokenizer.decode([token]))[1:-1] for token in data["action"][data["mask"]].tolist()],
        panels=[
            (name, values[data["mask"]].tolist(), color)
            for name, (values, color) in curves.items()
            if values is not None
        ],
        score=float(data["score"]),
    )


def make_task(config: TrainConfig) -> Task:
    """The task of the environment that the configuration names."""
    env = make_env(config.env, config.env_arguments(texts=NAMES))
    core: Any = env.unwrapped
    assert isinstance(core, TextGenEnv)
    _refuse_wrappers(env)
    return core.task


def make_env(name: str, arguments: Mapping[str, Any]) -> gym.Env:
    """The environment of an id and its arguments. Raises ValueError if it cannot be made."""
    try:
        return gym.make(name, **arguments)
    except gym.error.Error as error:
        raise ValueError(f"gym.make cannot make {name!r}: {error}") from error
    except TypeError as error:  # Gymnasium raises the constructor's again; before 1.4 it does not name it as the cause
        first = error.__cause__ or error.__context__
        if first is None or not is_ours(first):
            raise
        raise ValueError(f"gym.make cannot make {name!r}: {first}") from error


def check_minibatch(config: TrainConfig, settings: TextConfig) -> None:
    """Raise ValueError if minibatches do not divide a rollout."""
    algorithm: Any = find_algorithm(config.algorithm)[1]
    if algorithm.on_policy and settings.rollout_size % config.minibatch_size:
        raise ValueError(
            f"minibatch_size must divide rollout_size, so that every optimizer step sees as many responses; got "
            f"rollout_size={settings.rollout_size} and minibatch_size={config.minibatch_size}."
        )


def describe_kl(settings: TextConfig) -> str:
    """The penalty's estimator and controller in a few words."""
    if settings.kl_controller == "fixed":
        return f"{settings.kl_estimator}, fixed"
    return f"{settings.kl_estimator}, adaptive to {settings.kl_target:g} nats a {settings.kl_unit}"


def _refuse_wrappers(env: gym.Env) -> None:
    """Raise ValueError for wrappers: the learners write whole responses without calling them."""
    while isinstance(env, gym.Wrapper):
        if isinstance(env, TimeLimit):
            raise ValueError(
                "max_episode_steps (Gymnasium's TimeLimit) cuts an episode before it is scored, and the learners here "
                "write whole responses; use max_new_tokens=N, which ends a response at N tokens and scores it."
            )
        if not isinstance(env, PassiveEnvChecker | OrderEnforcing):
            raise ValueError(
                f"the environment is wrapped in {type(env).__name__}, past which the learners here would write; make "
                "it without, and put what it does into the arguments `reward` or `prompts`."
            )
        env = env.env
