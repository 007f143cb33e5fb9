"""The Stable-Baselines3 adapter returns the same as SB3's DummyVecEnv of single environments."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from tests.support import tiny
from textenv.vector_env import TextGenVectorEnv

pytest.importorskip("stable_baselines3")

from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, is_vecenv_wrapped

from textenv.adapters.stable_baselines import VecEnvAdapter

TOLERANCE = 2e-5  # batches of different sizes add the same float32 numbers in a different order
STOPS = list(range(75))  # a quarter of all ids, so that random responses end at many lengths


@pytest.fixture
def ragged(settings):
    """Settings under which random responses end early more often than not."""
    return {**settings, "stop_token_ids": STOPS, "max_new_tokens": 5}


def adapted(rows, **settings):
    """The native vector environment in the adapter."""
    return VecEnvAdapter(gym.make_vec("TextGen-v0", num_envs=rows, autoreset_mode="SameStep", **settings))


def same(got, wanted, where):
    """Assert equal structure, types and values, floats to the tolerance; VecMonitor's wall-clock `t` is skipped."""
    assert type(got) is type(wanted), f"{where}: {type(got)} and {type(wanted)}"
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), f"{where}: {sorted(got)} and {sorted(wanted)}"
        for key in wanted.keys() - {"t"}:
            same(got[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted), where
        for index, (left, right) in enumerate(zip(got, wanted, strict=True)):
            same(left, right, f"{where}[{index}]")
    elif isinstance(wanted, np.ndarray):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, f"{where}: {got!r} and {wanted!r}"
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE, err_msg=where)
    else:
        assert got == (pytest.approx(wanted, abs=TOLERANCE) if isinstance(wanted, float | np.floating) else wanted), (
            where
        )


def play(env, actions, seed):
    """Everything that an SB3 VecEnv returns for these actions."""
    env.seed(seed)
    trajectory = [dict(env.reset()), env.reset_infos]
    for row in actions:
        observation, *rest = env.step(row)
        trajectory += [dict(observation), *rest, list(env.reset_infos)]
    return trajectory


@pytest.mark.parametrize("changes", [{"kl_coef": 0}, {"kl_coef": 0.3, "action_mask": "special"}], ids=["bare", "full"])
def test_equals_dummy_vec_env(ragged, changes):
    """Observations, float32 rewards, dones, infos with terminal observations, and VecMonitor's episodes are equal."""
    ragged = {**ragged, **changes}
    actions = np.random.default_rng(0).integers(tiny.VOCABULARY, size=(30, 3))
    actions[0] = actions[20] = 5  # all rows end at once, at their first token
    dummy = DummyVecEnv([lambda: gym.make("TextGen-v0", **ragged)] * 3)
    got, wanted = (play(VecMonitor(env), actions, 7) for env in (adapted(3, **ragged), dummy))
    same(got, wanted, "trajectory")
    infos = [info for part in got[5::5] for info in part]
    ends = [info for info in infos if "terminal_observation" in info]
    assert len(infos) == 90 and 10 < len(ends) < 90
    assert all({"episode", "score", "finish_reason", "response"} <= info.keys() for info in ends)


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_time_limit(ragged):
    """`TimeLimit.truncated` is true only if Gymnasium's TimeLimit ended the episode, so that SB3 bootstraps there."""
    ragged = {**ragged, "max_episode_steps": 2}
    actions = np.array([[70, 80], [80, 80], [80, 3], [80, 80], [3, 80]])  # 70 and 3 stop, the last at the limit
    sync = gym.make_vec(
        "TextGen-v0",
        num_envs=2,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        **ragged,
    )
    dummy = DummyVecEnv([lambda: gym.make("TextGen-v0", **ragged)] * 2)
    got, wanted = (play(env, actions, 3) for env in (VecEnvAdapter(sync), dummy))
    same(got, wanted, "trajectory")
    cut = [[info["TimeLimit.truncated"] for info in infos] for infos in got[5::5]]
    assert cut == [[False, False], [False, True], [True, False], [False, False], [False, True]]


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_seeds_and_options_are_used_once(ragged):
    """`seed` and `set_options` apply to the next reset only; options must be equal in all rows."""
    env, calls = adapted(2, **ragged), []
    reset = env.env.reset
    env.env.reset = lambda **arguments: calls.append(arguments) or reset(**arguments)
    assert env.seed(5) == [5, 6]
    env.set_options({"reset_mask": np.array([True, True])})
    env.reset()
    env.reset()
    assert calls[0]["seed"] == [5, 6] and calls[0]["options"]["reset_mask"].all()
    assert calls[1] == {"seed": None, "options": None}
    env.set_options([{"a": 1}, {"a": 2}])
    with pytest.raises(ValueError, match="same reset options for all rows; call set_options with one dict"):
        env.reset()


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_refuses_other_autoreset_modes(ragged, mode):
    """Other modes raise an error: SB3 would train on the wrong observations."""
    with pytest.raises(
        ValueError, match=r'autoreset_mode SAME_STEP, got .*gym.make_vec\(..., autoreset_mode="SameStep"\)'
    ):
        VecEnvAdapter(gym.make_vec("TextGen-v0", num_envs=2, autoreset_mode=mode, **ragged))
    for other in (gym.make("TextGen-v0", **ragged), "TextGen-v0"):
        with pytest.raises(ValueError, match=r"takes a vector environment .*SAME_STEP, got None of .*TextGen-v0.*make"):
            VecEnvAdapter(other)


class WithWordCount(TextGenVectorEnv):
    """Has a method that returns one value, not one per row."""

    def word_count(self):
        return 3


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_methods(ragged):
    """The result of a method with one value per row is split into rows; other methods raise an error."""
    env = VecEnvAdapter(WithWordCount(3, autoreset_mode="SameStep", render_mode="ansi", **ragged))
    env.seed(0)
    env.reset()
    texts = env.env_method("render")
    assert env.render_mode == "ansi" and tuple(texts) == env.env.render() and all(texts)
    assert env.env_method("render", indices=[2, 0]) == [texts[2], texts[0]] and env.env_method("close") == [None] * 3
    with pytest.raises(
        ValueError, match=r"'word_count' must return one value per row, 3 in all.*got int; call it on the env"
    ):
        env.env_method("word_count")


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_masks_for_sb3_contrib(ragged):
    """sb3-contrib gets the masks of all rows, equal to those of single environments, also after automatic resets."""
    utils = pytest.importorskip("sb3_contrib.common.maskable.utils")
    ragged = {**ragged, "action_mask": "top_k:9"}
    env, dummy = adapted(3, **ragged), DummyVecEnv([lambda: gym.make("TextGen-v0", **ragged)] * 3)
    assert utils.is_masking_supported(env)
    for environment in (env, dummy):
        environment.seed(4)
        environment.reset()
    masks = []
    for actions in np.random.default_rng(0).integers(tiny.VOCABULARY, size=(12, 3)):
        masks.append(utils.get_action_masks(env))
        assert masks[-1].dtype == np.bool_ and (masks[-1].sum(1) == 9).all()
        np.testing.assert_array_equal(masks[-1], utils.get_action_masks(dummy))
        (*_, dones, infos), _ = env.step(actions), dummy.step(actions)
        after = utils.get_action_masks(env)
        for row in np.flatnonzero(~dones):
            np.testing.assert_array_equal(infos[row]["action_mask"], after[row])
    assert not (masks[0] == masks[1]).all()


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_images(ragged):
    """SB3's render tiles one image per row, as its video recorder expects."""
    env = adapted(2, render_mode="rgb_array", **ragged)
    env.reset()
    images, tiled = env.get_images(), env.render()
    height, width, _ = images[0].shape
    assert len(images) == 2 and tiled.shape == (2 * height, width, 3) and tiled.dtype == np.uint8
    np.testing.assert_array_equal(tiled[:height], images[0])


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_attributes(ragged):
    """All rows share one environment, so attributes are read and set for all rows."""
    env = adapted(3, **ragged)
    assert env.get_attr("num_envs") == [3, 3, 3] and env.get_attr("task", 1) == [env.env.task]
    env.set_attr("note", "x")
    assert env.get_attr("note", [0, 2]) == ["x", "x"]
    with pytest.raises(ValueError, match="'note' cannot be set for rows 1 only; leave out indices"):
        env.set_attr("note", "y", 1)
    with pytest.raises(AttributeError):
        env.get_attr("absent")
    assert env.env_is_wrapped(gym.Wrapper) == [False] * 3 and is_vecenv_wrapped(VecMonitor(env), VecMonitor)


def test_checker(settings):
    """SB3's environment checker passes without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("TextGen-v0", **settings))
        check_env(gym.make("TextGen-v0", render_mode="ansi", **settings).unwrapped)
