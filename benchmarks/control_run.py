"""One run of classic control with our learners or Stable-Baselines3, under the same preset.

Everything in the preset is equal on both sides. The rest is each library's own: Adam's epsilon (ours 1e-8, theirs
1e-5), advantages whitened per rollout (ours) or minibatch, gradients clipped per network (ours) or jointly, and reset
steps, which our frames include but do not learn from. Stable-Baselines3 has no double DQN, so ours runs without it too.

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
    """Run our learner without checkpoints; returns its row."""
    experiment, trainer = build(config, settings, algorithm)
    assert isinstance(experiment, ControlExperiment)
    curve = [iteration.metrics.get("return") for iteration in trainer.iterate()]
    returns = experiment.evaluate(trainer.algorithm.networks.policy).returns
    return row(returns, trainer.steps, trainer.seconds) | {"curve": thinned(curve)}


def sb3(config: TrainConfig, settings: ControlConfig, algorithm: Any) -> dict[str, Any]:
    """Run Stable-Baselines3 on DummyVecEnv, its default; returns its row."""
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
    evaluation_env: Any = make_vec_env(config.env, 1, seed=1_000_000)
    if normalized:
        norm_obs = settings.normalize_observation
        evaluation_env = VecNormalize(evaluation_env, norm_obs=norm_obs, training=False, norm_reward=False)
        if settings.normalize_observation:
            evaluation_env.obs_rms = env.obs_rms
    returns, _ = evaluate_policy(model, evaluation_env, EPISODES, deterministic=True, return_episode_rewards=True)
    return row([float(value) for value in np.ravel(returns)], model.num_timesteps, seconds)


def row(returns: list[float], frames: int, seconds: float) -> dict[str, Any]:
    """The numbers recorded for a run."""
    return {
        "return": float(np.mean(returns)),
        "return_std": float(np.std(returns)),
        "frames": frames,
        "seconds": seconds,
        "frames_per_second": frames / seconds,
        "threads": torch.get_num_threads(),
    }


def thinned(curve: list[float | None], count: int = 50) -> list[float]:
    """Reduce a curve to about `count` points, each the mean of a segment."""
    values = np.array([value for value in curve if value is not None])
    return [
        round(float(part.mean()), 3) for part in np.array_split(values, max(1, min(count, len(values)))) if len(part)
    ]


def _rate(config: TrainConfig) -> Callable[[float], float] | float:
    """Learning rate for Stable-Baselines3, whose schedules are functions of the remaining share of the run."""
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
# Our settings that Stable-Baselines3 does not have are switched off.
COMMON: dict[str, dict[str, Any]] = {"dqn": {"double": False}}
LEARNERS: dict[str, Callable[..., dict[str, Any]]] = {"ours": ours, "sb3": sb3}


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job and return its row. Keys `train`, `settings` and `algorithm_settings` override the preset."""
    torch.set_num_threads(1)
    parts = defaults(job["env"], job["algorithm"])
    chosen = COMMON.get(job["algorithm"], {}) | job.get("algorithm_settings", {})
    changes = ({"seed": job["seed"]} | job.get("train", {}), job.get("settings", {}), chosen)
    config, settings, algorithm = (
        dataclasses.replace(part, **change) for part, change in zip(parts, changes, strict=True)
    )
    result = LEARNERS[job["learner"]](config, settings, algorithm)
    parts_used = {"train": config, "settings": settings, "algorithm_settings": algorithm}
    return result | {name: dataclasses.asdict(part) for name, part in parts_used.items()}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
