"""PPO on a language model, from the prompt to the update, in one file of plain PyTorch: start reading here.

Four networks of the same small size take part. The *actor* π writes responses and is trained. The *reference* π_ref is
a frozen copy of the actor before training. The *reward model* is frozen too and scores whole responses. The *critic* V
predicts what is still to come while a response is being written, and is trained. Every iteration has four steps:

1. The actor responds to a batch of prompts.
2. The reward model scores the responses, and every token pays for its distance from the reference.
3. The critic's values turn these rewards into advantages: how much better was each token than expected?
4. The actor makes tokens of positive advantage likelier, and the critic learns what really came.

Letters in shape comments: B responses, P prompt tokens, R response tokens, L = P + R, V tokens in the vocabulary.
The action a_t is response token t; the state s_t is the prompt and all response tokens before it.

`python examples/one_file_ppo.py` takes a few minutes on two CPU cores; the score rises from about 0 to +1.6.
`python -m agents train` runs the same algorithm with checkpoints, plots and an evaluation on held-out prompts.
"""

import copy
import time
from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro
from torch import Tensor, nn

import textenv  # noqa: F401  registers TextGen-v0


@dataclass(frozen=True)
class Settings:
    iterations: int = 30  # each samples a batch of responses and learns from it
    seed: int = 0  # of prompts, tokens and minibatches
    rollout_size: int = 128  # responses in an iteration
    epochs: int = 4  # passes over them
    minibatch_size: int = 32  # responses in an optimizer step
    learning_rate: float = 1e-4  # of the actor; both learning rates fall linearly to zero
    critic_learning_rate: float = 3e-4
    max_grad_norm: float = 1.0  # of each network's gradient; larger ones are scaled down
    gamma: float = 1.0  # γ, discount per token: 1, because a late score is worth as much as an early one
    lmbda: float = 0.95  # λ of GAE: 0 trusts the critic alone, 1 trusts only what really happened
    clip: float = 0.2  # ε: how far a token's probability may move in one iteration, as a ratio
    value_clip: float = 0.2  # how far a value may move in one iteration


# ---- 1. The actor responds
@torch.no_grad()
def sample_responses(actor, input_ids: Tensor, attention_mask: Tensor, task) -> dict[str, Tensor]:
    """One response to each prompt, token by token. input_ids, attention_mask: [B, P], padded on the left."""
    stop_token_ids = torch.tensor(task.stop_token_ids, device=task.device)
    running = torch.ones(len(input_ids), 1, dtype=torch.bool, device=task.device)  # [B, 1], no stop token so far
    masks, log_probs = [], []  # [B, 1] from every step
    new_ids, cache = input_ids, None
    for _ in range(task.config.max_new_tokens):
        # The first pass reads the prompts, each later one a single token: the cache holds keys and values of the rest.
        # Positions count real tokens only, so padding before a prompt changes nothing.
        position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)[:, -new_ids.shape[1] :]  # [B, P], then [B, 1]
        text = {"input_ids": new_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        output = actor(**text, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        # The policy π is the softmax at the sampling temperature, here and everywhere below.
        distribution = (output.logits[:, -1] / task.config.temperature).log_softmax(-1)  # [B, V]
        new_ids = torch.multinomial(distribution.exp(), 1)  # [B, 1]
        log_probs.append(distribution.gather(1, new_ids))
        # The stop token belongs to the response. What a row writes after it is padding, and the masks hide it.
        masks.append(running)
        input_ids = torch.cat([input_ids, new_ids], 1)  # [B, P + t + 1]
        attention_mask = torch.cat([attention_mask, running.long()], 1)
        running = running & ~torch.isin(new_ids, stop_token_ids)
        if not running.any():
            break
    mask = torch.cat(masks, 1)
    return {
        "input_ids": input_ids,  # [B, L]
        "attention_mask": attention_mask,  # [B, L], 1 at real tokens
        "position_ids": (attention_mask.cumsum(1) - 1).clamp_min(0),  # [B, L]
        "mask": mask,  # [B, R], true at real response tokens
        "log_prob": torch.cat(log_probs, 1) * mask,  # [B, R], log π_old(a_t | s_t)
    }


# ---- Reading finished texts: one forward pass gives the numbers at all tokens
TEXT = ("input_ids", "attention_mask", "position_ids")  # what the models read of a batch, [B, L] each


def response_log_probs(model, batch: dict[str, Tensor], temperature: float) -> Tensor:
    """The log-probabilities log π(a_t | s_t) of all response tokens. Returns [B, R]."""
    R = batch["mask"].shape[1]
    # Logits at a token are about the next one: those at the last prompt token are about a_0, and the last go unused.
    text = {name: batch[name] for name in TEXT}
    logits = model(**text, use_cache=False, logits_to_keep=R + 1).logits[:, :-1]  # [B, R, V]
    log_probs = (logits / temperature).log_softmax(-1)
    return log_probs.gather(2, batch["input_ids"][:, -R:, None])[..., 0] * batch["mask"]


def scalar_outputs(model, batch: dict[str, Tensor]) -> Tensor:
    """The linear head w · h + b on the hidden state h at the last token of each state s_0..s_R. Returns [B, R + 1].

    The reward model and the critic are language models with this head in place of the one for logits.
    """
    hidden = model.base_model(**{name: batch[name] for name in TEXT}, use_cache=False).last_hidden_state  # [B, L, H]
    return model.score(hidden)[:, -batch["mask"].shape[1] - 1 :, 0]


def values(critic, batch: dict[str, Tensor]) -> Tensor:
    """V(s_t), the expected sum of the rewards from token t on, read before token t is written. Returns [B, R]."""
    return scalar_outputs(critic, batch)[:, :-1] * batch["mask"]


# ---- 2. Rewards: the score at the end, less a penalty at every token
@torch.no_grad()
def rewards(task, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    # The score is the reward model's output at the last token, where it has read the whole response.
    mask = batch["mask"]
    is_last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))  # [B, R], true at t = T
    score = (scalar_outputs(task.reward.model, batch)[:, 1:] * is_last).sum(1)  # [B]
    # The reward model is right only about texts like those that it was trained on, so the actor pays for leaving them:
    #     r_t = score · 1[t = T] − β (log π(a_t | s_t) − log π_ref(a_t | s_t))
    # As a_t is drawn from π, the penalties of a response sum to β KL(π ‖ π_ref) on average.
    log_ratio = batch["log_prob"] - response_log_probs(task.reference.model, batch, task.config.temperature)  # [B, R]
    reward = score[:, None] * is_last - task.config.kl_coef * log_ratio  # [B, R]
    return {"score": score, "kl": log_ratio.sum(1), "reward": reward}


# ---- 3. Advantages
def advantages(reward: Tensor, value: Tensor, gamma: float, lmbda: float) -> Tensor:
    """Generalized advantage estimation (Schulman et al. 2016). All [B, R], and 0 in the padding after a response.

    δ_t = r_t + γ V(s_{t+1}) − V(s_t)    how much better token t was than the critic expected
    A_t = δ_t + γ λ A_{t+1}              and, fading, how much better the tokens after it were
    """
    advantage = torch.zeros_like(reward)
    # Nothing is worth anything after the end: both stay 0 through the padding, until the last token reads them.
    next_value = next_advantage = torch.zeros_like(reward[:, 0])  # [B]
    for t in reversed(range(reward.shape[1])):
        delta = reward[:, t] + gamma * next_value - value[:, t]
        advantage[:, t] = next_advantage = delta + gamma * lmbda * next_advantage
        next_value = value[:, t]
    return advantage


def masked_mean(numbers: Tensor, mask: Tensor) -> Tensor:
    return (numbers * mask).sum() / mask.sum()


def whiten(numbers: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over real tokens, so that the scale of the scores does not matter to PPO."""
    centered = numbers - masked_mean(numbers, mask)
    return centered * (masked_mean(centered**2, mask) + 1e-8).rsqrt() * mask


# ---- 4. The update
def policy_loss(log_prob: Tensor, batch: dict[str, Tensor], clip: float) -> Tensor:
    """PPO's loss (Schulman et al. 2017): the mean of max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε)) with ρ = π / π_old.

    Once ρ has passed 1 ± ε in the direction that A asks for, the loss is constant and its gradient stops.
    """
    ratio = (log_prob - batch["log_prob"]).clamp(max=20.0).exp()  # e^89 overflows float32
    advantage = batch["advantage"]
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))  # [B, R]
    return masked_mean(loss, batch["mask"])


def value_loss(value: Tensor, batch: dict[str, Tensor], clip: float) -> Tensor:
    """The mean of ½ max((V − target)², (V_old + clip(V − V_old, −c, c) − target)²)."""
    near = batch["value"] + (value - batch["value"]).clamp(-clip, clip)
    target = batch["value_target"]
    loss = 0.5 * torch.maximum((value - target) ** 2, (near - target) ** 2)  # [B, R]
    return masked_mean(loss, batch["mask"])


def update(actor, critic, optimizer, rollout: dict[str, Tensor], settings: Settings, temperature: float) -> None:
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(rollout["mask"])).split(settings.minibatch_size):
            batch = {name: tensor[rows] for name, tensor in rollout.items()}
            # The networks share no weights: each gets the gradient of its own loss from the sum.
            loss = policy_loss(response_log_probs(actor, batch, temperature), batch, settings.clip)
            loss = loss + value_loss(values(critic, batch), batch, settings.value_clip)
            optimizer.zero_grad()
            loss.backward()
            for network in (actor, critic):
                nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
            optimizer.step()


# ---- All of it
def main(settings: Settings):
    torch.manual_seed(settings.seed)
    # The environment has the frozen models, the prompts, and the constants β (kl_coef), temperature and max_new_tokens.
    task = gym.make("TextGen-v0").unwrapped.task
    actor = copy.deepcopy(task.reference.model).requires_grad_(True)
    # The critic starts as the reward model: what can score a whole response has a good guess after half of it.
    critic = copy.deepcopy(task.reward.model).requires_grad_(True)
    critic.score.bias = nn.Parameter(torch.zeros(1, device=task.device))  # by which all values can move at once
    rates = {actor: settings.learning_rate, critic: settings.critic_learning_rate}
    groups = [{"params": network.parameters(), "lr": rate} for network, rate in rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    P = task.prompts.attention_mask.sum(1).max()  # tokens of the longest prompt: columns before are empty in every row
    for iteration in range(settings.iterations):
        started = time.perf_counter()
        for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate * (1 - iteration / settings.iterations)
        rows = torch.randperm(len(task.prompts))[: settings.rollout_size]
        prompt_ids, prompt_mask = task.prompts.input_ids[rows, -P:], task.prompts.attention_mask[rows, -P:]
        rollout = sample_responses(actor, prompt_ids, prompt_mask.long(), task)
        rollout |= rewards(task, rollout)
        with torch.no_grad():
            rollout["value"] = value = values(critic, rollout)
        mask = rollout["mask"]
        advantage = advantages(rollout["reward"], value, settings.gamma, settings.lmbda)
        rollout["value_target"] = advantage + value  # what the critic should have said
        rollout["advantage"] = whiten(advantage, mask)
        update(actor, critic, optimizer, rollout, settings, task.config.temperature)
        print(
            f"iteration {iteration + 1}/{settings.iterations}  score {rollout['score'].mean():+.2f}  "
            f"KL {rollout['kl'].mean():.2f}  length {mask.sum(1).float().mean():.1f}  "
            f"{time.perf_counter() - started:.1f} s"
        )
    for input_ids, attention_mask in zip(rollout["input_ids"][:4], rollout["attention_mask"][:4], strict=True):
        print(repr(task.tokenizer.decode(input_ids[attention_mask == 1], skip_special_tokens=True)))
    return actor, critic


if __name__ == "__main__":
    main(tyro.cli(Settings))
