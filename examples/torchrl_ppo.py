"""TorchRL's collector, GAE and PPO loss on `TextGenTorchEnv`, one transition per token.

`python examples/torchrl_ppo.py` (two minutes on one core)

The log-probability travels in the TensorDict beside the action, so the whole `score − kl_coef · KL` is optimized. For
long training, `python -m agents` is many times faster: it reads each response once instead of each of its prefixes.
"""

import torch
import tyro
from tensordict.nn import TensorDictModule
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.modules import ActorValueOperator, ProbabilisticActor
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from warm_start import SETTINGS, ActorCritic, Comparison, compare

from textenv import TextGenConfig, build_task
from textenv.torchrl_env import TextGenTorchEnv


def learn(env: EnvBase, agent: ActorCritic, steps: int, rollout: int) -> None:
    """Run PPO on `steps` tokens, with `rollout` tokens of each row per batch."""
    hidden = TensorDictModule(agent.backbone, ["input_ids", "attention_mask"], ["hidden"])
    logits = TensorDictModule(agent.actor, ["hidden"], ["logits"])
    actor = ProbabilisticActor(logits, ["logits"], distribution_class=Categorical, return_log_prob=True)
    value = TensorDictModule(agent.critic, ["hidden"], ["state_value"])
    networks = ActorValueOperator(hidden, actor, value)
    policy, critic = networks.get_policy_operator(), networks.get_value_operator()
    advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic, deactivate_vmap=True)
    settings = dict(normalize_advantage=True, entropy_bonus=False, critic_coeff=0.25, loss_critic_type="l2")
    loss = ClipPPOLoss(policy, critic, functional=False, **settings)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    frames = env.batch_size[0] * rollout
    options = dict(frames_per_batch=frames, total_frames=steps, auto_register_policy_transforms=False)
    for data in Collector(env, policy, **options):  # [rows, rollout]
        data["next", "reward"] -= SETTINGS["kl_coef"] * data["action_log_prob"][..., None]
        with torch.no_grad():
            advantage(data)
        flat = data.reshape(-1)
        for part in (part for _ in range(2) for part in torch.randperm(len(flat)).split(256)):
            terms = loss(flat[part])
            optimizer.zero_grad()
            (terms["loss_objective"] + terms["loss_critic"]).backward()
            optimizer.step()


def main(steps: int = 6144, rows: int = 32, rollout: int = 32, episodes: int = 128, seed: int = 0) -> Comparison:
    """Train on `steps` tokens, with `rows` episodes in parallel."""
    torch.manual_seed(seed)
    env, agent = TextGenTorchEnv(build_task(TextGenConfig(**SETTINGS)), rows, seed), ActorCritic()
    return compare(agent.act, lambda: learn(env, agent, steps, rollout), episodes)


if __name__ == "__main__":
    tyro.cli(main)
