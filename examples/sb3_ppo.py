"""Stable-Baselines3's PPO on TextGen-v0, through the native vector environment.

`pip install textenv[sb3]`, then `python examples/sb3_ppo.py` (a minute and a half on one core)

The environment pays the score and `kl_coef · log π_ref`. SB3's reward cannot hold `log π`, so its entropy bonus stands
for the policy's half of the penalty, at the current token only.
"""

from __future__ import annotations

import gymnasium as gym
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecMonitor
from torch import Tensor
from warm_start import SETTINGS, Backbone, Comparison, compare

from textenv.adapters.stable_baselines import VecEnvAdapter


class Features(BaseFeaturesExtractor):
    """The language model's hidden state, as a features extractor of SB3's policies."""

    def __init__(self, observation_space: gym.Space, backbone: Backbone) -> None:
        super().__init__(observation_space, features_dim=backbone.width)
        self.backbone = backbone

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        """Dict of [B, L] to [B, H]."""
        return self.backbone(observation["input_ids"], observation["attention_mask"])


def policy_settings(backbone: Backbone) -> dict[str, object]:
    """SB3's `policy_kwargs` for a policy with output layers directly on the hidden state."""
    features = dict(features_extractor_class=Features, features_extractor_kwargs=dict(backbone=backbone))
    return dict(**features, net_arch=[], ortho_init=False)


def main(steps: int = 6144, rows: int = 32, rollout: int = 32, episodes: int = 128, seed: int = 0) -> Comparison:
    """Train on `steps` tokens, with `rows` episodes in parallel."""
    torch.manual_seed(seed)
    env = VecMonitor(VecEnvAdapter(gym.make_vec("TextGen-v0", num_envs=rows, autoreset_mode="SameStep", **SETTINGS)))
    backbone = Backbone()
    model = PPO(
        "MultiInputPolicy",
        env,
        policy_kwargs=policy_settings(backbone),
        **dict(n_steps=rollout, batch_size=256, n_epochs=2, learning_rate=1e-3, gamma=1.0, ent_coef=0.003),
        seed=seed,
        device="cpu",
    )
    backbone.copy_output_layer(model.policy.action_net)
    return compare(lambda observation, infos: model.predict(observation)[0], lambda: model.learn(steps), episodes)


if __name__ == "__main__":
    tyro.cli(main)
