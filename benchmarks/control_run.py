"""One run of classic control, by the learners here or by Stable-Baselines3, under the same preset.

What a preset says is the same on both sides. What it does not is each library's own: Adam's epsilon (1e-8 here, 1e-5
there), advantages whitened by the rollout or by the minibatch, gradients clipped by the network or all together, and
frames, of which those here that only begin a new episode teach nothing. Stable-Baselines3's DQN has no double
estimates; so neither has the one beside it.

`python -m benchmarks.control_run '{"env": "CartPole-v1", "algorithm": "ppo", "learner": "sb3", "seed": 0}'` prints a
row as JSON. Used by benchmarks.classic_control and benchmarks.control_speed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from agents.config import TrainConfig
from agents.control.config import ControlConfig
from agents.control.experiment import ControlExperiment
from agents.presets import defaults
from agents.run import build

EPISODES = 20


def ours(config: TrainConfig, settings: ControlConfig, algorithm: Any) -> dict[str, Any]:
    """Returns, frames and seconds of a run here, with checkpoints left out."""
    experiment, trainer = build(config, settings, algorithm)
    assert isinstance(experiment, ControlExperiment)
    curve = [iteration.metrics.get("return") for iteration in trainer.iterate()]
    returns = experiment.evaluate(trainer.algorithm.networks.policy).returns
    return row(returns, trainer.steps, trainer.seconds) | {"curve": thinned(curve)}


def sb3(config: TrainConfig, settings: ControlConfig, algorithm: Any) -> dict[str, Any]:
    """The same by Stable-Baselines3, on DummyVecEnv, its default."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize

    frames = config.iterations * settings.num_envs * settings.steps
    env: Any = make_vec_env(config.env, settings.num_envs, seed=config.seed)
    normalized = settings.normalize_observation or settings.normalize_reward
    if normalized:
        env = VecNormalize(
            env,
            norm_obs=settings.normalize_observation,
            norm_reward=settings.normalize_reward,
            gamma=settings.reward_gamma,
        )
    model = MODELS[config.algorithm](env, config, settings, algorithm)
    started = time.perf_counter()
    model.learn(frames)
    seconds = time.perf_counter() - started
    measured: Any = make_vec_env(config.env, 1, seed=1_000_000)
    if normalized:
        measured = VecNormalize(measured, norm_obs=settings.normalize_observation, training=False, norm_reward=False)
        if settings.normalize_observation:
            measured.obs_rms = env.obs_rms
    returns, _ = evaluate_policy(model, measured, EPISODES, deterministic=True, return_episode_rewards=True)
    return row([float(one) for one in np.ravel(returns)], model.num_timesteps, seconds)


def row(returns: list[float], frames: int, seconds: float) -> dict[str, Any]:
    """What is kept of a run."""
    return {
        "return": float(np.mean(returns)),
        "return_std": float(np.std(returns)),
        "frames": frames,
        "seconds": seconds,
        "frames_per_second": frames / seconds,
        "threads": torch.get_num_threads(),
    }


def thinned(curve: list[float | None], count: int = 50) -> list[float]:
    """About `count` points of a curve, each the mean of its stretch."""
    known = np.array([value for value in curve if value is not None])
    return [round(float(part.mean()), 3) for part in np.array_split(known, max(1, min(count, len(known)))) if len(part)]


def _rate(config: TrainConfig) -> Callable[[float], float] | float:
    """Stable-Baselines3's schedules are functions of the share of the run that remains."""
    rate = config.learning_rate
    return (lambda remaining: remaining * rate) if config.schedule == "linear" else rate


def _common(env: Any, config: TrainConfig, settings: ControlConfig) -> Any:
    activation = torch.nn.Tanh if settings.activation == "tanh" else torch.nn.ReLU
    policy = {"net_arch": list(settings.hidden), "activation_fn": activation}
    return {
        "policy": "MlpPolicy",
        "env": env,
        "learning_rate": _rate(config),
        "policy_kwargs": policy,
        "seed": config.seed,
        "device": "cpu",
    }


def _ppo(env: Any, config: TrainConfig, settings: ControlConfig, algorithm: Any) -> Any:
    from stable_baselines3 import PPO

    return PPO(
        **_common(env, config, settings),
        n_steps=settings.steps,
        batch_size=config.minibatch_size,
        n_epochs=algorithm.epochs,
        gamma=algorithm.gamma,
        gae_lambda=algorithm.lmbda,
        clip_range=algorithm.clip,
        ent_coef=algorithm.entropy_coef,
        max_grad_norm=config.max_grad_norm,
    )


def _a2c(env: Any, config: TrainConfig, settings: ControlConfig, algorithm: Any) -> Any:
    from stable_baselines3 import A2C

    return A2C(
        **_common(env, config, settings),
        n_steps=settings.steps,
        gamma=algorithm.gamma,
        gae_lambda=algorithm.lmbda,
        ent_coef=algorithm.entropy_coef,
        max_grad_norm=config.max_grad_norm,
        normalize_advantage=algorithm.whiten,
        use_rms_prop=False,
    )


def _dqn(env: Any, config: TrainConfig, settings: ControlConfig, algorithm: Any) -> Any:
    from stable_baselines3 import DQN

    frames, per_rollout = config.iterations * settings.num_envs * settings.steps, settings.num_envs * settings.steps
    explored = algorithm.epsilon_updates / algorithm.gradient_steps * per_rollout
    return DQN(
        **(_common(env, config, settings) | {"learning_rate": config.critic_learning_rate}),
        buffer_size=algorithm.buffer_size,
        learning_starts=algorithm.learning_starts,
        batch_size=config.minibatch_size,
        tau=algorithm.tau,
        gamma=algorithm.gamma,
        train_freq=settings.steps,
        gradient_steps=algorithm.gradient_steps,
        target_update_interval=algorithm.target_update_interval * per_rollout // algorithm.gradient_steps,
        exploration_fraction=min(1.0, (algorithm.learning_starts + explored) / frames),
        exploration_initial_eps=algorithm.epsilon_start,
        exploration_final_eps=algorithm.epsilon_end,
        max_grad_norm=config.max_grad_norm,
    )


MODELS: dict[str, Callable[..., Any]] = {"ppo": _ppo, "a2c": _a2c, "dqn": _dqn}
# What Stable-Baselines3 cannot do is left out here too.
COMMON: dict[str, dict[str, Any]] = {"dqn": {"double": False}}
LEARNERS: dict[str, Callable[..., dict[str, Any]]] = {"ours": ours, "sb3": sb3}


def main(job: dict[str, Any]) -> dict[str, Any]:
    """The row of a job; `train`, `settings` and `algorithm_settings` in it change the preset."""
    torch.set_num_threads(1)
    parts = defaults(job["env"], job["algorithm"])
    chosen = COMMON.get(job["algorithm"], {}) | job.get("algorithm_settings", {})
    changes = ({"seed": job["seed"]} | job.get("train", {}), job.get("settings", {}), chosen)
    config, settings, algorithm = (
        dataclasses.replace(part, **change) for part, change in zip(parts, changes, strict=True)
    )
    found = LEARNERS[job["learner"]](config, settings, algorithm)
    used = {"train": config, "settings": settings, "algorithm_settings": algorithm}
    return found | {name: dataclasses.asdict(part) for name, part in used.items()}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
