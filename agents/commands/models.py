"""Commands that train models from your own data."""

from __future__ import annotations

from pathlib import Path

import tyro

from textenv.training.loop import LOOP, LoopConfig
from textenv.training.reward_model import DEFAULT, RewardConfig, train_reward_model
from textenv.training.supervised import SupervisedConfig
from textenv.training.supervised_job import train_supervised

SUPERVISED = SupervisedConfig()


def supervised_command(
    base: str,
    data: Path,
    output: Path,
    config: tyro.conf.OmitArgPrefixes[SupervisedConfig] = SUPERVISED,
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = LOOP,
) -> None:
    """Fine-tune a causal language model on texts, prompts with responses, or chats.

    Args:
        base: Folder or Hugging Face Hub name of a causal language model.
        data: JSONL file of {text}, of {prompt, response} (or completion), or of {messages}, a chat.
        output: New folder for the model, its tokenizer and its card, README.md.
        config: Training settings.
        loop: How the training is run.
    """
    train_supervised(base, data, output, config, loop)


def reward_model_command(
    base: str,
    data: Path,
    output: Path,
    config: tyro.conf.OmitArgPrefixes[RewardConfig] = DEFAULT,
    loop: tyro.conf.OmitArgPrefixes[LoopConfig] = LOOP,
) -> None:
    """Train a reward model, or an ensemble, from preference pairs or labeled texts; a card is written beside it.

    Args:
        base: Folder or Hugging Face Hub name of a causal language model or a sequence-classification model.
        data: JSONL file of {prompt?, chosen, rejected, margin?}, texts or chats, or of {prompt?, text, label}, where
            label is 0 or 1. A margin is by how much the score of chosen should exceed that of rejected.
        output: Folder to write the reward model to.
        config: Training settings.
        loop: How the training is run.
    """
    train_reward_model(base, data, output, config, loop)
