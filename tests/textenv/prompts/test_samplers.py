"""Prompt samplers: their frequencies against hand-computed numbers, their memory, and their state."""

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


def test_the_settings_know_every_sampler():
    """`prompt_sampling` may name every sampler, and nothing else."""
    assert list(SAMPLERS) == list(PROMPT_SAMPLING)


def generator(seed=0):
    """A fresh generator."""
    return np.random.default_rng(seed)


def assert_frequencies(sampler, wanted, draws=20_000):
    """Drawn shares are the wanted ones, to five standard deviations of a share of that many draws."""
    counts = Counter(sampler.draw(generator(), draws))
    for index, share in enumerate(wanted):
        tolerance = 5 * (share * (1 - share) / draws) ** 0.5
        assert counts[index] / draws == pytest.approx(share, abs=tolerance), index


def made(strategy, group_size=1):
    """A sampler over five prompts."""
    return make_sampler(strategy, 5, WEIGHTS, group_size)


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("strategy", list(SAMPLERS))
def test_cuts_do_not_matter(strategy, group_size):
    """Many small draws give what one large draw gives, and the generator alone decides."""
    whole = made(strategy, group_size).draw(generator(1), 40)
    sampler, source = made(strategy, group_size), generator(1)
    assert [index for count in (1, 7, 0, 12, 20) for index in sampler.draw(source, count)] == whole
    assert made(strategy, group_size).draw(generator(2), 40) != whole
    assert all(type(index) is int and 0 <= index < 5 for index in whole)


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("strategy", list(SAMPLERS))
def test_state_goes_on(strategy, group_size):
    """A sampler that takes back its state, through JSON, goes on where it was: mid-round, mid-group, and learned."""
    sampler, source = made(strategy, group_size), generator()
    drawn = sampler.draw(source, 7)
    sampler.update(drawn, [0.1 * index for index in range(7)])
    state = json.loads(json.dumps(sampler.state_dict()))
    place = source.bit_generator.state

    def onward(one):
        source.bit_generator.state = place
        first = one.draw(source, 11)
        one.update(first, [float(index) for index in range(11)])
        return first + one.draw(source, 11)

    wanted = onward(sampler)
    for _ in range(2):  # the state that was saved is a copy, not a view
        resumed = made(strategy, group_size)
        resumed.load_state_dict(state)
        assert onward(resumed) == wanted


@pytest.mark.parametrize("strategy", list(SAMPLERS))
def test_state_of_other_prompts(strategy):
    """A state of another number of prompts is refused: its indices would mean other prompts."""
    other = make_sampler(strategy, 6, [1.0] * 6, 1)
    with pytest.raises(ValueError, match="state is of 5 prompts, and there are 6 now; go on with the prompts"):
        other.load_state_dict(made(strategy).state_dict())


def test_uniform():
    """Each prompt as often as any other."""
    assert_frequencies(UniformSampler(5), [0.2] * 5)


def test_shuffled_rounds():
    """Each prompt comes once a round, in another order every round."""
    drawn = ShuffledSampler(7).draw(generator(), 21)
    rounds = [drawn[start : start + 7] for start in (0, 7, 14)]
    assert all(Counter(one) == Counter(range(7)) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2] and rounds[0] != list(range(7))


def test_weighted():
    """In proportion to the weights; a weight of 0 is never drawn, at the edges neither."""
    assert_frequencies(WeightedSampler(WEIGHTS), [0.25, 0.0, 0.5, 0.125, 0.125])
    assert set(WeightedSampler([0, 3, 0]).draw(generator(), 500)) == {1}


@pytest.mark.parametrize(
    ("weights", "says"),
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
def test_bad_weights(weights, says):
    """Weights that are no share of anything are refused by number."""
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=says):
        make_sampler("weighted", 2, weights, 1)


def test_prioritized_formula():
    """The documented formula, by hand.

    Prompt 3 was never played: rank 1. Prompts 1 and 2 share the lowest return 0: ranks 2 and 3. Prompt 0: rank 4.
    rank^-0.7 = 1, 0.615572, 0.463470, 0.378929, in sum 2.457971. Ages after 4 episodes: 1 + 4 − (2, 4, 4, 0).
    """
    sampler = PrioritizedSampler(4)
    sampler.update([0, 0], [0.5, 1.5])
    sampler.update([1, 2], [0.0, 0.0])
    by_rank = np.array([0.378929, (0.615572 + 0.463470) / 2, (0.615572 + 0.463470) / 2, 1.0]) / 2.457971
    by_age = np.array([3.0, 1.0, 1.0, 5.0]) / 10
    assert_frequencies(sampler, 0.9 * by_rank + 0.1 * by_age)


def test_prioritized_begins_uniform():
    """Before anything is known, all prompts are alike."""
    assert_frequencies(PrioritizedSampler(5), [0.2] * 5)


def test_recent_returns():
    """The mean of the last returns, four at most; a group counts once, by its mean."""
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
    """Draws and updates one episode at a time; solved prompts return 1, the others 0. Returns shares of draws."""
    counts = Counter()
    for _ in range(episodes):
        (index,) = sampler.draw(source, 1)
        counts[index] += 1
        sampler.update([index], [float(index in solved)])
    return np.array([counts[index] / episodes for index in range(sampler.size)])


def test_the_curriculum_works():
    """Unsolved prompts are drawn more often, the others keep being visited, and priorities follow the returns."""
    sampler, source = PrioritizedSampler(20), generator()
    easy, hard = list(range(15)), list(range(15, 20))
    shares = play(sampler, set(easy), 2000, source)
    assert shares[hard].min() > 1.5 * shares[easy].max()
    assert shares[hard].sum() > 0.4  # a quarter of the prompts
    assert shares.min() > 0.01
    play(sampler, set(hard), 500, source)  # the world turns
    shares = play(sampler, set(hard), 2000, source)
    assert shares[easy].min() > shares[hard].max() > 0.01


def test_a_lasting_success_is_found():
    """A prompt that becomes solved sinks, although it is then drawn seldom: age brings every prompt back."""
    sampler, source = PrioritizedSampler(50), generator()
    play(sampler, set(range(49)), 500, source)
    before = sampler.draw(source, 2000).count(49)
    play(sampler, set(range(50)), 500, source)
    assert sampler.draw(source, 2000).count(49) < before / 2


def test_groups():
    """Each drawn prompt comes G times in a row, and what the other sampler would draw next is next."""
    sampler = GroupedSampler(ShuffledSampler(4), 3)
    drawn, plain = sampler.draw(generator(), 24), ShuffledSampler(4).draw(generator(), 8)
    assert drawn == [index for index in plain for _ in range(3)]
