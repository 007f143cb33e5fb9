"""The replay buffer: what it keeps, what it draws, and when it refuses."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from agents.replay import FILLING, Replay, available_bytes

CPU = torch.device("cpu")


def rows(first, count, width=2):
    number = torch.arange(first, first + count)
    sets = number[:, None, None].expand(count, 3, width)
    return TensorDict({"number": number, "sets": sets.int()}, batch_size=[count])


def test_the_newest_rows_are_kept():
    """Rows go round, the oldest are forgotten, and more than fit at once leave the last of them."""
    replay = Replay(5, CPU)
    replay.extend(rows(0, 3))
    assert len(replay) == 3
    replay.extend(rows(3, 4))
    assert len(replay) == 5 and replay.storage["number"].tolist() == [5, 6, 2, 3, 4]
    replay.extend(rows(10, 7))
    assert sorted(replay.storage["number"].tolist()) == [12, 13, 14, 15, 16]


def test_samples_are_uniform_and_the_generators_own():
    """Every row that is there comes as often, none that is not, and global randomness has no part in it."""
    replay = Replay(8, CPU)
    replay.extend(rows(0, 5))
    state = torch.random.get_rng_state()
    drawn = replay.sample(5000, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.random.get_rng_state())
    counts = drawn["number"].bincount(minlength=8)
    assert counts[5:].sum() == 0 and (counts[:5] - 1000).abs().max() < 120  # four standard deviations of 28
    assert torch.equal(drawn["sets"][:, 0, 0], drawn["number"].int())  # rows stay whole
    again = replay.sample(5000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn["number"], again["number"])


def test_wider_sets_of_tokens_make_it_wider():
    """Rollouts whose sets of allowed tokens are larger or smaller share a buffer; -1 fills up."""
    replay = Replay(4, CPU)
    for first, width in ((0, 2), (1, 3), (2, 1)):
        replay.extend(rows(first, 1, width))
    assert replay.storage["sets"][:3, 0].tolist() == [[0, 0, FILLING], [1, 1, 1], [2, FILLING, FILLING]]


def test_a_saved_buffer_goes_on_alike():
    """What was saved and loaded, in part or wrapped around, keeps and draws the same from then on."""
    for counts in ((3,), (3, 4), ()):
        replay, other = Replay(5, CPU), Replay(5, CPU)
        for count in counts:
            replay.extend(rows(count, count))
        other.load_state_dict(replay.state_dict())
        for one in (replay, other):
            one.extend(rows(50, 2))
        drawn = [one.sample(20, torch.Generator().manual_seed(1)) for one in (replay, other)]
        assert torch.equal(drawn[0]["number"], drawn[1]["number"]) and len(replay) == len(other)
        assert replay.cursor == other.cursor


def test_what_does_not_fit_is_refused():
    """The size, what there is, and the number of rows that would fit."""
    available = available_bytes(CPU)
    assert 2**20 < available < 2**50
    row = 8 + 4 * 6  # a number of 8 bytes and six of 4
    size = 2 * available // row
    with pytest.raises(
        ValueError, match=rf"{size} rows of 32 bytes takes .* GiB, and cpu has .* GiB .*lower buffer_size"
    ):
        Replay(size, CPU).extend(rows(0, 1))
