"""RLlib's PPO on TextGen-v0, through the native vector environment.

RLlib 2.60 pins `gymnasium==1.2.2`, so install it in a virtual environment of its own, from the project's folder:

    python -m venv rllib && rllib/bin/pip install -c constraints.txt torch && rllib/bin/pip install -e ".[rllib]" pytest
    rllib/bin/python examples/rllib_ppo.py && rllib/bin/python -m pytest tests/test_clients.py -k rllib

(The constraints apply to torch alone, because they name Gymnasium 1.4.) RLlib's networks do not read Dict observations,
so the module is our own. Its reward cannot hold `log π`: the entropy bonus stands for the policy's half of the penalty.
"""

import gymnasium as gym
import ray
import torch
import tyro
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from warm_start import SETTINGS, ActorCritic, Comparison, compare


class TextModule(TorchRLModule, ValueFunctionAPI):
    """Actor and critic for RLlib's new API stack."""

    def setup(self):
        self.agent = ActorCritic()

    def _forward(self, batch, **kwargs):
        return {Columns.ACTION_DIST_INPUTS: self.agent(batch[Columns.OBS])[0].logits}

    def compute_values(self, batch, embeddings=None):
        return self.agent(batch[Columns.OBS])[1]


def main(steps: int = 6144, rows: int = 32, rollout: int = 32, episodes: int = 128, seed: int = 0) -> Comparison:
    """Train on `steps` tokens, with `rows` episodes in parallel, in one process."""
    ray.init(include_dashboard=False, num_cpus=1, log_to_driver=False)
    torch.manual_seed(seed)
    ppo = dict(gamma=1.0, lambda_=0.95, lr=1e-3, clip_param=0.2, use_kl_loss=False, entropy_coeff=0.003)
    sizes = dict(
        train_batch_size_per_learner=rows * rollout,
        minibatch_size=min(256, rows * rollout),
        num_epochs=2,
        vf_loss_coeff=0.25,
    )
    vector = dict(num_envs_per_env_runner=rows, gym_env_vectorize_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT)
    config = PPOConfig().environment("TextGen-v0", env_config=SETTINGS).debugging(seed=seed, log_level="ERROR")
    config = config.env_runners(num_env_runners=0, **vector).training(**ppo, **sizes)
    algorithm = config.rl_module(rl_module_spec=RLModuleSpec(module_class=TextModule)).build_algo()
    act = algorithm.get_module().agent.act
    comparison = compare(act, lambda: [algorithm.train() for _ in range(max(steps // (rows * rollout), 1))], episodes)
    algorithm.stop()
    ray.shutdown()
    return comparison


if __name__ == "__main__":
    tyro.cli(main)
