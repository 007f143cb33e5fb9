"""No flag of `train` does nothing in silence.

The walk gives every flag another value, for every algorithm on text and on control. Either the trained weights or the
evaluation differ afterwards, or the flag is refused. A flag that the code stops reading, or a new one that it never
reads, fails here.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from agents import run
from agents.algorithms.registry import ALGORITHMS
from agents.config import TrainConfig
from agents.control.config import ControlConfig
from agents.presets import CONTROL, PRESETS, defaults
from agents.text.config import GenerateConfig, TextConfig
from tests.support import tiny

HERE = __name__


def prompts():
    """Enough to hold some out."""
    return [f"{text}{number}" for text in tiny.PROMPTS for number in range(5)]


def held_out():
    """Other prompts for the evaluation."""
    return ["zebra", "yes"]


def gold(prompts, responses):
    """A gold rater."""
    return [float(len(response)) for response in responses]


# Flags that choose the context or the folder: `env_arg` has a walk of its own in tests/textenv/test_unread.py, and
# test_command_line.py tests what the others write. Gradient checkpointing changes memory alone, and no weight to the
# bit: tests/agents/text/test_memory.py.
NOT_WALKED = {"env", "env_arg", "algorithm", "run", "resume", "checkpoint_every", "keep_checkpoints"} | {
    *("tracker", "dump_rollouts", "dump_format"),  # tests/agents/reporting, tests/test_trackers.py
    "gradient_checkpointing",
    "decode_slots",
    "compile",
    "shard",  # refused without torchrun: tests/agents/text/test_sharding.py
    "rank_timeout",  # read under torchrun alone, and stored, so that any number of processes may go on
}

# Other values: changes that include the flag, of which the first that differs from the context is taken.
OTHER = {
    **{"seed": 7, "iterations": 2, "minibatch_size": 2, "learning_rate": 3e-3, "critic_learning_rate": 3e-3},
    **{"precision": "bf16", "old_log_probs": "recomputed"},
    **{"schedule": "constant", "max_grad_norm": 1e-3, "rollout_size": 16, "micro_batch_tokens": 40, "mask_refresh": 2},
    **{"critic": "scratch", "kl_estimator": "k2", "kl_target": 100.0, "kl_horizon": 8, "kl_unit": "token"},
    **{"lora_rank": 4, "evaluation_prompts": 1, "held_out": f"{HERE}:held_out", "gold": f"{HERE}:gold"},
    **{"num_envs": 3, "steps": 6, "vectorization": "async", "hidden": (8,)},
    **{"distribution": "tanh", "initial_log_std": 0.5, "reward_gamma": 0.5, "evaluation_episodes": 3},
    **{"epochs": 3, "clip": 0.01, "dual_clip": 1.01 + 0.2, "value_clip": 1e-3, "target_kl": 1e-6, "entropy_coef": 0.1},
    **{"gamma": 0.5, "lmbda": 0.3, "aggregation": "token", "alpha": 0.9, "target_entropy": 0.2},
    **{"buffer_size": 9, "learning_starts": 17, "gradient_steps": 3, "target_update_interval": 3, "tau": 0.9},
    **{"epsilon_start": 0.3, "epsilon_end": 0.9, "epsilon_updates": 2},
}
TOGETHER = {
    "kl_controller": [{"kl_controller": "adaptive", "kl_target": 0.01}, {"kl_controller": "fixed", "kl_target": None}],
    "kl_loss": [{"kl_loss": "k2"}, {"kl_loss": "k3"}],
    "activation": [{"activation": "relu"}, {"activation": "tanh"}],
    "loss_function": [{"loss_function": "smooth_l1"}, {"loss_function": "l2"}],
}

SMALL = {
    **{"iterations": 3, "minibatch_size": 4, "rollout_size": 8, "micro_batch_tokens": 160, "learning_rate": 1e-2},
    **{"critic_learning_rate": 1e-2, "num_envs": 2, "steps": 4, "evaluation_episodes": 2, "hidden": (16,)},
    **{"buffer_size": 40, "learning_starts": 8, "gradient_steps": 2, "epochs": 2, "checkpoint_every": 100},
    **{"target_update_interval": 1, "tau": 0.05},
    "evaluation_prompts": 2,
}
REPLAY = ("dqn", "sac")
GROUPS = ("grpo", "rloo")
ADAPTIVE = {"kl_controller": "adaptive", "kl_target": 3.0, "kl_horizon": 16, "mask_refresh": 1}
STOPS = list(range(60))  # random models rarely say one token; responses must differ in length
CONTROL_SETTINGS = {
    "ppo": {"learning_rate": 0.3},  # so that ratios reach a dual clip
    "dqn": {"epsilon_updates": 4},  # so that a few updates change the actions
}
MASKED = "action_mask=top_k:20"

# Context: algorithm, environment, its arguments, and settings.
CONTEXTS = {
    **{f"{name}-text": (name, "TextGen-v0", (), {}) for name in ALGORITHMS},
    **{f"{name}-free": (name, "TextGen-v0", ("kl_coef=0",), {}) for name in ("ppo", "grpo")},
    "ppo-adaptive": ("ppo", "TextGen-v0", (MASKED,), ADAPTIVE),
    "ppo-kl_loss": ("ppo", "TextGen-v0", (MASKED,), {"kl_loss": "k2", "mask_refresh": 1}),
    **{
        f"{name}-discrete": (name, "CartPole-v1", (), CONTROL_SETTINGS.get(name, {}))
        for name in ALGORITHMS
        if name not in GROUPS
    },
    **{
        f"{name}-continuous": (
            name,
            "Pendulum-v1",
            ("max_episode_steps=10",),
            CONTROL_SETTINGS.get(name, {}) | {"normalize_reward": True},
        )
        for name in ALGORITHMS
        if name not in (*GROUPS, *REPLAY)
    },
}


def parts_of(context, folders):
    """The three parts of a context's configuration."""
    name, env, arguments, settings = CONTEXTS[context]
    if env == "TextGen-v0":
        task = (f"reference={folders['gpt2']}", f"reward={folders['gpt2_reward']}", f"prompts={HERE}:prompts")
        sizes = ("max_prompt_tokens=16", "max_new_tokens=5", "device=cpu", "kl_coef=0.3", f"stop_token_ids={STOPS}")
        group = ("group_size=4",) if name in GROUPS else ()
        arguments = (*task, *sizes, *group, *arguments)
    unread = "critic_learning_rate" if name in GROUPS else "learning_rate" if name == "dqn" else None
    small = {setting: value for setting, value in SMALL.items() if setting != unread}
    return change(defaults(env, name, {"reference": "tiny"}), small | {"env_arg": arguments} | settings)


def change(parts, changes):
    """The parts with other values, for the settings that they have."""
    known = [{field.name for field in dataclasses.fields(part)} for part in parts]
    return [
        dataclasses.replace(part, **{name: value for name, value in changes.items() if name in names})
        for part, names in zip(parts, known, strict=True)
    ]


def values_of(parts):
    """All settings by name."""
    return {name: value for part in parts for name, value in vars(part).items()}


def result(parts):
    """What training leaves: the class of the environments, the weights and the evaluation."""
    experiment, trainer = run.build(*parts)
    list(trainer.iterate())
    weights = [
        tensor.clone() for network in trainer.algorithm.networks.trained.values() for tensor in network.parameters()
    ]
    evaluation = experiment.summarize(experiment.evaluate(trainer.algorithm.networks.policy))
    environments = getattr(experiment, "environments", None)
    if environments is not None:
        environments.env.close()
    return type(getattr(environments, "env", None) and environments.env.unwrapped), weights, evaluation


def differ(first, second):
    """Whether anything that training leaves differs."""
    same_weights = len(first[1]) == len(second[1]) and all(map(torch.equal, first[1], second[1]))
    return not (first[0] is second[0] and same_weights and first[2] == second[2])


def another(name, values):
    """Changes that give a flag another value."""
    if isinstance(values[name], bool):
        return {name: not values[name]}
    candidates = TOGETHER.get(name, [{name: OTHER[name]}] if name in OTHER else [])
    return next(changes for changes in candidates if changes[name] != values[name])


def shows_elsewhere(parts, changes):
    """Whether the changes show with another seed: a clip or a maximum need not bind in a run of two iterations."""
    seeded = (change(parts, {"seed": seed}) for seed in range(1, 9))
    return any(differ(result(one), result(change(one, changes))) for one in seeded)


SHOWN: dict[str, set[str]] = {}  # context -> flags that have changed something there, filled by the walk


def test_another_value_is_ready_for_every_flag():
    """A new flag must be added to the walk."""
    classes = [TrainConfig, TextConfig, ControlConfig, *(settings for settings, _ in ALGORITHMS.values())]
    fields = {field.name: field for settings in classes for field in dataclasses.fields(settings)}
    switches = {name for name, field in fields.items() if isinstance(field.default, bool)} - NOT_WALKED
    assert switches | set(OTHER) | set(TOGETHER) == set(fields) - NOT_WALKED


@pytest.mark.slow
@pytest.mark.parametrize("context", sorted(CONTEXTS))
def test_every_flag_changes_something_or_is_refused(context, folders):
    """See the module's docstring."""
    parts = parts_of(context, folders)
    values, base, dead = values_of(parts), result(parts), []
    SHOWN[context] = set()
    for name in sorted(values.keys() - NOT_WALKED):
        try:
            after = result(change(parts, another(name, values)))
        except ValueError as error:
            assert f"{name}=" in str(error) and "would do nothing" in str(error), (name, str(error))
            continue
        SHOWN[context].add(name)
        if not differ(base, after) and not shows_elsewhere(parts, another(name, values)):
            dead.append(name)
    assert not dead


@pytest.mark.slow
def test_every_flag_changes_something_somewhere():
    """After the walk: no flag is refused everywhere."""
    if len(SHOWN) < len(CONTEXTS):
        pytest.skip("the walk has not run in this process")
    switches = {"normalize_observation", "normalize_reward", "whiten", "normalize", "double"}
    assert set().union(*SHOWN.values()) == set(OTHER) | set(TOGETHER) | switches


REFUSED = [
    ("grpo-text", dict(kl_estimator="exact"), "kl_estimator='exact' would do nothing: the KL is in the loss"),
    ("grpo-text", dict(critic="scratch"), "critic='scratch' would do nothing: the algorithm has no critic"),
    ("rloo-text", dict(critic_learning_rate=1.0), "critic_learning_rate=1.0 would do nothing"),
    ("dqn-text", dict(learning_rate=1.0), "learning_rate=1.0 would do nothing.*critic_learning_rate"),
    ("dqn-text", dict(kl_estimator="k2"), "kl_estimator='k2' would do nothing: .*replay buffer"),
    ("dqn-text", dict(lora_rank=4), "lora_rank=4 would do nothing: .*Q-networks train all their weights"),
    ("sac-text", dict(lora_rank=4), "lora_rank=4 would do nothing: .*its own rollouts"),
    ("sac-text", dict(kl_controller="adaptive", kl_target=1.0), "kl_controller='adaptive' would do nothing"),
    ("dqn-text", dict(epsilon_end=0.5), "epsilon_end=0.5 would do nothing.*alpha"),
    ("sac-text", dict(target_entropy=0.9), "target_entropy=0.9 would do nothing: alpha is fixed"),
    ("ppo-text", dict(mask_refresh=3), "mask_refresh=3 would do nothing.*action-mask top_k"),
    ("ppo-text", dict(kl_target=6.0), "kl_target=6.0 would do nothing.*kl_controller=adaptive"),
    ("ppo-text", dict(kl_horizon=6, kl_unit="token"), "kl_horizon=6 and kl_unit='token' would do nothing"),
    ("ppo-free", dict(kl_estimator="k3"), "kl_estimator='k3' would do nothing: the environment's kl_coef is 0"),
    ("ppo-free", dict(kl_controller="adaptive", kl_target=1.0), "kl_controller='adaptive' would do nothing"),
    ("ppo-free", dict(kl_loss="k3"), "kl_loss='k3' would do nothing: there is no penalty"),
    ("ppo-discrete", dict(kl_loss="k3"), "kl_loss='k3' would do nothing: there is no penalty"),
    ("ppo-discrete", dict(distribution="tanh"), "distribution='tanh' would do nothing.*discrete"),
    ("ppo-discrete", dict(initial_log_std=0.1), "initial_log_std=0.1 would do nothing"),
    ("ppo-discrete", dict(reward_gamma=0.9), "reward_gamma=0.9 would do nothing.*set normalize_reward"),
    ("dqn-discrete", dict(lmbda=0.5), "lmbda=0.5 would do nothing.*single steps"),
    ("dqn-discrete", dict(epsilon_start=0.5, alpha=1.0), "epsilon_start=0.5 and epsilon_updates=4 would do nothing"),
    ("sac-discrete", dict(target_entropy=0.2, alpha=1.0), "target_entropy=0.2 would do nothing"),
]


@pytest.mark.parametrize(("context", "changes", "says"), REFUSED)
def test_unread_flags_are_refused(context, changes, says, folders):
    """The sentence names the flag, why it is not read, and what to do."""
    with pytest.raises(ValueError, match=says):
        run.build(*change(parts_of(context, folders), changes))


@pytest.mark.parametrize("env", ["TextGen-v0", "CartPole-v1"])
def test_training_renders_nothing(env):
    """`render_mode` would have no effect; `play` shows a policy."""
    train, settings, algorithm = defaults(env, "ppo")
    train = dataclasses.replace(train, env_arg=("render_mode=rgb_array",))
    with pytest.raises(ValueError, match=r"render_mode='rgb_array' would do nothing.*agents play"):
        run.build(train, settings, algorithm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "algorithm"),
    [
        *(("TextGen-v0", name) for name in ALGORITHMS),
        *((env, name) for env, presets in PRESETS.items() for name in presets if env != "LunarLander-v3"),
        *(("MountainCarContinuous-v0", name) for name in CONTROL if name not in REPLAY),
    ],
)
def test_presets_are_accepted(env, algorithm):
    """No preset trips over its own settings."""
    parts = defaults(env, algorithm)
    _, trainer = run.build(*parts)
    assert trainer.config == parts[0]


def test_a_preset_is_no_choice_of_the_user():
    """The preset's epsilon is not read once alpha is set; only a user's own value is refused."""
    train, settings, algorithm = defaults("CartPole-v1", "dqn")
    assert algorithm.epsilon_end == 0.04
    run.build(train, settings, dataclasses.replace(algorithm, alpha=0.1))
    with pytest.raises(ValueError, match=r"epsilon_end=0.5 would do nothing"):
        run.build(train, settings, dataclasses.replace(algorithm, alpha=0.1, epsilon_end=0.5))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(color="penalty", top_k=5), "top_k=5 would do nothing: --color uses .*leave out --temperature"),
        (dict(top_k=1, temperature=2.0), "temperature=2.0 would do nothing: top_k=1"),
        (dict(top_k=1, top_p=0.5, seed=3), "top_p=0.5 and seed=3 would do nothing"),
    ],
)
def test_unread_flags_of_generate_are_refused(changes, says):
    """Coloring samples as training did; the likeliest token needs no sampling."""
    with pytest.raises(ValueError, match=says):
        GenerateConfig(prompt="a", **changes)
