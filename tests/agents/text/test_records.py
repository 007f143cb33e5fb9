"""Records: the learner's numbers of every token, unchanged, and tokens as they are."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from agents.seeds import evaluation_seed
from agents.text.evaluation import evaluate
from agents.text.records import (
    ITERATIONS,
    held_out_records,
    iterations_to_keep,
    median_record,
    read_records,
    rows_to_keep,
)
from tests.support import tiny
from tests.support.by_hand import distribution, perturb
from tests.support.learning import make_trainer
from textenv.models.token_texts import TokenNames

KEYS = dict(
    score="step_score",
    reward="reward",
    log_prob="action_log_prob",
    reference_log_prob="reference_log_prob",
    entropy="entropy",
    value="state_value",
    td_error="td_error",
    advantage="raw_advantage",
)
only_gpt2 = pytest.mark.parametrize("kind", ["gpt2"], indirect=True)


def rollout_of(trainer):
    """The rollout of one iteration, with the entropies that the run adds, and those worked out by hand."""
    by_hand = []

    def watch(number, rollout, policy):
        data = rollout.data
        data["entropy"] = trainer.collector.entropies(policy, data)
        log_prob = distribution(trainer, data).detach()
        by_hand.append(-(log_prob.exp() * log_prob).sum(-1))

    (iteration,) = trainer.iterate(watch)
    return iteration.rollout, by_hand[0]


@only_gpt2
def test_the_numbers_are_the_rollouts(settings):
    """Every number reads back as the float32 that the learner used, and tokens are split as the masks say."""
    trainer = make_trainer(settings, iterations=1)
    rollout, _ = rollout_of(trainer)
    data = rollout.data
    for at, record in enumerate(read_records(trainer.collector.task.tokenizer, rollout, [0, 5], [0.5, 1.5])):
        row = [0, 5][at]
        mask = data["mask"][row]
        for name, key in KEYS.items():
            assert torch.equal(torch.tensor(record.numbers[name]), data[key][row][mask]), name
        assert torch.equal(torch.tensor(record.numbers["penalty"]), (data["kl_coef"][row] * data["kl"][row])[mask])
        assert set(record.numbers) == {*KEYS, "penalty"}
        assert torch.tensor(record.score) == data["score"][row] and record.gold == at + 0.5
        assert record.kl == pytest.approx(sum(record.numbers["penalty"]) / settings["kl_coef"], abs=1e-5)
        prompt = trainer.collector.task.tokenizer(rollout.prompts[row]).input_ids
        assert record.ids == prompt + data["action"][row][mask].tolist()
        assert record.generated == [False] * len(prompt) + [True] * int(mask.sum())
        assert record.finish == rollout.scored.finish_reason(row)


@only_gpt2
def test_the_entropy_is_of_the_policy_that_wrote(settings):
    """It is taken before the update: that of the distributions which the tokens were drawn from, by plain forwards."""
    trainer = make_trainer(settings, iterations=1, learning_rate=0.03)
    rollout, by_hand = rollout_of(trainer)
    mask = rollout.data["mask"]
    torch.testing.assert_close(rollout.data["entropy"], by_hand.where(mask, 0.0), atol=1e-4, rtol=1e-4)
    after = distribution(trainer, rollout.data).detach()
    assert ((-(after.exp() * after).sum(-1) - by_hand)[mask]).abs().max() > 1e-2  # the update shows


@only_gpt2
@pytest.mark.parametrize(
    ("learner", "missing"), [("rloo", {"value", "td_error"}), ("sac", {"value", "td_error", "advantage"})]
)
def test_learners_without_a_critic_have_fewer_numbers(settings, learner, missing):
    """What a learner does not compute is not there; the reward is the penalized one for all of them."""
    own = dict(learning_starts=8, gradient_steps=1) if learner == "sac" else dict(epochs=1)
    trainer = make_trainer(settings | dict(group_size=2), own, learner, iterations=1)
    rollout, by_hand = rollout_of(trainer)
    torch.testing.assert_close(rollout.data["entropy"], by_hand.where(rollout.data["mask"], 0.0), atol=1e-4, rtol=1e-4)
    for record in read_records(trainer.collector.task.tokenizer, rollout, range(4), None):
        assert {*KEYS, "penalty"} - set(record.numbers) == missing
        paid = zip(record.numbers["score"], record.numbers["penalty"], strict=True)
        assert record.numbers["reward"] == pytest.approx([score - penalty for score, penalty in paid], abs=1e-6)
        assert record.gold is None


@only_gpt2
@pytest.mark.parametrize("changes", [{}, dict(kl_coef=0), dict(group_size=2), dict(score_normalization="running")])
def test_held_out_records_are_of_the_evaluation(settings, changes):
    """Same responses, scores and KL as in the evaluation of the same policy, with β = 0 and for groups too."""
    learner = "rloo" if "group_size" in changes else "ppo"
    trainer = make_trainer(settings | changes, learner=learner)
    perturb(trainer.algorithm.networks.policy, 0.03)
    collector = trainer.collector
    held_out, model = collector.prompts.select([0, 1, 2]), collector.sampling_model(trainer.algorithm.networks.policy)
    before = evaluate(collector.task, model, held_out, None, evaluation_seed(), (8, 80))
    records = held_out_records(trainer, held_out, None)
    assert [record.prompt for record in records] == before.prompts
    for record, response, score, kl in zip(records, before.responses, before.score, before.kl, strict=True):
        written = [token for token, own in zip(record.ids, record.generated, strict=True) if own]
        assert collector.task.tokenizer.decode(written, skip_special_tokens=True) == response
        seen = record.score if record.raw_score is None else record.raw_score
        assert seen == pytest.approx(score, abs=1e-5) and record.kl == pytest.approx(kl, abs=1e-4)
        assert (record.raw_score is None) == ("score_normalization" not in changes)
        assert any(record.numbers["penalty"]) == ((settings | changes)["kl_coef"] > 0)
    assert min(abs(record.kl) for record in records) > 0


@only_gpt2
@pytest.mark.parametrize(
    ("learner", "own"), [("grpo", {}), ("grpo", dict(kl_loss="none")), ("ppo", dict(kl_loss="k2"))]
)
def test_a_penalty_is_where_the_learner_has_one(settings, learner, own):
    """Where the KL is in the loss, no record has a penalty, also while the policy is the reference and the KL is 0."""
    trainer = make_trainer(settings | dict(group_size=2), own, learner, iterations=1)
    collector = trainer.collector
    records = held_out_records(trainer, collector.prompts.select([0, 1]), None)
    in_reward = trainer.algorithm.kl_loss == "none"
    for record in records:
        assert ("penalty" in record.numbers) == in_reward
    rollout, _ = rollout_of(trainer)
    (record,) = read_records(collector.task.tokenizer, rollout, [0], None)
    assert ("penalty" in record.numbers) == in_reward
    if not in_reward:
        assert record.numbers["reward"] == record.numbers["score"]


def test_names_of_tokens():
    """Bytes that are no character are told, and so are special tokens, and ids that the tokenizer lacks."""
    names = TokenNames(tiny.tokenizer())
    euro = tiny.tokenizer()("€ a").input_ids  # three bytes, a space, a letter
    assert names([*euro, tiny.END, 299]) == ["\\xe2", "\\x82", "\\xac", " ", "a", "<end>", "[299]"]
    assert [names.is_special(token) for token in (euro[0], tiny.END, 299)] == [False, True, True]
    pieces = tiny.sentencepiece_tokenizer()
    assert TokenNames(pieces)(pieces("the cat").input_ids) == [" the", " cat"]


def test_what_is_kept():
    """About a dozen iterations, the first and the last among them; whole groups; few rows of long responses."""
    assert iterations_to_keep(1) == {1} and iterations_to_keep(5) == {1, 2, 3, 4, 5}
    kept = sorted(iterations_to_keep(1000))
    assert len(kept) == ITERATIONS and (kept[0], kept[-1]) == (1, 1000)
    gaps = [after - before for before, after in pairwise(kept)]
    assert max(gaps) - min(gaps) <= 1
    assert [rows_to_keep(1, 24), rows_to_keep(6, 24), rows_to_keep(64, 24)] == [16, 12, 16]
    assert [rows_to_keep(1, 400), rows_to_keep(1, 10_000)] == [5, 1]


def test_the_median():
    """The response of median length, whatever the order."""
    records = [{"generated": [1] * length} for length in (9, 2, 5)]
    assert len(median_record(records)["generated"]) == 5
