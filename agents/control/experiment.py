"""Experiments on Gymnasium environments other than text: collector, networks, evaluation and results."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.config import TrainConfig
from agents.control.collector import ControlCollector, ControlRollout, clip_action
from agents.control.config import ControlConfig
from agents.control.environments import Environments
from agents.control.networks import ControlNetworkFactory
from agents.control.policy import export_policy
from agents.ranks import ALONE, Ranks
from agents.reporting.plots import BLUE, CRITIC, GRAY, GREEN, POLICY_LOSS, UPDATE, VALUE_LOSS, Line, Panel
from agents.seeds import evaluation_seed
from agents.trainer import Trainer
from textenv.state import own_settings

LONGEST = 10_000  # maximum length of an evaluation episode in an environment without a time limit

PANELS = (
    Panel(
        title="Return",
        unit="return per episode",
        lines=(Line("return", "return", BLUE, evaluated="return"),),
        deviation="return_std",
    ),
    Panel(
        title="Length",
        unit="steps per episode",
        lines=(Line("length", "length", GRAY, evaluated="length"),),
        shows=(0.0,),
    ),
    Panel(title="Entropy", unit="nats per step", lines=(Line("entropy", "entropy", GREEN),), shows=(0.0,)),
    POLICY_LOSS,
    VALUE_LOSS,
    CRITIC,
    UPDATE,
)


@dataclass(frozen=True)
class Evaluation:
    """Returns and lengths of episodes of the deterministic policy."""

    returns: list[float]
    lengths: list[int]


class ControlExperiment:
    """See `agents.interfaces.Experiment`."""

    def __init__(self, config: TrainConfig, settings: ControlConfig, ranks: Ranks = ALONE) -> None:
        self.config, self.settings, self.ranks = config, settings, ranks
        self.environments = Environments(config, settings, settings.num_envs)
        check_checkpoints(config, settings, self.environments.limit)
        env = self.environments.env
        self.network_factory = ControlNetworkFactory(
            env.single_observation_space, env.single_action_space, settings, config.seed
        )
        self.collector = ControlCollector(self.environments, settings, config.seed, config.checkpoint_every, ranks)

    def describe(self) -> str:
        """Spaces, iterations and frames in one line."""
        settings, action = self.settings, self.environments.env.single_action_space
        frames = self.config.iterations * settings.num_envs * settings.steps
        kind = f"{self.network_factory.outputs} actions" if self.network_factory.discrete else f"actions {action.shape}"
        return (
            f"(cpu): {self.network_factory.inputs} observations, {kind}; {self.config.iterations} iterations of "
            f"{settings.num_envs} environments × {settings.steps} steps, up to {frames:,} frames (a step that only "
            "resets an environment is none)."
        )

    def fingerprints(self) -> dict[str, str]:
        """None: an environment is code."""
        return {}

    def save_prompts(self, folder: Path) -> None:
        """Write nothing: there are no prompts."""

    def evaluate(self, policy: Any) -> Evaluation:
        """Run `evaluation_episodes` episodes, with the same seed at every evaluation. The first rank runs them."""
        return self.ranks.lead(lambda: self._evaluate(policy))

    def _evaluate(self, policy: Any) -> Evaluation:
        environments = Environments(self.config, self.settings, self.settings.evaluation_episodes)
        environments.share_statistics(self.environments)
        evaluation = run_episodes(environments, policy)
        environments.env.close()
        return evaluation

    def summarize(self, evaluation: Evaluation) -> dict[str, float]:
        """Mean and standard deviation of the return, and mean length."""
        return {
            "return": float(np.mean(evaluation.returns)),
            "return_std": float(np.std(evaluation.returns)),
            "length": float(np.mean(evaluation.lengths)),
        }

    def objective(self, evaluation: Evaluation) -> float:
        """The mean return."""
        return float(np.mean(evaluation.returns))

    def report_metrics(self, rollout: Any) -> dict[str, float]:
        """Nothing: a rollout has all its metrics."""
        return {}

    def dump_rows(self, rollout: ControlRollout) -> Iterator[dict[str, Any]]:
        """One row for each environment: the tensors of the rollout by name, a list of steps each."""
        for row in rollout.data.cpu():
            yield {name: values.tolist() for name, values in row.items()}

    def watch(self, number: int, rollout: Any, policy: Any) -> None:
        """Note nothing."""

    def records(self, number: int, rollout: Any) -> list[dict[str, Any]]:
        """None: steps are no tokens."""
        return []

    def held_out_records(self, trainer: Trainer, evaluation: Evaluation) -> list[dict[str, Any]]:
        """None."""
        return []

    def progress_line(self, metrics: dict[str, float]) -> str:
        """Return and speed in a few words."""
        returns = f"return {metrics['return']:+.1f}" if "return" in metrics else "no episode ended"
        return f"{returns}  {metrics['frames_per_second']:.0f} frames/s"

    def remarks(self, number: int, metrics: dict[str, float]) -> list[str]:
        """Nothing."""
        return []

    def sample_rows(self, before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
        """The episodes of the evaluation, which start from the same states."""
        columns = {
            "return_before": before.returns,
            "return_after": after.returns,
            "length_before": before.lengths,
            "length_after": after.lengths,
        }
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]

    def panels(self) -> tuple[Panel, ...]:
        """Panels of the learning curves."""
        return PANELS

    def write_results(
        self,
        folder: Path,
        trainer: Trainer,
        evaluations: tuple[Evaluation, Evaluation],
        records: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        """The policy, which `agents.play` reads, and returns before and after training."""
        before, after = evaluations
        if not self.ranks.first:
            return {}
        export_policy(trainer.algorithm.networks.policy, self.environments.observation_statistics(), folder / "actor")
        first, last = self.summarize(before), self.summarize(after)
        return {
            "return_before": first["return"],
            "return_after": last["return"],
            "return_std_after": last["return_std"],
            "evaluation_episodes": len(after.returns),
        }

    def result_lines(self, summary: dict[str, Any], folder: Path) -> list[str]:
        """Returns, speed and next steps, as lines for the terminal."""
        return [
            f"return {summary['return_before']:+.1f} → {summary['return_after']:+.1f} ± "
            f"{summary['return_std_after']:.1f} over {summary['evaluation_episodes']} deterministic episodes",
            f"{summary['frames']:,} frames{self._resets(summary)} in {summary['seconds']:.0f} s, "
            f"{summary['frames_per_second']:,.0f} frames/s",
            f"see {folder}/curves.png; watch the policy: python -m agents play --run {shlex.quote(str(folder))}",
        ]

    def _resets(self, summary: dict[str, Any]) -> str:
        """How many steps were no frames: an environment resets in a step of its own."""
        resets = summary["iterations"] * self.settings.num_envs * self.settings.steps - summary["frames"]
        return f" (and {resets:,} steps that reset an environment)" if resets else ""


def check_checkpoints(config: TrainConfig, settings: ControlConfig, limit: int | None) -> None:
    """Raise ValueError if checkpoints are so close together that the longest episodes never end between them."""
    between = settings.steps * config.checkpoint_every
    if limit is not None and between < limit and config.checkpoint_every < config.iterations:
        raise ValueError(
            f"episodes of {config.env!r} last up to {limit} steps, but checkpoints, which reset all environments, are "
            f"{between} steps apart; set checkpoint_every to at least {-(-limit // settings.steps)}."
        )


@own_settings()
def run_episodes(environments: Environments, policy: Any) -> Evaluation:
    """Run the deterministic policy for one episode in every environment."""
    env, space = environments.env, environments.env.single_action_space
    observation, finished = environments.reset(evaluation_seed()), {}
    longest = environments.limit or LONGEST
    for _ in range(longest):
        action = policy.greedy(torch.as_tensor(observation, dtype=torch.float32)).numpy()
        observation, *_ = env.step(clip_action(action, space))
        for episode in environments.returns.take():
            finished.setdefault(episode.row, episode)
        if len(finished) == env.num_envs:
            break
    else:
        raise ValueError(
            f"{env.num_envs - len(finished)} of {env.num_envs} episodes had not ended after {longest:,} steps of the "
            "deterministic policy; give the environment a time limit, --env-arg max_episode_steps=1000."
        )
    episodes = [finished[row] for row in sorted(finished)]
    return Evaluation([episode.total for episode in episodes], [episode.length for episode in episodes])
