"""Action masks: what they allow, that every face shows them alike, that rollouts obey them and remember them."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import regex
import torch
from torchrl.envs import TransformedEnv
from torchrl.envs.transforms import ActionMask
from torchrl.envs.utils import check_env_specs

from agents.checkpoint import load_checkpoint, save_checkpoint
from agents.text.networks import FORBIDDEN
from tests.support import tiny
from tests.support.faces import assert_same
from tests.support.learning import losses, make_rollout, make_trainer, same, weights
from textenv import LanguageModel, TextGenConfig, build_task, shared
from textenv.dynamics import TextDynamics
from textenv.generation import generate
from textenv.masks.masks import MaskPolicy
from textenv.masks.token_sets import TokenSets
from textenv.models.sampling import Sampling, log_probs
from textenv.state import position_ids
from textenv.torchrl_env import TextGenTorchEnv
from textenv.vector_env import TextGenVectorEnv

SAMPLING = Sampling(temperature=0.7)
one_kind = pytest.mark.parametrize("kind", ["gpt2"], indirect=True)  # where the architecture plays no part


def vowels_first(prompt, response_ids):
    """A user's function: vowels at even places, any letter of the prompt at odd ones, the end after four."""
    if len(response_ids) == 4:
        return [tiny.END]
    letters = "aeiou" if len(response_ids) % 2 == 0 else prompt.replace(" ", "")
    return tiny.tokenizer().encode(letters)


def no_way(prompt, response_ids):
    """Allows nothing after two tokens."""
    return [5] if len(response_ids) < 2 else []


@pytest.fixture
def task(settings):
    """A task's maker: `task(action_mask=...)`."""
    return lambda **changes: build_task(TextGenConfig(**(settings | changes)))


def write(task, rows=8, seed=0):
    """Responses of the reference, under the task's masks."""
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
            position_ids=position_ids(state.attention_mask),
        ).logits
    return logits[:, state.prompt_width - 1 : -1].float()


def test_token_sets_by_hand():
    """The smaller side is stored: what is in the set, or what is not."""
    dense = torch.tensor([[1, 0, 0, 0, 1], [1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    sets = TokenSets.of(dense)
    assert sets.ids.tolist() == [[0, 4], [2, -1], [-1, -1], [-1, -1]]
    assert sets.inside.tolist() == [True, False, False, True]
    assert sets.ids.dtype == torch.int32


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_token_sets_round_trip(share):
    """Any masks come back as they were, and never as more ids than half the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(3, 4, 101, generator=generator) < share
    sets = TokenSets.of(dense)
    assert sets.dense(101).equal(dense)
    assert sets.ids.shape[-1] <= 51
    stacked = TokenSets.stack([TokenSets.of(dense[:, step]) for step in range(4)])
    assert stacked.dense(101).equal(dense)
    rows = torch.tensor([0, 2, 4])
    wide = TokenSets.of(dense[:, 0]).scatter(rows, 5).dense(101)
    assert wide[rows].equal(dense[:, 0]) and wide[[1, 3]].all()


@one_kind
def test_special_tokens(task):
    """`special` forbids the pad token and ids that no text has; the end token stays."""
    allowed = TextDynamics(task(action_mask="special"), 1)
    allowed.reset([0], [0])
    mask = allowed.action_mask()[0]
    assert mask[:256].all() and mask[tiny.END] and not mask[tiny.PAD] and not mask[258:].any()


@pytest.mark.parametrize(("mask", "keep"), [("top_k:5", Sampling(top_k=5)), ("top_p:0.6", Sampling(top_p=0.6))])
def test_mask_policy_is_the_reference_at_first(task, mask, keep):
    """At every step of stepping the mask is the top-k or top-p of the reference's own full forward."""
    built = task(action_mask=mask)
    dynamics = TextDynamics(built, 3)
    dynamics.reset([0, 1, 2], [0, 1, 2])
    tokens = torch.randint(0, 255, (6, 3), generator=torch.Generator().manual_seed(1))
    for written in tokens:
        state, shown = dynamics.state, dynamics.action_mask()
        logits = full_logits(built.load_reference().model, state)
        wanted = log_probs(logits[torch.arange(3), state.length], keep).isfinite()
        assert (shown == wanted).float().mean() > 0.999  # the last one kept may be a tie to rounding
        assert shown.any(1).all() and not shown.all(1).any()
        dynamics.step(written)


def test_refreshed_mask_policy_reads_the_texts_again(task):
    """After a refresh in the middle of episodes the mask is the new model's, as if it had read all along."""
    built = task(action_mask="top_k:5")
    dynamics, other = TextDynamics(built, 3), tiny.language_model("gpt2", seed=9)
    dynamics.reset([0, 1], [0, 1])
    for token in (5, 6, 7):
        dynamics.step(torch.full((3,), token), torch.tensor([True, True, False]))
    dynamics.reset([2], [2])  # the third row has written nothing yet
    before = dynamics.action_mask()
    built.masks[0].refresh(other)
    state = dynamics.state
    wanted = log_probs(full_logits(other, state)[torch.arange(3), state.length], Sampling(top_k=5)).isfinite()
    assert dynamics.action_mask().equal(wanted) and not wanted.equal(before)
    dynamics.reset([0], [3])
    dynamics.step(torch.tensor([8, 8, 8]))
    state = dynamics.state
    wanted = log_probs(full_logits(other, state)[torch.arange(3), state.length], Sampling(top_k=5)).isfinite()
    assert dynamics.action_mask().equal(wanted)


@one_kind
@pytest.mark.parametrize("pattern", [r"[ab]{2,4}", r"(?:yes|no), (?:\d+)!", r"é?x+"])
def test_pattern_by_brute_force(task, pattern):
    """Written under a pattern, every response that ended by itself matches it, and none left its path."""
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
    """`words:` allows these words and spaces between them, at every token."""
    built = task(action_mask="words:good,bad,fine")
    _, _, responses = write(built, rows=12)
    texts = [built.tokenizer.decode(row, skip_special_tokens=True) for row in responses]
    words = {word for text in texts for word in text.removeprefix(" ").split(" ")[:-1]}  # the last one may be cut
    assert words and words <= {"good", "bad", "fine"}


@one_kind
def test_function_and_intersection(task):
    """A user's function gets the prompt and the ids so far; several masks must all agree."""
    built = task(action_mask=[shared(vowels_first), "special"])
    _, prompts, responses = write(built)
    for prompt, row in zip(prompts.texts, responses, strict=True):
        for place, one in enumerate(row):
            assert one in vowels_first(prompt, row[:place])
        assert row[-1] == tiny.END and len(row) == 5


@one_kind
def test_nothing_left_means_the_end(task):
    """Where the masks leave no token, the stop tokens are allowed, so that the response can end."""
    _, _, responses = write(task(action_mask="tests.textenv.masks.test_masks:no_way"), rows=3)
    assert responses == [[5, 5, tiny.END]] * 3


def test_rollouts_remember_masks(task):
    """What generation stores is what stepping shows for the same tokens, and the log-probability is the masked one."""
    built = task(action_mask=["special", "top_k:7"])
    generation, prompts, responses = write(built, rows=4)
    dense = generation.allowed.dense(built.vocabulary)  # [B, R, V]
    logits = full_logits(built.load_reference().model, generation.state)
    masked = log_probs(logits.masked_fill(~dense, -torch.inf), SAMPLING)
    dynamics = TextDynamics(built, 4)
    dynamics.reset(range(4), [built.prompts.texts.index(text) for text in prompts.texts])
    for step in range(built.config.max_new_tokens):
        active = dynamics.running.clone()
        shown = dynamics.action_mask()
        if not active.any():
            break
        assert dense[:, step][active].equal(shown[active])
        dynamics.step(generation.state.response_ids[:, step], active)
    for row, response in enumerate(responses):
        wanted = masked[row, torch.arange(len(response)), torch.tensor(response)]
        torch.testing.assert_close(generation.log_prob[row, : len(response)], wanted, rtol=0, atol=1e-4)


@one_kind
def test_masks_leave_rewards_alone(settings):
    """Rewards and reference log-probabilities are the same with and without masks, for forbidden tokens too."""
    plain, masked = gym.make("TextGen-v0", **settings), gym.make("TextGen-v0", action_mask="words:no", **settings)
    plain.reset(seed=0), masked.reset(seed=0)
    for token in (70, 80, tiny.PAD, 299, tiny.END):
        one, other = plain.step(token), masked.step(token)
        assert one[1:4] == other[1:4] and np.isfinite(one[1])
        assert "action_mask" in other[4] and "action_mask" not in one[4]


@one_kind
def test_info_and_method(settings):
    """`info["action_mask"]` is a fresh int8 array at reset and at every step; `action_masks()` says the same."""
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
    """TorchRL's ActionMask reads ours: random actions of a rollout never leave the word list."""
    built = build_task(TextGenConfig(**settings, action_mask="words:no,yes"))
    check_env_specs(TextGenTorchEnv(built, 2))
    env = TransformedEnv(TextGenTorchEnv(built, 4), ActionMask())
    data = env.rollout(20, break_when_any_done=False)
    chosen = data["action_mask"].gather(-1, data["action"][..., None])
    assert chosen.all() and not data["action_mask"].all(-1).any()


def test_actor_under_masks(settings):
    """Ratios start at 1 under masks, the entropy is that of allowed tokens, and forbidden logits get no gradient."""
    trainer = make_trainer(settings | {"action_mask": "top_k:4"})
    rollout = make_rollout(trainer).data
    assert rollout["allowed_ids"].shape[-1] == 4 and rollout["allowed_inside"][rollout["mask"]].all()
    distribution = trainer.algorithm.networks.actor.distribution(rollout)
    log_prob = distribution.log_prob(rollout["action"])
    torch.testing.assert_close(log_prob, rollout["action_log_prob"], rtol=0, atol=1e-4)
    assert distribution.entropy().max() <= np.log(4) + 1e-4
    logits = distribution.logits
    assert ((logits > FORBIDDEN / 2).sum(-1)[rollout["mask"]] == 4).all()
    sum(losses(trainer, rollout).values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.algorithm.networks.actor.parameters())


@one_kind
def test_trainer_refreshes_the_mask_policy(settings):
    """NLPO's point: every `mask_refresh` iterations the mask policy takes the actor's weights, and not before."""
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
    assert same(weights(trainer.collector.task.load_reference().model), start)  # the reference itself never moves


@one_kind
def test_resume_with_a_mask_policy(settings, tmp_path):
    """Its weights are in the checkpoint: stopped between refreshes and resumed gives the same run to the bit."""
    settings = settings | {"action_mask": "top_k:9"}
    changes = dict(iterations=4, mask_refresh=2)
    whole = make_trainer(settings, **changes)
    expected = [iteration.metrics["score"] for iteration in whole.iterate()]
    stopped = make_trainer(settings, **changes)
    steps = stopped.iterate()
    scores = [next(steps).metrics["score"] for _ in range(3)]
    save_checkpoint(tmp_path, stopped)
    resumed = make_trainer(settings, **changes)
    load_checkpoint(tmp_path, resumed)
    scores += [iteration.metrics["score"] for iteration in resumed.iterate()]
    assert scores == expected
    assert same(weights(whole.algorithm.networks.actor), weights(resumed.algorithm.networks.actor))
    assert same(weights(whole.collector.mask_policies[0].model), weights(resumed.collector.mask_policies[0].model))


@one_kind
def test_masks_without_a_penalty(settings):
    """A mask policy needs the reference even where kl_coef is 0 and the environment pays no penalty."""
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
        ("top_k:many", "no such mask"),
        ("top_p:1.0", "keeps every token"),
        ("top_p:2", "top_p must lie"),
        ("regex:(", "no valid regular expression"),
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
    """A wrong mask is refused when the task is built, with what may be given."""
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
        ([True] * 300, "must return token ids"),  # a mask of truth values is no list of ids
        (np.ones(300, dtype=bool), "must return token ids"),
        (torch.ones(300, dtype=torch.bool), "must return token ids"),
    ],
)
def test_functions_that_return_nonsense(settings, returned, message):
    """The error names the mask and the text, and the environment works again after reset."""
    answers = [returned]
    env = gym.make("TextGen-v0", action_mask=shared(lambda *_: answers[0]), disable_env_checker=True, **settings)
    with pytest.raises(ValueError, match=message):
        env.reset(seed=0)
    for right in ([5], {5}, iter([5]), np.array([5]), torch.tensor([5]), [np.int64(5)], [torch.tensor(5)]):
        answers[0] = right
        assert env.reset(seed=0)[1]["action_mask"].nonzero()[0].tolist() == [5]
    answers[0] = []
    assert env.step(5)[4]["action_mask"].nonzero()[0].tolist() == [tiny.END]


BROKEN = []  # holds an exception where `breaks` is to go wrong


def breaks(prompt, response_ids):
    """Letters only; goes wrong after the token 7."""
    if BROKEN and response_ids[-1:] == [7]:
        raise BROKEN[0]
    return range(100)


def drive(face, settings):
    """A face's environment, and its reset, step and masks as functions that give comparable values."""
    if face == "single":
        env = gym.make("TextGen-v0", disable_env_checker=True, **settings).unwrapped
        return env, lambda: env.reset(seed=4), lambda tokens: env.step(tokens[0]), env.action_masks
    if face != "torchrl":
        env = TextGenVectorEnv(2, autoreset_mode=face, **settings)
        return env, lambda: env.reset(seed=4), lambda tokens: env.step(np.array(tokens)), env.action_masks
    env = TextGenTorchEnv(build_task(TextGenConfig(**settings)), 2, seed=4)
    shown = [None]

    def reset():
        env.set_seed(4)
        shown[0] = env.reset()
        return {key: value.numpy() for key, value in shown[0].flatten_keys().items()}

    def step(tokens):
        stepped, after = env.step_and_maybe_reset(shown[0].set("action", torch.tensor(tokens)))
        shown[0] = after
        return tuple({key: value.numpy() for key, value in one.flatten_keys().items()} for one in (stepped, after))

    return env, reset, step, lambda: env.dynamics.action_mask().numpy()


@one_kind
@pytest.mark.parametrize("face", ["single", "NextStep", "SameStep", "Disabled", "torchrl"])
def test_a_mask_that_goes_wrong_leaves_the_step_undone(settings, face):
    """As with a reward that raises: nothing moved in any face, the step can be tried again, and `reset` works."""
    changes = dict(score_normalization="running", prompt_sampling="prioritized", max_new_tokens=4)
    settings = {**settings, **changes, "action_mask": ["special", "top_k:200", breaks]}
    (env, reset, step, masks), (untouched, plain_reset, plain_step, _) = (drive(face, settings) for _ in range(2))
    assert_same(reset(), plain_reset(), "reset")
    assert_same(step([65, 66]), plain_step([65, 66]), "a step")
    BROKEN[:], before = [KeyError("lost")], masks()
    says = r"action mask 'breaks' raised KeyError: 'lost' \(.*test_masks.py, line \d+\) for prompt '.+' and .*\[65, 7\]"
    for _ in range(2):
        with pytest.raises(ValueError, match=says):
            step([7, tiny.END])  # where there is a second row it ends here: its score is paid, its curriculum hears it
        assert (masks() == before).all()
    BROKEN.clear()
    for tokens in ([7, tiny.END], [68, 69], [tiny.END, 70]):
        assert_same(step(list(tokens)), plain_step(list(tokens)), f"{tokens}")
        if face == "Disabled" and tokens[1] == tiny.END:
            again = [one.reset(options={"reset_mask": np.array([False, True])}) for one in (env, untouched)]
            assert_same(*again, "reset of the row that ended")
    statistics, wanted = (one.task.normalizer.statistics.state_dict() for one in (env, untouched))
    assert statistics == wanted and wanted["count"] == (1 if face == "single" else 2)
    found, wanted = ([one.state_dict() for one in each.dynamics.samplers] for each in (env, untouched))
    assert found == wanted
    assert_same(reset(), plain_reset(), "reset at the end")


@one_kind
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_a_mask_that_goes_wrong_at_a_reset(settings, mode):
    """A row that could not be started is over, rather than half begun; `reset` starts it."""
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
def test_masks_are_asked_once(settings):
    """A user's function hears of every context once, however often the masks are looked at."""
    heard = []

    def listen(prompt, response_ids):
        heard.append(list(response_ids))
        return [65]

    env = TextGenVectorEnv(2, autoreset_mode="SameStep", action_mask=shared(listen), **settings)
    env.reset(seed=0)
    env.step(np.array([65, tiny.END]))
    env.action_masks()
    assert heard == [[], [], [65], []]


def test_mask_policy_name():
    """Masks have names, for errors and logs."""
    assert MaskPolicy(tiny.language_model(), Sampling(top_p=0.9)).name == "top_p:0.9"
