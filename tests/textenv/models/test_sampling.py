"""The sampling distribution against an oracle in plain Python."""

import math
from fractions import Fraction

import pytest
import torch

from textenv.models.sampling import Sampling, chosen_log_probs, log_probs, sample

LOGITS = [2.0, 0.5, -1.0, 3.0, 0.0, 2.5]


def oracle(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities step by step: divide by the temperature, keep the k likeliest, keep the nucleus, normalize."""
    scaled = [math.exp(logit / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: -scaled[token])
    kept = order[: top_k or len(order)]
    total = sum(scaled[token] for token in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        if mass >= top_p:
            break
        nucleus.append(token)
        mass += scaled[token] / total
    total = sum(scaled[token] for token in nucleus)
    return [scaled[token] / total if token in nucleus else 0.0 for token in range(len(logits))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 99},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"temperature": 0.5, "top_k": 4, "top_p": 0.8},
    ],
)
def test_distribution(options):
    """`log_probs` is the distribution after temperature, then top-k, then top-p; filtered tokens have -inf."""
    result = log_probs(torch.tensor([LOGITS, LOGITS[::-1]]), Sampling(**options))
    # float32 has 2^-24 = 6e-8 relative error, a softmax of six terms some ten times that
    assert result[0].exp().tolist() == pytest.approx(oracle(LOGITS, **options), abs=1e-6)
    assert result[1].exp().tolist() == pytest.approx(oracle(LOGITS[::-1], **options), abs=1e-6)


def test_literal_numbers():
    """Hand-computed: odds 1 : 2 : 4, temperature 1/2 squares them, top-k 2 drops the smallest."""
    logits = torch.tensor([[0.0, math.log(2), math.log(4)]])
    assert log_probs(logits, Sampling()).exp()[0].tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    scaled = log_probs(logits, Sampling(temperature=0.5)).exp()[0].tolist()
    assert scaled == pytest.approx([1 / 21, 4 / 21, 16 / 21])
    assert log_probs(logits, Sampling(top_k=2)).exp()[0].tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    # 4/7 = 0.571 is less than 0.6, so the second token is still needed to reach it
    assert log_probs(logits, Sampling(top_p=0.6)).exp()[0].tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert log_probs(logits, Sampling(top_p=0.57)).exp()[0].tolist() == pytest.approx([0, 0, 1])


def test_half_precision_logits_are_read_in_float32():
    """Log-probabilities are float32 whatever the model's dtype, with no rounding after the logits."""
    logits = torch.tensor([LOGITS], dtype=torch.bfloat16)
    assert log_probs(logits, Sampling(temperature=0.7)).dtype == torch.float32
    chosen = chosen_log_probs(logits, torch.tensor([1]), 0.7)
    assert chosen.item() == pytest.approx(math.log(oracle(LOGITS, 0.7)[1]), abs=1e-6)


def test_arguments_stay_unchanged():
    """No call writes into the caller's logits."""
    logits = torch.tensor([LOGITS])
    log_probs(logits, Sampling(temperature=0.5, top_k=3, top_p=0.5))
    sample(logits, Sampling(top_k=2, top_p=0.9), uniform(1))
    chosen_log_probs(logits, torch.tensor([0]), 0.5)
    assert logits.tolist() == [LOGITS]


def uniform(count, seed=0):
    """Random numbers of the rows."""
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_sample_frequencies():
    """Tokens have their expected frequencies, filtered ones are never drawn, and the log-probability matches."""
    count, options = 20_000, dict(temperature=0.8, top_k=5, top_p=0.95)
    logits = torch.tensor([LOGITS]).expand(count, -1)
    tokens, drawn_log_prob = sample(logits, Sampling(**options), uniform(count))
    expected = oracle(LOGITS, **options)
    assert 0.0 in expected
    for token, probability in enumerate(expected):
        frequency = (tokens == token).float().mean().item()
        # five standard deviations of a binomial: a correct sampler fails with probability 6e-7
        assert abs(frequency - probability) <= 5 * math.sqrt(probability * (1 - probability) / count)
    expected_log_probs = [math.log(expected[token]) for token in tokens[:100].tolist()]
    assert drawn_log_prob[:100].tolist() == pytest.approx(expected_log_probs, abs=1e-6)


def test_a_random_number_chooses_the_token():
    """The token is the first whose running sum of probabilities is above the number, row by row, in exact sums."""
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, [0, 3, 49]] = -torch.inf
    for numbers in (torch.zeros(7).double(), torch.full((7,), 1 - 2.0**-53).double(), uniform(7), uniform(7, 1)):
        tokens, _ = sample(logits, Sampling(temperature=0.7), numbers)
        for row in range(7):
            weights = [int(p * 2.0**52) for p in log_probs(logits[row], Sampling(temperature=0.7)).exp().tolist()]
            place = min(Fraction(numbers[row].item()) * sum(weights), sum(weights) - 1)
            expected = next(token for token in range(50) if sum(weights[: token + 1]) > int(place))
            assert tokens[row] == expected and weights[expected] > 0


def test_no_forbidden_token_is_drawn():
    """At both ends of the interval, and where one token is left, what has no probability is not drawn."""
    logits = torch.zeros(3, 1000)
    logits[0, 500:], logits[1, :500], logits[2] = -torch.inf, -torch.inf, -torch.inf
    logits[2, 77] = -1e4
    numbers = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for number in numbers:
        tokens = sample(logits, Sampling(), number.expand(3))[0].tolist()
        assert tokens[0] < 500 <= tokens[1] and tokens[2] == 77


def test_logits_without_a_number_give_some_token():
    """Where logits are NaN or infinite the token is an id of the vocabulary, and its log-probability is NaN."""
    logits = torch.zeros(3, 5)
    logits[0, 2], logits[1, 2], logits[2] = torch.nan, torch.inf, -torch.inf
    tokens, log_prob = sample(logits, Sampling(), uniform(3))
    assert ((tokens >= 0) & (tokens < 5)).all() and log_prob.isnan().all()


def test_chosen_log_probs():
    """The log-probability of a token at a temperature, for logits of any leading shape."""
    logits = torch.tensor([[LOGITS, LOGITS[::-1]]])  # [1, 2, V]
    result = chosen_log_probs(logits, torch.tensor([[3, 0]]), 0.7)
    expected_log_probs = [math.log(oracle(LOGITS, 0.7)[3]), math.log(oracle(LOGITS[::-1], 0.7)[0])]
    assert result[0].tolist() == pytest.approx(expected_log_probs, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0.*top_k=1"),
        ({"temperature": -1.0}, "temperature must be above 0 and finite, got -1.0"),
        ({"temperature": math.nan}, "temperature must be above 0 and finite, got nan"),
        ({"temperature": math.inf}, "temperature must be above 0 and finite, got inf"),
        ({"top_k": -1}, "top_k must be a whole number.*got -1"),
        ({"top_k": 1.5}, "top_k must be .*got 1.5"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\], got 1.1"),
        ({"top_p": math.nan}, r"top_p must lie in \(0, 1\], got nan"),
    ],
)
def test_bad_sampling(options, message):
    """A setting out of range is refused at construction."""
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
