"""Advantages, targets and shaped rewards against plain-Python loops and published oracles."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from agents.objectives.advantages import (
    Ends,
    estimate_advantages,
    explained_variance,
    group_centered,
    group_normalized,
    leave_one_out,
    masked_mean,
    next_values,
    response_ends,
    sequence_weights,
    td_errors,
    token_weights,
    whiten,
)
from textenv.kl import environment_reward, k1, penalized_reward

GAMMA, LMBDA, BETA = 0.9, 0.8, 0.3
LENGTHS = [5, 1, 3, 4]


def make_mask(lengths: list[int] = LENGTHS, width: int = 5) -> torch.Tensor:
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


def random_batch():
    generator = torch.Generator().manual_seed(0)
    mask = make_mask()
    reward = torch.randn(4, 5, generator=generator)
    value = torch.randn(4, 6, generator=generator)
    return reward, value, mask


def loop_advantages(reward, value, lengths):
    """Generalized advantage estimation, as its paper writes it: a sum of discounted TD errors."""
    advantages = torch.zeros(len(lengths), reward.shape[1])
    for row, length in enumerate(lengths):
        for t in range(length):
            total = 0.0
            for k in range(t, length):
                beyond = 0.0 if k == length - 1 else float(value[row, k + 1])
                delta = float(reward[row, k]) + GAMMA * beyond - float(value[row, k])
                total += (GAMMA * LMBDA) ** (k - t) * delta
            advantages[row, t] = total
    return advantages


def test_advantages_equal_the_loop():
    """GAE on ragged responses is the paper's double sum; the target is advantage + value."""
    reward, value, mask = random_batch()
    advantage, target = estimate_advantages(reward, value, response_ends(mask), GAMMA, LMBDA)
    expected = loop_advantages(reward, value, LENGTHS)
    # float32 sums of at most five terms of size 1: rounding stays below 1e-6
    torch.testing.assert_close(advantage, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(target, (expected + value[:, :-1]).where(mask, 0.0), atol=1e-6, rtol=1e-6)


def test_tokens_of_the_environment_are_skipped():
    """A token of the policy is followed by its next one, whatever stands between: GAE, targets and TD errors by a loop.

    Padding and the tokens in between hold 99 and count nowhere.
    """
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 9, generator=generator) < 0.6
    mask[0], mask[1], mask[2] = True, False, torch.arange(9) == 4
    reward, value = torch.randn(6, 9, generator=generator), torch.randn(6, 10, generator=generator)
    ends = response_ends(mask)
    assert torch.equal(ends.done.sum(1), mask.any(1).long())
    spoiled_value = value.clone()
    spoiled_value[:, :-1][~mask], spoiled_value[:, -1] = 99.0, 99.0
    spoiled_reward = reward.where(mask, 99.0)
    advantage, target = estimate_advantages(spoiled_reward, spoiled_value, ends, GAMMA, LMBDA)
    errors = td_errors(spoiled_reward, spoiled_value, ends, GAMMA)
    for row in range(6):
        own, following, ahead = mask[row].nonzero()[:, 0].tolist(), 0.0, 0.0
        for t in reversed(own):
            error = float(reward[row, t]) + GAMMA * following - float(value[row, t])
            ahead = error + GAMMA * LMBDA * ahead
            following = float(value[row, t])
            numbers = [float(part[row, t]) for part in (errors, advantage, target)]
            assert numbers == pytest.approx([error, ahead, ahead + following], abs=1e-5)
        for part in (errors, advantage, target):
            assert not part[row][~mask[row]].any()


def test_a_time_limit_bootstraps_from_the_state_it_reached():
    """After a step that is done and not terminated comes V of the next state, not of the next episode's first step.

    Steps 0 and 1 are one episode, cut by a time limit; column 2 only resets; steps 3 and 4 are the next one.
    """
    mask = torch.tensor([[True, True, False, True, True]])
    done = torch.tensor([[False, True, False, False, False]])
    ends = Ends(mask, done, torch.zeros_like(done))
    value = torch.tensor([[1.0, 2.0, 7.0, 40.0, 50.0, 60.0]])
    assert next_values(value, ends)[mask].tolist() == [2.0, 7.0, 50.0, 60.0]
    errors = td_errors(torch.zeros(1, 5), value, ends, 0.5)
    assert errors.tolist() == [[0.0, 1.5, 0.0, -15.0, -20.0]]
    advantage, target = estimate_advantages(torch.zeros(1, 5), value, ends, 0.5, 1.0)
    assert advantage.tolist() == [[0.75, 1.5, 0.0, -25.0, -20.0]]
    assert target.tolist() == [[1.75, 3.5, 0.0, 15.0, 30.0]]


def test_td_errors_sum_to_the_advantage():
    """A_t = δ_t + γλ A_{t+1}, so the picture of the credit shows what the learner used."""
    reward, value, mask = random_batch()
    advantage, _ = estimate_advantages(reward, value, response_ends(mask), GAMMA, LMBDA)
    delta = td_errors(reward, value, response_ends(mask), GAMMA)
    following = torch.nn.functional.pad(advantage[:, 1:], (0, 1))
    torch.testing.assert_close(delta, (advantage - GAMMA * LMBDA * following).where(mask, 0.0))


@pytest.mark.parametrize("filler", [1e9, -1e9, float("nan")])
def test_padding_changes_nothing(filler):
    """What stands in padding changes no advantage, target, whitened value or metric, to the bit."""
    reward, value, mask = random_batch()
    clean_reward, clean_value = reward.where(mask, 0.0), value.clone()
    clean_value[:, 1:] = clean_value[:, 1:].where(mask, 0.0)
    dirty_reward, dirty_value = reward.where(mask, filler), value.clone()
    dirty_value[:, 1:] = dirty_value[:, 1:].where(mask, filler)
    clean = estimate_advantages(clean_reward, clean_value, response_ends(mask), GAMMA, LMBDA)
    dirty = estimate_advantages(dirty_reward, dirty_value, response_ends(mask), GAMMA, LMBDA)
    for first, second in zip(clean, dirty, strict=True):
        assert torch.equal(first, second)
    spoiled = clean[0].where(mask, filler)
    assert torch.equal(whiten(clean[0], mask), whiten(spoiled, mask))
    assert masked_mean(clean[0], mask) == masked_mean(spoiled, mask)
    assert torch.equal(
        td_errors(clean_reward, clean_value, response_ends(mask), GAMMA),
        td_errors(dirty_reward, dirty_value, response_ends(mask), GAMMA),
    )


def test_whiten_by_hand():
    """Whitened advantages have mean 0 and standard deviation 1 over valid tokens alone."""
    values = torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    deviation = (8 / 3) ** 0.5  # of 1, 3 and 5
    expected = torch.tensor([[-2 / deviation, 0.0, 0.0], [2 / deviation, 0.0, 0.0]])
    torch.testing.assert_close(whiten(values, mask), expected)


@pytest.mark.parametrize("valid", [0, 1])
def test_whiten_of_next_to_nothing_is_zero(valid):
    """One valid token, or none, whitens to 0 and not to NaN."""
    mask = torch.arange(4)[None] < valid
    assert torch.equal(whiten(torch.full((1, 4), 7.0), mask), torch.zeros(1, 4))


def test_the_whole_reward_is_score_minus_penalty():
    """Environment's half and learner's half add up to score − β Σ (log π − log π_ref), token by token."""
    generator = torch.Generator().manual_seed(1)
    mask = make_mask()
    log_prob = -torch.rand(4, 5, generator=generator).where(mask, 0.0)
    reference = -torch.rand(4, 5, generator=generator).where(mask, 0.0)
    score = torch.tensor([2.0, -1.0, 0.5, 3.0])
    last = mask & (torch.arange(5)[None] == torch.tensor(LENGTHS)[:, None] - 1)
    token_score = score[:, None].where(last, 0.0)
    paid = environment_reward(token_score, reference, BETA) - BETA * log_prob
    torch.testing.assert_close(penalized_reward(token_score, k1(log_prob, reference), BETA), paid)
    for row, length in enumerate(LENGTHS):
        for t in range(5):
            expected = 0.0
            if t < length:
                expected = -BETA * (float(log_prob[row, t]) - float(reference[row, t]))
            if t == length - 1:
                expected += float(score[row])
            assert float(paid[row, t]) == pytest.approx(expected, abs=1e-6)


def test_explained_variance_by_hand():
    """1 for a perfect critic, 0 for a constant one, over valid tokens."""
    target, mask = torch.tensor([[1.0, 2.0, 50.0]]), torch.tensor([[True, True, False]])
    assert float(explained_variance(target, target, mask)) == 1.0
    assert float(explained_variance(torch.full((1, 3), 9.0), target, mask)) == pytest.approx(0.0)


def test_leave_one_out_by_hand():
    """Each return less the mean of its siblings', group by group (Ahmadian et al. 2024)."""
    total = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 10.0])
    expected = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 4 - 7.0, 4 - 7.0, 10 - 4.0])
    torch.testing.assert_close(leave_one_out(total, 3), expected)


def test_group_normalized_by_hand():
    """Standard deviations from the group's mean, the unbiased deviation (Shao et al. 2024); or not divided by it."""
    total = torch.tensor([1.0, 3.0, 5.0, 0.0, 0.0, 3.0])
    expected = torch.tensor([-1.0, 0.0, 1.0, -1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5])
    torch.testing.assert_close(group_normalized(total, 3), expected)  # ε = 1e-6 is below its tolerance
    torch.testing.assert_close(group_centered(total, 3), torch.tensor([-2.0, 0.0, 2.0, -1.0, -1.0, 2.0]))


@pytest.mark.parametrize("compare", [leave_one_out, group_centered, group_normalized])
def test_equal_returns_give_no_signal(compare):
    """Where all of a group got the same, every advantage is exactly 0: rounding is not blown up to a signal."""
    assert torch.equal(compare(torch.full((9,), -12.3), 3), torch.zeros(9))


@pytest.mark.parametrize("compare", [leave_one_out, group_centered, group_normalized])
@pytest.mark.parametrize(("rows", "group"), [(6, 4), (6, 1), (3, 6)])
def test_cut_groups_are_refused(compare, rows, group):
    """A group of one, or a group cut in two, is refused with the remedy."""
    with pytest.raises(
        ValueError, match=rf"whole groups of two or more.*got {rows} rows in groups of {group}.*multiple"
    ):
        compare(torch.zeros(rows), group)


def test_weights_by_hand():
    """Every valid step the same, or every row the same; rows without steps weigh nothing."""
    mask = make_mask([3, 1, 0], 4)
    by_token = torch.tensor([[0.25] * 3 + [0], [0.25, 0, 0, 0], [0] * 4])
    by_sequence = torch.tensor([[1 / 6] * 3 + [0], [0.5, 0, 0, 0], [0] * 4])
    torch.testing.assert_close(token_weights(mask), by_token)
    torch.testing.assert_close(sequence_weights(mask), by_sequence)


def load_torchtune(name: str):
    """A single file of torchtune, since importing the package asks for more packages."""
    found = importlib.util.find_spec("torchtune")
    if found is None or found.origin is None:
        pytest.skip("torchtune is not installed")
    spec = importlib.util.spec_from_file_location(f"oracle_{name}", Path(found.origin).parent / "rlhf" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rewards_and_targets_equal_torchtune():
    """Penalized rewards and value targets equal those of torchtune's PPO recipe."""
    oracle = load_torchtune("rewards")
    reward, value, mask = random_batch()
    log_prob, reference = -reward.abs(), -(reward - 0.3).abs()
    log_prob, reference = log_prob.where(mask, 0.0), reference.where(mask, 0.0)
    score, last = torch.tensor([2.0, -1.0, 0.5, 3.0]), torch.tensor(LENGTHS) - 1
    expected, _, _ = oracle.get_rewards_ppo(score, log_prob, reference, BETA, valid_score_idxs=last)
    ended = torch.nn.functional.one_hot(last, 5).bool()
    paid = penalized_reward(score[:, None].where(ended, 0.0), k1(log_prob, reference), BETA)
    torch.testing.assert_close(paid, expected)
    clean_value = value[:, :-1].where(mask, 0.0)
    _, returns = oracle.estimate_advantages(clean_value, paid.where(mask, 0.0), GAMMA, LMBDA, masks=mask)
    _, target = estimate_advantages(paid, value, response_ends(mask), GAMMA, LMBDA)
    torch.testing.assert_close(target, returns.where(mask, 0.0))
