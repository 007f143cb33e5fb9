"""All faces of the environment tell one story, and each keeps the manners of its library."""

import copy
import itertools
import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torchrl.envs import GymWrapper, check_env_specs

import textenv
import textenv.task
from tests.support import tiny
from tests.support.faces import STOPS, TOLERANCE, assert_same, random_tokens
from textenv import TextGenConfig, build_task
from textenv.conformance import check_faces
from textenv.dynamics import TextDynamics
from textenv.generation import score_responses
from textenv.state import start
from textenv.torchrl_env import TextGenTorchEnv
from textenv.vector_env import TextGenVectorEnv


@pytest.fixture
def ragged(settings):
    """Settings under which random responses end early more often than not."""
    return {**settings, "stop_token_ids": STOPS}


# ---- the faces are one


@pytest.mark.parametrize("kl_coef", [0, 0.3])
@pytest.mark.parametrize("stops", [None, STOPS], ids=["end", "ragged"])
def test_faces_equal_fast_path(settings, kl_coef, stops):
    """Tokens, masks, rewards, ends and infos of every face are those of the fast path."""
    task = build_task(TextGenConfig(**{**settings, "kl_coef": kl_coef, "stop_token_ids": stops}))
    check_faces(task, rows=3, torchrl_env=TextGenTorchEnv(task, 3))


def random_reward(prompts, responses):
    """A reward that changes from call to call."""
    return [next(COUNTER) for _ in responses]


def neighborly_reward(prompts, responses):
    """A reward that depends on who else is in the batch."""
    return [float(len(responses))] * len(responses)


COUNTER = itertools.count()


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize("reward", [random_reward, neighborly_reward])
def test_conformance_catches_dishonest_rewards(settings, reward):
    """A user's reward that is random, or depends on its batch, is named with face, row, step and quantity."""
    task = build_task(TextGenConfig(**{**settings, "reward": reward}))
    with pytest.raises(AssertionError, match=r"TextGenEnv, row 0, step 0: (reward|score) is .*, by the fast path"):
        check_faces(task, rows=2)


def answer_reward(prompts, responses, answer):
    """A reward that reads a further field of the prompt."""
    return [float(one) for one in answer]


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_conformance_tells_equal_prompts_apart(settings):
    """Prompts of the same text may have other fields; an honest reward that reads them passes."""
    prompts = [{"prompt": "a", "answer": 1}, {"prompt": "a", "answer": 2}, {"prompt": "b", "answer": 3}]
    task = build_task(TextGenConfig(**{**settings, "reward": answer_reward, "prompts": prompts}))
    check_faces(task, rows=3, torchrl_env=TextGenTorchEnv(task, 3))


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize(
    ("quantity", "breakage"),
    [
        ("reward", lambda out: (out[0], out[1] + 1e-3, *out[2:])),
        ("terminated", lambda out: (*out[:2], out[2] | True, *out[3:])),
        ("mask", lambda out: ({name: np.roll(array, 1, -1) for name, array in out[0].items()}, *out[1:])),
        ("tokens", lambda out: ({**out[0], "input_ids": 0 * out[0]["input_ids"]}, *out[1:])),
        ("reference_log_prob", lambda out: (*out[:4], {**out[4], "reference_log_prob": np.zeros(2)})),
        ("response", lambda out: (*out[:4], {**out[4], "response": np.array(["x", "x"])})),
        ("returns", lambda out: (*out[:4], {**out[4], "_reference_log_prob": np.zeros(2, dtype=bool)})),
    ],
)
def test_conformance_catches_broken_faces(settings, monkeypatch, quantity, breakage):
    """A face that shows one quantity wrongly is caught, and the quantity is named."""
    step = TextGenVectorEnv.step
    monkeypatch.setattr(TextGenVectorEnv, "step", lambda self, actions: breakage(step(self, actions)))
    with pytest.raises(AssertionError, match=rf"TextGenVectorEnv, row \d, (reset|step \d+): .*\b{quantity}\b"):
        check_faces(build_task(TextGenConfig(**settings)), rows=2)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize(("kl_coef", "action_mask"), [(0, None), (0.3, None), (0.3, ["special", "top_k:9"])])
def test_vector_env_equals_sync_vector_env(ragged, mode, kl_coef, action_mask):
    """The native vector environment is step for step SyncVectorEnv of singles, observations and infos included."""
    ragged = {**ragged, "kl_coef": kl_coef, "max_new_tokens": 5, "action_mask": action_mask}
    native = gym.make_vec("TextGen-v0", num_envs=3, autoreset_mode=mode.value, **ragged)
    assert isinstance(native, TextGenVectorEnv)
    single = [lambda: gym.make("TextGen-v0", **ragged)] * 3
    sync = SyncVectorEnv(single, autoreset_mode=mode)  # type: ignore[arg-type]
    assert native.metadata["autoreset_mode"] is mode
    assert native.observation_space == sync.observation_space and native.action_space == sync.action_space
    assert_same(native.reset(seed=7), sync.reset(seed=7), "reset")
    tokens = random_tokens(40, 3)
    tokens[0] = tokens[20] = 5  # all rows end at once, at their first token
    ends = 0
    for step, actions in enumerate(tokens):
        got, wanted = native.step(actions), sync.step(actions)
        assert_same(got, wanted, f"step {step}")
        ends += int(got[2].sum())
        if mode is AutoresetMode.DISABLED and got[2].any():
            again = [env.reset(options={"reset_mask": got[2].copy()}) for env in (native, sync)]
            assert_same(*again, f"reset after step {step}")
    assert ends > 10


def test_vector_seeds_and_partial_resets(ragged):
    """A list of seeds, with None for rows that go on with their generator, and masks, as SyncVectorEnv has them."""
    native = TextGenVectorEnv(3, **ragged)
    sync = SyncVectorEnv([lambda: gym.make("TextGen-v0", **ragged)] * 3)
    tokens = random_tokens(12, 3)
    for seed, options in [
        ([3, 1, 2], None),
        ([None, 4, None], None),
        (None, {"reset_mask": np.array([True, False, True])}),
        (5, {"reset_mask": np.array([False, True, False])}),
        (None, None),
    ]:
        given = copy.deepcopy(options)
        assert_same(
            native.reset(seed=seed, options=given),
            sync.reset(seed=seed, options=copy.deepcopy(options)),
            seed,
        )
        assert given is None or given.keys() == options.keys()  # the caller's options stay whole
        for step, actions in enumerate(tokens):
            assert_same(native.step(actions), sync.step(actions), f"seed {seed}, step {step}")


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_seeds_of_any_whole_numbers(ragged):
    """Seeds may be NumPy's; where one of them is refused, no row has been seeded."""
    env, untouched = TextGenVectorEnv(3, **ragged), TextGenVectorEnv(3, **ragged)
    first = env.reset(seed=[5, 6, 7])
    for seed in (np.int64(5), np.arange(5, 8), [np.int32(5), 6, np.uint8(7)], (5, 6, 7)):
        assert_same(env.reset(seed=seed), first, seed)
    for one in (env, untouched):
        one.reset(seed=1)
    for wrong in ([8, -1, 9], [8, 9, 2.5], [8, 9, "a"]):
        with pytest.raises(gym.error.Error, match="Seed must be"):
            env.reset(seed=wrong)
    for _ in range(4):
        assert_same(env.reset(), untouched.reset(), "unseeded reset")


def test_vector_row_is_the_single_environment(ragged):
    """Row i seeded with s + i gives the prompts of a single environment seeded so, over many episodes."""
    native, env = TextGenVectorEnv(3, autoreset_mode="SameStep", **ragged), gym.make("TextGen-v0", **ragged)
    for row in range(3):
        got = [native.reset(seed=20)[0]] + [native.step(np.array([0, 0, 0]))[0] for _ in range(8)]
        wanted = [env.reset(seed=20 + row)[0]] + [env.reset()[0] for _ in range(8)]
        for one, other in zip(got, wanted, strict=True):
            assert one["input_ids"][row].tolist() == other["input_ids"].tolist()
    assert len({tuple(one["attention_mask"][0]) for one in got}) > 1


def test_torchrl_rollout_with_resets(ragged):
    """Over automatic resets: each finished response has the fast path's score, each new one begins empty."""
    task = build_task(TextGenConfig(**ragged))
    env = TextGenTorchEnv(task, 4, seed=3)
    data = env.rollout(40, break_when_any_done=False)  # [4, 40], random policy
    done, following = data["next", "done"][..., 0], data["next"]
    assert done.sum() > 10 and (done == following["terminated"][..., 0]).all()
    assert not following["truncated"].any()
    assert (following["finish_code"][..., 0] > 0).equal(done)
    width = task.config.max_prompt_tokens
    starts = torch.zeros_like(done)
    starts[:, 0], starts[:, 1:] = True, done[:, :-1]
    assert (data["attention_mask"][..., width:].any(-1) == ~starts).all()
    going_on = ~done[:, :-1]
    assert torch.equal(following["input_ids"][:, :-1][going_on], data["input_ids"][:, 1:][going_on])
    mask = following["attention_mask"][done]  # [N, L]
    length = mask[:, width:].sum(1)
    state = start(following["input_ids"][done][:, :width], mask[:, :width], 12, 0)
    for step in range(12):
        column = following["input_ids"][done][:, width + step]
        state = state.append(column, step < length)
    scored = score_responses(task, state, ["unread"] * len(length))
    torch.testing.assert_close(following["score"][done][:, 0], scored.score, rtol=0, atol=TOLERANCE)
    assert not following["score"][~done].any()
    paid = following["reward"][done][:, 0]
    wanted = scored.reward.gather(1, length[:, None] - 1)[:, 0]
    torch.testing.assert_close(paid, wanted, rtol=0, atol=TOLERANCE)


def test_torchrl_whole_batch(ragged):
    """While rows that ended wait for the others, nothing more is paid that a mask made from done would count."""
    task = build_task(TextGenConfig(**ragged))
    env = TextGenTorchEnv(task, 6, seed=0)
    data = env.rollout(30, break_when_any_done=False, break_when_all_done=True)
    done, following = data["next", "done"][..., 0], data["next"]
    assert done[:, -1].all() and data.shape[1] <= 12 and not done[:, 0].all()
    valid = done.long().cumsum(1) - done.long() == 0  # TorchRL repeats a row's last transition after its end
    assert (valid & done).sum(1).tolist() == [1] * 6 and not valid.all()
    reward, reference, score = (
        (following[name][..., 0] * valid).sum(1) for name in ("reward", "reference_log_prob", "score")
    )
    torch.testing.assert_close(reward, score + 0.3 * reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_torchrl_steps_the_rows_that_it_is_asked_for(ragged):
    """TorchRL's `_step` leaves rows out: they write nothing and are paid nothing, and go on later as if never asked."""
    env = TextGenTorchEnv(build_task(TextGenConfig(**ragged)), 3)
    start = env.reset()
    data = start.clone().set("action", torch.tensor([200, 201, 202])).set("_step", torch.tensor([True, False, True]))
    after = env.step(data)["next"]
    written = after["attention_mask"].sum(1) - start["attention_mask"].sum(1)
    assert written.tolist() == [1, 0, 1] and (after["reward"][:, 0] != 0).tolist() == [True, False, True]
    later = env.step(after.clone().set("action", torch.tensor([200, 201, 202])))["next"]
    alone = TextGenTorchEnv(env.task, 3)
    wanted = alone.step(alone.reset().set("action", torch.tensor([200, 201, 202])))["next"]
    for name in ("input_ids", "reward", "reference_log_prob"):
        torch.testing.assert_close(later[name][1], wanted[name][1])


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_torchrl_bad_input(settings):
    """Wrong tasks, rows, actions and arguments of reset are refused with what to do; integers of any width are ids."""
    config = TextGenConfig(**settings)
    with pytest.raises(ValueError, match=r"must be a Task, got TextGenConfig; build one with build_task\(TextGenConf"):
        TextGenTorchEnv(config, 2)
    task = build_task(config)
    for rows in (0, 2.0, "2", True, None):
        with pytest.raises(ValueError, match=r"rows must be a whole number of at least 1, got"):
            TextGenTorchEnv(task, rows)
    env = TextGenTorchEnv(task, 2)
    data = env.reset()
    for action in (torch.tensor([1.0, 2.0]), torch.tensor([[1], [2]]), torch.eye(2, 300).long(), torch.ones(2) > 0):
        with pytest.raises(ValueError, match=r"action must be token ids, int64 \[2\], got torch.*with argmax\(-1\)"):
            env.step(data.clone().set("action", action))
    stepped = env.step(data.clone().set("action", torch.tensor([65, 66], dtype=torch.int32)))["next"]
    assert stepped["input_ids"][:, 16].tolist() == [65, 66]
    for wrong in ({"seed": 3}, {"option": {}}):
        with pytest.raises(TypeError, match=r"options=\{...\}, got \['(seed|option)'\]; to seed, call set_seed"):
            env.reset(**wrong)


def test_torchrl_seed(ragged):
    """set_seed decides the prompts; the same seed gives the same ones."""
    task = build_task(TextGenConfig(**ragged))
    env, drawn = TextGenTorchEnv(task, 4), []
    for seed in (1, 1, 2):
        env.set_seed(seed)
        drawn.append(torch.stack([env.reset()["input_ids"] for _ in range(6)]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("kl_coef", [0, 0.3])
def test_return_is_score_and_penalty(ragged, kl_coef):
    """The undiscounted return is score + kl_coef · Σ log π_ref."""
    env = gym.make("TextGen-v0", **{**ragged, "kl_coef": kl_coef})
    for actions in random_tokens(6, 12):
        env.reset(seed=int(actions[0]))
        total = reference = 0.0
        for token in actions:
            _, reward, terminated, truncated, info = env.step(token)
            total += reward
            reference += info.get("reference_log_prob", 0.0)
            assert ("score" in info) == terminated and not truncated
            if terminated:
                break
        assert terminated and total == pytest.approx(info["score"] + kl_coef * reference, abs=TOLERANCE)
        assert (reference < 0) == (kl_coef > 0)


def test_no_penalty_loads_no_reference(settings, monkeypatch):
    """With kl_coef=0 no language model is loaded or run, by any face."""
    monkeypatch.setattr(textenv.task, "load_causal_lm", lambda *args: pytest.fail("a reference was loaded"))
    task = build_task(TextGenConfig(**{**settings, "kl_coef": 0}))
    assert task.reference is None and task.vocabulary == tiny.VOCABULARY and task.stop_token_ids == (tiny.END,)
    check_faces(task, rows=2, torchrl_env=TextGenTorchEnv(task, 2))


def test_no_penalty_runs_no_live_reference(settings):
    """With kl_coef=0 a live model lends its tokenizer and width, and is never run."""
    model = tiny.language_model("gpt2")
    model.forward = lambda *args, **kwargs: pytest.fail("the reference was run")
    lm = textenv.LanguageModel(model, tiny.tokenizer(), (tiny.END,))
    task = build_task(TextGenConfig(**{**settings, "kl_coef": 0, "reference": textenv.shared(lm)}))
    assert task.reference is None
    check_faces(task, rows=2)


def test_frozen_models_are_shared(settings, monkeypatch):
    """Many environments on the same folders hold one copy of each model; a changed folder is read anew."""
    loads = []
    load = textenv.models.loading.load_model
    monkeypatch.setattr(textenv.models.loading, "load_model", lambda *args: loads.append(args) or load(*args))
    monkeypatch.setattr(textenv.models.loading, "_frozen", {})
    envs = [gym.make("TextGen-v0", **settings).unwrapped for _ in range(3)]
    assert len(loads) == 2  # reference and reward model
    assert all(env.task.reference.model is envs[0].task.reference.model for env in envs)
    assert all(env.task.reward.model is envs[0].task.reward.model for env in envs)


# ---- Gymnasium's manners


def test_gymnasium_checker(settings):
    """Gymnasium's own checker passes, and has nothing to warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("TextGen-v0", **settings).unwrapped)
        check_env(gym.make("TextGen-v0", render_mode="ansi", **settings).unwrapped)


def test_torchrl_checker(settings):
    """TorchRL's own checker passes, with and without the penalty."""
    for kl_coef in (0, 0.3):
        check_env_specs(TextGenTorchEnv(build_task(TextGenConfig(**{**settings, "kl_coef": kl_coef})), 3))


def test_observation_layout(settings):
    """Prompts end at column P - 1, step t writes column P + t, and spaces are the documented ones."""
    env = gym.make("TextGen-v0", **{**settings, "prompts": ["the cat"]})
    observation, info = env.reset(seed=0)
    assert env.action_space == gym.spaces.Discrete(tiny.VOCABULARY)
    assert observation["input_ids"].dtype == np.int64 and observation["attention_mask"].dtype == np.int8
    assert observation["attention_mask"].tolist() == [0] * 9 + [1] * 7 + [0] * 12
    assert info == {"prompt_index": 0}
    ids = tiny.tokenizer()("the cat").input_ids
    assert observation["input_ids"][9:16].tolist() == ids
    for step, token in enumerate([299, 257, 0]):
        observation, *_ = env.step(token)
        assert observation in env.observation_space
        assert observation["input_ids"][16 + step] == token
        assert observation["attention_mask"].tolist() == [0] * 9 + [1] * (8 + step) + [0] * (11 - step)
    assert observation["input_ids"][9:19].tolist() == [*ids, 299, 257, 0]


def test_infos_and_plain_types(settings):
    """Reward is a float, ends are bools, infos hold Python values; the end adds score, reason and text."""
    env = gym.make("TextGen-v0", **{**settings, "prompts": ["the cat"], "max_new_tokens": 3})
    env.reset(seed=0)
    answers = [env.step(token) for token in (*b" s", tiny.END)]
    for _, reward, terminated, truncated, info in answers:
        assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
        assert type(info["reference_log_prob"]) is float
    assert [answer[2] for answer in answers] == [False, False, True]
    assert [sorted(answer[4]) for answer in answers[:2]] == [["reference_log_prob"]] * 2
    end = answers[2][4]
    assert sorted(end) == ["finish_reason", "reference_log_prob", "response", "score", "score_parts"]
    assert type(end["score"]) is float and end["finish_reason"] == "stop"
    json.dumps(end)


def test_seeds(settings):
    """Same seed and actions, same episodes; other seeds, other prompts."""
    stories = []
    for seed in (5, 5, 6):
        env, story = gym.make("TextGen-v0", **settings), []
        observation, _ = env.reset(seed=seed)
        for token in random_tokens(60, 1)[:, 0]:
            observation, reward, terminated, _, info = env.step(token)
            story.append((observation["input_ids"].tolist(), reward, info))
            if terminated:
                story.append(env.reset()[0]["input_ids"].tolist())
        stories.append(story)
    assert stories[0] == stories[1] != stories[2]


def test_reset_leaves_nothing_behind(settings):
    """A seeded reset gives the same observation, every column of it, whatever was played before."""
    env, vector = gym.make("TextGen-v0", **settings), TextGenVectorEnv(2, **settings)
    first, first_rows = env.reset(seed=1), vector.reset(seed=1)
    for actions in random_tokens(5, 2):
        env.step(actions[0])
        vector.step(actions)
    assert_same(env.reset(seed=1), first, "env")
    assert_same(vector.reset(seed=1), first_rows, "vector")


def test_observations_never_change(ragged):
    """What a client was given stays as it was, through later steps and resets, and shares no memory."""
    task = build_task(TextGenConfig(**ragged))
    env, vector, torchrl_env = (
        gym.make("TextGen-v0", **ragged),
        TextGenVectorEnv(2, **ragged),
        TextGenTorchEnv(task, 2),
    )
    given = [env.reset(seed=0), vector.reset(seed=0)]
    data = torchrl_env.reset()
    tensors = [data.clone()]
    kept, frozen = [data], copy.deepcopy(given)
    for actions in random_tokens(30, 2):
        answers = [env.step(actions[0]), vector.step(actions)]
        if answers[0][2]:
            answers.append(env.reset())
        given += answers
        frozen += copy.deepcopy(answers)
        stepped, data = torchrl_env.step_and_maybe_reset(data.set("action", torch.from_numpy(actions)))
        kept += [stepped["next"], data]
        tensors += [stepped["next"].clone(), data.clone()]
    for answer, before in zip(given, frozen, strict=True):
        assert_same(answer, before, "an answer")
    for one, before in zip(kept[1:], tensors[1:], strict=True):
        assert (one.exclude("action", "next") == before.exclude("action", "next")).all()
    arrays = [answer[0][name] for answer in given for name in ("input_ids", "attention_mask")]
    assert len({array.__array_interface__["data"][0] for array in arrays}) == len(arrays)


def test_clients_may_write_into_observations(settings):
    """Observations are the client's own: writing into them changes nothing inside the environment."""
    for make, shape in ((lambda: gym.make("TextGen-v0", **settings), ()), (lambda: TextGenVectorEnv(2, **settings), 2)):
        rude, polite = make(), make()
        observation, _ = rude.reset(seed=2)
        polite.reset(seed=2)
        for token in (65, 66, tiny.END):
            for array in observation.values():
                array[:] = 1
            answer, wanted = (env.step(np.full(shape, token)) for env in (rude, polite))
            observation = answer[0]
            assert_same(answer, wanted, f"step with {token}")


def test_spec_copies_no_shared_object(settings):
    """Gymnasium copies keyword arguments once a wrapper; what is in `shared` passes through as it is."""
    model = tiny.language_model("gpt2")
    lm = textenv.LanguageModel(model, tiny.tokenizer(), (tiny.END,))
    reward = tiny.reward_model("gpt2")
    given = {"reference": textenv.shared(lm), "reward": textenv.shared(reward)}
    env = gym.make("TextGen-v0", **{**settings, **given})
    assert env.spec.kwargs["reference"].value is lm and env.unwrapped.task.reference.model is model
    assert env.unwrapped.task.reward.model is reward
    env.reset(seed=0)
    assert type(env.step(65)[1]) is float


@pytest.mark.parametrize("kl_coef", [0, 0.3])
def test_gym_wrapper(ragged, kl_coef):
    """TorchRL's GymWrapper takes the vector environment in mode DISABLED: true last observations, masked resets."""
    native = gym.make_vec("TextGen-v0", num_envs=3, autoreset_mode="Disabled", **{**ragged, "kl_coef": kl_coef})
    env = GymWrapper(native, categorical_action_encoding=True, device="cpu")
    env.set_seed(0)
    data = env.rollout(30, break_when_any_done=False)
    done = data["next", "done"][..., 0]
    assert done.sum() > 5
    written = data["next", "attention_mask"][..., 16:].sum(-1)  # response tokens so far, [3, 30]
    wanted = torch.zeros_like(written)
    for row, step in itertools.product(range(3), range(30)):
        new = step == 0 or done[row, step - 1]
        wanted[row, step] = 1 if new else wanted[row, step - 1] + 1
    assert torch.equal(written, wanted)


def test_dynamics_one_row_equals_many(ragged):
    """Single-row dynamics and many-row dynamics give the same transitions for the same tokens."""
    task = build_task(TextGenConfig(**ragged))
    many, single = TextDynamics(task, 4), [TextDynamics(task, 1) for _ in range(4)]
    many.reset(range(4), [0, 1, 2, 3])
    for row, one in enumerate(single):
        one.reset([0], [row])
    for tokens in torch.from_numpy(random_tokens(12, 4)):
        running = many.running.clone()
        together = many.step(tokens, running)
        for row in running.nonzero()[:, 0].tolist():
            alone = single[row].step(tokens[row : row + 1])
            for name in ("reward", "reference_log_prob", "score"):
                got, wanted = getattr(together, name)[row].item(), getattr(alone, name)[0].item()
                assert got == pytest.approx(wanted, abs=TOLERANCE), name
            assert together.finish_code[row] == alone.finish_code[0]
            assert together.responses.get(row) == alone.responses.get(0)
    assert not many.running.any()
