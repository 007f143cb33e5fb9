"""The client examples run end to end at a small size; benchmarks.clients measures how well they learn at full size."""

import importlib
import math
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper, check_env_specs

from textenv import TextGenConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
PPO = dict(steps=32, rows=4, rollout=8, episodes=4)
CLIENTS = [  # example, the library it needs, small settings
    ("sb3_ppo", "stable_baselines3", PPO),
    ("sb3_maskable_ppo", "sb3_contrib", PPO),
    ("sb3_dqn", "stable_baselines3", dict(steps=1100, rows=4, episodes=8)),
    ("vector_env_ppo", "torch", PPO),
    ("torchrl_ppo", "torchrl", PPO),
    ("torchrl_gym_wrapper", "torchrl", PPO),
    ("tianshou_ppo", "tianshou", PPO),
    ("rllib_ppo", "ray.rllib", PPO),
]
TOLERANCE = 1e-4  # cached and full forwards sum the same float32 numbers in different orders


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    """Make the examples importable, as in `python examples/x.py`. Tianshou's JIT would take longer than all the tests."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")


@pytest.fixture(autouse=True)
def device_is_explicit(monkeypatch):
    """Every example names its device: its policy is on the CPU, so `device="auto"` would fail on a machine with CUDA."""
    original = TextGenConfig.torch_device

    def torch_device(config):
        assert config.device != "auto", "the example does not name its device"
        return original(config)

    monkeypatch.setattr(TextGenConfig, "torch_device", torch_device)


@pytest.fixture
def steps_taken():
    """For every optimizer step of any client: whether it changed a weight and left all of them finite."""
    taken, before = [], []

    def weights(optimizer):
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def after_step(optimizer, *_):
        moved = any(not torch.equal(old, new) for old, new in zip(before.pop(), weights(optimizer), strict=True))
        taken.append(moved and all(bool(weight.isfinite().all()) for weight in weights(optimizer)))

    hooks = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: before.append([w.clone() for w in weights(optimizer)])),
        register_optimizer_step_post_hook(after_step),
    ]
    yield taken
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("name", "library", "settings"), CLIENTS, ids=[client[0] for client in CLIENTS])
def test_client(name, library, settings, steps_taken, capsys):
    """Each example takes optimizer steps that change its weights, and reports finite scores and its responses."""
    pytest.importorskip(library)
    torch.set_num_threads(1)
    comparison = importlib.import_module(name).main(**settings)
    assert steps_taken and all(steps_taken)
    for scores in (comparison.before, comparison.after, comparison.reference):
        assert np.isfinite(scores.values).all() and len(scores.values) == settings["episodes"]
    assert math.isfinite(comparison.gain)
    printed = capsys.readouterr().out
    assert (
        f"gain: {comparison.gain:.2f} standard deviations" in printed
        and comparison.after.responses[0].strip() in printed
    )


def test_reward_hacking(tmp_path, monkeypatch, capsys):
    """The example of reward hacking trains without a penalty, still measures the KL, and draws its picture."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    measured = importlib.import_module("reward_hacking").main(iterations=4, rollout=32, prompts=8)
    assert [row["iteration"] for row in measured] == [0, 4]
    assert measured[0]["kl_per_response"] == pytest.approx(0, abs=TOLERANCE) and measured[1]["kl_per_response"] > 0.1
    printed = capsys.readouterr().out
    assert printed.count("iteration ") == 2 and printed.count("gold ") == 8
    assert (tmp_path / "reward_hacking.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path):
    """A client example has at most 60 lines; warm_start.py is shared code, one_file_ppo.py a whole trainer."""
    assert path.stem in ("warm_start", "one_file_ppo") or len(path.read_text(encoding="utf-8").splitlines()) <= 60


def test_policies_start_as_the_reference():
    """The examples' initial policy gives every token the same log-probability as the environment's reference."""
    warm_start = importlib.import_module("warm_start")
    agent = warm_start.ActorCritic()
    env = gym.make_vec("TextGen-v0", num_envs=3, autoreset_mode="SameStep", **warm_start.SETTINGS)
    observation, _ = env.reset(seed=0)
    for actions in np.random.default_rng(0).integers(2, 1024, size=(6, 3)):
        with torch.no_grad():
            log_prob = agent(observation)[0].log_prob(torch.from_numpy(actions))
        observation, *_, infos = env.step(actions)
        np.testing.assert_allclose(log_prob.numpy(), infos["reference_log_prob"], rtol=TOLERANCE, atol=TOLERANCE)


def test_vector_env_advantages():
    """Across episode ends and reset steps, advantages equal GAE written out for each episode alone."""
    warm_start, example = (importlib.import_module(name) for name in ("warm_start", "vector_env_ppo"))
    env = gym.make_vec("TextGen-v0", num_envs=1, **{**warm_start.SETTINGS, "max_new_tokens": 3})
    torch.manual_seed(0)
    agent, observation = warm_start.ActorCritic(), env.reset(seed=0)[0]
    _, _, data = example.collect(env, agent, observation, torch.ones(1, dtype=torch.bool), 11)
    lengths = data["attention_mask"][:, 24:].sum(1).tolist()
    assert lengths == [0, 1, 2] * 3  # 3 episodes of 3 steps, and 2 reset steps
    reward, value = data["reward"].tolist(), data["value"].tolist()
    for first in (0, 3, 6):
        errors = [
            reward[step] + (value[step + 1] if step < first + 2 else 0.0) - value[step]
            for step in range(first, first + 3)
        ]
        expected = [sum(0.95 ** (k - t) * errors[k] for k in range(t, 3)) for t in range(3)]
        assert data["advantage"][first : first + 3].tolist() == pytest.approx(expected, abs=1e-5)
    # The policy still equals the reference, so the two halves of the penalty cancel and only scores remain.
    assert [reward[step] for step in (0, 1, 3, 4, 6, 7)] == pytest.approx([0.0] * 6, abs=1e-5)
    assert all(abs(reward[step]) > 0.1 for step in (2, 5, 8))


@pytest.mark.parametrize("changes", [{"kl_coef": 0}, {"kl_coef": 0.3}], ids=["bare", "penalty"])
def test_gym_wrapper_and_collector(settings, changes):
    """Through GymWrapper and a Collector, the specs hold and every transition equals stepping by hand."""
    settings = {**settings, **changes, "stop_token_ids": list(range(75)), "max_new_tokens": 5}
    native = gym.make_vec("TextGen-v0", num_envs=3, autoreset_mode="Disabled", **settings)
    env = GymWrapper(native, categorical_action_encoding=True, device="cpu")
    check_env_specs(env)
    env.set_seed(5)
    options = dict(frames_per_batch=60, total_frames=60, auto_register_policy_transforms=False)
    (data,) = list(Collector(env, None, **options))  # [3, 20], random actions
    by_hand = gym.make_vec("TextGen-v0", num_envs=3, autoreset_mode="Disabled", **settings)
    by_hand.reset(seed=5)
    observation, ends = by_hand.reset()[0], 0
    for step in range(20):
        step_data = data[:, step]
        for name, array in observation.items():
            np.testing.assert_array_equal(step_data[name].numpy(), array)
        observation, reward, terminated, truncated, _ = by_hand.step(step_data["action"].numpy())
        np.testing.assert_array_equal(step_data["next", "input_ids"].numpy(), observation["input_ids"])
        np.testing.assert_allclose(step_data["next", "reward"][:, 0].numpy(), reward, atol=TOLERANCE)
        assert step_data["next", "terminated"][:, 0].tolist() == terminated.tolist() and not truncated.any()
        if terminated.any():
            ends += int(terminated.sum())
            observation, _ = by_hand.reset(options={"reset_mask": terminated.copy()})
    assert ends > 8


def test_no_example_needs_another_client():
    """The code that the examples share imports none of the optional libraries."""
    source = (EXAMPLES / "warm_start.py").read_text(encoding="utf-8")
    assert not any(name in source for name in ("stable_baselines3", "sb3_contrib", "tianshou", "torchrl", "import ray"))
