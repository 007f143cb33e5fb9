"""The other side of benchmarks.ppo_iteration: TRL's PPOTrainer, in an environment of its own, without this library.

`python ppo_trl.py JOB.json`, started by the benchmark. TRL's loop asks its data loader for the next prompts once in an
iteration; the loader here answers when a line arrives on the input, and reports what happened since the last one.
"""

# pyright: reportMissingImports=none

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import transformers
import trl
from datasets import Dataset
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Turns:
    """A data loader that gives all prompts for every line on the input, and measures the time between."""

    def __init__(self, loader: Any, steps: list[Any], lengths: list[float]) -> None:
        self.loader, self.steps, self.lengths = loader, steps, lengths

    def __iter__(self) -> Iterator[Any]:
        for _ in sys.stdin:
            batch = next(iter(self.loader))
            self.steps.clear()
            self.lengths.clear()
            clock, cpu = time.perf_counter(), time.process_time()
            yield batch
            row = {"seconds": time.process_time() - cpu, "clock_seconds": time.perf_counter() - clock}
            row |= {"optimizer_steps": len(self.steps), "mean_length": sum(self.lengths) / len(self.lengths)}
            print("RESULT", json.dumps(row), flush=True)
        raise SystemExit


def note_lengths(lengths: list[float]) -> None:
    """Have TRL's truncation add the length of every response, its stop token included, to `lengths`."""
    truncate = ppo_trainer.truncate_response

    def noted(stop: int, pad: int, responses: torch.Tensor) -> torch.Tensor:
        stopped = responses == stop
        lengths.extend(torch.where(stopped.any(1), stopped.int().argmax(1) + 1, responses.shape[1]).tolist())
        return truncate(stop, pad, responses)

    ppo_trainer.truncate_response = noted


def config_of(job: dict[str, Any]) -> PPOConfig:
    """The job as TRL's settings.

    A whole rollout is one device batch, without accumulation: otherwise `num_mini_batches` is not the number of
    optimizer steps in an epoch.
    """
    return PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=job["rows"],
        gradient_accumulation_steps=1,
        num_ppo_epochs=job["epochs"],
        num_mini_batches=job["minibatches"],
        total_episodes=job["rows"] * job["iterations"],
        local_rollout_forward_batch_size=min(job["trl_forward_rows"], job["rows"]),
        response_length=job["response"],
        stop_token_id=job["stop"],
        temperature=job["temperature"],
        kl_coef=job["kl_coef"],
        learning_rate=job["learning_rate"],
        vf_coef=1.0,
        missing_eos_penalty=None,
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )


def main(job: dict[str, Any]) -> None:
    """Build TRL's trainer and run its loop until the input ends."""
    torch.set_num_threads(1)
    steps: list[Any] = []
    lengths: list[float] = []
    register_optimizer_step_post_hook(lambda *_: steps.append(None))
    note_lengths(lengths)
    tokenizer = AutoTokenizer.from_pretrained(job["policy"], padding_side="left")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(job["pad"])
    prompts = Dataset.from_list([{"input_ids": ids} for ids in job["prompt_ids"]])
    # float32 on both sides, whatever the files hold
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32) for _ in range(2))
    if policy.generation_config.use_cache is False:
        raise ValueError(f"{job['policy']} would generate without a cache, which is no comparison.")
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(job["reward"], num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    trainer = PPOTrainer(
        args=config_of(job),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=prompts,
        eval_dataset=prompts,
    )
    trainer.dataloader = Turns(trainer.dataloader, steps, lengths)
    ready = {"prompt_tokens": sum(map(len, job["prompt_ids"])), "torch": torch.__version__}
    ready |= {"trl": trl.__version__, "transformers": transformers.__version__}
    print("RESULT", json.dumps(ready), flush=True)
    trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
