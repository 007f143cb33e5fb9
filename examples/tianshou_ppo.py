"""Tianshou's PPO on TextGen-v0. `pip install textenv[tianshou]`, then `python examples/tianshou_ppo.py`

Tianshou's stock `Net` does not read Dict observations, so actor and critic are our own. The reward cannot hold `log π`:
the entropy bonus stands for the policy's half of the penalty, at the current token only.
"""

import gymnasium as gym
import torch
import tyro
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy as Policy
from tianshou.algorithm.optim import AdamOptimizerFactory as Adam
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import ActionReprNet
from warm_start import SETTINGS, ActorCritic, Comparison, compare


class WithoutInfo(gym.Wrapper):
    """Drops infos: Tianshou treats keys that only an episode's last step has as missing values at all other steps."""

    def step(self, action):
        return *self.env.step(action)[:4], {}


class Actor(ActionReprNet):
    """Logits, and no recurrent state."""

    def __init__(self, agent):
        super().__init__()
        self.agent = agent

    def forward(self, obs, state=None, info=None):
        return self.agent(obs)[0].logits, state


class Critic(Actor):
    """Values from the same agent."""

    def forward(self, obs):
        return self.agent(obs)[1]


def main(steps: int = 4096, rows: int = 32, rollout: int = 32, episodes: int = 128, seed: int = 0) -> Comparison:
    """Train on `steps` tokens, with `rows` episodes in parallel."""
    torch.manual_seed(seed)
    env, agent = DummyVectorEnv([lambda: WithoutInfo(gym.make("TextGen-v0", **SETTINGS))] * rows), ActorCritic()
    env.seed(seed)
    policy, critic = Policy(actor=Actor(agent), action_space=env.action_space[0]), Critic(agent)
    algorithm = PPO(policy=policy, critic=critic, optim=Adam(lr=1e-3), gamma=1.0, ent_coef=0.003, vf_coef=0.25)
    collector = Collector(algorithm, env, VectorReplayBuffer(rows * rollout, rows))
    sizes = dict(epoch_num_steps=steps, collection_step_num_env_steps=rows * rollout, batch_size=256)
    sizes |= dict(max_epochs=1, update_step_num_repetitions=2, show_progress=False, verbose=False)
    params = OnPolicyTrainerParams(training_collector=collector, **sizes)
    return compare(agent.act, lambda: algorithm.run_training(params), episodes)


if __name__ == "__main__":
    tyro.cli(main)
