"""Bias and spread of k1, k2 and k3 about the exact KL, token by token: `python -m benchmarks.kl_estimators`

The policy is the embedded task's reference with noise added to its weights, a little or a lot. Both models' whole
distributions are known at every token, so each estimate can be held against the KL that it stands for.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import tyro
from transformers import PreTrainedModel

from benchmarks import rows
from textenv import TextGenConfig, build_task
from textenv.generation import generate, response_kl, score_responses
from textenv.kl import ESTIMATORS
from textenv.models.sampling import Sampling
from textenv.task import Task


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure."""

    responses: int = 256  # sampled from each policy
    noise: tuple[float, ...] = (0.02, 0.05, 0.1)  # added to every weight matrix, as a share of its own deviation
    seed: int = 0  # of noise and tokens


def perturbed(model: PreTrainedModel, noise: float, generator: torch.Generator) -> PreTrainedModel:
    """A copy with noise in its weight matrices."""
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            if parameter.dim() > 1:
                drawn = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                parameter.add_(noise * parameter.std() * drawn)
    return duplicate


def measure(task: Task, policy: PreTrainedModel, settings: Settings) -> list[dict]:
    """A row for each estimator: means, bias and deviation from the exact KL of the same token, nats."""
    prompts = task.prompts.select(range(settings.responses))
    generator = torch.Generator(task.device).manual_seed(settings.seed)
    generation = generate(task, policy, prompts, Sampling(temperature=task.config.temperature), generator)
    state = generation.state
    mask = state.response_mask
    reference = score_responses(task, state, prompts.texts).reference_log_prob[mask]
    exact = response_kl(policy, task.load_reference().model, generation, task.config.temperature)[mask]
    found = []
    for name, estimate in ESTIMATORS.items():
        error = estimate(generation.log_prob[mask], reference) - exact
        found.append(
            {
                "estimator": name,
                "tokens": int(mask.sum()),
                "exact_kl_per_token": float(exact.mean()),
                "bias": float(error.mean()),
                "bias_standard_error": float(error.std() / len(error) ** 0.5),
                "deviation": float(error.std()),
            }
        )
    return found


def main(settings: Settings) -> None:
    """Measures every policy and prints the table."""
    task = build_task(TextGenConfig())
    results = []
    for noise in settings.noise:
        generator = torch.Generator().manual_seed(settings.seed)
        policy = perturbed(task.load_reference().model, noise, generator)
        results += [{"noise": noise} | row for row in measure(task, policy, settings)]
    path = rows.write("kl_estimators", results, vars(settings))
    print("noise  estimator  exact KL      bias    (error)  deviation, nats a token")
    for row in results:
        print(
            f"{row['noise']:5.2f}  {row['estimator']:9}  {row['exact_kl_per_token']:8.4f}  {row['bias']:+8.4f}  "
            f"({row['bias_standard_error']:.4f})  {row['deviation']:9.4f}"
        )
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
