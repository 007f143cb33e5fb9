"""What other people's learners gain on TextGen-v0: each client's example, run whole, over several seeds.

`python -m benchmarks.clients`, or with `--examples sb3_ppo --seeds 0 1 2` for some of it. Gains are in standard
deviations of the reference's scores on held-out prompts; the bar is half of one. About a minute and a half a run.
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
    """What to run. RLlib needs a virtual environment of its own: see examples/rllib_ppo.py."""

    examples: tuple[str, ...] = EXAMPLES  # modules of examples/
    seeds: tuple[int, ...] = (0, 1, 2)


def run(example: str, seed: int) -> dict[str, Any]:
    """One run of an example with its own settings."""
    started = time.perf_counter()
    found = importlib.import_module(example).main(seed=seed)
    return {
        "example": example,
        "seed": seed,
        "reference": float(found.reference.values.mean()),
        "reference_std": float(found.reference.values.std()),
        "before": float(found.before.values.mean()),
        "after": float(found.after.values.mean()),
        "gain": found.gain,
        "seconds": time.perf_counter() - started,
    }


def main(settings: Settings) -> None:
    """Runs all, adds them to what was measured before (each row names its commit), and prints a table."""
    sys.path.insert(0, str(rows.HERE.parent / "examples"))
    for example in settings.examples:
        for seed in settings.seeds:
            rows.add("clients", run(example, seed), ("example", "seed"), {"textenv": textenv.__version__})
    for example in settings.examples:
        gains = [row["gain"] for row in rows.measured("clients") if row["example"] == example]
        spread = f"({min(gains):.2f} to {max(gains):.2f})"
        print(f"{example:22} gain {mean(gains):.2f} {spread} standard deviations, {len(gains)} seeds")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
