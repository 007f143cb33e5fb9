"""Margins, ensembles and calibration of reward models: losses equal plain loops, and numbers are worked out by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from tests.support import tiny
from textenv import TextGenConfig, build_task
from textenv.rewards.reward_model import has_heads, last_token_scores
from textenv.training import reward_model
from textenv.training.calibration import calibrate, draw_reliability
from textenv.training.data import read_rows
from textenv.training.loop import LoopConfig, pad_right
from textenv.training.preferences import Labeled, Pair, Pairs, encode_rows
from textenv.training.reward_card import agreement_of, report_of
from textenv.training.reward_model import (
    RewardConfig,
    bootstrap_counts,
    fit,
    head_scores,
    load_base,
    preference_loss,
    score_tokens,
    train_reward_model,
)

FAST = RewardConfig(learning_rate=3e-3, epochs=2, batch_size=8, max_length=32, held_out=0.25)
EVERY = LoopConfig(save_every=2)


def _base(folder: Path) -> str:
    return tiny.save(tiny.language_model(), folder / "base")


def _data(folder: Path, rows: int = 40, **more) -> Path:
    """Pairs in which the chosen text has the letter x, two to a prompt."""
    rng, lines = random.Random(0), []
    for index in range(rows):
        texts = ["".join(rng.choices("abcdef", k=rng.randint(1, 9))) for _ in range(2)]
        lines.append({"prompt": f"p{index // 2}", "chosen": f"{texts[0]}x", "rejected": texts[1], **more})
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---- margins


def test_the_loss_equals_a_plain_loop() -> None:
    """−log σ(r_chosen − r_rejected − m) of ragged pairs, mean over pairs, in value and gradient; for labels without."""
    model = tiny.reward_model("gpt2")
    pairs = Pairs([Pair([65, 66], [67, 68, 69, 70], 0.5), Pair([71] * 7, [72], 2.0), Pair([73, 74, 75], [76, 77])])

    def scores(sequences) -> Tensor:
        return last_token_scores(model, *pad_right(sequences))  # [N, 1]

    loss = preference_loss(pairs.logits(scores(pairs.sequences())), pairs.targets(), pairs.margins())
    loss.backward()
    got, model.score.weight.grad = model.score.weight.grad.clone(), None  # type: ignore[union-attr]
    wanted = torch.zeros(())
    for chosen, rejected, margin in pairs.rows:
        gap = scores([chosen])[0, 0] - scores([rejected])[0, 0] - margin
        wanted = wanted + torch.log(1 + torch.exp(-gap)) / 3
    wanted.backward()
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)  # float32
    torch.testing.assert_close(got, model.score.weight.grad, atol=1e-4, rtol=1e-4)  # type: ignore[union-attr]
    labeled = Labeled([([65, 66], 1), ([67], 0)])
    one, other = scores(labeled.sequences())[:, 0].tolist()
    by_hand = (math.log(1 + math.exp(-one)) + math.log(1 + math.exp(other))) / 2
    got_loss = preference_loss(labeled.logits(torch.tensor([[one], [other]])), labeled.targets(), labeled.margins())
    assert got_loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_margins_are_read_and_widen_the_gap(tmp_path: Path) -> None:
    """A margin in the rows is the pair's, zero without; training with a large one ends with scores further apart."""
    rows = read_rows(_data(tmp_path, margin=3))
    tokenizer = tiny.tokenizer()
    with_margin, without = (
        encode_rows(tokenizer, part, 32, tiny.VOCABULARY)
        for part in (rows, [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    )
    assert set(with_margin.margins().tolist()) == {3.0} and set(without.margins().tolist()) == {0.0}
    gaps = []
    for examples in (with_margin, without):
        model, _ = load_base(_base(tmp_path), seed=0)
        fit(model, examples, RewardConfig(learning_rate=1e-2, epochs=8, batch_size=8))
        gaps.append(examples.logits(score_tokens(model, examples.sequences())).mean().item())
    assert gaps[0] > gaps[1] + 0.5


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"chosen": "a", "rejected": "b", "margin": -0.5}, r"line 2: margin must be a number of 0 or more, got -0.5"),
        ({"chosen": "a", "rejected": "b", "margin": "1"}, r"line 2: margin must be a number of 0 or more, got '1'"),
        ({"chosen": "a", "rejected": "b", "margin": True}, r"line 2: margin must be .* got True"),
        ({"chosen": "a", "rejected": "b", "margin": None}, r"line 2: margin must be .* got None"),
        ({"chosen": "a", "rejected": "b", "margin": math.inf}, r"line 2: not JSON \(the number Infinity is not finite"),
        ({"chosen": "a", "rejected": "b", "margin": math.nan}, r"line 2: not JSON \(the number NaN is not finite"),
        ({"chosen": "a", "rejected": "b"}, r"line 2: the file mixes rows of pairs with a margin and of pairs\."),
        ({"text": "a", "label": 1, "margin": 1}, r"line 2: a margin belongs to a pair"),
    ],
)
def test_wrong_margins(tmp_path: Path, line: dict, says: str) -> None:
    """Negative margins, what is no finite number, margins in some rows alone, and of labels: refused with the line."""
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"chosen": "a", "rejected": "b", "margin": 0.5}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=says):
        read_rows(path)


# ---- calibration


def test_calibration_by_hand() -> None:
    """Five choices, of which one is a tie and one is wrong: accuracy, log loss and the bins' error."""
    confident, unsure = math.log(0.92 / 0.08), math.log(0.62 / 0.38)
    logits = torch.tensor([confident, -confident, unsure, -unsure, 0.0])
    targets = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])  # right, right, right, wrong, a tie
    found = calibrate(logits, targets)
    assert (found.rows, found.accuracy) == (5, 0.7)
    losses = [-math.log(p) for p in (0.92, 0.92, 0.62, 0.38, 0.5)]
    assert found.log_loss == pytest.approx(sum(losses) / 5)
    deviations = sum((value - 0.7) ** 2 for value in (1, 1, 1, 0, 0.5))
    assert found.accuracy_error == pytest.approx(math.sqrt(deviations * 5 / 4) / 5)
    wanted = 2 / 5 * abs(1 - 0.92) + 2 / 5 * abs(0.5 - 0.62) + 1 / 5 * 0
    assert found.calibration_error == pytest.approx(wanted)
    normal = math.sqrt(2 / math.pi)
    expected = [2 / 5 * math.sqrt(0.92 * 0.08 / 2), 2 / 5 * math.sqrt(0.62 * 0.38 / 2), 1 / 5 * math.sqrt(0.25)]
    assert found.expected_error == pytest.approx(normal * sum(expected))
    assert [each.rows for each in found.bins] == [1, 0, 2, 0, 0, 0, 0, 0, 2, 0]
    swapped = calibrate(-logits, 1 - targets)  # which response comes first does not matter
    assert swapped.bins == found.bins and swapped.log_loss == pytest.approx(found.log_loss)
    assert calibrate(torch.tensor([99.0]), torch.ones(1)).bins[-1].rows == 1  # a confidence of 1 is in the last bin


def test_calibration_of_a_calibrated_model() -> None:
    """Targets drawn with the model's own probabilities: the error is what bins of few rows make of it, not more."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, generator=generator)
    targets = (torch.rand(20_000, generator=generator) < logits.sigmoid()).float()
    found = calibrate(logits, targets)
    assert found.calibration_error < 3 * found.expected_error < 0.03
    assert calibrate(4 * logits, targets).calibration_error > 0.1  # and one that is too sure is found out


def test_rows_of_one_prompt_are_not_independent() -> None:
    """Each prompt's rows repeated: the standard error is that of the prompts."""
    logits, targets = torch.tensor([1.0, -1.0, 2.0, 0.5]), torch.ones(4)
    alone = calibrate(logits, targets)
    repeated = calibrate(logits.repeat_interleave(3), targets.repeat(3), [index // 3 for index in range(12)])
    assert repeated.accuracy_error == pytest.approx(alone.accuracy_error)


def test_agreement_by_hand() -> None:
    """Std over members of scores and of differences; the ensemble's accuracy where they agree and where they do not."""
    pairs = Pairs([Pair([1], [2])] * 2)
    scores = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 0.0], [0.0, 3.0]])  # chosen, chosen, rejected, rejected
    logits = pairs.logits(scores)  # [[1, 1], [2, -3]]
    found = agreement_of(scores, logits, pairs.targets(), [])
    assert found.disagreement == pytest.approx((0 + 1 + 0 + 1.5) / 4)
    assert found.disagreement_of_choices == pytest.approx((0 + 2.5) / 2)
    assert (found.accuracy_agreed, found.accuracy_disputed) == (1.0, 0.0)
    assert [member.accuracy for member in found.members] == [1.0, 0.5]
    report = report_of(pairs, pairs, [scores, scores])
    assert report.held_out_accuracy == 0.5 and report.agreement == found


def test_the_reliability_diagram(tmp_path: Path) -> None:
    """It is drawn, also of a single row."""
    for rows in (1, 50):
        draw_reliability(tmp_path / "r.png", calibrate(torch.linspace(-3, 3, rows), torch.ones(rows)))
        assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


# ---- ensembles


def test_bootstrap_counts() -> None:
    """Each head's sample has as many rows as there are, drawn with replacement, from the seed alone."""
    counts = bootstrap_counts(1000, 3, seed=1)
    assert counts.sum(0).tolist() == [1000.0] * 3
    shares = (counts == 0).float().mean(0)
    assert all(abs(share - math.exp(-1)) < 0.06 for share in shares.tolist())  # 4 standard errors
    assert torch.equal(counts, bootstrap_counts(1000, 3, 1)) and not torch.equal(counts[:, 0], counts[:, 1])


def test_the_loss_of_heads_equals_a_plain_loop() -> None:
    """Each head's loss is weighted by its own counts; the mean is over rows and heads."""
    logits, weights = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    margins = torch.tensor([0.25, 1.0])
    wanted = (2 * math.log(1 + math.exp(-0.75)) + math.log(1 + math.exp(-2.0))) / 4
    assert preference_loss(logits, torch.ones(2), margins, weights).item() == pytest.approx(wanted)


def test_heads(tmp_path: Path) -> None:
    """`heads` trains a standard folder with K labels, which disagree a little, and is a reward as it is."""
    report = train_reward_model(
        _base(tmp_path), _data(tmp_path), tmp_path / "rm", RewardConfig(**(vars(FAST) | {"heads": 3}))
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert has_heads(model) and model.config.num_labels == 3 and model.config.problem_type == "regression"
    assert report.agreement is not None and report.agreement.disagreement > 1e-3
    assert len(report.agreement.members) == 3 and not (tmp_path / "rm" / "training").exists()
    _is_a_reward(tmp_path)


@pytest.mark.slow
def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`models` trains K folders; stopped in the second and resumed, all are what they are without a stop."""
    config = RewardConfig(**(vars(FAST) | {"models": 2}))
    base, data = _base(tmp_path), _data(tmp_path, rows=24)
    report = train_reward_model(base, data, tmp_path / "rm", config, EVERY)
    single = train_reward_model(base, data, tmp_path / "single", FAST)
    assert report.agreement is not None and report.agreement.members[0] == single.calibration  # the same seed
    assert report.agreement.disagreement > 1e-2

    def stopped(self, model, inputs, *rest, **named):
        state["steps"] += 1
        if state["steps"] == 9:  # the first has 6 steps
            raise KeyboardInterrupt
        return step(self, model, inputs, *rest, **named)

    state, step = {"steps": 0}, reward_model._RewardTrainer.compute_loss
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stop:
        patch.setattr(reward_model._RewardTrainer, "compute_loss", stopped)
        train_reward_model(base, data, tmp_path / "cut", config, EVERY)
    assert stop.value.__notes__ == ["Give --resume to go on with this training."]  # once
    assert (tmp_path / "cut" / "member-0").is_dir() and not (tmp_path / "cut" / "member-1").exists()
    loaded, load = [], reward_model.load_base

    def stopped_between(*arguments):
        loaded.append(arguments)
        if len(loaded) == 2:  # the first is before all members
            raise KeyboardInterrupt
        return load(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stop:
        patch.setattr(reward_model, "load_base", stopped_between)
        train_reward_model(base, data, tmp_path / "cut", config, LoopConfig(resume=True, save_every=2))
    assert stop.value.__notes__ == ["Give --resume to go on with this training."]
    resumed = train_reward_model(base, data, tmp_path / "cut", config, LoopConfig(resume=True, save_every=2))
    assert resumed == report
    _is_a_reward(tmp_path)


def _is_a_reward(folder: Path) -> None:
    """The ensemble in rm/ is a reward, and its card and record name the numbers."""
    parts: dict[str, Any] = dict(reference=str(folder / "base"), reward=str(folder / "rm"), prompts=["a"])
    task = build_task(TextGenConfig(**parts, reward_ensemble=1.0, max_prompt_tokens=8, device="cpu"))
    assert task.score_part_names == (str(folder / "rm"), "disagreement")
    card, record = (folder / "rm" / "README.md").read_text(), json.loads((folder / "rm" / "training.json").read_text())
    for words in ("reliability.png", "curve.png", "## Members", "std of a text's score", "reward_ensemble=min"):
        assert words in card
    assert record["numbers"]["accuracy"]["standard_error"] is not None
    assert record["report"]["agreement"]["disagreement"] == record["numbers"]["disagreement"]["value"]
    assert (folder / "rm" / "reliability.png").is_file() and (folder / "rm" / "curve.png").is_file()


def test_the_card_of_one_model(tmp_path: Path) -> None:
    """Numbers with errors, the settings, the data's hash, the curve on held-out rows, and no word of members."""
    report = train_reward_model(_base(tmp_path), _data(tmp_path), tmp_path / "rm", FAST)
    card, record = (
        (tmp_path / "rm" / "README.md").read_text(),
        json.loads((tmp_path / "rm" / "training.json").read_text()),
    )
    assert "Members" not in card and f"{report.held_out_accuracy:.4g}" in card and "learning_rate" in card
    history = record["histories"][0]
    assert [row["step"] for row in history if "held_out_loss" in row] == list(range(9))
    assert record["report"]["calibration"]["rows"] == report.held_out_rows == 10
    assert sum(each["rows"] for each in record["report"]["calibration"]["bins"]) == 10


def test_heads_or_models() -> None:
    """An ensemble is of one kind, and has a member at least."""
    for wrong in ({"heads": 0}, {"models": 0}, {"heads": 2, "models": 2}, {"seed": 2**32 - 1, "models": 2}):
        with pytest.raises(ValueError, match="models"):
            RewardConfig(**wrong)


def test_scores_of_heads_are_their_mean() -> None:
    """`score_tokens` is the mean of `head_scores`."""
    model = tiny.reward_model("gpt2", labels=3)
    texts = [[65, 66, 67], [70]]
    torch.testing.assert_close(score_tokens(model, texts), head_scores(model, texts).mean(1))
