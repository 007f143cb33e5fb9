"""Bias and standard deviation of k1, k2 and k3 against the exact KL per token: `python -m benchmarks.kl_estimators`

Policies are copies of the embedded task's reference with noise of several sizes added to the weights. Both models'
distributions are known at every token, so each estimate can be compared with the exact KL.
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
    """Sizes and repeats."""

    responses: int = 256  # sampled from each policy
    noise: tuple[float, ...] = (0.02, 0.05, 0.1)  # added to every weight matrix, as a share of its standard deviation
    seed: int = 0  # of noise and tokens


def perturbed(model: PreTrainedModel, noise: float, generator: torch.Generator) -> PreTrainedModel:
    """A copy of the model with noise added to its weight matrices."""
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            if parameter.dim() > 1:
                random = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                parameter.add_(noise * parameter.std() * random)
    return duplicate


def measure(task: Task, policy: PreTrainedModel, settings: Settings) -> list[dict]:
    """One row per estimator: mean exact KL, and bias and standard deviation of the estimate's error, nats per token."""
    prompts = task.prompts.select(range(settings.responses))
    generator = torch.Generator(task.device).manual_seed(settings.seed)
    generation = generate(task, policy, prompts, Sampling(temperature=task.config.temperature), generator)
    state = generation.state
    mask = state.response_mask
    reference = score_responses(task, state, prompts.texts).reference_log_prob[mask]
    exact = response_kl(policy, task.load_reference().model, generation, task.config.temperature)[mask]
    results = []
    for name, estimate in ESTIMATORS.items():
        error = estimate(generation.log_prob[mask], reference) - exact
        results.append(
            {
                "estimator": name,
                "tokens": int(mask.sum()),
                "exact_kl_per_token": float(exact.mean()),
                "bias": float(error.mean()),
                "bias_standard_error": float(error.std() / len(error) ** 0.5),
                "deviation": float(error.std()),
            }
        )
    return results


def main(settings: Settings) -> None:
    """Measure every policy and print the table."""
    task = build_task(TextGenConfig())
    results = []
    for noise in settings.noise:
        generator = torch.Generator().manual_seed(settings.seed)
        policy = perturbed(task.load_reference().model, noise, generator)
        results += [{"noise": noise} | row for row in measure(task, policy, settings)]
    path = rows.write("kl_estimators", results, vars(settings))
    print("noise  estimator  exact KL      bias    (error)  deviation, nats per token")
    for row in results:
        print(
            f"{row['noise']:5.2f}  {row['estimator']:9}  {row['exact_kl_per_token']:8.4f}  {row['bias']:+8.4f}  "
            f"({row['bias_standard_error']:.4f})  {row['deviation']:9.4f}"
        )
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
