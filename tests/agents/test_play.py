"""A finished run's policy on plain environments is the policy that was trained: it plays as `evaluate` does."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import play as playing
from agents import run
from agents.__main__ import main
from agents.config import TrainConfig
from agents.play import load_player, play
from agents.presets import defaults
from agents.run_folder import load_config
from agents.seeds import evaluation_seed
from tests.support import tiny


class Far(gym.Env):
    """Observations near 500, in a Dict, and actions that must stay within the bounds. The policy is paid for 0.3."""

    action_space = gym.spaces.Box(-0.5, 0.5, (1,), np.float32)
    observation_space = gym.spaces.Dict(
        place=gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), phase=gym.spaces.Discrete(3)
    )

    def reset(self, *, seed=None, options=None):
        """Start at a random place."""
        super().reset(seed=seed)
        self.time = 0
        return self._observe(), {}

    def step(self, action):
        """Raise outside the bounds."""
        assert self.action_space.contains(action), action
        self.time += 1
        return self._observe(), -abs(float(action[0]) - 0.3 * self.drift), False, self.time == 12, {}

    def _observe(self):
        self.drift = float(self.np_random.normal())
        return {"place": np.array([500 + 2 * self.drift, -3.0], np.float32), "phase": self.time % 3}


gym.register("Far-v0", Far, max_episode_steps=12)
HERE = __name__


def prompts():
    """Enough to hold some out."""
    return [f"{text}{number}" for text in tiny.PROMPTS for number in range(3)]


QUIET = {"iterations": 2, "checkpoint_every": 2, "minibatch_size": 16}
CONTROL_RUNS = {
    "gaussian": ("Far-v0", "ppo", {"normalize_observation": True, "initial_log_std": 0.5}, {}),
    "tanh": ("Far-v0", "ppo", {"normalize_observation": False, "distribution": "tanh"}, {}),
    "discrete": ("CartPole-v1", "a2c", {"normalize_observation": True}, {}),
    "q": ("CartPole-v1", "dqn", {}, {"learning_starts": 16, "gradient_steps": 4}),
}


@pytest.fixture(scope="module", params=sorted(CONTROL_RUNS))
def control_run(request, tmp_path_factory):
    """The folder of a finished run, and its returns in the evaluation."""
    env, name, settings, algorithm = CONTROL_RUNS[request.param]
    folder = tmp_path_factory.mktemp("control") / "run"
    parts = defaults(env, name)
    small = dict(vectorization="sync", num_envs=2, steps=16, evaluation_episodes=4)
    train = dataclasses.replace(parts[0], run=str(folder), **QUIET | {"checkpoint_every": 100})
    parts = (train, dataclasses.replace(parts[1], **small | settings), dataclasses.replace(parts[2], **algorithm))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.reporting.plots.draw_curves", lambda *_: None)  # a second
        run.train(*parts)
    experiment, policy = run.load_policy(folder)
    return folder, env, experiment.evaluate(policy)


def test_control_plays_as_it_was_evaluated(control_run, tmp_path):
    """Seed for seed the same returns and lengths: statistics, clips and bounds travel with the policy, and only they."""
    folder, env, evaluation = control_run
    shutil.copytree(folder / "actor", tmp_path / "copy" / "actor")  # no trainer, checkpoint or configuration
    episodes = play(tmp_path / "copy", gym.make(env), episodes=4, seed=evaluation_seed())
    assert [episode.length for episode in episodes] == evaluation.lengths
    assert [episode.total for episode in episodes] == pytest.approx(evaluation.returns, abs=1e-6)
    assert len(set(evaluation.returns)) > 1


def test_other_spaces_are_refused(control_run):
    """A policy meets the environment that it was trained on, or says why not."""
    folder, env, _ = control_run
    other = gym.make("Far-v0" if env == "CartPole-v1" else "CartPole-v1")
    with pytest.raises(
        ValueError, match=r"policy was trained on observations of \d numbers.*Make the environment of the"
    ):
        load_player(folder, other)


def test_the_window_is_where_there_is_one(control_run, capsys, monkeypatch):
    """Without a display the episodes are played and their returns printed, and the remedy is named."""
    folder = control_run[0]
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    main(["play", "--run", str(folder), "--episodes", "2", "--seed", str(evaluation_seed())])
    printed = capsys.readouterr().out
    assert "--video FOLDER records them" in printed and printed.count("return ") == 2
    with pytest.raises(SystemExit, match=r"draws no images|pygame is not installed|cannot be shown"):
        main(["play", "--run", str(folder), "--video", str(folder / "video")])


@pytest.fixture(scope="module")
def text_run(folders, tmp_path_factory):
    """The folder of a finished run on a small task with a mask, and the run's parts."""
    folder = tmp_path_factory.mktemp("text") / "run"
    task = (f"reference={folders['gpt2']}", f"reward={folders['gpt2_reward']}", f"prompts={HERE}:prompts")
    sizes = ("max_prompt_tokens=16", "max_new_tokens=6", "device=cpu", "temperature=0.8", "action_mask=top_k:30")
    train, text, ppo = defaults("TextGen-v0", "ppo", {"reference": folders["gpt2"]})
    train = dataclasses.replace(train, run=str(folder), learning_rate=1e-3, env_arg=(*task, *sizes), **QUIET)
    text = dataclasses.replace(text, rollout_size=16, evaluation_prompts=2, mask_refresh=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.reporting.plots.draw_curves", lambda *_: None)
        patch.setattr("agents.reporting.plots.draw_credit", lambda *_: None)
        run.train(train, text, ppo)
    return folder


def test_text_plays_the_trained_distribution(text_run):
    """At every step of plain episodes: the trainer's log-probabilities, at its temperature, within the masks."""
    _, policy = run.load_policy(text_run)
    model, temperature = policy.model, 0.8
    train, *_ = load_config(text_run)
    env = gym.make("TextGen-v0", **train.env_arguments())
    player, steps = load_player(text_run, env, seed=3), 0
    for seed in range(3):
        observation, info = env.reset(seed=seed)
        ended = False
        while not ended:
            context = torch.from_numpy(observation["input_ids"][observation["attention_mask"] == 1])
            with torch.no_grad():
                logits = model(input_ids=context[None]).logits[0, -1] / temperature
            allowed = torch.from_numpy(info["action_mask"]) == 1
            expected = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
            log_probs = player.log_probs(observation, info)
            torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)  # the same float32 forward
            token = player(observation, info)
            assert int(allowed.sum()) == 30 and allowed[token]
            observation, _, ended, _, info = env.step(token)
            steps += 1
    assert steps > 3


def test_text_prints_its_episodes(text_run, capsys):
    """Prompt, response, score and return of every episode; the same again with the same seed."""
    printed = []
    for _ in range(2):
        main(["play", "--run", str(text_run), "--episodes", "2", "--seed", "5"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count("[score ") == printed[0].count(": return ") == 2


@pytest.mark.slow
def test_text_is_recorded(text_run, tmp_path, capsys):
    """One video for each episode, in a new folder."""
    main(["play", "--run", str(text_run), "--episodes", "2", "--video", str(tmp_path / "video")])
    assert sorted(path.suffix for path in (tmp_path / "video").iterdir()) == [".mp4", ".mp4"]
    with pytest.raises(SystemExit, match=r"exists already and is not empty; choose another --video"):
        main(["play", "--run", str(text_run), "--video", str(tmp_path / "video")])


def test_the_actor_of_text_says_how_it_samples(text_run):
    """Transformers' own `generate` samples as the run did: temperature, no top-k or top-p, and the task's stops."""
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(text_run / "actor")
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.8, 0, 1.0)
    assert config.eos_token_id == [tiny.END]


class Shown(gym.Env):
    """An environment that can be shown and drawn."""

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": 10}  # noqa: RUF012
    action_space, observation_space = gym.spaces.Discrete(2), gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        """Start."""
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        """One step."""
        return np.zeros(1, np.float32), 1.0, False, False, {}

    def render(self):
        """A picture."""
        return np.zeros((32, 32, 3), np.uint8)


gym.register("Shown-v0", Shown, max_episode_steps=3)


@pytest.mark.parametrize(("display", "mode"), [(":0", "human"), ("", None)])
def test_a_window_opens_where_there_is_a_display(monkeypatch, display, mode):
    """Gymnasium's own window, and none on a machine without a display."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert playing.open_shown(TrainConfig(env="Shown-v0"), None).render_mode == mode


def test_recording_needs_moviepy(monkeypatch, tmp_path, text_run):
    """The sentence says what to install."""
    monkeypatch.setitem(sys.modules, "moviepy", None)
    with pytest.raises(SystemExit, match=r"error: the episodes cannot be shown: MoviePy is not installed.*pip install"):
        main(["play", "--run", str(text_run), "--video", str(tmp_path / "video")])


@pytest.mark.parametrize("content", [None, b"{", b"[" * 100_000, b"[1]", b"{}"])
def test_a_damaged_generation_config_is_one_sentence(text_run, tmp_path, content):
    """It says how the policy is written again, whether the file is missing or cannot be read."""
    folder = Path(shutil.copytree(text_run, tmp_path / "run"))
    file = folder / "actor/generation_config.json"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=r"generation_config.json' cannot be read .*--resume writes the policy again"):
        load_player(folder, gym.make("CartPole-v1"))


@pytest.mark.parametrize("temperature", ["x", [], {}, None, True, 0, -1, float("inf"), float("nan")])
def test_a_temperature_is_a_number_above_zero(text_run, tmp_path, temperature):
    """The policy's own is never replaced by another one without a word."""
    folder = Path(shutil.copytree(text_run, tmp_path / "run"))
    file = folder / "actor/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"temperature": temperature}))
    with pytest.raises(ValueError, match="must have a temperature above 0"):
        load_player(folder, gym.make("CartPole-v1"))


def test_an_unfinished_run_has_no_policy(tmp_path):
    """The remedy is to finish it."""
    with pytest.raises(ValueError, match=r"no policy in .*a run writes it when it ends.*--resume"):
        load_player(tmp_path, gym.make("CartPole-v1"))


def test_endless_episodes_are_refused(monkeypatch):
    """An episode without an end stops after as many steps as in an evaluation."""
    monkeypatch.setattr(playing, "LONGEST", 20)
    env = gym.make("Pendulum-v1", max_episode_steps=30)
    with pytest.raises(ValueError, match=r"not ended after 20 steps; make the environment with max_episode_steps"):
        playing.play_episode(env, lambda observation, info: env.action_space.sample(), seed=0)


ROOT = Path(__file__).parents[2]


def raised_in(package: str, source: str):
    """A function `fail` of this source, as if it stood in a file of a package."""
    names: dict = {}
    exec(compile(source, str(ROOT / package / "made_up.py"), "exec"), names)
    return names["fail"]


@pytest.mark.parametrize("package", ["agents", "textenv"])
def test_only_our_own_sentences_are_sentences(monkeypatch, package):
    """A `raise` in our files ends in one line; an error of Python's own in the same place keeps its traceback."""
    ours = ["raise ValueError('ours')", "raise TypeError('ours')", "raise ValueError('ours') from KeyError(1)"]
    pythons = ["int('x')", "list(zip([1], [], strict=True))", "[].index(3)", "None + 1", "a, b = [1]"]
    within = "try:\n        {}\n    finally:\n        pass"
    for line in [*ours, *(within.format(line) for line in ours)]:
        monkeypatch.setattr("agents.commands.policies.show", raised_in(package, f"def fail(*_):\n    {line}"))
        with pytest.raises(SystemExit, match="error: ours"):
            main(["play", "--run", "x"])
    for line in [*pythons, *(within.format(line) for line in pythons)]:
        monkeypatch.setattr("agents.commands.policies.show", raised_in(package, f"def fail(*_):\n    {line}"))
        with pytest.raises((ValueError, TypeError)):
            main(["play", "--run", "x"])


def test_a_bug_in_make_keeps_its_traceback(monkeypatch):
    """Gymnasium raises a TypeError of the constructor again: ours is a sentence, Python's own is not."""
    monkeypatch.setattr("textenv.env.build_task", raised_in("textenv", "def fail(*_):\n    None + 1"))
    with pytest.raises(TypeError, match="unsupported operand"):
        main(["train"])
    with pytest.raises(SystemExit, match="no argument 'kl_coeff'; did you mean"):
        main(["train", "--env-arg", "kl_coeff=1"])


@pytest.mark.parametrize("arguments", [[], ["--env"], ["train", "--env"], ["train", "--env-arg"]])
def test_incomplete_commands_are_usage_errors(arguments, capsys):
    """No subcommand, or a flag without its value: exit code 2, as for every mistake in the words themselves."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "zip" not in capsys.readouterr().err
