"""PPO trains a real chat model on small sums: accuracy on held-out sums before and after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from agents.algorithms.ppo import PPO, PPOConfig
from agents.config import TrainConfig
from agents.text.config import TextConfig
from agents.text.experiment import TextExperiment
from agents.trainer import Trainer
from benchmarks.cuda.scale import Row, Scale
from textenv import TextGenConfig, build_task

ITERATIONS = 400  # more than fit into the time limit


def make_sums() -> list[dict[str, Any]]:
    """Prompts and answers for all sums of two numbers from 2 to 49."""
    numbers = range(2, 50)
    return [
        {"prompt": f"What is {a} + {b}? Answer with the number only.", "answer": a + b}
        for a in numbers
        for b in numbers
    ]


def sums(scale: Scale, folder: Path) -> Iterator[Row]:
    """Run PPO on sums with the model in `folder` for `scale.train_seconds`."""
    small = scale.device.type != "cuda"
    config = TextGenConfig(
        reference=str(folder),
        chat=True,
        prompts=make_sums(),
        reward="textenv.rewards.library:numeric_match",
        max_prompt_tokens=64,
        max_new_tokens=16,
        temperature=1.0,
        kl_coef=0.02,
    )
    rollout = 4 if small else 128
    train = TrainConfig(
        iterations=ITERATIONS,
        minibatch_size=rollout // 2,
        learning_rate=2e-6,
        critic_learning_rate=1e-5,
        schedule="constant",
    )
    settings = TextConfig(rollout_size=rollout, micro_batch_tokens=64 * 80, evaluation_prompts=4 if small else 256)
    experiment = TextExperiment(train, settings, build_task(config))
    trainer = Trainer(train, PPO(PPOConfig(epochs=2), experiment.network_factory), experiment.collector)
    yield {"case": "before", **_accuracy(experiment, trainer)}
    torch.set_float32_matmul_precision("high")
    started = time.perf_counter()
    for iteration in trainer.iterate():
        if iteration.number % 5 == 1:
            names = ("score", "kl_per_response", "length", "explained_variance", "tokens_per_second", "seconds")
            yield {"case": f"iteration {iteration.number}"} | {name: iteration.metrics[name] for name in names}
        if time.perf_counter() - started > scale.train_seconds:
            break
    torch.set_float32_matmul_precision("highest")
    yield {"case": f"after {trainer.iteration} iterations", **_accuracy(experiment, trainer)}


def _accuracy(experiment: TextExperiment, trainer: Trainer) -> Row:
    evaluation = experiment.evaluate(trainer.algorithm.networks.policy)
    summary = evaluation.summary()
    samples = [
        f"{prompt} -> {response}" for prompt, response in zip(evaluation.prompts, evaluation.responses, strict=True)
    ]
    return {"accuracy": summary["score"], "kl_per_response": summary["kl_per_response"], "samples": samples[:4]}
