"""TextState by hand: what its masks and lengths say, with and without tokens that the policy did not write."""

from __future__ import annotations

import pytest
import torch

from textenv.state import LENGTH, RUNNING, STOP, TextState, finish, left_aligned, start

ROWS = torch.tensor([True, True])


def make_state() -> TextState:
    """Two rows, P = 3 and R = 6: row 0 is `g n n g` and row 1 is `g g`, g generated and n not."""
    state = start(
        torch.tensor([[0, 7, 7], [7, 7, 7]]), torch.tensor([[0, 1, 1], [1, 1, 1]]), max_new_tokens=6, pad_token_id=0
    )
    state = state.append(torch.tensor([11, 21]), ROWS)
    for token in (12, 13):
        state = state.append(torch.tensor([token, 0]), torch.tensor([True, False]), generated=False)
    return state.append(torch.tensor([14, 22]), ROWS)


def test_tokens_that_the_policy_did_not_write():
    """They are in the text, its positions and its length; they are not in the response mask."""
    state = make_state()
    assert state.response_ids.tolist() == [[11, 12, 13, 14, 0, 0], [21, 22, 0, 0, 0, 0]]
    assert state.attention_mask.long().tolist() == [[0, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0]]
    assert state.generated.long().tolist() == [[0, 0, 0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0, 0]]
    assert state.response_mask.long().tolist() == [[1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert state.last_generated.long().tolist() == [[0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    ids, length = left_aligned(state.input_ids, state.attention_mask)
    assert ids.tolist() == [[7, 7, 11, 12, 13, 14], [7, 7, 7, 21, 22, 22]] and length.tolist() == [6, 5]
    assert state.length.tolist() == [4, 2] and state.generated_length.tolist() == [2, 2]


def test_last_generated_before_a_token_that_is_not():
    """A response may end with tokens of someone else; an empty one has no last token."""
    state = make_state().append(torch.tensor([15, 0]), torch.tensor([True, False]), generated=False)
    assert state.last_generated.long().tolist() == [[0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]]
    fresh = start(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2), 3, 0)
    assert not fresh.last_generated.any() and not fresh.append(torch.tensor([1]), ROWS[:1], False).last_generated.any()


def test_select_and_restart_move_every_mask():
    """Rows are chosen and replaced whole: ids, both masks and the length."""
    state = make_state()
    fresh = start(torch.tensor([[8, 8, 8]]), torch.tensor([[1, 1, 1]]), 6, 0)
    restarted = state.restart(torch.tensor([0]), fresh)
    for row, wanted in ((0, fresh), (1, state.select(torch.tensor([1])))):
        one = restarted.select(torch.tensor([row]))
        for name in ("input_ids", "attention_mask", "generated", "length"):
            assert torch.equal(getattr(one, name), getattr(wanted, name))


def test_from_masks_gives_the_state_back():
    """A rollout keeps ids and two masks; they hold the whole state."""
    state = make_state()
    again = TextState.from_masks(state.input_ids, state.attention_mask, state.response_mask)
    assert torch.equal(again.generated, state.generated) and torch.equal(again.length, state.length)
    assert again.prompt_width == 3


def test_finish_counts_all_tokens():
    """The budget is the response's width: tokens that were not generated take room too. A stop token comes first."""
    tokens, stops = torch.tensor([1, 1, 9, 9]), torch.tensor([9])
    assert finish(tokens, torch.tensor([5, 6, 5, 6]), stops, 6).tolist() == [RUNNING, LENGTH, STOP, STOP]


def test_a_batch_without_rows():
    """It is refused in a sentence before a model sees it: attention in Transformers takes none."""
    state = make_state().select(torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match=r"the batch has no texts.*pass one or more"):
        left_aligned(state.input_ids, state.attention_mask)
