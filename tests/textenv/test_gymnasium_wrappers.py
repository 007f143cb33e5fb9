"""Gymnasium's own wrappers around TextGen-v0: each gives the right numbers, and what cannot work says so.

Works, tested here (RecordVideo, HumanRendering, AddRenderObservation and the lists of frames in test_rendering.py):

| wrapper | single | vector (NEXT_STEP and DISABLED) | vector, SAME_STEP |
|---|---|---|---|
| FlattenObservation, FilterObservation | yes | yes | refused by Gymnasium: ValueError |
| RecordEpisodeStatistics, NormalizeReward, TransformReward, DictInfoToList, RecordVideo | yes | yes | yes |
| NumpyToTorch | yes | around DictInfoToList | around DictInfoToList |
| TimeLimit | yes | `max_episode_steps=` of `make_vec` | `max_episode_steps=` of `make_vec` |
| FrameStackObservation, TimeAwareObservation, DelayObservation, Autoreset, PassiveEnvChecker | yes | - | - |

Cannot work, or not as one may expect:

| wrapper | what happens | instead |
|---|---|---|
| DtypeObservation, NormalizeObservation, RescaleObservation, ReshapeObservation, MaxAndSkipObservation | refuse Dict observations | none is needed: token ids are names, not magnitudes |
| RescaleAction, ClipAction, DiscretizeAction | refuse Discrete actions | - |
| vector NumpyToTorch directly around the environment | BufferError at the first end: texts in infos | NumpyToTorch(DictInfoToList(env)) |
| NumpyToTorch, texts of info | become "<generator object ...>" (Gymnasium 1.4) | read them inside the wrapper |
| vector RecordEpisodeStatistics, DISABLED | a partial reset changes `_episode` of the infos given before | copy it first |
| vector NormalizeReward, DISABLED | a partial reset zeroes the running sums of all rows | NEXT_STEP or SAME_STEP |
| TransformReward, ClipReward, NormalizeReward | change the environment's half of the penalty, not the learner's | kl_coef=0, or scale both |
"""

import copy
import itertools
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces, wrappers
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import vector as vector_wrappers
from packaging.version import Version
from torchrl.envs import StepCounter, TransformedEnv
from torchrl.objectives.value.functional import td0_advantage_estimate

from agents.config import TrainConfig
from agents.text.experiment import make_task
from tests.support import tiny
from tests.support.faces import assert_same
from textenv import TextGenConfig, build_task
from textenv.torchrl_env import TextGenTorchEnv
from textenv.vector_env import TextGenVectorEnv

pytestmark = [pytest.mark.parametrize("kind", ["gpt2"], indirect=True), pytest.mark.usefixtures("models_kept")]
STOPS = list(range(60))  # a fifth of all ids, so that random responses end at many lengths
MODES = list(AutoresetMode)


OF_1_4 = pytest.mark.skipif(
    Version(gym.__version__) < Version("1.4"),
    reason="older wrappers refuse by AssertionError, and count rows differently",
)


@pytest.fixture
def ragged(settings):
    """Settings under which random responses end early, late and by the budget of six."""
    return {**settings, "stop_token_ids": STOPS, "max_new_tokens": 6}


def random_tokens(*shape):
    """Actions of any shape."""
    return np.random.default_rng(0).integers(tiny.VOCABULARY, size=shape)


def episodes(env, count=4):
    """Answers to random actions, a list for each episode; the first holds what reset gave."""
    told, tokens = [], iter(random_tokens(200))
    env.reset(seed=0)
    for _ in range(count):
        answers = [env.reset()]
        while len(answers) == 1 or not (answers[-1][2] or answers[-1][3]):
            answers.append(env.step(next(tokens)))
        told.append(answers)
    return told


def play_vector(env, steps=14):
    """Answers to random actions in any autoreset mode, from the reset on; in DISABLED ended rows are reset."""
    answers = [(*env.reset(seed=0), None)]
    for actions in random_tokens(steps, env.num_envs):
        answer = env.step(actions)
        ended = np.asarray(answer[2]) | np.asarray(answer[3])
        again = ended.any() and env.metadata["autoreset_mode"] is AutoresetMode.DISABLED
        answers.append((*copy.deepcopy(answer), env.reset(options={"reset_mask": ended.copy()}) if again else None))
    return answers


def returns_of(answers, mode):
    """Sum of rewards and number of steps of every episode that ended, in order of end, by a plain loop."""
    rows = len(answers[1][1])
    total, length, resting = [0.0] * rows, [0] * rows, [False] * rows
    finished = []
    for _, reward, terminated, truncated, *_ in answers[1:]:
        for row in range(rows):
            if resting[row]:
                resting[row] = False
                continue
            total[row] += reward[row]
            length[row] += 1
            if terminated[row] or truncated[row]:
                finished.append((total[row], length[row]))
                total[row], length[row] = 0.0, 0
                resting[row] = mode is AutoresetMode.NEXT_STEP
    return finished


# ---- around a single environment


def test_passive_checker_has_nothing_to_say(ragged):
    """Six whole episodes under PassiveEnvChecker, which gym.make adds, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make("TextGen-v0", **ragged)
        assert isinstance(env.env, wrappers.common.PassiveEnvChecker)
        lengths = [len(answers) - 1 for answers in episodes(env)]
    assert min(lengths) < max(lengths) == 6


def test_record_episode_statistics(ragged):
    """`episode` holds the sum of the rewards and the number of tokens, at the end alone."""
    env = wrappers.RecordEpisodeStatistics(gym.make("TextGen-v0", **ragged))
    for answers in episodes(env):
        end = answers[-1][4]["episode"]
        assert end["r"] == pytest.approx(sum(answer[1] for answer in answers[1:])) and end["l"] == len(answers) - 1
        assert not any("episode" in answer[4] for answer in answers[1:-1])


@pytest.mark.parametrize("limit", [1, 6, 7])
def test_time_limit(ragged, limit):
    """At the limit an episode is truncated; it is scored only if it ended by itself, be it at the same step."""
    bare, env = gym.make("TextGen-v0", **ragged), gym.make("TextGen-v0", max_episode_steps=limit, **ragged)
    both = cut = 0
    for episode in range(8):
        tokens = iter(random_tokens(20, 8)[:, episode])
        env.reset(seed=episode)
        bare.reset(seed=episode)
        for step in itertools.count(1):
            token = next(tokens)
            observation, reward, terminated, truncated, info = env.step(token)
            wanted = bare.step(token)
            assert_same((observation, reward, terminated, info), (*wanted[:3], wanted[4]), f"step {step}")
            assert truncated == (step == limit) and ("score" in info) == terminated
            if terminated or truncated:
                both, cut = both + (terminated and truncated), cut + (truncated and not terminated)
                break
    assert (both > 0) == (limit < 7) and (cut > 0) == (limit < 6)


def test_flatten_observation(ragged):
    """One int64 row of both parts, from which the observation can be had back."""
    env, bare = wrappers.FlattenObservation(gym.make("TextGen-v0", **ragged)), gym.make("TextGen-v0", **ragged)
    assert isinstance(env.observation_space, spaces.Box) and env.observation_space.dtype == np.int64
    for flat, whole in zip(episodes(env), episodes(bare), strict=True):
        for (observation, *_), (wanted, *_) in zip(flat, whole, strict=True):
            assert observation in env.observation_space
            assert_same(spaces.unflatten(bare.observation_space, observation), wanted, "unflattened")


def test_filter_observation(ragged):
    """The ids alone."""
    env = wrappers.FilterObservation(gym.make("TextGen-v0", **ragged), ["input_ids"])
    bare = gym.make("TextGen-v0", **ragged)
    for kept, whole in zip(episodes(env), episodes(bare), strict=True):
        for (observation, *_), (wanted, *_) in zip(kept, whole, strict=True):
            assert observation in env.observation_space
            assert_same(observation, {"input_ids": wanted["input_ids"]}, "filtered")


def test_frame_stack(ragged):
    """The last three observations, the first of an episode repeated where there are fewer."""
    env, bare = wrappers.FrameStackObservation(gym.make("TextGen-v0", **ragged), 3), gym.make("TextGen-v0", **ragged)
    for stacked, whole in zip(episodes(env), episodes(bare), strict=True):
        seen = [whole[0][0]] * 3
        for index, (observation, *_) in enumerate(stacked):
            seen = [*seen[1:], whole[index][0]]
            assert observation in env.observation_space
            wanted = {name: np.stack([one[name] for one in seen]) for name in observation}
            assert_same(observation, wanted, f"observation {index}")


def test_delay_observation(ragged):
    """Each observation comes a step late."""
    env, bare = wrappers.DelayObservation(gym.make("TextGen-v0", **ragged), 1), gym.make("TextGen-v0", **ragged)
    late, whole = episodes(env, 1)[0], episodes(bare, 1)[0]
    for (observation, *_), (wanted, *_) in zip(late[1:], whole, strict=False):
        assert_same(observation, wanted, "delayed")


@pytest.mark.parametrize("flatten", [False, True])
def test_time_aware_observation(ragged, flatten):
    """The steps so far beside the tokens, as a key or as a number of the flat row."""
    env = wrappers.TimeAwareObservation(gym.make("TextGen-v0", max_episode_steps=9, **ragged), flatten=flatten)
    bare = gym.make("TextGen-v0", max_episode_steps=9, **ragged)
    for aware, whole in zip(episodes(env), episodes(bare), strict=True):
        for step, ((observation, *_), (wanted, *_)) in enumerate(zip(aware, whole, strict=True)):
            assert observation in env.observation_space
            if flatten:
                parts = (wanted["attention_mask"], wanted["input_ids"], [step])  # Dict spaces are in order of name
                assert observation.tolist() == np.concatenate(parts).tolist()
            else:
                assert observation.pop("time").tolist() == [step]
                assert_same(observation, wanted, f"step {step}")


def test_transform_and_clip_reward(ragged):
    """Functions of the reward see what the environment pays, score included."""
    bare = [answer for answers in episodes(gym.make("TextGen-v0", **ragged)) for answer in answers[1:]]
    doubled = wrappers.TransformReward(gym.make("TextGen-v0", **ragged), lambda reward: 2 * reward)
    clipped = wrappers.ClipReward(gym.make("TextGen-v0", **ragged), -1.0, 0.5)
    for env, function in ((doubled, lambda reward: 2 * reward), (clipped, lambda reward: min(max(reward, -1.0), 0.5))):
        told = [answer for answers in episodes(env) for answer in answers[1:]]
        assert [one[1] for one in told] == pytest.approx([function(one[1]) for one in bare])


def running_std(sums):
    """Gymnasium's running deviation: that of the sums so far and of a prior worth 1e-4 of one (mean 0, variance 1)."""
    count, mean = len(sums) + 1e-4, sum(sums) / (len(sums) + 1e-4)
    return ((1e-4 * (1 + mean**2) + sum((one - mean) ** 2 for one in sums)) / count + 1e-8) ** 0.5


def test_normalize_reward(ragged):
    """Rewards over the deviation of the discounted sums so far, by a plain loop."""
    bare = [answer for answers in episodes(gym.make("TextGen-v0", **ragged)) for answer in answers[1:]]
    env = wrappers.NormalizeReward(gym.make("TextGen-v0", **ragged), gamma=0.9)
    told, sums, total = [one for answers in episodes(env) for one in answers[1:]], [], 0.0
    for (_, reward, terminated, *_), answer in zip(bare, told, strict=True):
        total = total * 0.9 * (1 - terminated) + reward
        sums.append(total)
        assert answer[1] == pytest.approx(reward / running_std(sums), rel=1e-6)


def test_autoreset(ragged):
    """The step after an end ignores its action, pays nothing and shows the next prompt."""
    env, bare = wrappers.Autoreset(gym.make("TextGen-v0", **ragged)), gym.make("TextGen-v0", **ragged)
    assert_same(env.reset(seed=0), bare.reset(seed=0), "reset")
    ended, resets = False, 0
    for token in random_tokens(30):
        answer = env.step(token)
        wanted = (*[(o, 0.0, False, False, i) for o, i in [bare.reset()]],) if ended else (bare.step(token),)
        assert_same(answer, wanted[0], "a step")
        ended, resets = wanted[0][2], resets + ended
    assert resets > 3


def test_numpy_to_torch(ragged):
    """Observations as tensors of the same numbers, actions from tensors, plain rewards and ends."""
    pytest.importorskip("array_api_compat")
    env, bare = wrappers.NumpyToTorch(gym.make("TextGen-v0", **ragged)), gym.make("TextGen-v0", **ragged)
    env.reset(seed=0)
    bare.reset(seed=0)
    for token in (100, 101, 5):
        observation, reward, terminated, truncated, info = env.step(torch.tensor(token))
        wanted = bare.step(token)
        assert all(isinstance(one, torch.Tensor) for one in observation.values())
        assert_same({name: one.numpy() for name, one in observation.items()}, wanted[0], "observation")
        assert (reward, terminated, truncated) == wanted[1:4] and (type(reward), type(terminated)) == (float, bool)
        assert float(info["reference_log_prob"]) == pytest.approx(wanted[4]["reference_log_prob"])
    assert terminated


@pytest.mark.xfail(strict=True, reason="Gymnasium 1.4 turns a text into that of a generator")
def test_numpy_to_torch_keeps_texts(ragged):
    """Texts of info come through NumpyToTorch; when they do, the table above has one line less."""
    pytest.importorskip("array_api_compat")
    env = wrappers.NumpyToTorch(gym.make("TextGen-v0", **ragged))
    env.reset(seed=0)
    assert env.step(torch.tensor(5))[4]["finish_reason"] == "stop"


@OF_1_4
@pytest.mark.parametrize(
    ("wrap", "error"),
    [
        (lambda env: wrappers.DtypeObservation(env, np.float32), TypeError),
        (lambda env: wrappers.NormalizeObservation(env), ValueError),
        (lambda env: wrappers.RescaleObservation(env, np.float32(0), np.float32(1)), TypeError),
        (lambda env: wrappers.ReshapeObservation(env, (2, 11)), TypeError),
        (lambda env: wrappers.MaxAndSkipObservation(env), ValueError),
        (lambda env: wrappers.RescaleAction(env, np.float32(0), np.float32(1)), TypeError),
        (lambda env: wrappers.ClipAction(env), TypeError),
        (lambda env: wrappers.DiscretizeAction(env, 3), TypeError),
    ],
)
def test_wrappers_of_other_spaces_refuse(ragged, wrap, error):
    """Wrappers for vectors and pictures refuse Dict observations and Discrete actions when they are made."""
    with pytest.raises(error):
        wrap(gym.make("TextGen-v0", **ragged))


def test_flat_observations_are_vectors(ragged):
    """What refuses a Dict takes the flat row: other types, and running means."""
    flat = lambda: wrappers.FlattenObservation(gym.make("TextGen-v0", **ragged))  # noqa: E731
    wanted, _ = flat().reset(seed=0)
    observation, _ = wrappers.DtypeObservation(flat(), np.float32).reset(seed=0)
    assert observation.dtype == np.float32 and observation.tolist() == wanted.tolist()
    normalized = wrappers.NormalizeObservation(flat())
    assert np.isfinite(normalized.reset(seed=0)[0]).all() and np.isfinite(normalized.step(65)[0]).all()


# ---- around the vector environment


@OF_1_4
@pytest.mark.parametrize("mode", MODES)
def test_vector_record_episode_statistics(ragged, mode):
    """Returns and lengths of all episodes, in every autoreset mode; the others' statistics survive partial resets."""
    env = vector_wrappers.RecordEpisodeStatistics(TextGenVectorEnv(3, autoreset_mode=mode, **ragged))
    answers = play_vector(env)
    finished = returns_of(answers, mode)
    assert len(finished) > 5
    assert list(env.return_queue) == pytest.approx([total for total, _ in finished])
    assert list(env.length_queue) == [length for _, length in finished]
    for _, _, terminated, _, info, _ in answers[1:]:
        assert ("episode" in info) == bool(terminated.any())
        assert not terminated.any() or info["_episode"].tolist() == terminated.tolist()


@OF_1_4
@pytest.mark.parametrize("mode", MODES)
def test_vector_normalize_reward(ragged, mode):
    """Rewards over the deviation of all rows' discounted sums so far, by a plain loop over Gymnasium's rule."""
    bare = play_vector(TextGenVectorEnv(3, autoreset_mode=mode, **ragged))
    env = vector_wrappers.NormalizeReward(TextGenVectorEnv(3, autoreset_mode=mode, **ragged), gamma=0.9)
    total, resting, sums = [0.0] * 3, [False] * 3, []
    for (_, reward, terminated, *_, again), (_, normalized, *_) in zip(bare[1:], play_vector(env)[1:], strict=True):
        for row in range(3):
            if not resting[row]:
                total[row] = total[row] * 0.9 * (1 - terminated[row]) + reward[row]
                sums.append(total[row])
            if terminated[row] and mode is AutoresetMode.SAME_STEP:
                total[row] = 0.0
            resting[row] = terminated[row] and mode is AutoresetMode.NEXT_STEP
        if again is not None:
            total = [0.0] * 3  # Gymnasium forgets the rows that were not reset, too: see the table above
        np.testing.assert_allclose(normalized, reward / running_std(sums), rtol=1e-5)  # it sums in float32


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_vector_flatten_and_filter(ragged, mode):
    """Row for row the flat and the filtered observation of the single environment's wrappers."""
    single = gym.make("TextGen-v0", **ragged).observation_space
    bare, flat, kept = (
        play_vector(wrap(TextGenVectorEnv(3, autoreset_mode=mode, **ragged)))
        for wrap in (
            lambda env: env,
            vector_wrappers.FlattenObservation,
            lambda env: vector_wrappers.FilterObservation(env, ["input_ids"]),
        )
    )
    for (whole, *_), (flattened, *_), (filtered, *_) in zip(bare, flat, kept, strict=True):
        assert_same(filtered, {"input_ids": whole["input_ids"]}, "filtered")
        rows = [spaces.flatten(single, {name: array[row] for name, array in whole.items()}) for row in range(3)]
        assert_same(flattened, np.stack(rows), "flattened")


@OF_1_4
def test_vector_observation_wrappers_refuse_same_step(ragged):
    """Gymnasium refuses to transform observations under SAME_STEP, where final_obs would stay as it was."""
    env = TextGenVectorEnv(3, autoreset_mode="SameStep", **ragged)
    for wrap in (vector_wrappers.FlattenObservation, lambda env: vector_wrappers.FilterObservation(env, ["input_ids"])):
        with pytest.raises(ValueError, match="SAME_STEP"):
            wrap(env)


@pytest.mark.parametrize("mode", MODES)
def test_vector_transform_reward(ragged, mode):
    """A function of the rewards sees what the environment pays."""
    bare = play_vector(TextGenVectorEnv(3, autoreset_mode=mode, **ragged))
    env = vector_wrappers.TransformReward(TextGenVectorEnv(3, autoreset_mode=mode, **ragged), lambda reward: 2 * reward)
    for answer, wanted in zip(play_vector(env)[1:], bare[1:], strict=True):
        np.testing.assert_allclose(answer[1], 2 * wanted[1])


@pytest.mark.parametrize("mode", MODES)
def test_dict_info_to_list(ragged, mode):
    """A list with each row's own info: that of the single environments, row by row."""
    env = vector_wrappers.DictInfoToList(TextGenVectorEnv(3, autoreset_mode=mode, **ragged))
    bare, ends = play_vector(TextGenVectorEnv(3, autoreset_mode=mode, **ragged)), 0
    for (*_, infos, _), (_, _, terminated, _, info, _) in zip(play_vector(env)[1:], bare[1:], strict=True):
        for row, own in enumerate(infos):
            assert set(own) == {name for name in info if f"_{name}" in info and info[f"_{name}"][row]}
            end = own.get("final_info", own)
            assert ("score" in end) == ("response" in end) == ("finish_reason" in end) == bool(terminated[row])
            if terminated[row]:
                ends += 1
                holder = info.get("final_info", info)
                assert end["score"] == holder["score"][row] and end["response"] == holder["response"][row]
    assert ends > 5


@pytest.mark.parametrize("mode", MODES)
def test_vector_numpy_to_torch(ragged, mode):
    """Around DictInfoToList tensors of the same numbers, in every mode; without it the texts stop it at an end."""
    pytest.importorskip("array_api_compat")
    make = lambda: TextGenVectorEnv(3, autoreset_mode=mode, **ragged)  # noqa: E731
    env, bare = vector_wrappers.NumpyToTorch(vector_wrappers.DictInfoToList(make())), make()
    naked = vector_wrappers.NumpyToTorch(make())
    for one in (env, bare, naked):
        one.reset(seed=0)
    for actions in ([100] * 3, [101, 5, 102]):
        told, wanted = env.step(torch.tensor(actions)), bare.step(np.array(actions))
        assert_same({name: one.numpy() for name, one in told[0].items()}, wanted[0], "observation")
        for one, other in zip(told[1:4], wanted[1:4], strict=True):
            assert_same(one.numpy(), other, "reward and ends")
    naked.step(torch.tensor([100] * 3))
    with pytest.raises(BufferError):
        naked.step(torch.tensor([101, 5, 102]))


# ---- max_episode_steps


LIMITS = [*itertools.product(MODES, [3, 6], [None]), (MODES[0], 1, None), (MODES[1], -1, None)]


@pytest.mark.parametrize(
    ("mode", "limit", "action_mask"), [*LIMITS, *itertools.product(MODES, [3], [["special", "top_k:40"]])]
)
def test_vector_limit_is_that_of_time_limit(ragged, mode, limit, action_mask):
    """`make_vec(..., max_episode_steps=n)`: step for step SyncVectorEnv of singles in TimeLimit, infos included."""
    ragged = {**ragged, "action_mask": action_mask}
    native = gym.make_vec("TextGen-v0", num_envs=3, autoreset_mode=mode.value, max_episode_steps=limit, **ragged)
    single = [lambda: gym.make("TextGen-v0", max_episode_steps=limit, **ragged)] * 3
    assert isinstance(native, TextGenVectorEnv)
    got, wanted = play_vector(native), play_vector(SyncVectorEnv(single, autoreset_mode=mode))
    terminated = truncated = both = 0
    for step, (answer, other) in enumerate(zip(got, wanted, strict=True)):
        assert_same(answer[:-1], other[:-1], f"step {step}")
        assert (answer[-1] is None) == (other[-1] is None)
        if answer[-1] is not None:
            assert_same(answer[-1], other[-1], f"reset after step {step}")
        if step:
            both += int((answer[2] & answer[3]).sum())
            terminated += int((answer[2] & ~answer[3]).sum())
            truncated += int((answer[3] & ~answer[2]).sum())
            end = answer[4].get("final_info", answer[4])
            scored = end.get("_score", np.zeros(3, dtype=bool))
            assert scored.tolist() == answer[2].tolist()  # a truncated response is never scored
    assert (
        (terminated > 0) == (limit != 1) and (truncated > 0) == (limit in (1, 3)) and (both > 0) == (limit in (1, 3, 6))
    )


def test_vector_limit_of_the_spec(ragged):
    """A registered limit reaches the native environment, and the spec of what was made says it."""
    spec = gym.spec("TextGen-v0")
    limited = gym.envs.registration.EnvSpec(
        "Limited-v0", spec.entry_point, vector_entry_point=spec.vector_entry_point, max_episode_steps=2
    )
    native = gym.make_vec(limited, num_envs=2, **ragged)
    native.reset(seed=0)
    assert [native.step(np.array([100, 100]))[3].tolist() for _ in range(2)] == [[False] * 2, [True] * 2]
    assert native.spec.kwargs["max_episode_steps"] == 2


@pytest.mark.parametrize("limit", [0, -2, 2.5, "5", True])
def test_bad_limits(ragged, limit):
    """A limit must be a number of steps; anything else is refused."""
    with pytest.raises(ValueError, match="max_episode_steps must be a whole number of at least 1, or None"):
        TextGenVectorEnv(2, max_episode_steps=limit, **ragged)


@pytest.mark.parametrize("limit", [None, 1])
def test_ended_rows_wait_for_their_reset(ragged, limit):
    """In mode DISABLED a step into an ended row is refused with what to do, truncated or terminated."""
    env = TextGenVectorEnv(2, autoreset_mode="Disabled", max_episode_steps=limit, **ragged)
    env.reset(seed=0)
    env.step(np.array([100, 5]))
    with pytest.raises(ValueError, match=r"row \d is over; .*reset_mask"):
        env.step(np.array([100, 100]))
    env.reset(options={"reset_mask": np.array([limit == 1, True])})
    env.step(np.array([100, 100]))


def test_learners_refuse_wrapped_environments(ragged):
    """The learners write past all wrappers, so max_episode_steps and others are refused, with what to do."""
    names = ("reference", "reward", "max_prompt_tokens", "max_new_tokens")
    arguments = tuple(f"{name}={ragged[name]}" for name in names)
    arguments += ('prompts=["a", "b"]',)
    assert make_task(TrainConfig(env_arg=arguments)).width > 0
    with pytest.raises(ValueError, match=r"max_episode_steps.*cuts.*use max_new_tokens=N"):
        make_task(TrainConfig(env_arg=(*arguments, "max_episode_steps=5")))
    with pytest.raises(ValueError, match=r"wrapped in RenderCollection.*make it without"):
        make_task(TrainConfig(env_arg=(*arguments, "render_mode=ansi_list")))


def test_torchrl_limit_bootstraps(ragged):
    """TorchRL's StepCounter truncates our EnvBase: not terminated, not scored, and the next value counts."""
    env = TransformedEnv(TextGenTorchEnv(build_task(TextGenConfig(**ragged)), 4, seed=0), StepCounter(max_steps=3))
    torch.manual_seed(0)
    data = env.rollout(30, break_when_any_done=False)
    following = data["next"]
    terminated, truncated = following["terminated"][..., 0], following["truncated"][..., 0]
    cut = truncated & ~terminated
    assert cut.sum() > 5 and terminated.sum() > 5
    assert torch.equal(following["done"][..., 0], terminated | truncated)
    assert not following["score"][cut].any() and (following["step_count"][cut] == 3).all()
    written = following["attention_mask"][..., -6:].sum(-1)
    assert (written[cut] == 3).all()  # the last observation is the cut one, not the next prompt
    after = data["attention_mask"][:, 1:, -6:].sum(-1)[cut[:, :-1]]
    assert (after == 0).all()  # and the next step starts a new episode
    values = torch.ones_like(following["reward"])
    error = td0_advantage_estimate(
        0.9, 0 * values, 5 * values, following["reward"], following["done"], following["terminated"]
    )
    wanted = following["reward"] + 0.9 * 5 * (~following["terminated"])
    torch.testing.assert_close(error, wanted)
