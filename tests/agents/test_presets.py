"""Defaults belong to the task: those of the embedded task for its own model, those of the field for any other."""

from __future__ import annotations

import dataclasses

import gymnasium as gym
import pytest

from agents import run
from agents.__main__ import main
from agents.algorithms.registry import ALGORITHMS
from agents.config import TrainConfig
from agents.presets import defaults, describe_defaults
from agents.text.experiment import TextExperiment
from tests.support import tiny
from textenv import TextGenConfig, build_task
from textenv.env import TextGenEnv

HERE = __name__


def prompts():
    """Enough to hold some out."""
    return [f"{text}{number}" for text in tiny.PROMPTS for number in range(3)]


def gold(prompts, responses):
    """A reward."""
    return [float(len(response)) for response in responses]


gym.register("OwnModel-v0", gym.spec("TextGen-v0").entry_point, kwargs={"reference": "some/model"})
gym.register("Renamed-v1", gym.spec("TextGen-v0").entry_point)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
@pytest.mark.parametrize(
    ("env", "arguments"),
    [("TextGen-v0", {"reference": "some/model"}), ("OwnModel-v0", {}), ("OwnModel-v0", {"chat": True})],
)
def test_another_model_gets_the_fields_rates(env, arguments, algorithm):
    """Whatever the id, the rate at which a language model learns is 1e-6 (TRL, OpenRLHF, verl), a critic's 1e-5."""
    train, _, settings = defaults(env, algorithm, arguments)
    language_model = train.critic_learning_rate if algorithm == "dqn" else train.learning_rate
    assert language_model == 1e-6
    assert train.critic_learning_rate <= 1e-5 or algorithm in ("grpo", "rloo")
    assert train.env_arg == (("group_size=4",) if algorithm in ("grpo", "rloo") else ())
    assert settings == ALGORITHMS[algorithm][0]()


@pytest.mark.parametrize(
    ("env", "arguments"),
    [
        ("TextGen-v0", {}),
        ("TextGen-v0", {"reference": "reviews", "reward": "mine:reward"}),
        ("Renamed-v1", {"kl_coef": 0.3}),
        ("OwnModel-v0", {"reference": "reviews"}),
    ],
)
def test_the_embedded_task_keeps_its_own(env, arguments):
    """The embedded model has its tuned rates under every id and by name."""
    assert defaults(env, "grpo", arguments)[0].learning_rate == 5e-4
    assert defaults(env, "ppo", arguments)[0].learning_rate == 1e-4


@pytest.fixture
def own_constructors(folders):
    """Ids of classes that set arguments in their own constructors: the reference, and something else."""

    def ready(prompts, responses):
        return [0.0] * len(responses)

    class OwnReference(TextGenEnv):
        def __init__(self, **settings):
            parts = dict(reference=folders["gpt2"], reward=ready, prompts=tiny.PROMPTS, max_prompt_tokens=16)
            super().__init__(**parts | settings)

    class OwnLength(TextGenEnv):
        def __init__(self, max_new_tokens=7, **settings):
            super().__init__(max_new_tokens=max_new_tokens, **settings)

    kinds = {"OwnReference-v0": OwnReference, "OwnLength-v0": OwnLength}
    for name, kind in kinds.items():
        gym.register(name, kind)
    yield
    for name in kinds:
        del gym.registry[name]


def test_a_constructor_that_sets_the_reference(own_constructors, folders):
    """What a class makes decides, not what `gym.make` is given: the rates follow the reference in its constructor."""
    rates = {
        env: defaults(env, "grpo", {"device": "cpu"})[0].learning_rate for env in ("OwnReference-v0", "OwnLength-v0")
    }
    assert rates == {"OwnReference-v0": 1e-6, "OwnLength-v0": 5e-4}
    embedded = dict(reference="reviews", reward="reviews", prompts="reviews", max_prompt_tokens=24)
    assert defaults("OwnReference-v0", "grpo", embedded)[0].learning_rate == 5e-4
    mine = dict(reference=folders["gpt2"], reward="tests.support.oracle_models:length_reward", prompts=tiny.PROMPTS)
    assert defaults("OwnLength-v0", "grpo", mine)[0].learning_rate == 1e-6
    with pytest.raises(ValueError, match="TextGen-v0 has no argument 'betas'"):
        defaults("OwnLength-v0", "grpo", {"betas": 1})


def test_the_preset_is_named(capsys):
    """`--help` and the first lines of a run say which defaults apply."""
    for arguments, says in (
        ([], "Defaults: ppo on the embedded task."),
        (
            ["--env-arg", "reference=x"],
            "Defaults: ppo on a pretrained model, learning_rate 1e-06, critic_learning_rate 1e-05.",
        ),
        (["--env_arg=reference=x", "--algorithm=grpo"], "Defaults: grpo on a pretrained model, learning_rate 1e-06."),
        (
            ["--lora-rank", "4"],
            "ppo on the embedded task with adapters, learning_rate 0.001, critic_learning_rate 0.003.",
        ),
        (
            ["--env-arg", "reference=x", "--lora_rank=4", "--algorithm", "rloo"],
            "Defaults: rloo on a pretrained model with adapters, learning_rate 1e-05.",
        ),
        (["--lora-rank", "0"], "Defaults: ppo on the embedded task."),
        (["--env", "CartPole-v1"], "Defaults: ppo on CartPole-v1, learning_rate 0.001, critic_learning_rate 0.001."),
        (["--env", "MountainCarContinuous-v0"], "Defaults: ppo on any environment of vectors, learning_rate 0.0003"),
    ):
        with pytest.raises(SystemExit):
            main(["train", *arguments, "--help"])
        assert says in " ".join(capsys.readouterr().out.split()), arguments
    config = TrainConfig(env="CartPole-v1", algorithm="dqn")
    assert describe_defaults(config).startswith("Defaults: dqn on CartPole-v1, learning_rate 0.0023")


def far_run(folders, tmp_path, capsys, rate, *more, algorithm="ppo"):
    """What a run of two iterations on a small model prints."""
    task = (f"reference={folders['gpt2']}", f"reward={HERE}:gold", f"prompts={HERE}:prompts", "device=cpu")
    parts = defaults("TextGen-v0", algorithm, {"reference": folders["gpt2"]})
    changes = dict(run=str(tmp_path / "run"), iterations=2, minibatch_size=8, learning_rate=rate)
    train = dataclasses.replace(parts[0], **changes, env_arg=(*task, "max_prompt_tokens=16", "max_new_tokens=6", *more))
    text = dataclasses.replace(parts[1], rollout_size=16, evaluation_prompts=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.reporting.plots.draw_curves", lambda *_: None)
        patch.setattr("agents.reporting.plots.draw_credit", lambda *_: None)
        run.train(train, text, parts[2])
    return " ".join(capsys.readouterr().out.split())


WARNING = "The first iteration has moved the policy by"


@pytest.mark.parametrize("more", [(), pytest.param(("kl_coef=0",), marks=pytest.mark.slow)], ids=["penalty", "free"])
def test_a_large_first_step_says_so(folders, tmp_path, capsys, more):
    """A rate that moves another model by nats is named with the remedy, with and without a reference in memory."""
    printed = far_run(folders, tmp_path, capsys, 1e-2, *more)
    assert (
        WARNING in printed and "lower the learning rates (learning_rate=0.01" in printed and "1e-6 is usual" in printed
    )


@pytest.mark.slow
def test_the_fields_rate_moves_little(folders, tmp_path, capsys):
    """The preset's own rate raises no warning, and the run names its defaults."""
    printed = far_run(folders, tmp_path, capsys, 1e-6)
    assert WARNING not in printed and "Defaults: ppo on a pretrained model, learning_rate 1e-06" in printed
    assert "it will hardly learn. Try --learning-rate 1e-4" in printed and "This run has" not in printed


def test_the_rates_of_a_run_are_told(folders, tmp_path, capsys):
    """Rates beside those of the preset are named at the start, and they raise no remark."""
    printed = far_run(folders, tmp_path, capsys, 1e-4)
    assert "learning_rate 1e-06, critic_learning_rate 1e-05. This run has learning_rate 0.0001." in printed
    assert "hardly learn" not in printed


def test_only_what_was_learned_counts(folders):
    """A mask keeps the KL off 0 before anything is learned, so the first rollout's is taken off."""
    task = dict(reference=folders["gpt2"], reward=folders["gpt2_reward"], prompts=tiny.PROMPTS, device="cpu")
    task |= dict(max_prompt_tokens=16, max_new_tokens=6)
    config, text = defaults("TextGen-v0", "ppo")[:2]
    small, sizes = dataclasses.replace(config, minibatch_size=8), dataclasses.replace(text, rollout_size=8)
    for first, warned in ((2.9, False), (0.0, True)):
        experiment = TextExperiment(small, sizes, build_task(TextGenConfig(**task)))
        experiment.remarks(1, {"kl_per_response": first})
        assert bool(experiment.remarks(2, {"kl_per_response": 3.0})) is warned


def test_the_embedded_task_is_not_warned_about():
    """Its rates are tuned: REINFORCE's first iteration moves it by 1.2 nats, and it learns."""
    experiment = TextExperiment(*defaults("TextGen-v0", "reinforce")[:2])
    assert experiment.remarks(2, {"kl_per_response": 3.0, "length": 20.0}) == []
