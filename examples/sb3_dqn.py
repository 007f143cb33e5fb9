"""Stable-Baselines3's DQN on a short task with a reward in Python: name the aspects that the prompt asks for.

`pip install textenv[sb3]`, then `python examples/sb3_dqn.py`

A Q-network starts from scratch, and random exploration over 1024 tokens would never write a sentence. So an action is
one of 32 words, through Gymnasium's `TransformAction`, and a response has 4 tokens. There is no penalty: `kl_coef=0`.
"""

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.wrappers.vector import TransformAction
from stable_baselines3 import DQN
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from warm_start import Comparison, compare

from textenv.adapters.stable_baselines import VecEnvAdapter
from textenv.reviews.prompts import parse_prompt, train_prompts

WORDS = sorted({aspect for prompt in train_prompts() for aspect in parse_prompt(prompt).aspects})


def named_share(prompts, responses):
    """Share of the requested aspects that the response names."""
    asked = [parse_prompt(prompt).aspects for prompt in prompts]
    return [np.mean([word in text.split() for word in words]) for words, text in zip(asked, responses, strict=True)]


class Bags(BaseFeaturesExtractor):
    """Two bags of words: the summed token embeddings of the prompt, and of the response so far."""

    def __init__(self, space, start, width=64):
        super().__init__(space, features_dim=2 * width)
        self.start, self.embedding = start, torch.nn.Embedding(int(space["input_ids"].high.max()) + 1, width)

    def forward(self, observation):  # Dict of [B, L], as floats
        vectors = self.embedding(observation["input_ids"].long()) * observation["attention_mask"][..., None]
        return torch.cat([vectors[:, : self.start].sum(1), vectors[:, self.start :].sum(1)], 1)


def main(steps: int = 40_000, rows: int = 16, episodes: int = 128, seed: int = 0) -> Comparison:
    """Train on `steps` tokens, with `rows` episodes in parallel."""
    parts = dict(reference="reviews", reward=named_share, prompts="reviews")
    settings = dict(**parts, kl_coef=0, max_new_tokens=4, device="cpu")
    env = gym.make_vec("TextGen-v0", num_envs=rows, autoreset_mode="SameStep", **settings)
    ids = np.array([env.task.tokenizer(f" {word}").input_ids[0] for word in WORDS] + [*env.task.stop_token_ids])
    choices = gym.spaces.Discrete(len(ids))
    env = VecEnvAdapter(TransformAction(env, lambda action: ids[action], single_action_space=choices))
    start = dict(start=env.env.unwrapped.task.config.max_prompt_tokens)
    networks = dict(features_extractor_class=Bags, features_extractor_kwargs=start, net_arch=[128])
    replay = dict(buffer_size=20_000, learning_starts=1000, batch_size=128, train_freq=1, target_update_interval=2000)
    explore = dict(exploration_fraction=0.5, exploration_final_eps=0.05, gamma=1.0, learning_rate=1e-3, seed=seed)
    model = DQN("MultiInputPolicy", env, policy_kwargs=networks, **replay, **explore, device="cpu")
    act = lambda observation, infos: ids[model.predict(observation, deterministic=True)[0]]  # noqa: E731
    return compare(act, lambda: model.learn(steps), episodes, settings)


if __name__ == "__main__":
    tyro.cli(main)
