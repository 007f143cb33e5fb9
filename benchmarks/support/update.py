"""One PPO update in a process of its own, for benchmarks.memory: here, and as it is usually written.

`python -m benchmarks.support.update JOB.json`, started by the benchmark. The usual way holds the logits of all response
tokens of a micro-batch, [m, R, V], and differentiates through log_softmax; actor's and critic's losses are added and go
backward together. Both sides train an actor and a critic with AdamW, in float32, and hold a frozen reference; the
rollout is over when the measurement starts.
"""

from __future__ import annotations

import copy
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.support import models, ours
from benchmarks.support.measure import PeakMemory, return_memory
from textenv.models.language_model import find_backbone

CLIP = 0.2


def constant(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that takes no time and no memory."""
    return [float(len(response) % 7) for response in responses]


def own_update(job: dict[str, Any], model: Any) -> PeakMemory:
    """The update of an iteration of this library's trainer, one micro-batch at a time."""
    rows, prompt, response = job["rows"], job["prompt"], job["response"]
    task = models.task_of(model, rows + 1, prompt, response, reward=constant)
    settings = {"rollout_size": rows, "minibatch_size": rows, "iterations": 1, "epochs": 1}
    settings |= ours.micro_batch(job["micro_rows"], prompt + response) | ours.read_flags(job["flags"])
    memory = PeakMemory()

    def rollout_is_over() -> None:
        return_memory()
        memory.__enter__()

    trainer = ours.trainer_on(task, settings, rollout_is_over)
    list(trainer.iterate())
    memory.__exit__()
    return memory


class Plain:
    """Actor, critic and reference, and an update on whole logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.reference = model
        self.actor: Any = copy.deepcopy(model).requires_grad_(True)
        self.backbone: Any = copy.deepcopy(find_backbone(model)).requires_grad_(True)
        self.head = nn.Linear(model.config.get_text_config().hidden_size, 1)
        parameters = [*self.actor.parameters(), *self.backbone.parameters(), *self.head.parameters()]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)

    def log_probs(self, model: Any, ids: Tensor, prompt: int) -> Tensor:
        """Log-probabilities of the response tokens of texts [m, P + R]. Returns [m, R]."""
        logits = model(input_ids=ids, use_cache=False).logits[:, prompt - 1 : -1]  # [m, R, V]
        log_probs = logits.float().log_softmax(-1)  # [m, R, V]
        return log_probs.gather(-1, ids[:, prompt:, None])[..., 0]

    def values(self, ids: Tensor, prompt: int) -> Tensor:
        """Values before each response token, [m, R]."""
        hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        return self.head(hidden)[:, prompt - 1 : -1, 0]

    def update(self, ids: Tensor, old: Tensor, advantage: Tensor, prompt: int, micro_rows: int) -> None:
        """One optimizer step on all rows. ids: [B, P + R]; old log-probabilities and advantages: [B, R]."""
        for rows in torch.arange(len(ids)).split(micro_rows):
            log_prob, value = self.log_probs(self.actor, ids[rows], prompt), self.values(ids[rows], prompt)
            ratio = (log_prob - old[rows]).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            policy_loss = -torch.minimum(ratio * advantage[rows], clipped * advantage[rows]).mean()
            value_loss = 0.5 * (value - advantage[rows]).square().mean()
            ((policy_loss + value_loss) * len(rows) / len(ids)).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain_update(job: dict[str, Any], model: Any) -> PeakMemory:
    """An update on random responses."""
    generator = torch.Generator().manual_seed(0)
    shape = (job["rows"], job["prompt"] + job["response"])
    ids = torch.randint(model.vocabulary, shape, generator=generator)
    plain = Plain(model.model)
    with torch.no_grad():  # the rollout's part; row by row, so that nothing large stays in the allocator
        old = torch.cat([plain.log_probs(plain.reference, row[None], job["prompt"]) for row in ids])
    advantage = torch.randn(old.shape, generator=generator)
    return_memory()
    with PeakMemory() as memory:
        plain.update(ids, old, advantage, job["prompt"], job["micro_rows"])
    return memory


def main(job: dict[str, Any]) -> None:
    """Do the update and print the memory before it and at its peak."""
    torch.set_num_threads(1)
    model = models.language_model(job["model"], job["smollm2"] and Path(job["smollm2"]))
    started = time.process_time()
    memory = (own_update if job["side"] == "ours" else plain_update)(job, model)
    row = {"before_bytes": memory.before, "peak_bytes": memory.peak, "cpu_seconds": time.process_time() - started}
    scale = 1 if sys.platform == "darwin" else 1024
    row["peak_of_process_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    print("RESULT", json.dumps(row))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
