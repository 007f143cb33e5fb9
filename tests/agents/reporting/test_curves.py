"""The picture of learning curves shows what was measured, and nothing larger than it is."""

import math

import numpy as np
import pytest

from agents.control.experiment import PANELS as CONTROL
from agents.reporting import plots
from agents.reporting.plots import POLICY_LOSS, VALUE_LOSS, Line, Panel, draw_curves
from agents.text.experiment import PANELS as TEXT
from agents.text.experiment import SCORES

BEFORE = {"score": 0.2, "score_std": 1.5, "gold": 1.4, "kl_per_response": 0.0, "length": 20.0}
AFTER = {"score": 1.6, "score_std": 1.0, "gold": 2.9, "kl_per_response": 3.0, "length": 15.0}


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws rows in panels; returns the axes by title."""
    figures = []
    monkeypatch.setattr(plots.pyplot, "close", figures.append)

    def drawn(rows, panels, before=BEFORE, after=AFTER):
        draw_curves(tmp_path / "curves.png", rows, "title", panels, before, after)
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        return {axis.get_title(): axis for axis in figures[-1].axes}

    return drawn


def rows_of(name, values):
    """Rows of iterations from 1 on, without the metric where a value is None."""
    return [{"iteration": i} | ({} if value is None else {name: value}) for i, value in enumerate(values, 1)]


def test_no_line_bridges_a_gap(draw):
    """Iterations without an episode, and missing ones, break the line; a value alone between gaps is a dot."""
    rows = rows_of("return", [5.0, None, 7.0, None, 6.0, 8.0])
    line, dots, *_ = draw([*rows, {"iteration": 9, "return": 4.0}], CONTROL, {}, {})["Return"].lines
    nan = math.nan
    assert list(line.get_xdata()) == list(range(1, 10))
    np.testing.assert_array_equal(line.get_ydata(), [5.0, nan, 7.0, nan, 6.0, 8.0, nan, nan, 4.0])
    np.testing.assert_array_equal(dots.get_ydata(), [5.0, nan, 7.0, nan, nan, nan, nan, nan, 4.0])


def test_evaluations_before_and_after_are_drawn(draw):
    """The values before training are lines across the panel, those after it points at the last iteration."""
    rows = [{"iteration": i, "score": 0.1 * i, "gold": 1.0} for i in range(1, 6)]
    lines = draw(rows, (SCORES,))[SCORES.title].lines
    heights = [line.get_ydata()[0] for line in lines if line.get_linestyle() == "--"]
    assert heights == [BEFORE["score"], BEFORE["gold"]]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines if line.get_marker() == "o"]
    assert points == [(5, AFTER["score"]), (5, AFTER["gold"])]


def test_a_panel_without_numbers_is_left_out(draw):
    """A learner without a critic has no empty panels; with a KL coefficient of 0 the evaluations' KL is drawn."""
    rows = [{"iteration": i, "score": 1.0, "policy_loss": 0.1, "length": 9.0} for i in (1, 2)]
    axes = draw(rows, (SCORES, *TEXT))
    assert list(axes) == [SCORES.title, "Distance from the reference", "Length", POLICY_LOSS.title]
    assert {line.get_ydata()[0] for line in axes["Distance from the reference"].lines if len(line.get_xdata())} >= {
        0,
        3.0,
    }


@pytest.mark.parametrize("panels", [TEXT, CONTROL[1:]], ids=["text", "control"])
def test_axes_do_not_enlarge_noise(draw, panels):
    """Each axis but that of scores holds zero, so that noise of a thousandth looks like a thousandth."""
    names = [line.metric for panel in panels for line in panel.lines]
    rows = [{"iteration": i} | dict.fromkeys(names, value) for i, value in enumerate([1.0, 1.001, 0.999], 1)]
    axes = draw(rows, panels, {}, {})
    for panel in panels:
        low, high = axes[panel.title].get_ylim()
        assert low <= min(panel.shows) <= 0 <= max(panel.shows) <= high and high - low >= 1


def test_scores_are_seen_beside_their_deviation(draw):
    """A change of the mean score by a hundredth of the deviation before training looks like it."""
    low, high = draw(rows_of("score", [0.2, 0.215]), (SCORES,), {"score": 0.2, "score_std": 1.5}, {})[
        SCORES.title
    ].get_ylim()
    assert low <= 0.2 - 1.5 and high >= 0.2 + 1.5


def test_the_policy_loss_has_an_axis_of_its_own(draw):
    """A value loss of hundreds does not flatten the policy loss."""
    rows = [{"iteration": i, "policy_loss": -0.01 * i, "value_loss": 300.0} for i in (1, 2)]
    axes = draw(rows, CONTROL, {}, {})
    low, high = axes[POLICY_LOSS.title].get_ylim()
    assert high - low < 0.1 and axes[VALUE_LOSS.title].get_ylim()[1] >= 300


def test_a_picture_without_rows_is_drawn(draw):
    """Where all metrics were lost, the evaluations are drawn."""
    panel = Panel(title="Score", unit="score", lines=(Line("score", "score", "blue", evaluated="score"),))
    assert [line.get_ydata()[0] for line in draw([], (panel,))["Score"].lines if len(line.get_xdata())] == [0.2, 1.6]
