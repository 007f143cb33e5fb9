"""Prompt samplers: frequencies against hand-computed numbers, updates, and checkpointed state."""

import json
from collections import Counter

import numpy as np
import pytest

from textenv.config import PROMPT_SAMPLING
from textenv.prompts.samplers import (
    SAMPLERS,
    GroupedSampler,
    PrioritizedSampler,
    ShuffledSampler,
    UniformSampler,
    WeightedSampler,
    make_sampler,
)

WEIGHTS = [1.0, 0.0, 2.0, 0.5, 0.5]


def test_settings_list_every_sampler():
    """`prompt_sampling` accepts the name of every sampler, and no other name."""
    assert list(SAMPLERS) == list(PROMPT_SAMPLING)


def generator(seed=0):
    """A fresh generator."""
    return np.random.default_rng(seed)


def assert_frequencies(sampler, expected, draws=20_000):
    """The shares of draws are as expected, within five standard deviations."""
    counts = Counter(sampler.draw(generator(), draws))
    for index, share in enumerate(expected):
        tolerance = 5 * (share * (1 - share) / draws) ** 0.5
        assert counts[index] / draws == pytest.approx(share, abs=tolerance), index


def make(strategy, group_size=1):
    """A sampler over five prompts."""
    return make_sampler(strategy, 5, WEIGHTS, group_size)


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("strategy", list(SAMPLERS))
def test_small_draws_equal_one_large_draw(strategy, group_size):
    """Several small draws equal one large draw, and the generator alone decides."""
    whole = make(strategy, group_size).draw(generator(1), 40)
    sampler, source = make(strategy, group_size), generator(1)
    assert [index for count in (1, 7, 0, 12, 20) for index in sampler.draw(source, count)] == whole
    assert make(strategy, group_size).draw(generator(2), 40) != whole
    assert all(type(index) is int and 0 <= index < 5 for index in whole)


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("strategy", list(SAMPLERS))
def test_state_restores_the_sampler(strategy, group_size):
    """A sampler restored from its state, through JSON, draws on: mid-round, mid-group, and with its returns."""
    sampler, source = make(strategy, group_size), generator()
    drawn = sampler.draw(source, 7)
    sampler.update(drawn, [0.1 * index for index in range(7)])
    state = json.loads(json.dumps(sampler.state_dict()))
    generator_state = source.bit_generator.state

    def go_on(sampler):
        source.bit_generator.state = generator_state
        first = sampler.draw(source, 11)
        sampler.update(first, [float(index) for index in range(11)])
        return first + sampler.draw(source, 11)

    expected = go_on(sampler)
    for _ in range(2):  # twice: the saved state is a copy, not a view
        resumed = make(strategy, group_size)
        resumed.load_state_dict(state)
        assert go_on(resumed) == expected


@pytest.mark.parametrize("strategy", list(SAMPLERS))
def test_state_of_other_prompts(strategy):
    """The state of another number of prompts is refused, since its indices would mean other prompts."""
    other = make_sampler(strategy, 6, [1.0] * 6, 1)
    with pytest.raises(ValueError, match="state has 5 prompts, and there are 6 now; resume with the same prompts"):
        other.load_state_dict(make(strategy).state_dict())


def test_uniform():
    """Every prompt is equally frequent."""
    assert_frequencies(UniformSampler(5), [0.2] * 5)


def test_shuffled_rounds():
    """Each prompt comes once per round, in a new order every round."""
    drawn = ShuffledSampler(7).draw(generator(), 21)
    rounds = [drawn[start : start + 7] for start in (0, 7, 14)]
    assert all(Counter(indices) == Counter(range(7)) for indices in rounds)
    assert rounds[0] != rounds[1] != rounds[2] and rounds[0] != list(range(7))


def test_weighted():
    """Shares are in proportion to the weights; a weight of 0 is never drawn, not even at either end of the list."""
    assert_frequencies(WeightedSampler(WEIGHTS), [0.25, 0.0, 0.5, 0.125, 0.125])
    assert set(WeightedSampler([0, 3, 0]).draw(generator(), 500)) == {1}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "draws by the prompts' weights, and they have none; give rows such as"),
        ([1.0, -1.0], "weight of prompt number 1 must be a finite number, 0 or more, got -1.0"),
        ([1.0, float("nan")], "weight of prompt number 1 must be a finite number, .*got nan"),
        ([float("inf"), 1.0], "weight of prompt number 0 must be a finite number, .*got inf"),
        ([10**400, 1.0], "weight of prompt number 0 must be a finite number, .*got 1000"),
        (["2", 1.0], "weight of prompt number 0 must be a finite number, .*got '2'"),
        ([None, 1.0], "weight of prompt number 0 must be a finite number, .*got None"),
        ([True, 1.0], "weight of prompt number 0 must be a finite number, .*got True"),
        ([0.0, 0], "weights of the prompts must sum to more than 0 and stay finite, got 0.0"),
        ([1e308, 1e308], "weights of the prompts must sum to more than 0 and stay finite, got inf"),
    ],
)
def test_bad_weights(weights, message):
    """Weights that are not finite, non-negative numbers with a positive sum are refused; the error names the prompt."""
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=message):
        make_sampler("weighted", 2, weights, 1)


def test_prioritized_formula():
    """The probabilities in the docstring, by hand.

    Prompt 3 was never played: rank 1. Prompts 1 and 2 share the lowest return 0: ranks 2 and 3. Prompt 0: rank 4.
    rank^-0.7 = 1, 0.615572, 0.463470, 0.378929, in sum 2.457971. Ages after 4 episodes: 1 + 4 − (2, 4, 4, 0).
    """
    sampler = PrioritizedSampler(4)
    sampler.update([0, 0], [0.5, 1.5])
    sampler.update([1, 2], [0.0, 0.0])
    by_rank = np.array([0.378929, (0.615572 + 0.463470) / 2, (0.615572 + 0.463470) / 2, 1.0]) / 2.457971
    by_age = np.array([3.0, 1.0, 1.0, 5.0]) / 10
    assert_frequencies(sampler, 0.9 * by_rank + 0.1 * by_age)


def test_prioritized_starts_uniform():
    """Before any episode, all prompts are equally likely."""
    assert_frequencies(PrioritizedSampler(5), [0.2] * 5)


def test_recent_returns():
    """The recent return is the mean of the last four returns; a group counts once, by its mean."""
    sampler = PrioritizedSampler(3)
    for returns, recent in [([4.0], 4.0), ([2.0], 3.0), ([0.0, 6.0], 3.0), ([7.0], 4.0), ([8.0], 5.0)]:
        sampler.update([0] * len(returns), returns)
        assert sampler.recent.tolist() == [recent, -np.inf, -np.inf]
    sampler.update([0, 2, 0], [1.0, 7.0, 3.0])
    assert sampler.state_dict() == {
        "size": 3,
        "returns": [[3.0, 7.0, 8.0, 2.0], [], [7.0]],
        "updated": [9, 0, 9],
        "episodes": 9,
    }


def play(sampler, solved, episodes, source):
    """Shares of draws when each episode is drawn and recorded in turn; solved prompts return 1, the others 0."""
    counts = Counter()
    for _ in range(episodes):
        (index,) = sampler.draw(source, 1)
        counts[index] += 1
        sampler.update([index], [float(index in solved)])
    return np.array([counts[index] / episodes for index in range(sampler.size)])


def test_prioritized_follows_the_returns():
    """Unsolved prompts are drawn more often, solved ones keep being drawn, and priorities follow a change."""
    sampler, source = PrioritizedSampler(20), generator()
    easy, hard = list(range(15)), list(range(15, 20))
    shares = play(sampler, set(easy), 2000, source)
    assert shares[hard].min() > 1.5 * shares[easy].max()
    assert shares[hard].sum() > 0.4  # a quarter of the prompts
    assert shares.min() > 0.01
    play(sampler, set(hard), 500, source)  # easy and hard change places
    shares = play(sampler, set(hard), 2000, source)
    assert shares[easy].min() > shares[hard].max() > 0.01


def test_newly_solved_prompt_loses_priority():
    """A prompt that becomes solved is drawn less often: staleness makes sure that it is tried again."""
    sampler, source = PrioritizedSampler(50), generator()
    play(sampler, set(range(49)), 500, source)
    before = sampler.draw(source, 2000).count(49)
    play(sampler, set(range(50)), 500, source)
    assert sampler.draw(source, 2000).count(49) < before / 2


def test_groups():
    """Each prompt comes G times in a row, in the order of the inner sampler."""
    sampler = GroupedSampler(ShuffledSampler(4), 3)
    drawn, plain = sampler.draw(generator(), 24), ShuffledSampler(4).draw(generator(), 8)
    assert drawn == [index for index in plain for _ in range(3)]
