"""Gains of other libraries' learners on TextGen-v0: each client example at full size, over several seeds.

`python -m benchmarks.clients`, or a part with `--examples sb3_ppo --seeds 0 1 2`. Gains are in standard deviations of
the reference's scores on held-out prompts; 0.5 is the minimum we expect. A run takes half a minute to eight minutes.
"""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import dataclass
from statistics import mean
from typing import Any

import tyro

import textenv
from benchmarks import rows

EXAMPLES = (
    "sb3_ppo",
    "sb3_maskable_ppo",
    "sb3_dqn",
    "vector_env_ppo",
    "tianshou_ppo",
    "torchrl_ppo",
    "torchrl_gym_wrapper",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Selection of the runs. RLlib needs a virtual environment of its own: see examples/rllib_ppo.py."""

    examples: tuple[str, ...] = EXAMPLES  # module names in examples/
    seeds: tuple[int, ...] = (0, 1, 2)


def run(example: str, seed: int) -> dict[str, Any]:
    """Run an example with its default settings; returns its row."""
    started = time.perf_counter()
    comparison = importlib.import_module(example).main(seed=seed)
    return {
        "example": example,
        "seed": seed,
        "reference": float(comparison.reference.values.mean()),
        "reference_std": float(comparison.reference.values.std()),
        "before": float(comparison.before.values.mean()),
        "after": float(comparison.after.values.mean()),
        "gain": comparison.gain,
        "seconds": time.perf_counter() - started,
    }


def main(settings: Settings) -> None:
    """Run everything, add the rows to the results file, and print a table."""
    sys.path.insert(0, str(rows.HERE.parent / "examples"))
    for example in settings.examples:
        for seed in settings.seeds:
            rows.add("clients", run(example, seed), ("example", "seed"), {"textenv": textenv.__version__})
    for example in settings.examples:
        gains = [row["gain"] for row in rows.read_rows("clients") if row["example"] == example]
        spread = f"({min(gains):.2f} to {max(gains):.2f})"
        print(f"{example:22} gain {mean(gains):.2f} {spread} standard deviations, {len(gains)} seeds")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
