"""What a run on text was started with: fingerprints of its models and prompts, and the evaluation prompts themselves.

Names in the settings stay the same when the files behind them are overwritten; fingerprints do not. They hash the whole
content that was loaded, whatever its source. Tensors are hashed on all cores, about a second per GB and core.
Functions have none, since what they do may depend on anything.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from agents.text.sharding import whole
from textenv.prompts.tokenized import Prompts
from textenv.rewards.reward_model import reward_models
from textenv.task import Task
from textenv.training.files import write_text

HELD_OUT = "held_out.jsonl"  # the evaluation prompts of a run, in its folder
REFERENCE, TOKENIZER, TRAINING, EVALUATION = "reference", "tokenizer", "prompts", "evaluation prompts"  # names
REWARD_MODEL = "reward model"  # and its number


def fingerprints(task: Task, training: Prompts, evaluation: Prompts) -> dict[str, str]:
    """Hashes by what they are of: reference, tokenizer, reward models, prompts."""
    found = {
        REFERENCE: of_weights(task.load_reference().model),
        TOKENIZER: of_tokenizer(task.tokenizer),
        TRAINING: of_prompts(training),
        EVALUATION: of_prompts(evaluation),
    }
    for number, model in enumerate(reward_models(task.reward), 1):
        tokenizer = "" if model.tokenizer is None else of_tokenizer(model.tokenizer)
        found[f"{REWARD_MODEL} {number}"] = of_weights(model.model) + tokenizer
    return found


def of_weights(model: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and bytes of a model's weights, the same on every device."""
    with whole(model), ThreadPoolExecutor() as pool:  # hashing lets other threads run
        digests = pool.map(_digest, sorted(model.state_dict().items()))
        return _sha256("".join(digests))


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary and the chat template."""
    return _sha256(json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]))


def of_prompts(prompts: Prompts) -> str:
    """SHA-256 of texts, tokens and further fields; of values that JSON lacks, only the types count."""
    rows = [ids[mask].tolist() for ids, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True)]
    return _sha256(json.dumps([prompts.texts, rows, prompts.fields], default=lambda value: type(value).__name__))


def save_prompts(path: Path, prompts: Prompts) -> None:
    """Write prompts as a file that the setting `prompts` takes. Fields that JSON lacks leave no file."""
    fields = [dict(zip(prompts.fields, values, strict=True)) for values in zip(*prompts.fields.values(), strict=True)]
    rows = [{"prompt": entry} | row for entry, row in zip(prompts.entries, fields or [{}] * len(prompts), strict=True)]
    try:
        lines = [json.dumps(row) for row in rows]
    except TypeError:  # the evaluation then reads the prompts from where the run read them
        return
    write_text(path, "".join(f"{line}\n" for line in lines))


def _digest(named: tuple[str, Tensor]) -> str:
    name, tensor = named
    data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(
        f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + hashlib.sha256(data).digest()
    ).hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
