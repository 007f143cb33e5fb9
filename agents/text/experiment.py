"""A TextGen environment prepared for learning: its task, networks, collector, measurements and results."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from torch import nn

from agents.algorithms.registry import find_algorithm
from agents.config import BEST, TrainConfig, id_of
from agents.ranks import ALONE, Ranks
from agents.reporting import plots
from agents.reporting.errors import is_ours
from agents.reporting.plots import BLUE, CRITIC, GRAY, GREEN, ORANGE, POLICY_LOSS, RED, UPDATE, VALUE_LOSS, Line, Panel
from agents.seeds import evaluation_seed
from agents.text.collector import TextCollector
from agents.text.config import FULL, TextConfig
from agents.text.evaluation import Evaluation, distinct_bigrams, evaluate, find_gold, mean, rate, split_prompts
from agents.text.fingerprints import HELD_OUT, fingerprints, save_prompts
from agents.text.lora import merged_model, save_adapter
from agents.text.networks import TextNetworkFactory
from agents.text.policy import export_policy
from agents.text.records import held_out_records, iterations_to_keep, median_record, read_records, rows_to_keep
from agents.text.rollout import TextRollout
from agents.text.samples import make_summary, sample_rows, write_samples
from agents.text.sharding import shard_task
from agents.trainer import Trainer
from textenv.config import NAMES, TextGenConfig
from textenv.env import TextGenEnv
from textenv.task import Task, is_embedded
from textenv.training.files import write_json

EQUAL = 1e-6  # a smaller standard deviation of float32 scores, relative to their mean, is rounding error
SMALL = 10e6  # weights; a model of a million needs a hundred times the rate of one of a hundred million
FAR = 1.0  # nats a response; two iterations that wreck a model of 135M weights move it by six

GOLD = Line("gold", "gold score", ORANGE, evaluated="gold")
SCORES = Panel(
    title="What is optimized, and what is true",
    unit="score",
    lines=(Line("score", "score", BLUE, evaluated="score"), GOLD),
    deviation="score_std",
)
# Evaluations and gold scores are not normalized.
NORMALIZED_SCORES = replace(
    SCORES,
    lines=(
        Line("score", "score, normalized", GRAY),
        Line("score/raw", "score", BLUE, evaluated="score"),
        GOLD,
    ),
)
PANELS = (
    Panel(
        title="Distance from the reference",
        unit="nats a response",
        lines=(Line("kl_per_response", "KL", RED, evaluated="kl_per_response"),),
        shows=(0.0, 1.0),
    ),
    Panel(title="Entropy", unit="nats a token", lines=(Line("entropy", "entropy", GREEN),), shows=(0.0,)),
    Panel(
        title="Length",
        unit="tokens a response",
        lines=(Line("length", "length", GRAY, evaluated="length"),),
        shows=(0.0,),
    ),
    POLICY_LOSS,
    VALUE_LOSS,
    CRITIC,
    UPDATE,
    Panel(
        title="Disagreement of the reward models",
        unit="standard deviation of a score",
        lines=(Line("score/disagreement", "disagreement", GRAY),),
        shows=(0.0,),
    ),
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
        check_best(config, self.task)
        ranks.check_device(self.task.config.device)
        self.weights = self.task.load_reference().model.num_parameters()  # of the language model
        self.first_kl = 0.0  # of the first rollout
        if settings.shard == FULL:
            self.task = shard_task(self.task, ranks.mesh(self.task.device))
        if held_out is None:
            self.prompts, self.held_out = split_prompts(self.task, settings, config.seed)
        else:
            self.prompts, self.held_out = self.task.prompts, self.task.read_prompts(held_out)
        self.gold = find_gold(self.task, settings)
        self.network_factory = TextNetworkFactory(self.task, settings, config.seed, ranks)
        ratios = find_algorithm(config.algorithm)[1].ratios
        self.collector = TextCollector(self.task, self.prompts, settings, config.seed, ratios, ranks)
        self.kept = slice(rows_to_keep(self.task.config.group_size, self.task.config.width))  # of a rollout

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

    def objective(self, evaluation: Evaluation) -> float:
        """Mean score − β·KL, with the β of the environment."""
        return mean(evaluation.score) - self.task.config.kl_coef * mean(evaluation.kl)

    def report_metrics(self, rollout: TextRollout) -> dict[str, float]:
        """The diversity of a rollout's responses, and their gold score, if the task has one.

        `data` gets the gold scores of the responses, float64 [B].
        """
        responses = rollout.scored.responses
        metrics = {"distinct_bigrams": distinct_bigrams(responses)}
        if self.gold is None:
            return metrics
        golds = rate(self.gold, list(rollout.prompts), responses)
        rollout.data["gold"] = torch.tensor(golds, dtype=torch.float64, device=rollout.data.device)
        return metrics | {"gold": mean(golds)}

    def dump_rows(self, rollout: TextRollout) -> Iterator[dict[str, Any]]:
        """One row for each response."""
        return rollout.rows()

    def watch(self, number: int, rollout: TextRollout, policy: nn.Module) -> None:
        """Add `entropy` [B, R] to rollouts of which records are kept, in their rows."""
        if number in iterations_to_keep(self.config.iterations):
            data: Any = rollout.data
            entropy = torch.zeros_like(data["action_log_prob"])
            entropy[self.kept] = self.collector.entropies(policy, data[self.kept])
            data["entropy"] = entropy

    def records(self, number: int, rollout: TextRollout) -> list[dict[str, Any]]:
        """The first rows of about a dozen rollouts, as the learner saw them."""
        if number not in iterations_to_keep(self.config.iterations):
            return []
        rows = range(len(rollout.data))[self.kept]
        golds = rollout.data["gold"][self.kept].tolist() if "gold" in rollout.data else None
        records = read_records(self.task.tokenizer, rollout, rows, golds)
        return [record.as_json() for record in records]

    def held_out_records(self, trainer: Trainer, evaluation: Evaluation) -> list[dict[str, Any]]:
        """Of responses to the first held-out prompts."""
        return [record.as_json() for record in held_out_records(trainer, self.held_out, evaluation.gold)]

    def progress_line(self, metrics: dict[str, float]) -> str:
        """Score, gold score, KL and speed."""
        gold = f"  gold {metrics['gold']:+.2f}" if "gold" in metrics else ""
        kl, speed = metrics["kl_per_response"], metrics["tokens_per_second"]
        return f"score {metrics['score']:+.2f}{gold}  KL {kl:.1f}  {speed:.0f} tokens/s"

    def remarks(self, number: int, metrics: dict[str, float]) -> list[str]:
        """A line if the learning rate cannot move a model as small as this, or if the first update has moved it far.

        Measured by what the KL to the reference has risen from the first rollout, which masks may keep off 0, to the
        second.
        """
        if number == 1 and self._too_slow():
            return [
                f"The model has less than ten million weights, and learning_rate={self.config.learning_rate:g} is for "
                "one of a hundred million: it will hardly learn. Try --learning-rate 1e-4 --critic-learning-rate 3e-4."
            ]
        if number == 1:
            self.first_kl = metrics["kl_per_response"]
        moved = metrics["kl_per_response"] - self.first_kl if number == 2 else 0.0
        if moved <= FAR or is_embedded(self.task.config.reference):
            return []
        config = self.config
        rates = f"learning_rate={config.learning_rate:g}, critic_learning_rate={config.critic_learning_rate:g}"
        return [
            f"The first iteration has moved the policy by {moved:.1f} nats a response. Beyond about {FAR:g}, a "
            f"pretrained model soon forgets how to write; watch the responses, or lower the learning rates ({rates}; "
            "for the language model 1e-6 is usual)."
        ]

    def _too_slow(self) -> bool:
        """Whether a small model has a learning rate of pretrained ones."""
        return self.config.learning_rate < 1e-5 and self.weights < SMALL

    def write_results(
        self,
        folder: Path,
        trainer: Trainer,
        evaluations: tuple[Evaluation, Evaluation],
        records: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        """The language model with its tokenizer, its adapter, samples before and after, and one response's credit."""
        policy = trainer.algorithm.networks.policy
        model = merged_model(policy)  # by all ranks
        save_adapter(policy, folder / "adapter", self.ranks)
        if not self.ranks.first:
            return {}
        export_policy(model, self.task, folder / "actor")
        write_samples(folder / "samples.md", *evaluations, self._settings_line())
        credit = median_record(records)
        write_json(folder / "credit.json", credit)
        plots.draw_credit(folder / "credit.png", credit)
        return make_summary(*evaluations) | self.collector.describe_precision()

    def sample_rows(self, before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
        """Responses to the same held-out prompts."""
        return sample_rows(before, after)

    def _settings_line(self) -> str:
        """What shapes the responses, for their page."""
        config, task = self.config, self.task.config
        return (
            f"{config.algorithm} on {config.env}, seed {config.seed}: {config.iterations} iterations of "
            f"{self.settings.rollout_size} responses, learning rate {config.learning_rate:g} ({config.schedule}), "
            f"reward {self.task.reward.name}, kl_coef {task.kl_coef:g} ({describe_kl(self.settings)}), "
            f"temperature {task.temperature:g}, at most {task.max_new_tokens} tokens a response."
        )

    def panels(self) -> tuple[Panel, ...]:
        """The panels of the learning curves."""
        return (SCORES if self.task.normalizer is None else NORMALIZED_SCORES, *PANELS)

    def result_lines(self, summary: dict[str, Any], folder: Path) -> list[str]:
        """Score, gold score, KL, and the files to look at."""
        lines = [
            f"score {summary['score_before']:+.2f} → {summary['score_after']:+.2f} ({describe_gain(summary)})",
            f"KL {summary['kl_per_response']:.1f} nats a response, length {summary['length_before']:.0f} → "
            f"{summary['length_after']:.0f} tokens, {summary['tokens']} tokens in {summary['seconds']:.0f} s",
            f"look at {folder}/report.html, read {folder}/samples.md, try: "
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
    return config.with_env_arg({name: json.dumps(value) for name, value in changes.items()})


def _is_here(device: str) -> bool:
    try:
        return bool(TextGenConfig(device=device).torch_device())
    except ValueError:
        return False


def make_task(config: TrainConfig) -> Task:
    """The task of the environment that the configuration names."""
    return task_of(config.env, config.env_arguments(texts=NAMES))


def task_of(name: str, arguments: Mapping[str, Any]) -> Task:
    """The task of the environment of an id and its arguments."""
    env = make_env(name, arguments)
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


def check_best(config: TrainConfig, task: Task) -> None:
    """Raise ValueError if checkpoints could not be compared by score − β·KL."""
    if config.keep_checkpoints == BEST and task.normalizer is not None:
        raise ValueError(
            f"keep_checkpoints={BEST!r} compares scores as they are less β·KL, and with score_normalization="
            f"{task.config.score_normalization!r} β is the weight of the KL beside other scores; give a number of "
            "checkpoints to keep."
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
