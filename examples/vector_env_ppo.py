"""PPO in PyTorch that steps Gymnasium's vector interface, in the shape of CleanRL's scripts.

It has its log-probabilities, so it optimizes the whole `score − kl_coef · KL`. After an episode ends, the row's next
step only resets it (autoreset mode NEXT_STEP) and is not learned from. warm_start.py holds networks and evaluation.
"""

import gymnasium as gym
import torch
import tyro
from warm_start import SETTINGS, ActorCritic, Comparison, compare


@torch.no_grad()
def collect(env, agent, observation, valid, rollout):
    """`rollout` steps of every row with their advantages, invalid steps left out. valid: rows not about to reset."""
    steps, advantage = [], torch.zeros(env.num_envs)
    for _ in range(rollout):
        step, (policy, value) = {name: torch.from_numpy(observation[name]) for name in observation}, agent(observation)
        step |= {"value": value, "valid": valid, "action": policy.sample()}
        observation, reward, terminated, truncated, _ = env.step(step["action"].numpy())
        valid, step["log_prob"] = torch.from_numpy(~(terminated | truncated)), policy.log_prob(step["action"])
        step["reward"] = torch.from_numpy(reward).float() - SETTINGS["kl_coef"] * step["log_prob"]
        steps.append(step | {"not_terminated": torch.from_numpy(~terminated), "same_episode": valid})
    next_value = agent(observation)[1]
    for step in reversed(steps):  # generalized advantage estimation (Schulman et al. 2016)
        error = step["reward"] + next_value * step["not_terminated"] - step["value"]
        step["advantage"] = advantage = error + 0.95 * advantage * step["same_episode"]
        next_value = step["value"]
    return observation, valid, {name: torch.cat([step[name][step["valid"]] for step in steps]) for name in steps[0]}


def update(agent, optimizer, data, epochs=2):
    """PPO's clipped loss (Schulman et al. 2017)."""
    whitened = (data["advantage"] - data["advantage"].mean()) / data["advantage"].std()
    for part in (part for _ in range(epochs) for part in torch.randperm(len(whitened)).split(256)):
        policy, value = agent({name: data[name][part] for name in ("input_ids", "attention_mask")})
        ratio = (policy.log_prob(data["action"][part]) - data["log_prob"][part]).exp()
        gain = torch.minimum(ratio * whitened[part], ratio.clamp(0.8, 1.2) * whitened[part]).mean()
        optimizer.zero_grad()
        (0.25 * (value - (data["value"] + data["advantage"])[part]).square().mean() - gain).backward()
        optimizer.step()


def main(steps: int = 6144, rows: int = 32, rollout: int = 32, episodes: int = 128, seed: int = 0) -> Comparison:
    """Train on about `steps` tokens, with `rows` episodes in parallel."""
    torch.manual_seed(seed)
    env, agent = gym.make_vec("TextGen-v0", num_envs=rows, **SETTINGS), ActorCritic()
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)

    def learn():
        observation, valid = env.reset(seed=seed)[0], torch.ones(rows, dtype=torch.bool)
        for _ in range(max(steps // (rows * rollout), 1)):
            observation, valid, data = collect(env, agent, observation, valid, rollout)
            update(agent, optimizer, data)

    return compare(agent.act, learn, episodes)


if __name__ == "__main__":
    tyro.cli(main)
