"""Builds the embedded task's weights: `python -m textenv.reviews.build --output DIR`.

The steps: corpus, tokenizer, supervised model, samples, noisy choices by the gold rater, reward model, model card.
These are stages 1 and 2 of RLHF, by the public functions of textenv.training. One seed, one command.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from textenv.models.encoding import encode, encode_pairs
from textenv.reviews.card import RECORD, measure
from textenv.reviews.grammar.writer import sample_review
from textenv.reviews.measure import as_pairs, compare
from textenv.reviews.prompts import held_out_prompts, train_prompts
from textenv.reviews.sampling import MAX_NEW_TOKENS, sample_responses
from textenv.reviews.tokenizer import END, MAX_LENGTH, PAD, train_tokenizer
from textenv.settings import check_types
from textenv.training.reward_model import RewardConfig, fit, load_base
from textenv.training.supervised import SupervisedConfig, fine_tune

DEFAULT_SUPERVISED = SupervisedConfig(
    learning_rate=1e-2, batch_size=32, optimizer="muon", loss_on="all", max_length=MAX_LENGTH
)


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Settings of a build."""

    output: Path = Path(__file__).parent  # folder for supervised/, reward_model/, training.json and README.md
    seed: int = 0  # of everything except the prompts, which are part of the task
    threads: int = 1  # CPU threads; a rebuild needs the same number to reproduce the weights
    reviews_per_prompt: int = 96  # corpus reviews per training prompt
    pairs_per_prompt: int = 8  # preference pairs per training prompt, sampled at temperature 1 for variety
    noise: float = 0.5  # the odds of a choice against the gold scores are exp(-difference / noise)
    supervised: SupervisedConfig = field(default_factory=lambda: DEFAULT_SUPERVISED)  # stage 1
    reward: RewardConfig = field(
        default_factory=lambda: RewardConfig(learning_rate=1e-3, epochs=2, batch_size=32, max_length=MAX_LENGTH)
    )  # stage 2

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("threads", "reviews_per_prompt", "pairs_per_prompt", "noise"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.reward.heads > 1 or self.reward.models > 1:
            raise ValueError("the embedded task has one reward model with one head; leave reward.heads and .models 1.")


Corpus = list[tuple[str, str]]  # prompt, review


def build(config: BuildConfig) -> dict[str, float]:
    """Build everything into `config.output`. Returns the figures of the model card."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    record = {"settings": {key: value for key, value in asdict(config).items() if key != "output"}}
    model, tokenizer, stage = train_supervised(config)
    record |= stage | train_reward(config, model, tokenizer)
    (config.output / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return measure(config.output)


def train_supervised(config: BuildConfig) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerBase, dict[str, float]]:
    """Stage 1. Returns model, tokenizer and figures for the card."""
    started = time.perf_counter()
    corpus = write_corpus(train_prompts() * config.reviews_per_prompt, config.seed)
    tokenizer = train_tokenizer(f"{prompt} {review}" for prompt, review in corpus)
    check_budgets(tokenizer, corpus)
    model = new_model(tokenizer)
    loss = fine_tune(model, tokenizer, corpus, config.supervised)
    _save(model, tokenizer, config.output / "supervised")
    minutes = (time.perf_counter() - started) / 60
    return model, tokenizer, {"supervised_loss": loss, "reviews": len(corpus), "supervised_minutes": minutes}


def train_reward(config: BuildConfig, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Stage 2. Returns figures for the card."""
    started = time.perf_counter()
    prompts = [p for p in train_prompts() for _ in range(2 * config.pairs_per_prompt)]
    samples = sample_responses(model, tokenizer, prompts, config.seed + 2, temperature=1.0)
    comparisons = compare(list(zip(samples[::2], samples[1::2], strict=True)), config.noise, config.seed)
    reward_model, _ = load_base(config.output / "supervised", config.seed)
    fit(reward_model, as_pairs(tokenizer, comparisons), config.reward)
    _save(reward_model, tokenizer, config.output / "reward_model")
    return {"pairs": len(comparisons), "reward_minutes": (time.perf_counter() - started) / 60}


def write_corpus(prompts: list[str], seed: int) -> Corpus:
    """A list of (prompt, review), one for each prompt."""
    rng = random.Random(seed)
    return [(prompt, sample_review(prompt, rng)) for prompt in prompts]


def check_budgets(tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> None:
    """Raise ValueError if a prompt exceeds 20 tokens, or over 3% of the reviews exceed 48 with the end token."""
    longest = max(map(len, encode(tokenizer, [*train_prompts(), *held_out_prompts()])))
    responses = [ids for _, ids in encode_pairs(tokenizer, corpus[:4096])]
    fitting = sum(len(ids) < MAX_NEW_TOKENS for ids in responses) / len(responses)  # one more is the end token
    if longest > 20 or fitting < 0.97:
        raise ValueError(
            f"the longest prompt takes {longest} tokens (20 allowed), {fitting:.1%} of the reviews fit into "
            f"{MAX_NEW_TOKENS} (97% needed). Rename the product or lower MAX_WORDS in grammar/writer.py."
        )


def new_model(tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    """An untrained GPT-2 of about a million parameters, without dropout."""
    end, pad = (tokenizer.get_vocab()[token] for token in (END, PAD))
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=MAX_LENGTH,
            n_embd=128,
            n_layer=4,
            n_head=2,
            activation_function="gelu_pytorch_tanh",  # the function of GPT-2 as a single kernel
            initializer_range=0.08,  # about 1/sqrt(width); GPT-2's 0.02 suits a width of 768 and trains slowly here
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            summary_first_dropout=0.0,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=pad,
        )
    )


def _save(model, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    import tyro

    print(build(tyro.cli(BuildConfig)))
