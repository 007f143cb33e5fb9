"""The whole penalty: the wrappers, the learners' reward, and equal sums in every face."""

from __future__ import annotations

import copy
import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import Autoreset

from agents.objectives.actor_critic import add_penalized_reward
from agents.text.rollout import Penalty, TextRollout, collect
from tests.support import tiny
from tests.support.faces import STOPS, TOLERANCE, assert_same, random_tokens
from textenv import TextGenConfig, build_task
from textenv.adapters.whole_penalty import VectorWholePenalty, WholePenalty
from textenv.kl import ESTIMATORS, AdaptiveKL, FixedKL
from textenv.task import Task
from textenv.torchrl_env import TextGenTorchEnv
from textenv.vector_env import TextGenVectorEnv

BETA = 0.3  # kl_coef of the settings
ROWS = 4


@pytest.fixture
def one_prompt(settings):
    """Settings with a single prompt, so that every face has the same prompts, and responses of different lengths."""
    return {**settings, "prompts": ["the cat"], "stop_token_ids": STOPS}


def rollout_of(task: Task, estimator: str = "k1", coef: float = BETA) -> TextRollout:
    """A learner's rollout of a policy that differs from the reference."""
    model = copy.deepcopy(task.load_reference().model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    prompts = task.prompts.select([0] * ROWS)
    rollout = collect(task, model, prompts, generator, 2, Penalty(coef=coef, estimator=estimator))
    assert len(set(rollout.data["mask"].sum(1).tolist())) > 1  # responses of several lengths
    assert rollout.data["kl"].abs().sum() > 0.1
    return rollout


def random_log_probs(steps: int, rows: int) -> np.ndarray:
    return -np.random.default_rng(1).exponential(3.0, (steps, rows))


# ---- one identity in every face


def play_single(settings, data):
    """Reward sums of a single environment, one per response."""
    env, sums = gym.make("TextGen-v0", **settings), []
    for row in range(ROWS):
        env.reset(seed=0)
        length = int(data["mask"][row].sum())
        steps = [env.step(int(token)) for token in data["action"][row, :length]]
        assert steps[-1][2]
        sums.append(sum(step[1] for step in steps))
    return sums


def play_vector(env, data):
    """Reward sums of a vector environment, over the steps that took a token of the rollout."""
    env.reset(seed=0)
    mask, sums = data["mask"].numpy(), np.zeros(ROWS)
    for step, actions in enumerate(data["action"].numpy().T[: mask.sum(1).max()]):
        sums += env.step(actions)[1] * mask[:, step]
        if env.metadata["autoreset_mode"] is AutoresetMode.DISABLED and not mask[:, step + 1 :].any():
            break
    return sums.tolist()


def play_torchrl(task, data):
    """Reward sums of the TorchRL environment."""
    env, sums = TextGenTorchEnv(task, ROWS), torch.zeros(ROWS)
    current = env.reset()
    for step, actions in enumerate(data["action"].T):
        if not data["mask"][:, step].any():
            break
        stepped, current = env.step_and_maybe_reset(current.set("action", actions.clone()))
        sums += stepped["next", "reward"][:, 0] * data["mask"][:, step]
    return sums.tolist()


def test_every_face_adds_up_to_score_minus_penalty(one_prompt):
    """In every face, Σ reward − β Σ log π = score − β · KL for every response."""
    task = build_task(TextGenConfig(**one_prompt))
    rollout = rollout_of(task)
    data = rollout.data
    add_penalized_reward(data)
    kl = (data["action_log_prob"] - data["reference_log_prob"]).sum(1)
    wanted = (data["score"] - BETA * kl).tolist()
    own_half = (BETA * data["action_log_prob"].sum(1)).tolist()
    single = [lambda: gym.make("TextGen-v0", **one_prompt)] * ROWS
    sums = {
        "fast path": rollout.scored.reward.sum(1).tolist(),
        "TextGenEnv": play_single(one_prompt, data),
        "TextGenVectorEnv": play_vector(TextGenVectorEnv(ROWS, **one_prompt), data),
        "TextGenVectorEnv, same step": play_vector(
            TextGenVectorEnv(ROWS, autoreset_mode="SameStep", **one_prompt), data
        ),
        "SyncVectorEnv": play_vector(SyncVectorEnv(single), data),
        "TextGenTorchEnv": play_torchrl(task, data),
    }
    for face, sum_of_rewards in sums.items():
        for row in range(ROWS):
            got = sum_of_rewards[row] - own_half[row]
            assert got == pytest.approx(wanted[row], abs=TOLERANCE), f"{face}, row {row}"
    torch.testing.assert_close(data["reward"].sum(1), torch.tensor(wanted), atol=TOLERANCE, rtol=0)


# ---- the wrappers


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_wrappers_pay_the_learners_reward(one_prompt, estimator):
    """For every token and estimator, both wrappers pay the penalized reward that the learner computes."""
    task = build_task(TextGenConfig(**one_prompt))
    rollout = rollout_of(task, estimator)
    data, mask = rollout.data, rollout.data["mask"].numpy()
    add_penalized_reward(data)
    penalized, kl = data["reward"].numpy(), data["kl"].numpy()
    log_prob, tokens = data["action_log_prob"].numpy(), data["action"].numpy()
    single = WholePenalty(gym.make("TextGen-v0", **one_prompt), estimator)
    vector = VectorWholePenalty(gym.make_vec("TextGen-v0", num_envs=ROWS, **one_prompt), estimator)
    vector.reset(seed=0)
    for step in range(mask.sum(1).max()):
        action = {"token": tokens[:, step], "log_prob": np.where(mask[:, step], log_prob[:, step], -1.0)}
        _, rewards, _, _, infos = vector.step(action)
        taken = mask[:, step]
        # large k3 values have float32's relative rounding error
        np.testing.assert_allclose(rewards[taken], penalized[taken, step], rtol=1e-5, atol=TOLERANCE)
        np.testing.assert_allclose(infos["penalty"][taken], BETA * kl[taken, step], rtol=1e-5, atol=TOLERANCE)
    for row in range(ROWS):
        single.reset(seed=0)
        for step in range(mask[row].sum()):
            action = {"token": tokens[row, step], "log_prob": log_prob[row, step]}
            _, reward, terminated, _, info = single.step(action)
            assert reward == pytest.approx(penalized[row, step], rel=1e-5, abs=TOLERANCE)
            assert info["penalty"] == pytest.approx(BETA * kl[row, step], rel=1e-5, abs=TOLERANCE)
        assert terminated


def test_k1_is_the_reward_less_beta_log_prob(settings):
    """With k1 and the environment's β, a step pays the environment's reward − β · log π, as a float."""
    plain, whole = gym.make("TextGen-v0", **settings), WholePenalty(gym.make("TextGen-v0", **settings))
    assert_same(whole.reset(seed=3), plain.reset(seed=3), "reset")
    for token, log_prob in ((65, -2.0), (66, -0.5), (tiny.END, 0.0)):
        observation, reward, terminated, truncated, info = whole.step({"token": token, "log_prob": log_prob})
        wanted = plain.step(token)
        assert reward == pytest.approx(wanted[1] - BETA * log_prob, abs=1e-6)
        assert info.pop("penalty") == pytest.approx(BETA * (log_prob - info["reference_log_prob"]), abs=1e-6)
        assert type(reward) is float
        assert_same((observation, terminated, truncated, info), (wanted[0], *wanted[2:]), "step")


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize(("mode", "kl_coef"), [*((mode, 0.3) for mode in AutoresetMode), ("NextStep", 0)])
def test_vector_wrapper_equals_wrapped_singles(settings, mode, kl_coef):
    """The vector wrapper, native or sync, equals a SyncVectorEnv of wrapped singles at every step, including infos."""
    ragged, mode = {**settings, "kl_coef": kl_coef, "stop_token_ids": STOPS, "max_new_tokens": 4}, AutoresetMode(mode)
    single = [lambda: gym.make("TextGen-v0", **ragged)] * 3
    wrapped = [lambda: WholePenalty(gym.make("TextGen-v0", **ragged))] * 3
    reference = SyncVectorEnv(wrapped, autoreset_mode=mode)  # type: ignore[arg-type]
    native = VectorWholePenalty(TextGenVectorEnv(3, autoreset_mode=mode, **ragged))
    sync = VectorWholePenalty(SyncVectorEnv(single, autoreset_mode=mode))  # type: ignore[arg-type]
    for env in (native, sync):
        assert env.action_space == reference.action_space and env.single_action_space == reference.single_action_space
    wanted = reference.reset(seed=7)
    for env in (native, sync):
        assert_same(env.reset(seed=7), wanted, "reset")
    tokens, log_probs, ends = random_tokens(13, 3), random_log_probs(13, 3), 0
    tokens[0] = tokens[7] = 5  # all rows end at once, at their first token
    for step, (token, log_prob) in enumerate(zip(tokens, log_probs, strict=True)):
        wanted = reference.step({"token": token, "log_prob": log_prob.astype(np.float32)})
        for env in (native, sync):
            got = env.step({"token": token, "log_prob": log_prob.astype(np.float32)})
            assert_same(got, wanted, f"{env}, step {step}")
        ends += int(wanted[2].sum())
        if mode is AutoresetMode.DISABLED and wanted[2].any():
            resets = [env.reset(options={"reset_mask": wanted[2].copy()}) for env in (reference, native, sync)]
            for result in resets[1:]:
                assert_same(result, resets[0], f"reset after step {step}")
    assert ends > 6


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_resetting_rows_pay_no_penalty(settings):
    """A row that resets instead of taking its token pays nothing; its log_prob is ignored and may be NaN."""
    env = VectorWholePenalty(TextGenVectorEnv(2, **settings))
    env.reset(seed=0)
    env.step({"token": [tiny.END, 65], "log_prob": [-1.0, -1.0]})
    _, rewards, _, _, infos = env.step({"token": [65, 65], "log_prob": [math.nan, -1.0]})
    assert rewards[0] == 0 and infos["penalty"][0] == 0 and infos["_penalty"].tolist() == [False, True]
    with pytest.raises(ValueError, match="log_prob nan in row 0"):
        env.step({"token": [65, 65], "log_prob": [math.nan, -1.0]})
    env.step({"token": [tiny.END, 65], "log_prob": [-1.0, -1.0]})
    env.reset(options={"reset_mask": np.array([True, False])})  # row 0 is reset explicitly, so it takes its next token
    with pytest.raises(ValueError, match="log_prob nan in row 0"):
        env.step({"token": [65, 65], "log_prob": [math.nan, -1.0]})


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_truncated_rows_reset_too(settings):
    """A row truncated by TimeLimit also resets at the next step."""
    env = VectorWholePenalty(gym.make_vec("TextGen-v0", 2, "sync", **settings, max_episode_steps=2))
    env.reset(seed=0)
    for _ in range(2):
        truncated = env.step({"token": [65, 65], "log_prob": [-1.0, -1.0]})[3]
    assert truncated.all()
    _, rewards, _, _, infos = env.step({"token": [65, 65], "log_prob": [math.nan, math.nan]})
    assert not rewards.any() and "penalty" not in infos
    assert env.step({"token": [65, 65], "log_prob": [-1.0, -1.0]})[4]["_penalty"].all()


class WithoutInfos(gym.vector.VectorWrapper):
    """Drops the infos."""

    def step(self, actions):
        return *self.env.step(actions)[:4], {}


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_steps_without_a_reference_log_prob(settings):
    """Inner wrappers that restart episodes or drop infos raise an error instead of giving a wrong penalty."""
    env = WholePenalty(Autoreset(gym.make("TextGen-v0", **settings)))
    env.reset(seed=0)
    assert env.step({"token": tiny.END, "log_prob": -1.0})[2]
    with pytest.raises(ValueError, match=r"no reference_log_prob .*apply this wrapper inside .*Autoreset"):
        env.step({"token": 65, "log_prob": -1.0})
    outside = Autoreset(WholePenalty(gym.make("TextGen-v0", **settings)))
    outside.reset(seed=0)
    outside.step({"token": tiny.END, "log_prob": -1.0})
    assert outside.step({"token": 65, "log_prob": -1.0})[1] == 0.0
    vector = VectorWholePenalty(WithoutInfos(TextGenVectorEnv(2, **settings)))
    vector.reset(seed=0)
    with pytest.raises(ValueError, match=r"no reference_log_prob"):
        vector.step({"token": [65, 65], "log_prob": [-1.0, -1.0]})


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_controller_in_the_wrappers(settings):
    """β changes at the end of every episode, by the KL of that episode only; earlier steps pay the old β."""
    for unit, rows in (("response", 1), ("token", 1), ("response", 2), ("token", 2)):
        controller = AdaptiveKL(BETA, 5.0, 10, unit)
        expected = copy.deepcopy(controller)
        if rows == 1:
            env = WholePenalty(gym.make("TextGen-v0", **settings), "k2", controller)
            shape: tuple = ()
        else:
            env = VectorWholePenalty(TextGenVectorEnv(rows, autoreset_mode="SameStep", **settings), "k2", controller)
            shape = (rows,)
        env.reset(seed=0)
        env.step({"token": np.full(shape, 65), "log_prob": np.full(shape, -40.0)})
        env.reset(seed=0)  # an abandoned episode does not count
        for _ in range(3):
            kl, coef = 0.0, expected.coef
            for token in (65, 66, tiny.END):
                info = env.step({"token": np.full(shape, token), "log_prob": np.full(shape, -1.5)})[4]
                info = info if token != tiny.END or rows == 1 else info["final_info"]
                reference = info["reference_log_prob"]
                kl += np.sum(0.5 * (-1.5 - reference) ** 2)
                assert np.allclose(info["penalty"], coef * 0.5 * (-1.5 - reference) ** 2)
            expected.update(float(kl), 3 * rows, rows)
            assert env.controller.coef == pytest.approx(expected.coef, rel=1e-9) and env.controller.coef != coef
            if rows == 1:
                env.reset()


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_checkers(settings, estimator):
    """Gymnasium's checker warns only about the wrapper itself and the unbounded log-probability."""
    expected = ("different from the unwrapped version", "A Box action space minimum value is -infinity")
    env = WholePenalty(gym.make("TextGen-v0", **settings), estimator)
    assert all(env.action_space.sample() in env.action_space for _ in range(20))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env, skip_render_check=True)
    assert len(caught) == 2, [*map(str, caught)]
    assert all(any(text in str(warning.message) for text in expected) for warning in caught), [*map(str, caught)]


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_spec_of_a_wrapped_environment(settings):
    """A wrapped environment remade from its JSON spec pays the same."""
    env = WholePenalty(gym.make("TextGen-v0", **settings), "k3")
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    for environment in (env, again):
        environment.reset(seed=0)
    action = {"token": 65, "log_prob": -1.0}
    assert_same(again.step(action), env.step(action), "step")


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_numbers_of_any_kind(settings):
    """log_prob may be a Python, NumPy or torch number, even with a gradient; a rounding error above 0 is accepted."""
    env = WholePenalty(gym.make("TextGen-v0", **settings))
    rewards = []
    for log_prob in (-1, -1.0, np.float32(-1), np.array([-1.0]), torch.tensor(-1.0, requires_grad=True).bfloat16()):
        env.reset(seed=0)
        rewards.append(env.step({"token": 65, "log_prob": log_prob})[1])
    assert len(set(rewards)) == 1
    env.step({"token": 65, "log_prob": 1e-7})


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
@pytest.mark.parametrize(
    ("action", "says"),
    [
        (65, "an action must be {'token': ..., 'log_prob': ...}, got 65"),
        ({"token": 65}, "an action must be {'token': ..., 'log_prob': ...}"),
        ({"token": 65, "log_prob": 0.5}, "log_prob 0.5 in row 0 is not a log-probability.*at most 0"),
        ({"token": 65, "log_prob": math.nan}, "log_prob nan in row 0 is not a log-probability.*finite"),
        ({"token": 65, "log_prob": -math.inf}, "log_prob -inf in row 0 is not a log-probability.*finite"),
        ({"token": 65, "log_prob": "-1"}, "log_prob must be one number, got '-1'"),
        ({"token": 65, "log_prob": None}, "log_prob must be one number, got None"),
        ({"token": 65, "log_prob": [-1.0, -1.0]}, "log_prob must be one number"),
        ({"token": 65, "log_prob": True}, "log_prob must be one number, got True"),
        ({"token": 65, "log_prob": -1e30}, r"log_prob -1e\+30 in row 0 is too low for the k2 .*use estimator='k1'"),
        ({"token": 300, "log_prob": -1.0}, "action 300 in row 0 is not a token id"),
    ],
)
def test_bad_actions(settings, action, says):
    """An invalid action raises an error before stepping: the episode continues as if it had not been tried."""
    tried, untouched = (
        WholePenalty(gym.make("TextGen-v0", disable_env_checker=True, **settings), "k2") for _ in range(2)
    )
    for env in (tried, untouched):
        env.reset(seed=0)
        env.step({"token": 65, "log_prob": -1.0})
    with pytest.raises(ValueError, match=says):
        tried.step(action)
    good = {"token": tiny.END, "log_prob": -1.0}
    assert_same(tried.step(good), untouched.step(good), "step")


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_bad_vector_actions(settings):
    """The error names the invalid row, and no row is stepped."""
    tried, untouched = (VectorWholePenalty(TextGenVectorEnv(3, **settings)) for _ in range(2))
    good = {"token": np.array([65, tiny.END, 66]), "log_prob": np.full(3, -1.0)}
    for env in (tried, untouched):
        env.reset(seed=0)
        env.step(good)
    for log_prob, says in (
        ([-1.0, -1.0, 2.0], "log_prob 2 in row 2"),
        ([-1.0, -1.0], "log_prob must be 3 numbers"),
        ([-1.0, -1.0, math.nan], "log_prob nan in row 2"),
    ):
        with pytest.raises(ValueError, match=says):
            tried.step({**good, "log_prob": log_prob})
    for _ in range(2):
        assert_same(tried.step(good), untouched.step(good), "step")


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_bad_wrapping(settings):
    """Other environments and contradictory settings raise an error with the remedy."""
    env = gym.make("TextGen-v0", **settings)
    free = gym.make("TextGen-v0", **{**settings, "kl_coef": 0})
    with pytest.raises(ValueError, match="estimator must be one of k1, k2, k3, got 'exact'; the exact KL needs"):
        WholePenalty(env, "exact")
    with pytest.raises(ValueError, match=r"kl_coef is 0.*estimator='k3'.*set kl_coef above 0"):
        WholePenalty(free, "k3")
    with pytest.raises(ValueError, match=r"kl_coef is 0.*AdaptiveKL\(coef=0.1.*leave both at their defaults"):
        WholePenalty(free, controller=AdaptiveKL(0.1, 6.0, 100, "response"))
    with pytest.raises(ValueError, match=r"estimator must be one of k1, k2, k3, got \['k1'\]"):
        WholePenalty(env, ["k1"])
    with pytest.raises(ValueError, match=r"controller must be a controller of textenv.kl, got 0.1; .*pass FixedKL"):
        WholePenalty(env, controller=0.1)
    with pytest.raises(ValueError, match=r"wraps TextGen-v0.*got CartPoleEnv.*wrap each single TextGen-v0"):
        WholePenalty(gym.make("CartPole-v1"))
    with pytest.raises(ValueError, match=r"got CartPoleEnv"):
        VectorWholePenalty(gym.make_vec("CartPole-v1", 2, "sync"))
    free.reset(seed=0)
    whole = WholePenalty(free)
    _, reward, _, _, info = whole.step({"token": 65, "log_prob": -3.0})
    assert reward == 0 and info["penalty"] == 0  # kl_coef=0 works, for sweeps
    other = WholePenalty(env, controller=FixedKL(1.0))  # a different β; the environment's half is removed
    other.reset(seed=0)
    _, reward, _, _, info = other.step({"token": 65, "log_prob": -3.0})
    assert reward == pytest.approx(-1.0 * (-3.0 - info["reference_log_prob"]), abs=1e-5)
