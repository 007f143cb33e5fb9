"""The command of stage 1: from a JSONL file to a model with a card."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertLMHeadModel, XLNetConfig, XLNetLMHeadModel

from agents.__main__ import main
from tests.support import tiny
from textenv import LanguageModel
from textenv.models.language_model import position_limit
from textenv.training.card import mean_and_error
from textenv.training.data import encode_exchanges
from textenv.training.loop import LoopConfig
from textenv.training.supervised import (
    SupervisedConfig,
    encode_supervised,
    fine_tune,
    losses_of_rows,
)
from textenv.training.supervised_job import train_supervised

FAST = SupervisedConfig(learning_rate=3e-3, epochs=4, batch_size=8, held_out=0.2, max_length=32)
PAIRS = [
    (f"the {word}", "is red" if len(word) % 2 else "is blue") for word in ("car", "boat", "sofa", "cat", "dog") * 8
]


def _base(folder: Path) -> str:
    model = tiny.language_model()
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.02)  # type: ignore[union-attr]
    return tiny.save(model, folder)


def _data(folder: Path, rows: list[dict] | None = None) -> Path:
    path = folder / "rows.jsonl"
    rows = [{"prompt": prompt, "response": response} for prompt, response in PAIRS] if rows is None else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_model_a_card_and_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command writes a model that opens, whose held-out loss fell as the card says, and leaves no checkpoint."""
    base, data, output = _base(tmp_path / "base"), _data(tmp_path), tmp_path / "out"
    flags = ["--learning-rate", "3e-3", "--epochs", "4", "--batch-size", "8", "--held-out", "0.2", "--max-length", "32"]
    main(["supervised", "--base", base, "--data", str(data), "--output", str(output), *flags])
    record = json.loads((output / "training.json").read_text())
    numbers = {name: number["value"] for name, number in record["numbers"].items()}
    assert numbers["loss_after"] < numbers["loss_before"] - 1
    assert numbers["change"] == pytest.approx(numbers["loss_after"] - numbers["loss_before"], abs=1e-6)
    measured = [row["held_out_loss"] for row in record["history"] if "held_out_loss" in row]
    assert measured[0] == pytest.approx(numbers["loss_before"]) and measured[-1] == pytest.approx(numbers["loss_after"])
    assert f"held-out loss {numbers['loss_before']:.4f} -> {numbers['loss_after']:.4f}" in capsys.readouterr().out
    card = (output / "README.md").read_text()
    assert f"{numbers['loss_after']:.4g}" in card and "rows.jsonl" in card and "the " in card
    assert (output / "curve.png").stat().st_size > 5000 and not (output / "training").exists()
    opened = LanguageModel.from_pretrained(output)
    assert opened.model.config.resid_pdrop == 0.0  # trained without the base's dropout
    held = json.loads(data.read_text().splitlines()[0])
    rows = encode_supervised(opened.model, opened.tokenizer, [(held["prompt"], held["response"])], FAST)
    assert losses_of_rows(opened.model, rows, 1).item() / rows.tokens < numbers["loss_before"]


def test_a_stopped_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped and resumed, the command writes the weights that it writes uninterrupted; other settings are refused."""
    base, data = _base(tmp_path / "base"), _data(tmp_path)
    loop = LoopConfig(save_every=3)
    train_supervised(base, data, tmp_path / "whole", FAST, loop)
    real, calls = torch.optim.AdamW.step, []

    def stop(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", stop)
        train_supervised(base, data, tmp_path / "cut", FAST, loop)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="holds a training that was stopped; give --resume"):
        train_supervised(base, data, tmp_path / "cut", FAST, loop)
    with pytest.raises(ValueError, match=r"was started with settings.seed = 0, and now it is 1"):
        train_supervised(base, data, tmp_path / "cut", replace(FAST, seed=1), LoopConfig(resume=True))
    train_supervised(base, data, tmp_path / "cut", FAST, LoopConfig(resume=True, save_every=3))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    cards = [json.loads((tmp_path / name / "training.json").read_text())["numbers"] for name in ("whole", "cut")]
    assert cards[0] == cards[1]


def test_the_loss_by_hand(tmp_path: Path) -> None:
    """Summed over the tokens of a response and its end, whatever the padding; `all` adds the prompt after its first."""
    model, tokenizer = tiny.language_model().eval(), tiny.tokenizer()
    exchanges = [("ab", "c"), ("a", "longer one"), (None, "xyz")]
    for loss_on, firsts in (("responses", (2, 1, 1)), ("all", (1, 1, 1))):
        config = SupervisedConfig(loss_on=loss_on)  # type: ignore[arg-type]
        losses = losses_of_rows(model, encode_supervised(model, tokenizer, exchanges, config), 2)
        for row, first, loss in zip(encode_exchanges(tokenizer, exchanges), firsts, losses, strict=True):
            with torch.no_grad():
                log_probs = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            by_hand = -sum(log_probs[at - 1, row.ids[at]].item() for at in range(first, len(row.ids)))
            assert loss.item() == pytest.approx(by_hand, rel=1e-5)  # float32 sums of about ten terms


def test_rows_too_long_for_their_response(tmp_path: Path) -> None:
    """A row whose prompt fills the greatest length is left out, and counted; where all are, the training is refused."""
    model, tokenizer = tiny.language_model(), tiny.tokenizer()
    rows = encode_supervised(model, tokenizer, [("x" * 9, "y"), ("x", "yyy")], SupervisedConfig(max_length=4))
    assert rows.kept == [1] and rows.tokens == 3 and len(rows.encoded[0]) == 4
    with pytest.raises(ValueError, match="none of 1 rows has a token of a response within 4 tokens; raise max_length"):
        encode_supervised(model, tokenizer, [("x" * 9, "y")], SupervisedConfig(max_length=4))


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_a_base_that_sees_later_tokens_is_refused(tmp_path: Path, kind: str) -> None:
    """It would learn to copy the token that it is to predict, at a loss near 0; nothing is written."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = (
        BertLMHeadModel(BertConfig(vocab_size=300, max_position_embeddings=64, **sizes))  # type: ignore[arg-type]
        if kind == "bert"
        else XLNetLMHeadModel(XLNetConfig(vocab_size=300, d_model=32, n_layer=2, n_head=4, d_inner=48))
    )
    base = tiny.save(model.eval(), tmp_path / "base")
    with pytest.raises(ValueError, match=rf"the base is a .* \({kind}\): .* so it is not causal"):
        train_supervised(base, _data(tmp_path), tmp_path / "out", FAST)
    assert not (tmp_path / "out").exists()


def test_a_limit_below_one_is_none(tmp_path: Path) -> None:
    """XLNet says -1 positions for any length, which must not cut the end token of each row."""
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=300, d_model=32, n_layer=1, n_head=4, d_inner=48))
    (row,) = encode_supervised(model, tiny.tokenizer(), [("a", "bc")], SupervisedConfig(max_length=8)).encoded
    assert position_limit(model) is None and row.ids[-1] == tiny.END


@pytest.mark.parametrize(
    "own",
    [
        {"min_p": 0.9, "do_sample": True},
        {"num_beams": 2, "num_return_sequences": 2},
        {"suppress_tokens": [65, 66]},
        {"return_dict_in_generate": True},
        {"min_length": 30, "no_repeat_ngram_size": 1},
    ],
)
def test_samples_on_the_card_are_at_temperature_1(tmp_path: Path, own: dict) -> None:
    """They are those of the model's distribution, whatever its generation config says, which is left as it was."""
    cards = []
    for name, options in (("plain", {}), ("own", own)):
        base = Path(_base(tmp_path / name))
        file = base / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | options))
        train_supervised(base, _data(tmp_path), tmp_path / f"{name}-out", replace(FAST, epochs=1))
        cards.append((tmp_path / f"{name}-out" / "README.md").read_text().split("## Samples")[1].split("## ")[0])
    assert cards[0] == cards[1]
    assert own.items() <= json.loads((tmp_path / "own-out" / "generation_config.json").read_text()).items()


def test_chats_are_learned(tmp_path: Path) -> None:
    """A chat model learns its own turns; the card tells that `chat` must be on."""
    base = _base(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}[a]{% endif %}"
    )
    tokenizer.save_pretrained(base)
    roles = ("user", "assistant")
    rows = [{"messages": [{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)]} for pair in PAIRS]
    report = train_supervised(base, _data(tmp_path, rows), tmp_path / "out", FAST)
    assert report.change < -1 and report.change_error is None  # one prompt of five is held out
    assert "--env.chat" in (tmp_path / "out" / "README.md").read_text()


def test_texts_without_prompts(tmp_path: Path) -> None:
    """Texts are trained on whole; every one is a prompt of its own for the split and the standard error."""
    rows = [{"text": f"{prompt} {response} {at}"} for at, (prompt, response) in enumerate(PAIRS)]
    report = train_supervised(_base(tmp_path / "base"), _data(tmp_path, rows), tmp_path / "out", FAST)
    assert (report.train_rows, report.held_out_rows) == (32, 8) and report.change_error is not None
    assert report.change < -10 * report.change_error


def test_bad_input_ends_before_the_base_is_read(tmp_path: Path) -> None:
    """Data, output and settings are checked first, each in a sentence."""
    data = _data(tmp_path)
    with pytest.raises(SystemExit, match="error: no training data at "):
        main(["supervised", "--base", "none", "--data", str(tmp_path / "no"), "--output", str(tmp_path / "o")])
    with pytest.raises(SystemExit, match=r"error: .*exists already and is not empty"):
        main(["supervised", "--base", "none", "--data", str(data), "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: no model configuration in 'none/such'"):
        main(["supervised", "--base", "none/such", "--data", str(data), "--output", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()
    with pytest.raises(ValueError, match="muon_learning_rate is read with optimizer muon only"):
        SupervisedConfig(muon_learning_rate=0.1)
    with pytest.raises(ValueError, match="held_out must lie in"):
        SupervisedConfig(held_out=1.0)
    llama = tiny.language_model("llama")
    with pytest.raises(ValueError, match="muon is for GPT-2 models, and this is a LlamaForCausalLM; use adamw"):
        fine_tune(llama, tiny.tokenizer(), PAIRS, SupervisedConfig(optimizer="muon"))


def test_the_standard_error_of_a_mean() -> None:
    """By hand: independent values, clusters, and a ratio of sums."""
    assert mean_and_error([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7 / 3)))  # variance 7 of three values
    assert mean_and_error([1.0]) == (1.0, None)
    assert mean_and_error([1.0, 1.0, 4.0, 4.0], "aabb") == (2.5, 1.5)  # as if two values, 1 and 4
    assert mean_and_error([2.0, 9.0], weights=[1.0, 2.0])[0] == pytest.approx(11 / 3)
    equal = mean_and_error([1.0, 2.0, 6.0], weights=[1.0, 1.0, 1.0])
    assert equal == mean_and_error([1.0, 2.0, 6.0])
