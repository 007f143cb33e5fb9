"""The replay buffer: storage, sampling, saving and its memory check."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from agents.replay import FILLING, Replay, free_memory

CPU = torch.device("cpu")


def rows(first, count, width=2):
    number = torch.arange(first, first + count)
    sets = number[:, None, None].expand(count, 3, width)
    return TensorDict({"number": number, "sets": sets.int()}, batch_size=[count])


def test_the_newest_rows_are_kept():
    """New rows overwrite the oldest; of more rows than fit at once, the last remain."""
    replay = Replay(5, CPU)
    replay.extend(rows(0, 3))
    assert len(replay) == 3
    replay.extend(rows(3, 4))
    assert len(replay) == 5 and replay.storage["number"].tolist() == [5, 6, 2, 3, 4]
    replay.extend(rows(10, 7))
    assert sorted(replay.storage["number"].tolist()) == [12, 13, 14, 15, 16]


def test_samples_are_uniform_and_use_the_generator():
    """Every stored row is sampled equally often, empty ones never; global randomness is not used."""
    replay = Replay(8, CPU)
    replay.extend(rows(0, 5))
    state = torch.random.get_rng_state()
    sample = replay.sample(5000, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.random.get_rng_state())
    counts = sample["number"].bincount(minlength=8)
    assert counts[5:].sum() == 0 and (counts[:5] - 1000).abs().max() < 120  # four standard deviations of 28
    assert torch.equal(sample["sets"][:, 0, 0], sample["number"].int())  # keys of a row stay together
    again = replay.sample(5000, torch.Generator().manual_seed(0))
    assert torch.equal(sample["number"], again["number"])


def test_wider_token_sets_widen_the_storage():
    """Token sets of different widths share a buffer, padded with -1."""
    replay = Replay(4, CPU)
    for first, width in ((0, 2), (1, 3), (2, 1)):
        replay.extend(rows(first, 1, width))
    assert replay.storage["sets"][:3, 0].tolist() == [[0, 0, FILLING], [1, 1, 1], [2, FILLING, FILLING]]


def test_a_restored_buffer_continues_alike():
    """A restored buffer (empty, partly filled or wrapped around) stores and samples like the original."""
    for counts in ((3,), (3, 4), ()):
        replay, other = Replay(5, CPU), Replay(5, CPU)
        for count in counts:
            replay.extend(rows(count, count))
        other.load_state_dict(replay.state_dict())
        for buffer in (replay, other):
            buffer.extend(rows(50, 2))
        samples = [buffer.sample(20, torch.Generator().manual_seed(1)) for buffer in (replay, other)]
        assert torch.equal(samples[0]["number"], samples[1]["number"]) and len(replay) == len(other)
        assert replay.cursor == other.cursor


def test_a_buffer_beyond_memory_is_refused():
    """The error names the size, the available memory and the number of rows that would fit."""
    available = free_memory(CPU)
    assert available is not None and 2**20 < available < 2**50
    row = 8 + 4 * 6  # an int64 and six int32
    size = 2 * available // row
    with pytest.raises(
        ValueError, match=rf"{size} rows of 32 bytes takes .* GiB, and cpu has .* GiB .*lower buffer_size"
    ):
        Replay(size, CPU).extend(rows(0, 1))
