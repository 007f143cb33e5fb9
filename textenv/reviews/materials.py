r"""What the build trains on, as files, so that its stages can be done by commands.

    python -m textenv.reviews.materials --output work/materials
    OMP_NUM_THREADS=1 python -m agents supervised --base work/materials/untrained --data work/materials/corpus.jsonl \
        --output work/supervised --optimizer muon --learning-rate 1e-2 --loss-on all --max-length 128
    python -m textenv.reviews.materials --output work/pairs --supervised work/supervised
    OMP_NUM_THREADS=1 python -m agents reward-model --base work/supervised --data work/pairs/pairs.jsonl \
        --output work/reward_model --learning-rate 1e-3 --max-length 128

The commands hold rows out for their cards, and the build trains on all, so the weights differ; the card of the weights
that are shipped says by how much its figures do. In a file a response that was cut off by its budget ends like any
other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from textenv.reviews.build import BuildConfig, check_budgets, new_model, write_corpus
from textenv.reviews.measure import compare
from textenv.reviews.prompts import train_prompts
from textenv.reviews.sampling import sample_responses
from textenv.reviews.tokenizer import train_tokenizer
from textenv.settings import check_new_folder

DEFAULT = BuildConfig()


def write_materials(
    output: Path,
    supervised: Path | None = None,
    seed: int = DEFAULT.seed,
    reviews_per_prompt: int = DEFAULT.reviews_per_prompt,
    pairs_per_prompt: int = DEFAULT.pairs_per_prompt,
) -> None:
    """Write an untrained model and the corpus; or, with a supervised model, preference pairs of its responses.

    Args:
        output: New folder for untrained/ and corpus.jsonl, or for pairs.jsonl.
        supervised: Folder of a model that was trained on the corpus.
        seed: Of everything except the prompts.
        reviews_per_prompt: Reviews of the corpus for each training prompt.
        pairs_per_prompt: Pairs of responses for each training prompt, which the gold rater chooses from with noise.
    """
    check_new_folder(output, "output folder")
    if supervised is None:
        _write_stage_1(output, seed, reviews_per_prompt)
    else:
        _write_stage_2(output, supervised, seed, pairs_per_prompt)


def _write_stage_1(output: Path, seed: int, reviews_per_prompt: int) -> None:
    corpus = write_corpus(train_prompts() * reviews_per_prompt, seed)
    tokenizer = train_tokenizer(f"{prompt} {review}" for prompt, review in corpus)
    check_budgets(tokenizer, corpus)
    torch.manual_seed(seed)
    new_model(tokenizer).save_pretrained(output / "untrained")
    tokenizer.save_pretrained(output / "untrained")
    _write(output / "corpus.jsonl", ({"prompt": prompt, "response": review} for prompt, review in corpus))


def _write_stage_2(output: Path, supervised: Path, seed: int, pairs_per_prompt: int) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(supervised), AutoTokenizer.from_pretrained(supervised)
    prompts = [prompt for prompt in train_prompts() for _ in range(2 * pairs_per_prompt)]
    samples = sample_responses(model, tokenizer, prompts, seed + 2, temperature=1.0)
    choices = compare(list(zip(samples[::2], samples[1::2], strict=True)), DEFAULT.noise, seed)
    output.mkdir(parents=True, exist_ok=True)
    rows = (
        {"prompt": chosen.prompt, "chosen": chosen.text.strip(), "rejected": rejected.text.strip()}
        for chosen, rejected, _ in choices
    )
    _write(output / "pairs.jsonl", rows)


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    import tyro

    tyro.cli(write_materials)
