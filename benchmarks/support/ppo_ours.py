"""One side of benchmarks.ppo_iteration: this library's PPO, which does an iteration for every line on its input.

`python -m benchmarks.support.ppo_ours JOB.json`, started by the benchmark. It answers with lines of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from agents.run import build
from benchmarks.support import ours


def settings_of(job: dict[str, Any]) -> dict[str, Any]:
    """The job as settings of training."""
    environment = {
        "reference": job["policy"],
        "reward": job["reward"],
        "prompts": job["prompts"],
        "max_prompt_tokens": job["prompt_width"],
        "max_new_tokens": job["response"],
        "temperature": job["temperature"],
        "stop_token_ids": [job["stop"]],
        "kl_coef": job["kl_coef"],
        "device": "cpu",
    }
    return {
        "env_arg": tuple(f"{name}={json.dumps(value)}" for name, value in environment.items()),
        "iterations": job["iterations"],
        "minibatch_size": job["rows"] // job["minibatches"],
        "rollout_size": job["rows"],
        "epochs": job["epochs"],
        "learning_rate": job["learning_rate"],
        "critic_learning_rate": job["learning_rate"],
        "schedule": "constant",
        "critic": "reward-model",
        "held_out": job["held_out"],
    } | ours.read_flags(job["flags"])


def main(job: dict[str, Any]) -> None:
    """Build the trainer, and do an iteration for every line on the input."""
    torch.set_num_threads(1)
    steps: list[Any] = []
    register_optimizer_step_post_hook(lambda *_: steps.append(None))
    experiment, trainer = build(*ours.configure(settings_of(job), job["policy"]))
    prompt_tokens = int(experiment.prompts.attention_mask.sum())  # type: ignore[attr-defined]
    print("RESULT", json.dumps({"prompt_tokens": prompt_tokens, "torch": torch.__version__}), flush=True)
    iterations = trainer.iterate()
    for _ in sys.stdin:
        steps.clear()
        clock, cpu = time.perf_counter(), time.process_time()
        metrics = next(iterations).metrics
        row = {"seconds": time.process_time() - cpu, "clock_seconds": time.perf_counter() - clock}
        row |= {"optimizer_steps": len(steps), "mean_length": metrics["length"]}
        print("RESULT", json.dumps(row), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
