"""The on-policy learners' losses as their papers write them: plain Python over rows and steps.

Only the gradient is left to torch. Nothing here is used by the learners.
"""

from __future__ import annotations

import statistics

import torch

TEMPERATURE = 0.7


def perturb(module: torch.nn.Module, scale: float = 0.02) -> None:
    """Moves the weights, so that ratios and values differ from the recorded ones."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def gradients(module: torch.nn.Module) -> torch.Tensor:
    """All gradients in one vector; zeros where there are none."""
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
    return torch.cat([gradient.flatten() for gradient in found])


def distribution(trainer, data) -> torch.Tensor:
    """Log π of every token at every step, [B, R, V], by one plain forward pass of the language model."""
    width = data["input_ids"].shape[1] - data["mask"].shape[1]
    logits = trainer.algorithm.networks.policy.model(
        input_ids=data["input_ids"],
        attention_mask=data["attention_mask"].long(),
        position_ids=(data["attention_mask"].long().cumsum(1) - 1).clamp_min(0),
    ).logits[:, width - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1)


def steps(data) -> list[tuple[int, int]]:
    """(row, t) of every real step."""
    return [(row, t) for row in range(len(data)) for t in range(int(data["mask"][row].sum()))]


def advantages(trainer, data) -> tuple[dict, dict]:
    """Advantage and value target of every step, as {(row, t): number}; a rollout's recorded values are V."""
    config, places = trainer.algorithm.config, steps(data)
    lengths = [int(row.sum()) for row in data["mask"]]
    coef = 0.0 if getattr(config, "kl_loss", "none") != "none" else 1.0  # a KL in the loss is not in the reward
    reward = {
        (row, t): float(data["step_score"][row, t]) - coef * float(data["kl_coef"][row]) * float(data["kl"][row, t])
        for row, t in places
    }
    if "critic" not in trainer.algorithm.networks.trained:
        total = [sum(reward[row, t] for t in range(lengths[row])) for row in range(len(data))]
        own = group_advantages(total, trainer.algorithm.group_size, config)
        return {(row, t): own[row] for row, t in places}, {}
    value = {place: float(data["state_value"][place]) for place in places}
    gamma, lmbda = config.gamma, getattr(config, "lmbda", 1.0)
    raw = {}
    for row, t in reversed(places):
        delta = reward[row, t] + gamma * value.get((row, t + 1), 0.0) - value[row, t]
        raw[row, t] = delta + gamma * lmbda * raw.get((row, t + 1), 0.0)
    target = {place: raw[place] + value[place] for place in places}
    mean, deviation = statistics.fmean(raw.values()), statistics.pstdev(raw.values())
    return {place: (one - mean) / deviation if config.whiten else one for place, one in raw.items()}, target


def group_advantages(total: list[float], group: int, config) -> list[float]:
    """RLOO's and GRPO's."""
    found = []
    for start in range(0, len(total), group):
        own = total[start : start + group]
        for index, one in enumerate(own):
            if not hasattr(config, "normalize"):
                found.append(one - statistics.fmean(own[:index] + own[index + 1 :]))
            else:
                deviation = statistics.stdev(own) + 1e-6 if config.normalize else 1.0
                found.append((one - statistics.fmean(own)) / deviation)
    return found


def surrogate(config, advantage: float, log_prob: torch.Tensor, old: float) -> torch.Tensor:
    """The policy loss of one step: clipped where the algorithm has a ratio, else −A log π."""
    if not hasattr(config, "clip"):
        return -advantage * log_prob
    ratio = (log_prob - old).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - config.clip, 1 + config.clip))
    if getattr(config, "dual_clip", 0) and advantage < 0:
        loss = torch.minimum(loss, torch.tensor(-advantage * config.dual_clip))
    return loss


def value_loss(config, value: torch.Tensor, old: float, target: float) -> torch.Tensor:
    """½ (V − target)², clipped where the algorithm has a value clip."""
    loss = (value - target).square()
    if getattr(config, "value_clip", 0):
        near = old + (value - old).clamp(-config.value_clip, config.value_clip)
        loss = torch.maximum(loss, (near - target).square())
    return 0.5 * loss


def kl_loss(config, log_prob: torch.Tensor, reference: float) -> torch.Tensor:
    """k2 or k3."""
    difference = log_prob - reference
    return 0.5 * difference**2 if config.kl_loss == "k2" else (-difference).exp() - 1 + difference


def whole_loss(trainer, data) -> torch.Tensor:
    """What one optimizer step on these rows minimizes, with its graph."""
    config, (advantage, target) = trainer.algorithm.config, advantages(trainer, data)
    log_probs = distribution(trainer, data)
    lengths = [int(row.sum()) for row in data["mask"]]
    if target:
        critic = trainer.algorithm.networks.critic
        values = critic.values(data)
    total = torch.zeros(())
    for row, t in steps(data):
        log_prob = log_probs[row, t, data["action"][row, t]]
        loss = surrogate(config, advantage[row, t], log_prob, float(data["action_log_prob"][row, t]))
        if target:
            old = float(data["state_value"][row, t])
            loss = loss + value_loss(config, values[row, t], old, target[row, t])
        if getattr(config, "entropy_coef", 0):
            loss = loss + config.entropy_coef * (log_probs[row, t].exp() * log_probs[row, t]).sum()
        if getattr(config, "kl_loss", "none") != "none":
            loss = loss + float(data["kl_coef"][row]) * kl_loss(
                config, log_prob, float(data["reference_log_prob"][row, t])
            )
        by_sequence = getattr(config, "aggregation", "token") == "sequence"
        total = total + loss / (len(lengths) * lengths[row] if by_sequence else sum(lengths))
    return total
