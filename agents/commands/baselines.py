"""Commands for what a run is held against: learning without a rollout, and no learning at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import tyro

from agents.baselines.best_of_n import BestOfNConfig, best_of_n
from agents.baselines.dpo import DEFAULT, EMBEDDED, LOOP, DPOConfig, dpo
from agents.baselines.setting import SettingConfig
from agents.commands import flags
from agents.config import TrainConfig, with_items
from agents.domains import TEXT, arguments_of, domain_of, environment_settings
from agents.presets import is_embedded_task
from textenv.config import TextGenConfig
from textenv.training.dpo import PreferenceConfig
from textenv.training.loop import LoopConfig

WHERE = SettingConfig()


def best_of_n_command(arguments: Sequence[str], prog: str) -> Callable[..., None]:
    """The command, whose environment's flags have the defaults of the environment that is named."""
    given = _given(arguments, (BestOfNConfig,), prog)
    settings = _environment(given)

    def command(
        config: tyro.conf.OmitArgPrefixes[tyro.conf.UseAppendAction[BestOfNConfig]],
        where: tyro.conf.OmitArgPrefixes[tyro.conf.UseAppendAction[SettingConfig]] = WHERE,
        environment: flags.Environment = settings,
    ) -> None:
        """Measure the best of n = 1, 2, 4, ... 64 samples by the score: score, gold score and KL, without learning.

        Args:
            config: What is sampled, and what it is drawn beside.
            where: The environment, and what is measured.
            environment: Its settings.
        """
        best_of_n(config, _with_flags(where, arguments))

    return command


def dpo_command(arguments: Sequence[str], prog: str) -> Callable[..., None]:
    """The command, with defaults for the embedded task's small model unless another one is trained."""
    given = _given(arguments, (DPOConfig, PreferenceConfig, LoopConfig), prog)
    settings = _environment(given)
    own = bool(flags.values_of(arguments, "base"))
    own = own or (domain_of(given.env) is TEXT and not is_embedded_task(given.env, arguments_of(given)))

    def command(
        config: tyro.conf.OmitArgPrefixes[DPOConfig],
        where: tyro.conf.OmitArgPrefixes[tyro.conf.UseAppendAction[SettingConfig]] = WHERE,
        environment: flags.Environment = settings,
        learning: tyro.conf.OmitArgPrefixes[PreferenceConfig] = DEFAULT if own else EMBEDDED,
        loop: tyro.conf.OmitArgPrefixes[LoopConfig] = LOOP,
    ) -> None:
        """Train a policy from preference pairs, without a rollout (DPO or IPO), and measure it as a run's policy.

        Args:
            config: From what, and to where.
            where: The environment, and what is measured.
            environment: Its settings.
            learning: Settings of the training.
            loop: How the training is run.
        """
        dpo(config, _with_flags(where, arguments), learning, loop)

    return command


def _given(arguments: Sequence[str], classes: tuple[type, ...], prog: str) -> TrainConfig:
    """The environment that the arguments name, with its arguments, read before the other flags."""
    env = [WHERE.env, *flags.values_of(arguments, "env")][-1]
    flags.refuse_misplaced(arguments, (*classes, SettingConfig), env, None, prog)
    flags.refuse_twice(arguments)
    given = TrainConfig(env=env, env_arg=tuple(flags.values_of(arguments, "env_arg")))
    return given.with_env_arg(flags.of_environment(arguments))


def _environment(given: TrainConfig) -> TextGenConfig:
    return environment_settings(given) if domain_of(given.env) is TEXT else TextGenConfig()


def _with_flags(where: SettingConfig, arguments: Sequence[str]) -> SettingConfig:
    return replace(where, env_arg=with_items(where.env_arg, flags.of_environment(arguments)))
