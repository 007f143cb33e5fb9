"""sb3-contrib's MaskablePPO on TextGen-v0: the policy chooses among the reference's 20 likeliest tokens.

`pip install textenv[sb3]`, then `python examples/sb3_maskable_ppo.py` (a minute and a half on one core)

This is the mask of NLPO (Ramamurthy et al. 2023), without its refreshes. It keeps texts well-formed without an entropy
bonus or a penalty, so `kl_coef=0`, and only the score is optimized.
"""

from __future__ import annotations

import gymnasium as gym
import torch
import tyro
from sb3_contrib import MaskablePPO
from sb3_ppo import policy_settings
from stable_baselines3.common.vec_env import VecMonitor
from warm_start import SETTINGS, Backbone, Comparison, compare

from textenv.adapters.stable_baselines import VecEnvAdapter


def main(steps: int = 6144, rows: int = 32, rollout: int = 32, episodes: int = 128, seed: int = 0) -> Comparison:
    """Train on `steps` tokens, with `rows` episodes in parallel."""
    torch.manual_seed(seed)
    settings = {**SETTINGS, "kl_coef": 0, "action_mask": "top_k:20"}
    env = VecMonitor(VecEnvAdapter(gym.make_vec("TextGen-v0", num_envs=rows, autoreset_mode="SameStep", **settings)))
    backbone = Backbone()
    model = MaskablePPO(
        "MultiInputPolicy",
        env,
        policy_kwargs=policy_settings(backbone),
        **dict(n_steps=rollout, batch_size=256, n_epochs=2, learning_rate=1e-3, gamma=1.0),
        seed=seed,
        device="cpu",
    )
    backbone.copy_output_layer(model.policy.action_net)

    def act(observation, infos):
        return model.predict(observation, action_masks=infos["action_mask"].astype(bool))[0]

    return compare(act, lambda: model.learn(steps), episodes, settings)


if __name__ == "__main__":
    tyro.cli(main)
