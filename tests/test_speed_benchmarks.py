"""The benchmarks of speed and memory run at small sizes, and what they compute with is right."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import generation, memory, ppo_iteration, ranks, scaling
from benchmarks.support import models, ours
from benchmarks.support.measure import PeakMemory, bend, interleaved, ratios, slope
from benchmarks.support.update import Plain
from tests.support import tiny
from textenv.generation import response_log_probs
from textenv.reviews.weights import SUPERVISED
from textenv.state import TextState

SIDES = ("ours", "generate", "forward")


def rows_of(folder, name):
    """The rows that a benchmark wrote, beside its picture."""
    assert (folder / f"{name}.png").stat().st_size > 10_000
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def test_slopes_and_bends_of_known_power_laws():
    """Cost x^0.5 up to 8 and x^2 from there: both exponents and the place come back."""
    sizes = [1, 2, 4, 8, 16, 32]
    costs = [x**0.5 if x <= 8 else 8**0.5 * (x / 8) ** 2 for x in sizes]
    turn = bend(sizes, costs)
    assert (turn["at"], turn["below"], turn["above"]) == (8, pytest.approx(0.5), pytest.approx(2.0))
    assert slope(sizes, [3 * x**1.5 for x in sizes]) == pytest.approx(1.5)


def test_ratios_are_taken_within_a_turn():
    """A turn that is slow for both sides changes nothing; the medians' own ratio would be 6."""
    assert ratios([2.0, 20.0, 6.0], [1.0, 10.0, 3.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_methods_take_turns():
    """One call of each does not count, then they alternate, and work comes with its call."""
    calls = []
    methods = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    times = interleaved(methods, 2)
    assert calls == list("ababab") and times["a"].work == [3, 5] and times["b"].work == [4, 6]
    assert len(times["a"].seconds) == len(times["a"].clock_seconds) == 2


def test_peak_memory_sees_what_was_freed():
    """64 MiB that are there for a moment are in the peak, and not in what was there before."""
    with PeakMemory(every=0.001) as seen:
        block = torch.ones(16 * 2**20)
        for _ in range(5):
            block.sum()
        del block
    assert seen.peak - seen.before > 60 * 2**20


def test_stop_ids_give_the_mean_length():
    """Lengths are those of a plain loop, and the chosen ids end responses where they were asked to."""
    tokens = torch.randint(200, (64, 48), generator=torch.Generator().manual_seed(0))
    stops = models.stops_for_mean(tokens, 200, 19)
    single = models.stop_for_mean(tokens, 200, 30)

    def mean(ids):
        lengths = [next((t + 1 for t, token in enumerate(row) if token in ids), 48) for row in tokens.tolist()]
        return sum(lengths) / len(lengths)

    stopping = torch.zeros(200, dtype=torch.bool).index_fill(0, torch.tensor(stops), True)
    assert float(models.lengths_with(tokens, stopping).float().mean()) == pytest.approx(mean(set(stops)))
    assert mean(set(stops)) == pytest.approx(19, abs=1.5)
    assert abs(mean({single}) - 30) == min(abs(mean({token}) - 30) for token in range(200))


def test_settings_reach_the_part_that_has_them():
    """NAME=VALUE settings go to the trainer, the text or the algorithm; one that none has is refused."""
    flags = ours.read_flags(["iterations=3", "rollout_size=8", "clip=0.1", "critic=reference"])
    train, text, ppo = ours.configure(flags, "reviews")
    assert (train.iterations, text.rollout_size, ppo.clip, text.critic) == (3, 8, 0.1, "reference")
    with pytest.raises(ValueError, match="no setting"):
        ours.configure({"rollout_sizes": 8}, "reviews")


def test_whole_logits_are_the_same_mathematics():
    """The other side of the memory benchmark computes the library's log-probabilities, and its step changes weights."""
    model = tiny.language_model("gpt2").eval()
    ids = torch.randint(model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones(3, 9, dtype=torch.bool)
    state = TextState.from_masks(ids, everywhere, everywhere[:, 4:])
    plain = Plain(model)
    expected = response_log_probs(model, state, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(plain.log_probs(plain.actor, ids, 4), expected, rtol=1e-5, atol=1e-5)  # float32 sums
    weights = [parameter.detach().clone() for parameter in plain.parameters]
    plain.update(ids, expected, torch.randn(3, 5), 4, 2)
    assert not any(torch.equal(old, new) for old, new in zip(weights[:3], plain.parameters[:3], strict=True))


@pytest.mark.slow
def test_generation_runs(tmp_path):
    """Every model has rows of both kinds and of both sides, scoring, and the embedded task is stepped."""
    generation.main(generation.Settings(quick=True, output=tmp_path))
    *rows, steps = rows_of(tmp_path, "generation")
    assert {(row["model"], row["rows"], row["lengths"]) for row in rows} == {
        (name, count, kind)
        for name in ("GPT-2, 0.2M", models.EMBEDDED)
        for count in (4, 8)
        for kind in ("fixed", "ragged")
    }
    for row in rows:
        assert all(row["tokens_per_second"][side] > 0 for side in SIDES)
        assert row["mean_length"] == pytest.approx(8, abs=0.5) or row["lengths"] == "ragged"
        assert row["scoring / generation, time"]["median"] > 0
    assert steps["fast path / single environments"]["median"] > 0


@pytest.mark.slow
def test_scaling_runs(tmp_path):
    """Every sweep has seconds and a slope of every part."""
    scaling.main(scaling.Settings(quick=True, output=tmp_path))
    rows = rows_of(tmp_path, "scaling")
    assert [row["sweep"] for row in rows] == list(scaling.SWEEPS)
    for row in rows:
        for part in scaling.PARTS:
            assert len(row[part]["seconds"]) == len(row["sizes"]) and min(row[part]["seconds"]) > 0
            assert math.isfinite(row[part]["slope"])


@pytest.mark.slow
def test_memory_runs(tmp_path):
    """Both sides of every case have a peak that is above what was there before the update."""
    memory.main(memory.Settings(quick=True, output=tmp_path))
    (row,) = rows_of(tmp_path, "memory")
    for side in ("ours", "whole logits"):
        assert row[side]["peak_bytes"] > row[side]["before_bytes"] > 50e6


@pytest.mark.slow
def test_ranks_run(tmp_path):
    """One process and two are measured in turns, and the speedup is the ratio of their seconds."""
    ranks.main(ranks.Settings(quick=True, output=tmp_path))
    row, *memory = json.loads((tmp_path / "ranks.json").read_text(encoding="utf-8"))["rows"]  # no picture: few points
    (turn,) = row["turns"]
    assert row["speedup"]["median"] == pytest.approx(turn["1"]["seconds"] / turn["2"]["seconds"])
    assert turn["1"]["tokens"] > 0 < turn["2"]["tokens"]
    alone, whole, sharded = memory
    for name in ("weights", "gradients", "optimizer"):
        assert alone[name] == whole[name] and 0.5 <= sharded[name] / alone[name] < 0.6


@pytest.mark.slow
def test_ppo_iteration_runs(tmp_path):
    """The optimizer steps are counted; TRL's side runs where TRL_PYTHON names an interpreter that has TRL."""
    python = os.environ.get("TRL_PYTHON")
    flags = ("entropy_coef=0.01",)
    settings = ppo_iteration.Settings(
        quick=True, output=tmp_path, trl_python=Path(python) if python else None, flags=flags
    )
    ppo_iteration.main(settings)
    (row,) = rows_of(tmp_path, "ppo_iteration")
    for side in ("ours", "ours, with flags", *(["trl"] if python else [])):
        assert [turn["optimizer_steps"] for turn in row[side]["all"]] == [2]
        assert row[side]["peak_bytes"] > 100e6 and 1 <= row[side]["mean_length"] <= 48


@pytest.mark.slow
def test_the_longer_model_is_the_same_model(tmp_path):
    """The model with more positions gives the logits of the embedded one, and goes on beyond its last position."""
    models.with_positions(SUPERVISED, tmp_path, 160)
    longer, short = (GPT2LMHeadModel.from_pretrained(folder).eval() for folder in (tmp_path, SUPERVISED))
    assert isinstance(longer.config, GPT2Config)
    ids = torch.arange(160)[None] % longer.config.vocab_size
    with torch.no_grad():
        logits = longer(input_ids=ids).logits
        torch.testing.assert_close(logits[:, :128], short(input_ids=ids[:, :128]).logits, rtol=1e-5, atol=1e-5)
    assert bool(logits.isfinite().all())
