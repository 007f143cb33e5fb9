"""Stages 1 and 2 of RLHF: known answers are learned, data is validated, and pad == end is handled."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

import textenv.training.reward_model
from tests.support import tiny_tokenizers
from textenv.rewards.reward_model import last_token_scores
from textenv.training.data import read_rows
from textenv.training.loop import split_rows
from textenv.training.preferences import Labeled, Pair, Pairs, encode_rows
from textenv.training.reward_model import (
    RewardConfig,
    load_base,
    score_tokens,
    train_reward_model,
)
from textenv.training.supervised import SupervisedConfig, fine_tune

WORDS = ["good", "bad", "a", "b", "c", "d"]
FAST = RewardConfig(learning_rate=1e-2, epochs=2, batch_size=16, max_length=16, held_out=0.25)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Six words and an end token that is also the pad token; spaces produce no token."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "<unk>", "</s>"])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def _base(folder: Path, family: str = "llama") -> Path:
    """A tiny untrained language model with dropout in its config, whose pad token is its end token."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    if family == "llama":
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            attention_dropout=0.1,
            eos_token_id=7,
        )
        model: LlamaForCausalLM | GPT2LMHeadModel = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=32, eos_token_id=7)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _write(path: Path, rows: list[dict] | list[str]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def _text(rng: random.Random, word: str) -> str:
    filler = rng.choices("abcd", k=rng.randint(1, 6))
    filler.insert(rng.randrange(len(filler) + 1), word)
    return " ".join(filler)


# ---- known answers


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_learns_pairs(tmp_path: Path, family: str) -> None:
    """After a few steps "good" scores above "bad", with pad == end; the saved folder is standard, the mean near 0."""
    rng = random.Random(1)
    rows = [
        {"prompt": _text(rng, "a"), "chosen": _text(rng, "good"), "rejected": _text(rng, "bad")} for _ in range(400)
    ]
    report = train_reward_model(
        _base(tmp_path / "base", family), _write(tmp_path / "d.jsonl", rows), tmp_path / "rm", FAST
    )
    assert (report.kind, report.train_rows + report.held_out_rows) == ("pairs", 400)
    assert report.held_out_accuracy > 0.95  # chance is 0.5, with a standard error of 0.05
    assert abs(report.score_mean) < 0.3 * report.score_deviation
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    config = model.config
    assert (config.num_labels, config.id2label, config.pad_token_id) == (1, {0: "score"}, 7)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (tmp_path / "rm" / "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "rm").eos_token == "</s>"
    good, bad = score_tokens(model, [[2, 0, 3, 7], [2, 1, 3, 7]]).tolist()
    assert good > bad


def test_learns_labels(tmp_path: Path) -> None:
    """Texts without prompts, labels 0 and 1: a positive score means label 1."""
    rng = random.Random(2)
    rows = [{"text": _text(rng, WORDS[1 - label]), "label": label} for label in (0, 1) for _ in range(300)]
    report = train_reward_model(_base(tmp_path / "base"), _write(tmp_path / "d.jsonl", rows), tmp_path / "rm", FAST)
    assert report.kind == "labeled" and report.held_out_accuracy > 0.95
    model, _ = load_base(tmp_path / "rm", seed=0)
    good, bad = score_tokens(model, [[2, 0, 3, 7], [2, 1, 3, 7]]).tolist()
    assert good > 0 > bad


def test_training_is_reproducible(tmp_path: Path) -> None:
    """Equal seeds give equal reward models; a different seed gives a different one."""
    rng = random.Random(3)
    rows = [{"chosen": _text(rng, "good"), "rejected": _text(rng, "bad")} for _ in range(60)]
    base, data = _base(tmp_path / "base"), _write(tmp_path / "d.jsonl", rows)
    scores = [
        train_reward_model(base, data, tmp_path / f"rm{run}", RewardConfig(seed=seed, max_length=16)).score_mean
        for run, seed in enumerate((5, 5, 6))
    ]
    assert scores[0] == scores[1] != scores[2]


def test_fine_tuning_learns_the_response(tmp_path: Path) -> None:
    """After training on "a" -> "good", the model continues "a" with "good" and then the end token."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=32, n_layer=1, n_head=2, n_positions=32, eos_token_id=7))
    pairs = [("a", "good"), ("b", "bad")] * 100
    fine_tune(model, tokenizer, pairs, SupervisedConfig(learning_rate=1e-2, epochs=2, batch_size=16, max_length=16))
    model.eval()
    log_probs = model(input_ids=torch.tensor([[2, 0, 7], [3, 1, 7]])).logits.log_softmax(-1)
    assert log_probs[0, 0, 0] > math.log(0.9) and log_probs[1, 0, 1] > math.log(0.9)
    assert (log_probs[:, 1, 7] > math.log(0.9)).all()


# ---- sequences and scores


def test_sequences() -> None:
    """Prompt tokens, text tokens, end token, at most the last `max_length`; without a prompt, no leading space."""
    tokenizer = _tokenizer()
    pairs = encode_rows(tokenizer, [{"prompt": "a b", "chosen": "good", "rejected": "bad c d"}], 5, 8)
    assert isinstance(pairs, Pairs) and pairs.rows == [Pair([2, 3, 0, 7], [3, 1, 4, 5, 7])]
    rows = [{"text": "good a", "label": 1}, {"prompt": "b", "text": "bad", "label": 0}]
    labeled = encode_rows(tokenizer, rows, 8, 8)
    assert isinstance(labeled, Labeled) and labeled.rows == [([0, 2, 7], 1), ([3, 1, 7], 0)]


@pytest.mark.parametrize("kind", ["metaspace", "byte_level"])
def test_sequences_of_a_tokenizer_that_appends_its_end(kind: str) -> None:
    """The end token is there once, at the end, though the tokenizer appends it to prompts and texts, or the text has it.

    A response is tokenized behind its prompt: under SentencePiece, its first word alone would have two spaces.
    """
    tokenizer = getattr(tiny_tokenizers, kind)()
    end, vocabulary = tokenizer.eos_token_id, len(tokenizer)
    row = {"prompt": "the cat", "chosen": "sat on", "rejected": "sat on" + tokenizer.eos_token}
    pairs = encode_rows(tokenizer, [row], 32, vocabulary)
    labeled = encode_rows(tokenizer, [{"text": "the cat sat on", "label": 1}], 32, vocabulary)
    assert isinstance(pairs, Pairs) and isinstance(labeled, Labeled)
    whole = tokenizer("the cat sat on").input_ids  # with the end token
    assert pairs.rows == [Pair(whole, whole)] and labeled.rows == [(whole, 1)]
    assert whole.count(end) == 1 and whole[-1] == end


def test_tokens_that_the_model_lacks(tmp_path: Path) -> None:
    """A text with a token that the base has no row for is refused before training, in both stages."""
    base, tokenizer = _base(tmp_path / "base"), _tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(base)
    rows = [*_pairs(), {"chosen": "a new c", "rejected": "b"}]
    with pytest.raises(ValueError, match=r"the chosen text 'a new c' has the token 'new' \(id 8\), .*has 8 ids"):
        train_reward_model(base, _write(tmp_path / "d.jsonl", rows), tmp_path / "rm", FAST)
    model = LlamaForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=r"the row .*'new'.* has the token 'new' \(id 8\)"):
        fine_tune(model, tokenizer, [("a", "b"), ("a", "new")], SupervisedConfig())


def test_a_pad_token_that_the_model_lacks(tmp_path: Path) -> None:
    """A base whose tokenizer pads with a token beyond the model's is padded with its end token instead."""
    base, tokenizer = _base(tmp_path / "base"), _tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(base)
    model, loaded = load_base(base, seed=0)
    assert (tokenizer.pad_token_id, loaded.pad_token_id, model.config.pad_token_id) == (8, 7, 7)


def test_nll_of_a_response_under_sentencepiece(tmp_path: Path) -> None:
    """Supervised training teaches the tokens that continue a prompt, as a policy writes them.

    Trained on "the cat" -> "sat on", the model gives the continuation of the whole text a probability near 1.
    """
    torch.manual_seed(0)
    tokenizer = tiny_tokenizers.metaspace()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=32, eos_token_id=2, bos_token_id=1
    )
    model = GPT2LMHeadModel(config)
    fine_tune(
        model,
        tokenizer,
        [("the cat", "sat on"), ("a dog", "ran")] * 100,
        SupervisedConfig(learning_rate=1e-2, epochs=10, batch_size=16, max_length=16),
    )
    whole, width = tokenizer("the cat sat on").input_ids, len(tokenizer("the cat").input_ids) - 1
    with torch.no_grad():
        log_probs = model.eval()(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    nll = -sum(float(log_probs[at - 1, whole[at]]) for at in range(width, len(whole)))
    assert nll < 0.5


def test_padding_changes_no_score(tmp_path: Path) -> None:
    """Left, right and no padding give the same score, even if pad and end are one token."""
    model, _ = load_base(_base(tmp_path), seed=0)
    model.eval()
    end = 7
    alone = last_token_scores(model, torch.tensor([[2, 0, end]]), torch.ones(1, 3))
    ids = torch.tensor([[end, end, 2, 0, end], [2, 0, end, end, end]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    both = last_token_scores(model, ids, mask)
    torch.testing.assert_close(both, alone.expand(2, 1), atol=1e-5, rtol=1e-5)  # float32 rounding
    without_end = last_token_scores(model, ids, torch.tensor([[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]))
    assert (without_end - both).abs().min() > 1e-4  # the end token counts if the mask includes it


def test_dropout_is_off(tmp_path: Path) -> None:
    """Reward models train and run without dropout, even if their base has dropout."""
    model, _ = load_base(_base(tmp_path, "gpt2"), seed=0)
    config = model.config
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.0
    ids, mask = torch.tensor([[2, 0, 7]]), torch.ones(1, 3)
    torch.testing.assert_close(
        last_token_scores(model.train(), ids, mask),
        last_token_scores(model.train(), ids, mask),
        atol=0,
        rtol=0,
    )


def test_held_out_prompts_stay_together() -> None:
    """No prompt is on both sides of the split, and equal seeds give equal splits."""
    rows = [{"prompt": f"p{i % 20}", "chosen": str(i), "rejected": "x"} for i in range(100)]
    train, held_out = split_rows(rows, 0.25, seed=1)
    assert (len(train), len(held_out)) == (75, 25)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert split_rows(rows, 0.25, seed=1) == (train, held_out)
    assert split_rows(rows, 0.25, seed=2) != (train, held_out)


# ---- validation


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"chosen": "a", "rejected": "b"}', "{oops"], "line 2: not JSON"),
        (['{"chosen": "a"}'], "line 1: needs chosen and rejected, or text and label"),
        (["[1, 2]"], "line 1: needs an object with fields, got list"),
        (['{"text": "a", "label": 2}'], "line 1: label must be 0 or 1, got 2"),
        (
            ['{"text": "a", "label": true}', '{"text": 3, "label": 0}'],
            "line 1: label must be 0 or 1, got True",
        ),
        (['{"chosen": "a", "rejected": null}'], "line 1: rejected must be a string, got None"),
        (
            ['{"chosen": "a", "rejected": "b"}', "", '{"text": "a", "label": 1}'],
            "line 3: the file mixes rows of pairs and of texts with labels",
        ),
        ([""], "has no rows"),
    ],
)
def test_malformed_rows(tmp_path: Path, lines: list[str], message: str) -> None:
    """A malformed line raises an error with file, line number and remedy."""
    path = _write(tmp_path / "rows.jsonl", lines)
    with pytest.raises(ValueError, match=message) as error:
        read_rows(path)
    assert "rows.jsonl" in str(error.value)


def test_a_base_with_missing_weights(tmp_path: Path) -> None:
    """A base with missing layers would be random, so it is refused; a head of a different width is reinitialized."""
    folder = _base(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for model.layers.0.mlp.up_proj.weight of a Llama.*random"):
        load_base(folder, seed=0)
    wide = AutoModelForSequenceClassification.from_pretrained(_base(tmp_path / "wide"), num_labels=3)
    wide.save_pretrained(tmp_path / "wide")
    assert load_base(tmp_path / "wide", seed=0)[0].score.weight.shape == (1, 16)  # type: ignore[union-attr]


def test_a_new_head_is_not_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The head is new on purpose, so Transformers' table of missing weights is hidden; later warnings are shown."""
    folder, logger = _base(tmp_path), transformers_logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        load_base(folder, seed=0)
        assert caplog.text == ""
        logger.warning("heard")
        assert "heard" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def _pairs() -> list[dict]:
    rng = random.Random(4)
    return [{"chosen": _text(rng, "good"), "rejected": _text(rng, "bad")} for _ in range(8)]


def test_data_and_output_are_checked_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad data and bad outputs raise errors before a model is loaded, and no file is created."""
    monkeypatch.setattr(textenv.training.reward_model, "load_base", lambda *args: pytest.fail("the model was loaded"))
    rows, full, file = _write(tmp_path / "d.jsonl", _pairs()), tmp_path / "full", tmp_path / "file"
    full.mkdir()
    file.write_text("")
    (full / "model.safetensors").write_text("precious")
    for data, output, says in [
        (tmp_path / "none.jsonl", tmp_path / "rm", "no training data at .*none.jsonl'; give a .jsonl file"),
        (tmp_path, tmp_path / "rm", "no training data at "),
        (_write(tmp_path / "one.jsonl", _pairs()[:1]), tmp_path / "rm", "1 rows of 1 prompts leave no training rows"),
        (rows, full, "full' exists already and is not empty; choose another output"),
        (rows, file, "file' cannot be written: .*file' is not a folder; choose another output"),
        (rows, file / "rm", "rm' cannot be written: .*file' is not a folder"),
    ]:
        with pytest.raises(ValueError, match=says):
            train_reward_model("base", data, output, FAST)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(ValueError, match=f"cannot be written: {str(tmp_path)!r} is not writable"):
        train_reward_model("base", rows, tmp_path / "deep" / "rm", FAST)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "file", "full", "one.jsonl"]


def test_an_unknown_base(tmp_path: Path) -> None:
    """A base that does not exist raises an error with the remedy; the output folder is not created."""
    rows = _write(tmp_path / "d.jsonl", _pairs())
    for base in ("nobody/such-model", "/no/such/folder", tmp_path / "none"):
        with pytest.raises(ValueError, match=f"no model configuration in '{base}': .* Give a folder"):
            train_reward_model(base, rows, tmp_path / "rm", FAST)
    assert not (tmp_path / "rm").exists()


def test_an_empty_output_folder_is_used(tmp_path: Path) -> None:
    """An existing empty output folder is accepted."""
    (tmp_path / "rm").mkdir()
    train_reward_model(_base(tmp_path / "base"), _write(tmp_path / "d.jsonl", _pairs()), tmp_path / "rm", FAST)
    assert (tmp_path / "rm" / "model.safetensors").exists()


def test_data_that_is_not_utf_8(tmp_path: Path) -> None:
    """A line in another encoding raises an error with its line number."""
    path = tmp_path / "d.jsonl"
    path.write_bytes('{"text": "a", "label": 1}\n{"text": "naïve", "label": 0}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"d.jsonl, line 2: not UTF-8 .*byte 0xef.*save the file as UTF-8"):
        read_rows(path)


def test_invalid_configs() -> None:
    """Invalid settings raise an error that names the setting."""
    for wrong in ({"epochs": 0}, {"held_out": 1.0}, {"centering": -1.0}, {"batch_size": -3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RewardConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learning_rate"):
        SupervisedConfig(learning_rate=0.0)
