"""Refuses settings of a training run that it would not read; the settings' classes list the cases in `UNREAD`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from agents.config import TrainConfig
from agents.domains import arguments_of
from agents.interfaces import Algorithm, Experiment, NetworkFactory
from agents.presets import defaults, has_adapters
from textenv.unread import refuse_unread


@dataclass(frozen=True)
class Job:
    """A run that is built: what decides which of its settings are read."""

    train: TrainConfig
    settings: Any  # of the domain
    algorithm: Any  # settings of the algorithm
    experiment: Experiment
    learner: Algorithm

    @property
    def factory(self) -> NetworkFactory:
        """The factory of the networks, which knows the environment's actions and penalty."""
        return self.experiment.network_factory

    @property
    def trained(self) -> set[str]:
        """Names of the trained networks, such as `actor` and `critic`."""
        return set(self.learner.networks.trained)

    @property
    def on_text(self) -> bool:
        """Whether steps are tokens, and rows whole responses."""
        return self.experiment.collector.unit == "tokens"


def check_settings(job: Job) -> None:
    """Raise ValueError for a setting that would do nothing, unless it has its class's or its preset's value."""
    train = job.train
    parts = (train, job.settings, job.algorithm)
    by_class = [{field.name: field.default for field in fields(part)} for part in parts]
    preset = defaults(train.env, train.algorithm, arguments_of(train), has_adapters(job.settings))
    by_preset = [vars(part) for part in preset]
    rendered = {"render_mode": train.env_arguments().get("render_mode")}
    rules = [rule for part in parts for rule in type(part).UNREAD]
    known = [_merged(by_class) | {"render_mode": None}, _merged(by_preset) | {"render_mode": None}]
    refuse_unread(rules, _merged([vars(part) for part in parts]) | rendered, known, job)


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Settings of all three parts by name; no two parts share a name, since each is a flag."""
    return {name: value for part in parts for name, value in part.items()}
