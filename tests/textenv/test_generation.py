"""Scoring finished responses: what is refused, what models read, and what tokens that the policy did not write change."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import contextmanager

import pytest
import torch

import textenv.generation
from tests.support import tiny
from textenv import TextGenConfig, build_task, per_batch, per_token
from textenv.generation import Generation, response_kl, response_log_probs, score_responses
from textenv.kl import ESTIMATORS
from textenv.masks.token_sets import TokenSets
from textenv.models import logits
from textenv.models.decoding import CachedDecoder
from textenv.rewards.base import ResponseBatch
from textenv.rewards.reward_model import RewardModel
from textenv.state import FINISH_REASONS, TextState, start

# Other shapes of the same float32 sums: about ten roundings of 6e-8 at log-probabilities and scores of size 3.
TOLERANCE = 1e-5
# Responses of the two rows; `+` marks what the policy wrote, `-` what it did not, `$` is the end token.
TEXT, WRITER = ["ab$xyzc$", "de$"], ["+++---++", "+++"]


@per_token
def places(prompts, tokens):
    """Pays 1, 2, ... for the tokens of a response."""
    return [[1.0 + place for place in range(len(row))] for row in tokens]


def write(prompts, texts=TEXT, writers=WRITER):
    """The state after these responses to prompts."""
    tokenizer = tiny.tokenizer()
    state = start(prompts.input_ids, prompts.attention_mask, 12, tiny.PAD)
    for place in range(max(map(len, texts))):
        for row, (text, writer) in enumerate(zip(texts, writers, strict=True)):
            if place < len(text):
                token = tiny.END if text[place] == "$" else tokenizer(text[place]).input_ids[0]
                active = torch.arange(len(texts)) == row
                state = state.append(torch.full((len(texts),), token), active, writer[place] == "+")
    return state


@pytest.fixture
def task(settings):
    """A small task."""
    return build_task(TextGenConfig(**settings))


@pytest.fixture
def prompts(task):
    """Two prompts of different lengths."""
    return task.prompts.select([0, 1])


@torch.no_grad()
def plain_log_probs(model, state, row, temperature):
    """Log-probabilities of one row's response tokens by a bare forward of its tokens, [length]."""
    ids, length = state.input_ids[row][state.attention_mask[row]], int(state.length[row])
    log_probs = (model(input_ids=ids[None]).logits[0].float() / temperature).log_softmax(-1)
    return log_probs[:-1].gather(1, ids[1:, None])[-length:, 0]


@pytest.mark.parametrize("length", [0, 3])
def test_an_unfinished_response_is_refused(task, length):
    """A response without an end, empty or not, gets a ValueError that names its row, and no score."""
    width, budget = task.config.max_prompt_tokens, task.config.max_new_tokens
    ids = torch.full((1, task.width), tiny.END)  # the end token as padding must not pass for an end
    ids[0, width : width + length] = 65
    mask = torch.zeros(1, task.width, dtype=torch.bool)
    mask[0, width - 2 : width + length] = True
    state = TextState.from_masks(ids, mask, mask[:, -budget:])
    with pytest.raises(ValueError, match="finished responses, but row 0"):
        score_responses(task, state, ["a prompt"])


def test_a_response_of_others_alone_is_refused(task, prompts):
    """Where the policy wrote nothing there is no token to pay the score at."""
    state = write(prompts, ["ab$", "x" * 12], ["+++", "-" * 12])
    with pytest.raises(ValueError, match="finished responses, but row 1"):
        score_responses(task, state, prompts.texts)


def test_models_read_what_the_policy_did_not_write(task, prompts):
    """Tokens after a gap have the log-probability that a bare forward of the whole text gives; the gap has 0."""
    state, model = write(prompts), task.reference.model
    found = response_log_probs(model, state, 0.7)
    for row, writer in enumerate(WRITER):
        plain = plain_log_probs(model, state, row, 0.7)
        wanted = plain.where(torch.tensor([one == "+" for one in writer]), 0.0)
        assert (plain < 0).all()
        torch.testing.assert_close(found[row, : len(writer)], wanted, atol=TOLERANCE, rtol=0)
        assert not found[row, len(writer) :].any()


def test_the_decoder_reads_across_a_gap(task, prompts):
    """Next-token logits by the cache, token by token or read again, equal those of a bare forward."""
    state, model = write(prompts), task.reference.model
    decoder = CachedDecoder(model, 2, task.width, task.vocabulary)
    decoder.restart(state, torch.arange(2))
    again = decoder.with_model(model, state)
    for row in range(2):
        ids = state.input_ids[row][state.attention_mask[row]]
        with torch.no_grad():
            wanted = model(input_ids=ids[None]).logits[0, -1].float()
        torch.testing.assert_close(again.logits[row], wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("tail", ["", "uvw"])
def test_the_score_is_paid_at_the_last_generated_token(task, prompts, tail):
    """The whole text is scored; reward and reference log-probability are 0 where the policy wrote nothing."""
    state = write(prompts, [TEXT[0] + tail, TEXT[1]], [WRITER[0] + "-" * len(tail), WRITER[1]])
    scored = score_responses(task, state, prompts.texts)
    for row, writer in enumerate(WRITER):
        generated = torch.tensor([one == "+" for one in writer.ljust(12)])
        ids = state.input_ids[row][state.attention_mask[row]]
        with torch.no_grad():
            score = task.reward.model(input_ids=ids[None]).logits[0, 0]
        reference = plain_log_probs(task.reference.model, state, row, task.config.temperature)[: len(writer)]
        wanted = torch.zeros(12)
        wanted[: len(writer)] = task.config.kl_coef * reference
        wanted[len(writer) - 1] += score
        torch.testing.assert_close(scored.score[row], score, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(scored.reward[row], wanted.where(generated, 0.0), atol=TOLERANCE, rtol=TOLERANCE)
        assert not scored.reference_log_prob[row][~generated].any()
        assert (scored.reference_log_prob[row][generated] < 0).all()
    assert [scored.finish_reason(row) for row in range(2)] == ["stop", "stop"]
    assert scored.responses == ["abxyzc" + tail, "de"]


def test_all_tokens_count_towards_the_budget(task, prompts):
    """A response that ends at the width R without a stop token ended by its length, whoever wrote the tokens."""
    state = write(prompts, ["ab" + "x" * 9 + "c", "de$"], ["++" + "-" * 9 + "+", "+++"])
    scored = score_responses(task, state, prompts.texts)
    assert [FINISH_REASONS[code] for code in scored.finish_code.tolist()] == ["length", "stop"]
    assert scored.reward[0, 11] != 0 and not scored.reward[0, 2:11].any()


def test_rewards_of_tokens_skip_a_gap(settings):
    """A per-token reward sees the policy's tokens alone, and pays each of them in its own column."""
    task = build_task(TextGenConfig(**{**settings, "reward": places, "kl_coef": 0}))
    prompts = task.prompts.select([0, 1])
    scored = score_responses(task, write(prompts), prompts.texts)
    assert scored.reward[:, :9].tolist() == [[1, 2, 3, 0, 0, 0, 4, 5, 0], [1, 2, 3, 0, 0, 0, 0, 0, 0]]
    assert scored.score.tolist() == [15, 6]


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize(
    "reward", [None, places, {"tests.textenv.test_generation:places": 0.7, "textenv.rewards.library:length": -0.3}]
)
def test_the_score_per_token(settings, reward, kl_coef):
    """A row of token_score sums to the score, and the reward is it plus β log π_ref, to the bit."""
    reward = settings["reward"] if reward is None else reward
    task = build_task(TextGenConfig(**{**settings, "reward": reward, "kl_coef": kl_coef}))
    prompts = task.prompts.select([0, 1])
    state = write(prompts)
    scored = score_responses(task, state, prompts.texts)
    torch.testing.assert_close(scored.token_score.sum(1), scored.score, rtol=1e-6, atol=1e-6)  # float32, 12 terms
    assert torch.equal(scored.reward, scored.token_score + kl_coef * scored.reference_log_prob)
    assert not scored.token_score[~state.response_mask].any() and scored.token_score[state.last_generated].all()


def test_the_kl_leaves_a_gap_out(task, prompts, kind):
    """Every estimate is 0 where the policy wrote nothing, and the exact KL is positive everywhere else."""
    state, model = write(prompts), tiny.language_model(kind, seed=5)
    reference = task.reference.model
    log_prob, reference_log_prob = (response_log_probs(one, state, 0.7) for one in (model, reference))
    exact = response_kl(model, reference, Generation(state, log_prob, None), 0.7)
    assert torch.equal(exact > 0, state.response_mask)
    for estimate in ESTIMATORS.values():
        assert torch.equal(estimate(log_prob, reference_log_prob) != 0, state.response_mask)


RAGGED = ["abcdefghijk$", "a$", "abcdef$", "ab$", "ghijklmnopqr", "$"]


@pytest.fixture
def ragged(task):
    """Six prompts of different lengths, and their responses of 1 to 12 tokens."""
    prompts = task.prompts.select([0, 1, 2, 3, 0, 1])
    return prompts, write(prompts, RAGGED, ["+" * len(text) for text in RAGGED])


@contextmanager
def shapes_read(model):
    """The shapes of the ids that a model reads."""
    shapes = []

    def note(module, arguments, named):
        shapes.append(tuple(named["input_ids"].shape))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield shapes
    hook.remove()


def test_models_read_by_length_and_budget(task, ragged):
    """Shortest texts first, trimmed, at most so many tokens in a forward; the numbers are those of each row alone."""
    (prompts, state), budget = ragged, 30
    score_responses(task, state, prompts.texts)  # the first time, a forward of one token asks what follows the head
    with shapes_read(task.reference.model) as reference, shapes_read(task.reward.model.base_model) as reward:
        scored = score_responses(task, state, prompts.texts, budget)
    lengths = sorted(state.attention_mask.sum(1).tolist())
    read = 0
    for rows, width in reward:
        read += rows
        assert width == lengths[read - 1] and rows * width <= budget
    assert read == len(RAGGED) and 1 < len(reward) < len(RAGGED)
    assert [(rows, width + 1) for rows, width in reference] == reward  # the last token predicts nothing
    for row, length in enumerate(state.length.tolist()):
        alone = plain_log_probs(task.reference.model, state, row, task.config.temperature)
        torch.testing.assert_close(scored.reference_log_prob[row, :length], alone, atol=TOLERANCE, rtol=0)
        with torch.no_grad():
            ids = state.input_ids[row][state.attention_mask[row]]
            score = task.reward.model(input_ids=ids[None]).logits[0, 0]
        torch.testing.assert_close(scored.score[row], score, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_budget_of_no_tokens_is_refused(task, ragged):
    """The error says what the number means."""
    with pytest.raises(ValueError, match="at least 1 token, got 0; give the tokens of one forward"):
        score_responses(task, ragged[1], ragged[0].texts, 0)


def test_the_reward_sees_all_responses_at_once(settings, ragged):
    """A function is called once, with every response in the given order, however few tokens a model reads at a time."""
    seen = []

    @per_batch
    def record(batch):
        seen.append((batch.responses, dict(batch.fields), [batch.row(index) for index in range(len(batch))]))
        return torch.arange(float(len(batch)))

    prompts, state = ragged
    task = build_task(TextGenConfig(**{**settings, "reward": record}))
    scored = score_responses(task, state, prompts.texts, 1, {"answer": [*"uvwxyz"]})
    assert seen == [([text.rstrip("$") for text in RAGGED], {"answer": [*"uvwxyz"]}, [*range(6)])]
    assert scored.score.tolist() == [*range(6)]


def test_a_score_that_is_not_finite_names_its_row(task, ragged):
    """The model reads the longest text last, and the error names the row that it was given in."""
    model = copy.deepcopy(task.reward.model)
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny.tokenizer()("k").input_ids] = torch.nan
    task = dataclasses.replace(task, reward=RewardModel(model))
    with pytest.raises(ValueError, match=r"nan for row 0 \(prompt .*, response 'abcdefghijk'\)"):
        score_responses(task, ragged[1].select(torch.arange(4)), ragged[0].texts[:4], 1)


def test_texts_are_decoded_when_something_reads_them(monkeypatch, task, ragged):
    """A reward model with the policy's tokenizer reads none, so scoring decodes none; reading decodes once."""
    decoded, decode = [], ResponseBatch._decode
    monkeypatch.setattr(ResponseBatch, "_decode", lambda batch, ids: decoded.append(ids) or decode(batch, ids))
    scored = score_responses(task, ragged[1], ragged[0].texts)
    assert not decoded
    assert scored.responses == [text.rstrip("$") for text in RAGGED]
    count = len(decoded)
    assert count and scored.responses and len(decoded) == count


@pytest.mark.parametrize("masked", [False, True])
def test_the_exact_kl_in_parts(monkeypatch, task, ragged, kind, masked):
    """Equals sums of p log(p / q) over whole distributions of each row alone; no more logits are formed than a part."""
    (_, state), model, reference = ragged, tiny.language_model(kind, seed=5), task.reference.model
    vocabulary, generator = task.vocabulary, torch.Generator().manual_seed(0)
    allowed = torch.rand(*state.response_mask.shape, vocabulary, generator=generator) < 0.3  # [B, R, V]
    allowed.scatter_(2, state.response_ids[..., None], True)
    sets = TokenSets.of(allowed) if masked else None
    sizes, exact = [], textenv.generation.exact_kl
    monkeypatch.setattr(textenv.generation, "exact_kl", lambda own, *rest: sizes.append(len(own)) or exact(own, *rest))
    monkeypatch.setattr(logits, "PART", 3 * vocabulary)
    found = response_kl(model, reference, Generation(state, torch.zeros(6, 12), sets), 0.7, tokens_per_pass=40)
    assert max(sizes) == 3 and sum(sizes) == int(state.response_mask.sum())
    assert not found[~state.response_mask].any()
    for row, length in enumerate(state.length.tolist()):
        ids = state.input_ids[row][state.attention_mask[row]]
        with torch.no_grad():
            own, other = (
                (each(input_ids=ids[None]).logits[0, -length - 1 : -1] / 0.7).double() for each in (model, reference)
            )
        p, q = own.softmax(-1), other.softmax(-1)  # [length, V]
        if masked:
            p = p * allowed[row, :length]
            p = p / p.sum(-1, keepdim=True)
        wanted = torch.special.xlogy(p, p / q).sum(-1)
        assert (wanted > 0.01).all()
        torch.testing.assert_close(found[row, :length].double(), wanted, atol=TOLERANCE, rtol=TOLERANCE)
