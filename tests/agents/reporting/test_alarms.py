"""Alarms: series made by hand, of which it is known what deserves a look, and those of a run that went wrong."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from agents.reporting.alarms import find_alarms

HACKING = Path(__file__).parents[2] / "golden" / "hacking_metrics.json"
NOISE = (0.03, -0.02, 0.01, -0.03, 0.02, -0.01)
STEADY = dict(score=(1.0, 1.0), gold=(2.0, 2.0), length=(20.0, 20.0), distinct_bigrams=(0.7, 0.7), entropy=(1.0, 1.0))


def run(count: int = 24, **ends: tuple[float, ...]) -> list[dict[str, float]]:
    """Metrics of a run whose series go evenly through the given values, with a little noise."""
    rows = []
    for at in range(count):
        row = {"iteration": at + 1, "score_std": 0.8}
        for name, values in (STEADY | ends).items():
            place = at / (count - 1) * (len(values) - 1)
            low = min(int(place), len(values) - 2)
            level = values[low] + (place - low) * (values[low + 1] - values[low])
            row[name] = level * (1 + NOISE[at % len(NOISE)])
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        (dict(score=(0.0, 2.0), gold=(2.0, 2.9, 1.1)), "Gold falls while the score rises: since about iteration 1"),
        (dict(length=(20.0, 5.0)), "The responses collapse: their length fell"),
        (dict(distinct_bigrams=(0.8, 0.2)), "The responses repeat themselves"),
        (dict(entropy=(1.0, 0.1)), "The entropy collapses"),
    ],
)
def test_each_alarm(ends, words):
    """It rings for its own series, alone, in words with the numbers."""
    (alarm,) = find_alarms(run(**ends))
    assert alarm.startswith(words)


def test_a_run_that_hacks_its_reward():
    """The metrics of one, on the embedded task without a penalty: gold is best after a quarter, and texts grow alike."""
    stored = json.loads(HACKING.read_text(encoding="utf-8"))
    rows = [dict(zip(stored["columns"], row, strict=True)) for row in stored["rows"]]
    hacked, repeated = find_alarms(rows)
    assert "since about iteration 10 the score went from +1.66 to +2.15, and gold from +2.79 to +1.41" in hacked
    assert repeated.startswith("The responses repeat themselves")
    assert not any("Gold" in alarm for alarm in find_alarms(rows[:12]))  # both scores still rise


def test_the_numbers_are_means():
    """Over a sixth of the run: of the first and last iterations, and for gold of those where it was best."""
    rows = run(score=(0.0, 2.0), gold=(2.0, 2.9, 1.1), length=(20.0, 5.0))
    hacked, short = find_alarms(rows)
    first, last = (statistics.fmean(row["length"] for row in part) for part in (rows[:4], rows[-4:]))
    assert f"from {first:.3g} to {last:.3g} tokens" in short
    best = max(statistics.fmean(row["gold"] for row in rows[at : at + 4]) for at in range(21))
    end, score = (statistics.fmean(row[name] for row in rows[-4:]) for name in ("gold", "score"))
    assert f"to {score:+.2f}, and gold from {best:+.2f} to {end:+.2f}" in hacked and best > 2.7


@pytest.mark.parametrize(
    "ends",
    [
        {},
        dict(score=(0.0, 2.0), gold=(2.0, 3.0)),  # both rise
        dict(score=(2.0, 0.0), gold=(3.0, 1.0)),  # both fall: nothing is exploited
        dict(score=(0.0, 2.0), gold=(2.9, 2.88)),  # within the noise
        dict(length=(20.0, 12.0), entropy=(1.0, 0.5), distinct_bigrams=(0.8, 0.5)),  # usual
    ],
)
def test_no_false_alarm(ends):
    """Usual runs are quiet."""
    assert find_alarms(run(**ends)) == []


def test_short_and_broken_series():
    """Too few iterations, missing and infinite numbers, other environments and no run at all are no alarm, nor an error."""
    hacked = dict(score=(0.0, 2.0), gold=(3.0, 1.0))
    assert find_alarms([]) == [] and find_alarms(run(5, **hacked)) == []
    assert find_alarms([{"iteration": at, "return": 1.0, "length": 500 / at} for at in range(1, 40)]) == []
    rows = run(30, **hacked)
    for row in rows[::7]:
        row["gold"] = math.nan
    del rows[3]["score"]
    assert len(find_alarms(rows)) == 1
