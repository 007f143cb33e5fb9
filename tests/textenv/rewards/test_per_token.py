"""Per-token rewards: when they are paid, in every face, and the token texts that functions receive."""

from __future__ import annotations

import math

import gymnasium as gym
import pytest
import torch

import textenv.dynamics
from tests.support import tiny
from tests.support.episodes import written
from tests.support.faces import STOPS
from tests.support.tiny import sentencepiece_tokenizer
from textenv import Scores, TextGenConfig, build_task, per_token, shared
from textenv.conformance import check_faces
from textenv.dynamics import TextDynamics
from textenv.generation import score_responses
from textenv.models.token_texts import TokenTexts
from textenv.rewards.base import ResponseBatch, WeightedSum
from textenv.rewards.per_token import TokenFunctionReward
from textenv.state import start
from textenv.torchrl_env import TextGenTorchEnv

pytestmark = pytest.mark.parametrize("kind", ["gpt2"], indirect=True)


@pytest.fixture(autouse=True)
def kind_of_models(kind):
    """One architecture is enough here."""


@per_token
def vowels(prompts, tokens):
    """1 for every vowel, plus 0.1 for every earlier token, so that the position matters."""
    return [[float(text in "aeiou") + 0.1 * index for index, text in enumerate(row)] for row in tokens]


@per_token
def ahead(prompts, tokens):
    """Pays the first token by the length of the response, which later tokens change."""
    return [[float(len(row))] + [0.0] * (len(row) - 1) for row in tokens]


def count(prompts, responses):
    """Characters of the response."""
    return [len(response) for response in responses]


SUM = {"tests.textenv.rewards.test_per_token:vowels": 0.5, "tests.textenv.rewards.test_per_token:count": 2.0}


def ids(text):
    """One id a character."""
    return tiny.tokenizer()(text).input_ids


def test_what_is_paid_when(settings):
    """Each step pays the token's reward, and the last step also the final score; `score` is the sum of all."""
    env = gym.make("TextGen-v0", **{**settings, "kl_coef": 0, "reward": SUM})
    env.reset(seed=0)
    answers = [env.step(token) for token in [*ids("bae"), tiny.END]]
    wanted = [0.5 * 0.0, 0.5 * 1.1, 0.5 * 1.2, 0.5 * 0.3 + 2 * 3]
    wanted[3] += 0.5 * float("" in "aeiou")  # the end token's text is empty, and the empty string is in every string
    assert [answer[1] for answer in answers] == pytest.approx(wanted)
    info = answers[-1][4]
    assert info["score"] == pytest.approx(sum(wanted))
    assert info["score_parts"] == pytest.approx(dict(zip(SUM, (3.6, 3.0), strict=True)))


def test_the_fast_path_pays_the_same(settings):
    """Hand-computed: `score_responses` gives each row its per-token rewards, and zero after its end."""
    task = build_task(TextGenConfig(**{**settings, "kl_coef": 0, "reward": SUM}))
    prompts = task.prompts.select([0, 1])
    state = start(prompts.input_ids, prompts.attention_mask, 12, 0)
    for first, second in ((ids("b")[0], ids("a")[0]), (ids("a")[0], tiny.END), (tiny.END, 0)):
        state = state.append(torch.tensor([first, second]), torch.tensor([True, second != 0]))
    scored = score_responses(task, state, prompts.texts, tokens_per_pass=1)
    wanted = torch.zeros(2, 12)
    wanted[0, :3] = torch.tensor([0.0, 0.5 * 1.1, 0.5 * 1.2 + 2 * 2])
    wanted[1, :2] = torch.tensor([0.5, 0.5 * 1.1 + 2 * 1])
    torch.testing.assert_close(scored.reward, wanted)
    torch.testing.assert_close(scored.score, wanted.sum(1))


def test_faces_agree(settings):
    """With the penalty, weights and different lengths, every face pays the same as the fast path."""
    settings = {**settings, "reward": SUM, "stop_token_ids": STOPS}
    task = build_task(TextGenConfig(**settings))
    check_faces(task, rows=3, torchrl_env=TextGenTorchEnv(task, 3))


def test_looking_ahead_is_caught(settings):
    """A reward that depends on later tokens fails the conformance check at that token."""
    task = build_task(TextGenConfig(**{**settings, "reward": ahead, "kl_coef": 0}))
    with pytest.raises(AssertionError, match=r"row 0, step 0: reward is 1\.0, by the fast path"):
        check_faces(task, rows=2)


def test_one_call_a_step(settings):
    """A step calls the function once for all rows that continue and once for all that end; inactive rows are left out."""
    calls = []

    @per_token
    def spy(prompts, tokens):
        calls.append([len(row) for row in tokens])
        return [[0.0] * len(row) for row in tokens]

    task = build_task(TextGenConfig(**{**settings, "reward": spy, "kl_coef": 0, "max_new_tokens": 3}))
    dynamics = TextDynamics(task, 3)
    dynamics.reset([0, 1, 2], [0, 1, 2])
    dynamics.step(torch.tensor([65, 65, 65]))
    dynamics.step(torch.tensor([65, tiny.END, 65]))
    dynamics.step(torch.tensor([65, 65, 65]), torch.tensor([True, False, True]))
    assert calls == [[1, 1, 1], [2], [2, 2], [3, 3]]


def test_no_token_reward_costs_nothing(settings, monkeypatch):
    """Without a per-token reward, no ResponseBatch is built and no text is decoded before an episode ends."""
    task, calls = build_task(TextGenConfig(**{**settings, "reward": count, "kl_coef": 0})), []
    decode = task.tokenizer.decode
    monkeypatch.setattr(task.tokenizer, "decode", lambda *args, **more: calls.append("text") or decode(*args, **more))
    monkeypatch.setattr(textenv.dynamics, "ResponseBatch", lambda *args: calls.append("batch") or ResponseBatch(*args))
    dynamics = TextDynamics(task, 2)
    dynamics.reset([0, 1], [0, 1])
    dynamics.step(torch.tensor([65, 65]))
    assert not calls
    dynamics.step(torch.tensor([65, tiny.END]))
    assert set(calls) == {"batch", "text"}  # the spies do record calls


def test_a_retried_step_counts_its_scores_once(settings):
    """If the per-token reward of an unfinished row fails, the score of the row that ended is not counted either."""
    broken = [True]

    @per_token
    def pays(prompts, tokens):
        assert not (broken and any(len(row) == 2 and row[-1] == "b" for row in tokens))
        return [[0.5] * len(row) for row in tokens]

    def nothing(prompts, responses):  # running statistics normalize what is paid at the end
        return [0.0] * len(responses)

    reward = {pays: 1.0, nothing: 1.0}
    changes = dict(score_normalization="running", prompt_sampling="prioritized", reward=reward, kl_coef=0)
    task = build_task(TextGenConfig(**{**settings, **changes}))
    dynamics = TextDynamics(task, 2)
    dynamics.reset([0, 1], [0, 1])
    dynamics.step(torch.tensor([65, 65]))
    for _ in range(2):
        with pytest.raises(ValueError, match="raised AssertionError"):
            dynamics.step(torch.tensor([tiny.END, ids("b")[0]]))
        assert task.normalizer.statistics.count == 0 and dynamics.samplers[0].episodes == 0
    broken.clear()
    assert dynamics.step(torch.tensor([tiny.END, ids("b")[0]])).reward.tolist() == [0.5, 0.5]
    assert task.normalizer.statistics.count == 1 and dynamics.samplers[0].episodes == 1


class OwnTokenReward:
    """A user's reward object that pays each token its id / 100."""

    name, part_names = "own", ("own",)

    def token_rewards(self, batch):
        """Token ids / 100, [B, R]."""
        return (batch.state.response_ids / 100).where(batch.state.response_mask, 0.0)

    def __call__(self, batch):
        """The per-token rewards, and 1 at the end."""
        tokens = self.token_rewards(batch)
        return Scores(torch.ones(len(batch)), {"own": 1 + tokens.sum(1)}, tokens)


def test_reward_objects(settings):
    """An object with `token_rewards` pays at every step, alone and in a sum."""
    for reward, weight in ((OwnTokenReward(), 1.0), (WeightedSum([(-3.0, OwnTokenReward())]), -3.0)):
        env = gym.make("TextGen-v0", **{**settings, "reward": shared(reward), "kl_coef": 0})
        env.reset(seed=0)
        paid = [env.step(token)[1] for token in (50, 60, tiny.END)]
        assert paid == pytest.approx([weight * 0.5, weight * 0.6, weight * (2.56 + 1)])


WRONG = {
    "rows": (lambda tokens: [[0.0]] * 3, "must return a list of 2 lists, one per response, got 3"),
    "kind": (lambda tokens: 0.0, "must return a list of 2 lists, one per response, got float"),
    "length": (
        lambda tokens: [[0.0, 0.0], [0.0]],
        r"must return 2 numbers, one per token, for row 9 .*response 'd'\), got shape \(1,",
    ),
    "type": (
        lambda tokens: [["1", "2"], [0.0, 0.0]],
        r"must return 2 numbers, one per token, for row 8 .*'c'\), got .*'1', '2'",
    ),
    "huge": (
        lambda tokens: [[10**400, 0], [0, 0]],
        r"must return 2 numbers, one per token, for row 8 .*'c'\), got '\[1000",
    ),
    "nan": (lambda tokens: [[0.0, 0.0], [0.0, math.nan]], r"returned nan for token 1 of row 9 \(prompt 'b'"),
    "raise": (lambda tokens: tokens[7], "raised IndexError: .* for a batch of 2 responses, the first of them row 8"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_token_rewards(wrong):
    """Anything but one finite number per token raises an error that names the reward, and the response and token where known."""
    function, says = WRONG[wrong]
    batch = written([ids("a"), ids("b")], [[*ids("c"), 256], [*ids("d"), 256]], tiny.tokenizer(), rows=[8, 9])
    with pytest.raises(ValueError, match=f"reward 'f' {says}"):
        TokenFunctionReward(per_token(lambda prompts, tokens: function(tokens)), "f")(batch)


def test_prompt_fields_and_copies():
    """Prompt fields are passed by name, and a function that changes its lists does not affect the next call."""

    @per_token
    def rude(prompts, tokens, answer):
        paid = [[float(text in right) for text in row] for row, right in zip(tokens, answer, strict=True)]
        for row in tokens:
            row.clear()
        return paid

    batch = written([ids("a"), ids("b")], [ids("cd"), ids("dx")], tiny.tokenizer(), fields={"answer": ["c", "dx"]})
    reward = TokenFunctionReward(rude, "rude")
    for _ in range(2):
        assert reward(batch).total.tolist() == [1.0, 2.0]


def test_token_texts_make_the_response():
    """The token texts concatenate to the response: spaces are kept, special tokens are empty."""
    tokenizer = tiny.tokenizer()
    texts = TokenTexts(tokenizer)
    assert texts([*ids(" it's\nA"), tiny.PAD, tiny.END, 299]) == [" ", "i", "t", "'", "s", "\n", "A", "", "", ""]
    assert texts(ids("é")) == ["\ufffd", "\ufffd"]  # two bytes, neither of them a character
    words = TokenTexts(sentencepiece_tokenizer())
    assert words([2, 3, 5, 4, 1]) == [" the", " cat", "s", " sat", ""]
    assert words([3]) == [" cat"]  # a token's text does not depend on its position
