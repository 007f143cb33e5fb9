"""Action masks: the tokens they allow, the same in every face, obeyed and stored by rollouts."""

from __future__ import annotations

import copy
import pickle
import tracemalloc

import gymnasium as gym
import numpy as np
import pytest
import regex
import torch
from torchrl.envs import TransformedEnv
from torchrl.envs.transforms import ActionMask
from torchrl.envs.utils import check_env_specs
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.text.networks import FORBIDDEN
from tests.support import tiny
from tests.support.faces import assert_same
from tests.support.learning import losses, make_rollout, make_trainer, same, weights, whole
from textenv import LanguageModel, TextGenConfig, build_task, shared
from textenv.dynamics import TextDynamics
from textenv.generation import generate
from textenv.masks.masks import MaskPolicy, Pattern
from textenv.masks.token_sets import TokenSets
from textenv.models import decoding
from textenv.models.sampling import Sampling, log_probs
from textenv.torchrl_env import TextGenTorchEnv
from textenv.vector_env import TextGenVectorEnv

SAMPLING = Sampling(temperature=0.7)
one_kind = pytest.mark.parametrize("kind", ["gpt2"], indirect=True)  # for tests that do not depend on the architecture


def vowels_first(prompt, response_ids):
    """A user's function: vowels at even steps, letters of the prompt at odd steps, the end token after four."""
    if len(response_ids) == 4:
        return [tiny.END]
    letters = "aeiou" if len(response_ids) % 2 == 0 else prompt.replace(" ", "")
    return tiny.tokenizer().encode(letters)


def nothing_after_two(prompt, response_ids):
    """Allow token 5 twice, then nothing."""
    return [5] if len(response_ids) < 2 else []


@pytest.fixture
def task(settings):
    """Build a task: `task(action_mask=...)`."""
    return lambda **changes: build_task(TextGenConfig(**(settings | changes)))


def write(task, rows=8, seed=0):
    """Responses of the reference under the task's masks: the generation, its prompts and its token ids."""
    prompts = task.prompts.select([row % len(task.prompts) for row in range(rows)])
    generation = generate(task, task.load_reference().model, prompts, SAMPLING, torch.Generator().manual_seed(seed))
    ids, lengths = generation.state.response_ids.tolist(), generation.state.length.tolist()
    return generation, prompts, [row[:length] for row, length in zip(ids, lengths, strict=True)]


def full_logits(model, state):
    """Next-token logits of every state, by one full forward. [B, R, V]."""
    with torch.no_grad():
        logits = model(
            input_ids=state.input_ids,
            attention_mask=state.attention_mask.long(),
            position_ids=(state.attention_mask.long().cumsum(1) - 1).clamp_min(0),
        ).logits
    return logits[:, state.prompt_width - 1 : -1].float()


def test_token_sets_by_hand():
    """The smaller side is stored: the members, or the tokens left out."""
    dense = torch.tensor([[1, 0, 0, 0, 1], [1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    sets = TokenSets.of(dense)
    assert sets.ids.tolist() == [[0, 4], [2, -1], [-1, -1], [-1, -1]]
    assert sets.inside.tolist() == [True, False, False, True]
    assert sets.ids.dtype == torch.int32


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_token_sets_round_trip(share):
    """`of` then `dense` returns the same mask, with at most half the vocabulary stored, in any width."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(3, 4, 101, generator=generator) < share
    sets = TokenSets.of(dense)
    assert sets.dense(101).equal(dense)
    assert sets.ids.shape[-1] <= 51
    assert TokenSets.of(dense, 60).dense(101).equal(dense)
    assert TokenSets.stored_sizes(dense).max() == sets.ids.shape[-1]


def test_token_sets_are_collected():
    """Parts of other widths come to their rows and columns, and where there is none every token is allowed."""
    dense = (
        torch.rand(3, 4, 101, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.02, 0.5, 0.9, 1])[:, None]
    )
    places = [(torch.tensor([4, 0, 2]), torch.full((3,), column)) for column in (0, 1, 3, 4)]
    sets = TokenSets.collect([(place, TokenSets.of(dense[:, i])) for i, place in enumerate(places)], (5, 6))
    whole = sets.dense(101)  # [5, 6, 101]
    for column, (rows, columns) in enumerate(places):
        assert whole[rows, columns].equal(dense[:, column])
    assert whole[[1, 3]].all() and whole[:, [2, 5]].all()


@one_kind
def test_special_tokens(task):
    """`special` forbids the pad token and ids that the tokenizer never writes; the end token stays allowed."""
    dynamics = TextDynamics(task(action_mask="special"), 1)
    dynamics.reset([0], [0])
    mask = dynamics.action_mask()[0]
    assert mask[:256].all() and mask[tiny.END] and not mask[tiny.PAD] and not mask[258:].any()


@pytest.mark.parametrize(("mask", "keep"), [("top_k:5", Sampling(top_k=5)), ("top_p:0.6", Sampling(top_p=0.6))])
def test_mask_policy_starts_as_the_reference(task, mask, keep):
    """Before any refresh the mask is the top-k or top-p of the reference's full forward, at every step."""
    built = task(action_mask=mask)
    dynamics = TextDynamics(built, 3)
    dynamics.reset([0, 1, 2], [0, 1, 2])
    tokens = torch.randint(0, 255, (6, 3), generator=torch.Generator().manual_seed(1))
    for written in tokens:
        state, allowed = dynamics.state, dynamics.action_mask()
        logits = full_logits(built.load_reference().model, state)
        expected = log_probs(logits[torch.arange(3), state.length], keep).isfinite()
        assert (allowed == expected).float().mean() > 0.999  # the last token kept may be a tie up to rounding
        assert allowed.any(1).all() and not allowed.all(1).any()
        dynamics.step(written)


def test_refresh_rereads_unfinished_texts(task):
    """After a refresh in mid-episode the mask is the new model's, as if it had read the texts from the start."""
    built = task(action_mask="top_k:5")
    dynamics, other = TextDynamics(built, 3), tiny.language_model("gpt2", seed=9)
    dynamics.reset([0, 1], [0, 1])
    for token in (5, 6, 7):
        dynamics.step(torch.full((3,), token), torch.tensor([True, True, False]))
    dynamics.reset([2], [2])  # the third row has written nothing yet
    before = dynamics.action_mask()
    built.masks[0].refresh(other)
    state = dynamics.state
    expected = log_probs(full_logits(other, state)[torch.arange(3), state.length], Sampling(top_k=5)).isfinite()
    assert dynamics.action_mask().equal(expected) and not expected.equal(before)
    dynamics.reset([0], [3])
    dynamics.step(torch.tensor([8, 8, 8]))
    state = dynamics.state
    expected = log_probs(full_logits(other, state)[torch.arange(3), state.length], Sampling(top_k=5)).isfinite()
    assert dynamics.action_mask().equal(expected)


@one_kind
@pytest.mark.parametrize("pattern", [r"[ab]{2,4}", r"(?:yes|no), (?:\d+)!", r"é?x+"])
def test_pattern_by_brute_force(task, pattern):
    """Responses that stopped match the whole pattern; responses cut by the budget could still match it."""
    built = task(action_mask=f"regex:{pattern}", max_new_tokens=10)
    _, _, responses = write(built, rows=12)
    assert any(row[-1] == tiny.END for row in responses)
    for row in responses:
        text = built.tokenizer.decode(row, skip_special_tokens=True).removeprefix(" ")
        if row[-1] == tiny.END:
            assert regex.fullmatch(pattern, text), text
        else:
            assert regex.fullmatch(pattern, text, partial=True), text


@one_kind
def test_word_list(task):
    """`words:` allows only these words, with spaces between them."""
    built = task(action_mask="words:good,bad,fine")
    _, _, responses = write(built, rows=12)
    texts = [built.tokenizer.decode(row, skip_special_tokens=True) for row in responses]
    words = {
        word for text in texts for word in text.removeprefix(" ").split(" ")[:-1]
    }  # the budget may cut the last word
    assert words and words <= {"good", "bad", "fine"}


@one_kind
def test_function_and_intersection(task):
    """A user's function receives the prompt and the ids so far; with several masks, a token must pass all."""
    built = task(action_mask=[shared(vowels_first), "special"])
    _, prompts, responses = write(built)
    for prompt, row in zip(prompts.texts, responses, strict=True):
        for step, token in enumerate(row):
            assert token in vowels_first(prompt, row[:step])
        assert row[-1] == tiny.END and len(row) == 5


class ProtocolMask:
    """A user's mask that inherits nothing: ids below `limit`, from a model's logits or from none."""

    def __init__(self, limit, model=None):
        self.name, self.limit, self.model = f"below {limit}", limit, model
        self.contexts = []

    def allowed(self, contexts):
        """Bool [V], or bool [b, V] of the likeliest id below the limit where the mask has a model."""
        self.contexts.append(contexts)
        below = torch.arange(tiny.VOCABULARY) < self.limit
        if contexts.logits is None:
            return below
        best = contexts.logits.masked_fill(~below, -torch.inf).argmax(1)
        return torch.nn.functional.one_hot(best, tiny.VOCABULARY).bool()


@one_kind
@pytest.mark.parametrize(
    "wrap",
    [
        lambda mask: mask,
        shared,
        lambda mask: [mask, "special"],
        lambda mask: [shared(mask), "special"],
        lambda mask: shared(["special", mask]),
        lambda mask: ("special", [shared(mask)]),
    ],
    ids=["bare", "shared", "in a list", "shared in a list", "in a shared list", "nested"],
)
def test_protocol_mask_is_accepted(task, wrap):
    """An object that follows `TokenMask` is a mask, alone or in a list, shared or not; the object itself is called."""
    mask = ProtocolMask(90)
    built = task(action_mask=wrap(mask))
    assert any(built_mask is mask for built_mask in built.masks)
    _, _, responses = write(built)
    assert mask.contexts and all(token < 90 for row in responses for token in row)


@one_kind
def test_protocol_mask_reads_its_model(task):
    """The logits in `Contexts` are those of the mask's own model, at every step."""
    model = tiny.language_model("gpt2", seed=9)
    mask = ProtocolMask(90, model)
    generation, _, _ = write(task(action_mask=shared(mask)), rows=4)
    best = full_logits(model, generation.state)[..., :90].argmax(-1)  # [B, R]
    written = generation.state.response_mask
    assert generation.state.response_ids[written].equal(best[written])


@one_kind
def test_protocol_mask_through_gym_make(settings):
    """`gym.make` passes a shared mask on without a copy, in single and vector environments."""
    mask = ProtocolMask(90)
    env = gym.make("TextGen-v0", action_mask=shared(mask), **settings)
    assert env.reset(seed=0)[1]["action_mask"].nonzero()[0].tolist() == list(range(90))
    assert env.unwrapped.task.masks == (mask,)
    vector = gym.make_vec("TextGen-v0", num_envs=2, action_mask=[shared(mask)], **settings)
    assert vector.reset(seed=0)[1]["action_mask"].sum(1).tolist() == [90, 90]


@one_kind
def test_protocol_mask_that_is_callable_is_a_mask(task):
    """`allowed` decides, not `__call__`: only a callable without the protocol is a function of prompt and ids."""

    class CallableMask(ProtocolMask):
        def __call__(self, prompt, response_ids):
            raise AssertionError("called as a function")

    mask = CallableMask(90)
    assert task(action_mask=mask).masks == (mask,)


class NoModel:
    """Lacks `model`, so it does not follow `TokenMask`."""

    name = "half"

    def allowed(self, contexts):
        """Every id."""
        return torch.ones(tiny.VOCABULARY, dtype=torch.bool)


@one_kind
@pytest.mark.parametrize(
    "wrap", [lambda mask: mask, shared, lambda mask: [shared(mask)]], ids=["bare", "shared", "list"]
)
@pytest.mark.parametrize(
    ("make_mask", "message"),
    [
        (NoModel, r"object that follows TokenMask \(name, model, allowed\), or a list of these; got NoModel"),
        (object, "object that follows TokenMask .*; got object"),
        (lambda: ProtocolMask, "is the class ProtocolMask; pass an instance of it"),
        (lambda: ProtocolMask(5, "gpt2"), "'below 5' has a model of type str; .* PreTrainedModel or None"),
        (lambda: ProtocolMask(5, tiny.language_model().train()), "'below 5' has a model in train mode.*eval"),
        (lambda: ProtocolMask(5, tiny.language_model().base_model), "'below 5' has a GPT2Model, which has no output"),
        (lambda: ProtocolMask(5, narrow_model()), r"'below 5' has a model of 7 token ids, .* 300; "),
        (
            lambda: ProtocolMask(5, small_model(20)),
            r"= 28, more than the model of action mask 'below 5''s 20 positions",
        ),
        (lambda: ProtocolMask(5, both_ways()), r"the model of action mask 'below 5' is a BertLMHeadModel .*not causal"),
    ],
)
def test_objects_that_are_not_masks(task, make_mask, wrap, message):
    """An object that does not follow `TokenMask`, or has an unusable model, is refused when the task is built."""
    with pytest.raises(ValueError, match=message):
        task(action_mask=wrap(make_mask()))


def narrow_model():
    """A language model of seven token ids."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=7, n_embd=8, n_layer=1, n_head=1)).eval()


def small_model(positions):
    """A language model of few positions."""
    sizes = dict(vocab_size=tiny.VOCABULARY, n_positions=positions, n_embd=8, n_layer=1, n_head=1)
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def both_ways():
    """A masked language model, which reads the tokens behind a text too."""
    sizes = dict(vocab_size=tiny.VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    return BertLMHeadModel(BertConfig(**sizes, intermediate_size=8)).eval()


@one_kind
@pytest.mark.parametrize(
    ("result", "got"),
    [
        ([True] * 300, "list"),
        (torch.ones(300), r"torch.float32 of shape \(300,\)"),
        (torch.ones(299, dtype=torch.bool), r"torch.bool of shape \(299,\)"),
        (torch.ones(2, 300, dtype=torch.bool), r"torch.bool of shape \(2, 300\)"),
        (torch.tensor(True), r"torch.bool of shape \(\)"),
    ],
)
def test_protocol_mask_with_a_bad_result(task, result, got):
    """A wrong result is refused; the error names the mask, the shapes it may have, and the result."""
    mask = ProtocolMask(5)
    mask.allowed = lambda contexts: result
    says = rf"action mask 'below 5' must return a bool tensor of shape \(300,\) or \(3, 300\), got {got}"
    with pytest.raises(ValueError, match=says):
        write(task(action_mask=mask), rows=3)


@one_kind
def test_empty_mask_allows_stop_tokens(task):
    """Where the masks leave no token, the stop tokens are allowed, so that the response can end."""
    _, _, responses = write(task(action_mask="tests.textenv.masks.test_masks:nothing_after_two"), rows=3)
    assert responses == [[5, 5, tiny.END]] * 3


def test_rollouts_store_masks(task):
    """Generation stores the masks that stepping shows for the same tokens, and records the masked log-probability."""
    built = task(action_mask=["special", "top_k:7"])
    generation, prompts, responses = write(built, rows=4)
    dense = generation.allowed.dense(built.vocabulary)  # [B, R, V]
    logits = full_logits(built.load_reference().model, generation.state)
    masked = log_probs(logits.masked_fill(~dense, -torch.inf), SAMPLING)
    dynamics = TextDynamics(built, 4)
    dynamics.reset(range(4), [built.prompts.texts.index(text) for text in prompts.texts])
    for step in range(built.config.max_new_tokens):
        active = dynamics.running.clone()
        allowed = dynamics.action_mask()
        if not active.any():
            break
        assert dense[:, step][active].equal(allowed[active])
        dynamics.step(generation.state.response_ids[:, step], active)
    for row, response in enumerate(responses):
        expected = masked[row, torch.arange(len(response)), torch.tensor(response)]
        torch.testing.assert_close(generation.log_prob[row, : len(response)], expected, rtol=0, atol=1e-4)


@one_kind
def test_masks_do_not_change_rewards(settings):
    """Rewards and ends are the same with and without masks, and finite, for forbidden tokens too."""
    plain, masked = gym.make("TextGen-v0", **settings), gym.make("TextGen-v0", action_mask="words:no", **settings)
    plain.reset(seed=0), masked.reset(seed=0)
    for token in (70, 80, tiny.PAD, 299, tiny.END):
        unmasked_step, masked_step = plain.step(token), masked.step(token)
        assert unmasked_step[1:4] == masked_step[1:4] and np.isfinite(unmasked_step[1])
        assert "action_mask" in masked_step[4] and "action_mask" not in unmasked_step[4]


@one_kind
def test_info_and_method(settings):
    """`info["action_mask"]` is a fresh int8 array at reset and at every step; `action_masks()` is equal to it."""
    env = gym.make("TextGen-v0", action_mask="words:no", **settings)
    _, info = env.reset(seed=0)
    first = info["action_mask"]
    assert first.dtype == np.int8 and first.shape == (tiny.VOCABULARY,)
    kept = first.copy()
    assert (env.unwrapped.action_masks() == first.astype(bool)).all()
    token = env.action_space.sample(mask=first)
    assert first[token]
    _, _, _, _, info = env.step(token)
    assert (first == kept).all() and (info["action_mask"] != kept).any()
    assert info["action_mask"] is not first
    vector = gym.make_vec("TextGen-v0", num_envs=2, action_mask="words:no", **settings)
    _, infos = vector.reset(seed=0)
    assert infos["action_mask"].shape == (2, tiny.VOCABULARY) and infos["_action_mask"].all()
    assert (vector.action_masks() == infos["action_mask"].astype(bool)).all()
    assert gym.make("TextGen-v0", **settings).unwrapped.action_masks is not None


@one_kind
def test_torchrl_action_mask(settings):
    """TorchRL's ActionMask uses our mask: random actions of a rollout stay in the word list."""
    built = build_task(TextGenConfig(**settings, action_mask="words:no,yes"))
    check_env_specs(TextGenTorchEnv(built, 2))
    env = TransformedEnv(TextGenTorchEnv(built, 4), ActionMask())
    data = env.rollout(20, break_when_any_done=False)
    chosen = data["action_mask"].gather(-1, data["action"][..., None])
    assert chosen.all() and not data["action_mask"].all(-1).any()


def test_actor_under_masks(settings):
    """Ratios start at 1 under masks, the entropy covers allowed tokens only, and gradients are finite."""
    trainer = make_trainer(settings | {"action_mask": "top_k:4"})
    rollout = make_rollout(trainer).data
    assert rollout["allowed_ids"].shape[-1] == 4 and rollout["allowed_inside"][rollout["mask"]].all()
    distribution = trainer.algorithm.networks.actor.distribution(rollout)
    log_prob = distribution.log_prob(rollout["action"])
    torch.testing.assert_close(log_prob, rollout["action_log_prob"], rtol=0, atol=1e-4)
    assert distribution.entropy().max() <= np.log(4) + 1e-4
    logits = whole(trainer.algorithm.networks.actor, rollout).log_softmax(-1)
    assert ((logits > FORBIDDEN / 2).sum(-1)[rollout["mask"]] == 4).all()
    sum(losses(trainer, rollout).values()).backward()
    gradients = [parameter.grad for parameter in trainer.algorithm.networks.actor.parameters()]
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@one_kind
def test_trainer_refreshes_the_mask_policy(settings):
    """Every `mask_refresh` iterations, and not before, the mask policy takes the actor's weights (NLPO)."""
    trainer = make_trainer(settings | {"action_mask": "top_k:9"}, iterations=4, mask_refresh=2)
    (policy,) = trainer.collector.mask_policies
    start = weights(policy.model)
    steps = trainer.iterate()
    next(steps)
    assert same(weights(policy.model), start)
    next(steps)
    assert same(weights(policy.model), weights(trainer.algorithm.networks.policy.model))
    refreshed = weights(policy.model)
    next(steps)
    assert same(weights(policy.model), refreshed) and not same(refreshed, start)
    assert same(weights(trainer.collector.task.load_reference().model), start)  # the reference never changes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_refreshed_masks_are_not_compared_again(task, kind, dtype, monkeypatch):
    """A mask policy decodes after a refresh as before it, so its cache is compared once; that of another model anew."""
    built = task(action_mask="top_k:5", dtype=dtype)
    compared, compare = [], decoding._why_not
    monkeypatch.setattr(decoding, "_why_not", lambda *arguments: compared.append(arguments) or compare(*arguments))
    trained, old = copy.deepcopy(built.load_reference().model).float(), built.masks[0].model
    for step in range(3):
        trained.lm_head.weight.data.mul_(1.01)
        built.masks[0].refresh(trained)
        TextDynamics(built, 1).reset([0], [step])
        assert built.masks[0].model is not old and built.masks[0].model.dtype == getattr(torch, dtype)
    assert not compared
    built.masks[0].refresh(tiny.language_model("llama" if kind == "gpt2" else "gpt2"))
    TextDynamics(built, 1).reset([0], [0])
    assert len(compared) == 1


def ends_or_goes_on(prompt, response_ids):
    """The responses to "a" end at once; all others go on with c."""
    return [tiny.END] if prompt == "a" else [99]


@one_kind
def test_the_row_of_a_mask_that_fails(task):
    """An error about a mask's logits names the row of the whole batch, also after rows that ended were dropped."""
    built = task(action_mask=["top_k:300", ends_or_goes_on], prompts=["a", "a", "a", "the cat"])
    bad = copy.deepcopy(built.load_reference().model)
    bad.lm_head.weight = torch.nn.Parameter(bad.lm_head.weight.detach().clone())
    bad.transformer.wte.weight.data[99] = torch.nan
    built.masks[0].refresh(bad)
    with pytest.raises(ValueError, match=r"largest logit of action mask 'top_k:300' is nan at row 3"):
        write(built, rows=4)


@one_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_resume_with_a_mask_policy(settings, tmp_path, dtype):
    """The mask policy is in the checkpoint: a run resumed between refreshes equals the uninterrupted run to the bit.

    Its precision is the reference's from the first to the last iteration.
    """
    settings = settings | {"action_mask": "top_k:9", "dtype": dtype}
    changes = dict(iterations=4, mask_refresh=2)
    whole = make_trainer(settings, **changes)
    expected = [iteration.metrics["score"] for iteration in whole.iterate()]
    stopped = make_trainer(settings, **changes)
    steps = stopped.iterate()
    scores = [next(steps).metrics["score"] for _ in range(3)]
    save_checkpoint(tmp_path, stopped)
    resumed = make_trainer(settings, **changes)
    load_checkpoint(tmp_path, resumed)
    models = [trainer.collector.mask_policies[0].model for trainer in (stopped, resumed)]
    assert models[0].dtype == models[1].dtype and same(*map(weights, models))
    scores += [iteration.metrics["score"] for iteration in resumed.iterate()]
    assert scores == expected
    assert same(weights(whole.algorithm.networks.actor), weights(resumed.algorithm.networks.actor))
    assert same(weights(whole.collector.mask_policies[0].model), weights(resumed.collector.mask_policies[0].model))


@one_kind
def test_masks_without_a_penalty(settings):
    """A mask policy starts from the reference even if `kl_coef` is 0 and the environment has no penalty."""
    model = LanguageModel(tiny.language_model(), tiny.tokenizer(), (tiny.END,))
    built = build_task(TextGenConfig(**(settings | dict(kl_coef=0, reference=shared(model), action_mask="top_k:3"))))
    assert built.reference is None
    generation, _, _ = write(built)
    assert (generation.allowed.dense(built.vocabulary)[:, 0].sum(-1) == 3).all()


@one_kind
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("sepcial", "'special'"),
        ("top_k:0", "keeps every token"),
        ("top_k:-1", "top_k"),
        ("top_k:many", "top_k:many' is not valid: invalid literal"),
        ("top_p:1.0", "keeps every token"),
        ("top_p:2", "top_p must lie"),
        ("regex:(", "invalid regular expression"),
        ("regex:", "must be"),
        ("words:", "must be"),
        ("words:a,,b", "has an empty word in .*'a', '', 'b'"),
        ("words: ", "has an empty word"),
        ("tests.textenv.masks.test_masks:missing", "missing"),
        (3, "got int"),
        ([None, 3.5], "got float"),
    ],
)
def test_bad_masks(task, mask, message):
    """A wrong `action_mask` is refused when the task is built; the error lists the accepted forms."""
    with pytest.raises(ValueError, match=message):
        task(action_mask=mask)


@one_kind
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([999], "outside 0..299 for prompt"),
        ([-1], "outside 0..299"),
        (["x"], r"must return token ids, got \['x'\] for prompt '.*' and response ids \[\]; return a list"),
        ("12", "must return token ids"),
        (None, "must return token ids"),
        ([3.0], "must return token ids"),
        ([[3]], "must return token ids"),
        ([True] * 300, "must return token ids"),  # a mask of truth values is not a list of ids
        (np.ones(300, dtype=bool), "must return token ids"),
        (torch.ones(300, dtype=torch.bool), "must return token ids"),
    ],
)
def test_function_with_a_bad_result(settings, returned, message):
    """The error names the mask, the prompt and the ids; the environment works again after reset."""
    results = [returned]
    env = gym.make("TextGen-v0", action_mask=shared(lambda *_: results[0]), disable_env_checker=True, **settings)
    with pytest.raises(ValueError, match=message):
        env.reset(seed=0)
    for valid in ([5], {5}, iter([5]), np.array([5]), torch.tensor([5]), [np.int64(5)], [torch.tensor(5)]):
        results[0] = valid
        assert env.reset(seed=0)[1]["action_mask"].nonzero()[0].tolist() == [5]
    results[0] = []
    assert env.step(5)[4]["action_mask"].nonzero()[0].tolist() == [tiny.END]


BROKEN = []  # an exception for `breaks` to raise, or empty


def breaks(prompt, response_ids):
    """Allow ids below 100; raise the exception in BROKEN, if any, after the token 7."""
    if BROKEN and response_ids[-1:] == [7]:
        raise BROKEN[0]
    return range(100)


def drive(face, settings):
    """An environment, and its reset, step and masks as functions with comparable results."""
    if face == "single":
        env = gym.make("TextGen-v0", disable_env_checker=True, **settings).unwrapped
        return env, lambda: env.reset(seed=4), lambda tokens: env.step(tokens[0]), env.action_masks
    if face != "torchrl":
        env = TextGenVectorEnv(2, autoreset_mode=face, **settings)
        return env, lambda: env.reset(seed=4), lambda tokens: env.step(np.array(tokens)), env.action_masks
    env = TextGenTorchEnv(build_task(TextGenConfig(**settings)), 2, seed=4)
    current = [None]

    def reset():
        env.set_seed(4)
        current[0] = env.reset()
        return {key: value.numpy() for key, value in current[0].flatten_keys().items()}

    def step(tokens):
        stepped, after = env.step_and_maybe_reset(current[0].set("action", torch.tensor(tokens)))
        current[0] = after
        return tuple({key: value.numpy() for key, value in data.flatten_keys().items()} for data in (stepped, after))

    return env, reset, step, lambda: env.dynamics.action_mask().numpy()


@one_kind
@pytest.mark.parametrize("face", ["single", "NextStep", "SameStep", "Disabled", "torchrl"])
def test_failing_mask_leaves_the_state_unchanged(settings, face):
    """After a mask raises, no state of any face has changed: the step can be repeated, and `reset` works."""
    changes = dict(score_normalization="running", prompt_sampling="prioritized", max_new_tokens=4)
    settings = {**settings, **changes, "action_mask": ["special", "top_k:200", breaks]}
    (env, reset, step, masks), (untouched, plain_reset, plain_step, _) = (drive(face, settings) for _ in range(2))
    assert_same(reset(), plain_reset(), "reset")
    assert_same(step([65, 66]), plain_step([65, 66]), "a step")
    BROKEN[:], before = [KeyError("lost")], masks()
    says = r"action mask 'breaks' raised KeyError: 'lost' \(.*test_masks.py, line \d+\) for prompt '.+' and .*\[65, 7\]"
    for _ in range(2):
        with pytest.raises(ValueError, match=says):
            step([7, tiny.END])  # a second row would end here, with a score and a sampler update
        assert (masks() == before).all()
    BROKEN.clear()
    for tokens in ([7, tiny.END], [68, 69], [tiny.END, 70]):
        assert_same(step(list(tokens)), plain_step(list(tokens)), f"{tokens}")
        if face == "Disabled" and tokens[1] == tiny.END:
            results = [each.reset(options={"reset_mask": np.array([False, True])}) for each in (env, untouched)]
            assert_same(*results, "reset of the row that ended")
    statistics, expected = (each.task.normalizer.statistics.state_dict() for each in (env, untouched))
    assert statistics == expected and expected["count"] == (1 if face == "single" else 2)
    samplers, expected = ([sampler.state_dict() for sampler in each.dynamics.samplers] for each in (env, untouched))
    assert samplers == expected
    assert_same(reset(), plain_reset(), "reset at the end")


@one_kind
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_failing_mask_at_a_reset(settings, mode):
    """If a mask raises at a reset, the row counts as ended; the next `reset` starts it."""
    broken = []

    def at_the_start(prompt, response_ids):
        return [] if response_ids or not broken else 1 / 0

    env = TextGenVectorEnv(2, autoreset_mode=mode, action_mask=shared(at_the_start), **settings)
    env.reset(seed=0)
    for tokens in ([65, tiny.END],) if mode == "NextStep" else ():
        env.step(np.array(tokens))
    broken.append(True)
    with pytest.raises(ValueError, match="action mask 'at_the_start' raised ZeroDivisionError"):
        env.step(np.array([66, tiny.END]))
    with pytest.raises(ValueError, match=r"the episode in row 1 is over or was never started; call reset\(\) first"):
        env.step(np.array([66, 66]))
    broken.clear()
    env.reset(seed=0)
    env.step(np.array([66, 66]))


@one_kind
def test_masks_are_called_once(settings):
    """A user's function is called once per context, however often the mask is shown."""
    calls = []

    def record(prompt, response_ids):
        calls.append(list(response_ids))
        return [65]

    env = TextGenVectorEnv(2, autoreset_mode="SameStep", action_mask=shared(record), **settings)
    env.reset(seed=0)
    env.step(np.array([65, tiny.END]))
    env.action_masks()
    assert calls == [[], [], [65], []]


def test_mask_policy_name():
    """A mask policy is named after its filter, for error messages."""
    assert MaskPolicy(tiny.language_model(), Sampling(top_p=0.9)).name == "top_p:0.9"


@one_kind
def test_a_patterns_memory_is_bounded(settings, monkeypatch):
    """However many texts and tokens: the measured memory stays below the bound, and the masks right."""
    vocabulary, bound = 5_000, 40_000
    monkeypatch.setattr("textenv.masks.masks.CACHE_BYTES", bound)
    mask = Pattern(".*", tiny.tokenizer(), [tiny.END], vocabulary)
    mask.pieces = [chr(97 + token % 26) for token in range(vocabulary)]  # every token is allowed
    mask._can_match = lambda text: text[-1] != "b" or len(text) % 2 == 0
    lists = 100 * vocabulary * 8  # bytes of 100 lists of ids, at least
    tracemalloc.start()
    for length in range(100):
        mask._allowed_after("a" * length)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bound / 2 < held < 1.2 * bound < lists / 50 and mask.cached_bytes <= bound
    for length in (3, 98, 99):  # dropped, kept, newest
        bits = np.unpackbits(mask._allowed_after("a" * length), count=vocabulary).astype(bool)
        expected = [piece != "b" or (length + 1) % 2 == 0 for piece in mask.pieces]
        expected[tiny.END] = True
        assert bits.tolist() == expected


@one_kind
def test_masks_survive_copies(settings):
    """A pattern's copy, by copy.deepcopy or pickle, allows the same tokens and remembers its own texts."""
    mask = Pattern("[ab]{2}", tiny.tokenizer(), [tiny.END], tiny.VOCABULARY)
    expected = mask._allowed_after("a")
    for other in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert (other._allowed_after("a") == expected).all() and other.cache is not mask.cache
        other._allowed_after("b")
    assert len(mask.cache) == 1
