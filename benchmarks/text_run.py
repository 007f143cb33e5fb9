"""One training run on TextGen-v0 with evaluations on held-out prompts along the way.

`python -m benchmarks.text_run '{"algorithm": "ppo", "seed": 0}'` prints a row as JSON. Keys `train`, `settings` and
`algorithm_settings` override the preset; `env_arg` adds environment arguments; `measure_every` is in iterations. Used
by benchmarks.algorithms and benchmarks.ppo_details.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import torch

from agents.presets import defaults
from agents.run import build

RECORDED = ("score", "score_std", "gold", "kl_per_response", "length", "distinct_bigrams", "stopped")


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job and return its row: the curve of evaluations, time and settings."""
    torch.set_num_threads(job.get("threads", 1))
    config, settings, algorithm = defaults("TextGen-v0", job["algorithm"])
    env_arg = (*config.env_arg, *job.get("env_arg", ()))
    config = dataclasses.replace(config, seed=job["seed"], env_arg=env_arg, **job.get("train", {}))
    settings = dataclasses.replace(settings, **job.get("settings", {}))
    algorithm = dataclasses.replace(algorithm, **job.get("algorithm_settings", {}))
    experiment, trainer = build(config, settings, algorithm)

    def measure() -> dict[str, float]:
        numbers = experiment.summarize(experiment.evaluate(trainer.algorithm.networks.policy))
        progress = {"iteration": trainer.iteration, "tokens": trainer.steps, "seconds": trainer.seconds}
        return progress | {name: numbers[name] for name in RECORDED if name in numbers}

    started, curve = time.perf_counter(), [measure()]
    for iteration in trainer.iterate():
        if iteration.number % job.get("measure_every", 5) == 0 or iteration.number == config.iterations:
            curve.append(measure())
    parts = {"train": config, "settings": settings, "algorithm_settings": algorithm}
    used = {name: dataclasses.asdict(part) for name, part in parts.items()}
    results = {"curve": curve, "wall_seconds": time.perf_counter() - started, "threads": torch.get_num_threads()}
    return results | used


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
