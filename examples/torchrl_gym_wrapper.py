"""TorchRL's GymWrapper around the native vector environment, which keeps Gymnasium's seeds, options and infos.

`python examples/torchrl_gym_wrapper.py` (two minutes on one core)

TorchRL resets ended rows itself, so the environment must not: autoreset mode DISABLED. Do not use
`GymEnv(..., num_envs=n)`: it builds an environment that resets itself and records the resets as transitions. Without
`categorical_action_encoding`, an action would be a one-hot vector as wide as the vocabulary.
"""

import gymnasium as gym
import torch
import tyro
from torchrl.envs import GymWrapper, check_env_specs
from torchrl_ppo import learn
from warm_start import SETTINGS, ActorCritic, Comparison, compare

import textenv  # noqa: F401  registers TextGen-v0


def main(steps: int = 6144, rows: int = 32, rollout: int = 32, episodes: int = 128, seed: int = 0) -> Comparison:
    """Train on `steps` tokens, with `rows` episodes in parallel."""
    torch.manual_seed(seed)
    native = gym.make_vec("TextGen-v0", num_envs=rows, autoreset_mode="Disabled", **SETTINGS)
    env, agent = GymWrapper(native, categorical_action_encoding=True, device="cpu"), ActorCritic()
    check_env_specs(env)
    env.set_seed(seed)
    return compare(agent.act, lambda: learn(env, agent, steps, rollout), episodes)


if __name__ == "__main__":
    tyro.cli(main)
