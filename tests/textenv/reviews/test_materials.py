"""The embedded task's stages by commands."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from agents.__main__ import main
from textenv.models.loading import load_tokenizer, load_trainable_lm
from textenv.reviews.build import DEFAULT_SUPERVISED
from textenv.reviews.materials import write_materials
from textenv.reviews.prompts import train_prompts
from textenv.training.data import read_rows, read_supervised
from textenv.training.loop import split_rows
from textenv.training.supervised import fine_tune


@pytest.mark.slow
def test_stage_1_by_command(tmp_path):
    """By command, the model learns what `fine_tune` teaches it in the build, to the same bits; then it gives pairs."""
    write_materials(tmp_path / "m", reviews_per_prompt=1)
    base, data = str(tmp_path / "m" / "untrained"), tmp_path / "m" / "corpus.jsonl"
    lines = data.read_text().splitlines()[:200]
    data.write_text("\n".join(lines))
    flags = ["--optimizer", "muon", "--learning-rate", "1e-2", "--loss-on", "all", "--max-length", "128"]
    main(["supervised", "--base", base, "--data", str(data), "--output", str(tmp_path / "s"), *flags])
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "s").state_dict()

    model, tokenizer = load_trainable_lm(base), load_tokenizer(base)
    rows, _ = split_rows(read_supervised(data), 0.05, 0)
    fine_tune(model, tokenizer, [(row["prompt"], row["response"]) for row in rows], DEFAULT_SUPERVISED)
    assert all(torch.equal(weight, trained[name]) for name, weight in model.state_dict().items())

    write_materials(tmp_path / "p", supervised=tmp_path / "s", pairs_per_prompt=1)
    pairs = read_rows(tmp_path / "p" / "pairs.jsonl")
    assert [row["prompt"] for row in pairs] == train_prompts()
    assert json.dumps(pairs[0]) and any(row["chosen"] != row["rejected"] for row in pairs)
