"""The policy of a run by itself: a Transformers folder, which also says how the policy samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Dict, Discrete
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from agents.reporting.files import is_number
from textenv.models.loading import load_model, quietly
from textenv.task import Task

SAMPLING = "generation_config.json"  # Transformers' name
WRITE_AGAIN = "remove the run's summary.json, and train --resume writes the policy again."


def export_policy(model: PreTrainedModel, task: Task, folder: Path) -> None:
    """Write the language model with its tokenizer. Its generation config samples as the policy does."""
    with quietly():
        model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)
    sampling = {"do_sample": True, "temperature": task.config.temperature, "top_k": 0, "top_p": 1.0}
    GenerationConfig(**sampling, eos_token_id=list(task.stop_token_ids)).save_pretrained(folder)


class TextPlayer:
    """The policy of a run on a plain text environment, sampling at its temperature: see `agents.play.Player`.

    It forwards the whole context at every token, which is right for every causal model, and slow for long responses.
    """

    def __init__(self, folder: Path, env: gym.Env, seed: int) -> None:
        """Raises ValueError if the policy is damaged, or the environment has another vocabulary or is no text."""
        self.temperature = _temperature(folder)  # first: loading reads the file too, and would name another remedy
        self.model = load_model(AutoModelForCausalLM, str(folder), torch.device("cpu"), torch.float32).eval()
        self.generator = torch.Generator().manual_seed(seed)
        actions, observations = env.action_space, env.observation_space
        width = self.model.config.get_text_config().vocab_size
        reads = isinstance(observations, Dict) and "input_ids" in observations.spaces
        if not (reads and isinstance(actions, Discrete) and actions.n == width):
            raise ValueError(
                f"the policy in {str(folder)!r} writes one of {width} tokens, from input_ids and attention_mask; the "
                f"environment has {observations} and {actions}. Make the environment of the run, with its arguments."
            )

    def __call__(self, observation: Any, info: dict[str, Any]) -> np.int64:
        """The next token. `info` is that of the last reset or step; its `action_mask`, if there is one, applies."""
        weights = self.log_probs(observation, info).exp()
        return np.int64(torch.multinomial(weights, 1, generator=self.generator).item())

    @torch.no_grad()
    def log_probs(self, observation: Any, info: dict[str, Any]) -> Tensor:
        """Log-probabilities of the next token, float32 [V]."""
        context = torch.as_tensor(observation["input_ids"])[torch.as_tensor(observation["attention_mask"]) == 1]
        logits: Tensor = self.model(input_ids=context[None]).logits[0, -1].float() / self.temperature
        if "action_mask" in info:
            logits = logits.masked_fill(torch.as_tensor(info["action_mask"]) == 0, -torch.inf)
        return logits.log_softmax(-1)


def _temperature(folder: Path) -> float:
    """The temperature in the generation config of a policy. Raises ValueError if the file is damaged or missing."""
    file = folder / SAMPLING
    try:
        temperature = json.loads(file.read_bytes())["temperature"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} cannot be read ({error}); {WRITE_AGAIN}") from error
    if not (is_number(temperature) and temperature > 0):
        raise ValueError(f"{str(file)!r} must have a temperature above 0, got {temperature!r}; {WRITE_AGAIN}")
    return float(temperature)
