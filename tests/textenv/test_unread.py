"""No setting of `gym.make` does nothing in silence: the parts of a task are set together, unread settings are refused.

The walk gives every setting another value in several tasks. What it changes may be anything that an episode, the fast
path or an error shows; what changes nothing must be refused, and every setting must change something in some task.
"""

from __future__ import annotations

import dataclasses
import time

import gymnasium as gym
import numpy as np
import pytest
import torch

import textenv
from tests.support import tiny
from textenv import TextGenConfig, build_task, shared
from textenv.env import TextGenEnv
from textenv.generation import generate, score_responses
from textenv.models.sampling import Sampling
from textenv.rewards.reward_model import RewardModel

HERE = __name__


def lengths(prompts, responses):
    """A reward that takes a moment."""
    time.sleep(0.01)
    return [len(response) / 10 for response in responses]


@textenv.per_token
def vowels(prompts, tokens):
    """A reward at every token, which takes a moment too."""
    time.sleep(0.01)
    return [[0.5 * (token in "aeiou") for token in row] for row in tokens]


@pytest.fixture(scope="module")
def tasks(folders, tmp_path_factory):
    """Complete arguments of tasks that read different settings."""
    root, tokenizer = tmp_path_factory.mktemp("unread"), tiny.tokenizer()
    labels = tiny.save(tiny.reward_model("gpt2", labels=3), root / "labels")
    members = root / "members"
    for index in range(2):
        tiny.save(tiny.reward_model("gpt2", seed=index), members / f"member-{index}")
    small = dict(prompts=tiny.PROMPTS, max_prompt_tokens=16, max_new_tokens=5, kl_coef=0.3, device="cpu")
    chat = tiny.tokenizer()
    chat.chat_template = "{{ messages[0].content }}!{% if enable_thinking is defined %}?{% endif %}"
    live = shared(textenv.LanguageModel(tiny.language_model("gpt2"), tokenizer, (tiny.END,)))
    return {
        "models": small | dict(reference=folders["gpt2"], reward=folders["gpt2_reward"]),
        "labels": small | dict(reference=folders["gpt2"], reward=labels, reward_label="LABEL_1"),
        "ensemble": small | dict(reference=folders["gpt2"], reward=str(members)),
        "function": small | dict(reference=folders["gpt2"], reward=f"{HERE}:lengths", kl_coef=0),
        "tokens": small | dict(reference=folders["gpt2"], reward=f"{HERE}:vowels"),
        "sum": small | dict(reference=folders["gpt2"], reward={f"{HERE}:vowels": 1, f"{HERE}:lengths": 1}),
        "fixed": small | dict(reference=live, reward=f"{HERE}:lengths", score_normalization="fixed", score_mean=2.0),
        "chat": small
        | dict(
            reference=shared(textenv.LanguageModel(tiny.language_model("gpt2"), chat, (tiny.END,))),
            reward=f"{HERE}:lengths",
            chat=True,
        ),
        "live": small | dict(reference=live, reward=shared(RewardModel(tiny.reward_model("gpt2")))),
    }


# Another value for every setting; a callable makes it from the task's arguments and the saved models.
OTHER = {
    "reference": lambda folders: folders["llama"],
    "reward": lambda folders: folders["llama_reward"],
    "reward_label": lambda folders: "LABEL_2",
    "reward_ensemble": lambda folders: "min",
    "reward_timeout": lambda folders: 0.001,
    "score_normalization": lambda folders: "running",
    "score_mean": lambda folders: 3.0,
    "score_std": lambda folders: 3.0,
    "score_clip": lambda folders: 0.01,
    "prompts": lambda folders: ["z", "y", "x"],
    "prompt_sampling": lambda folders: "shuffle",
    "group_size": lambda folders: 3,
    "chat": lambda folders: True,  # where the tokenizer has no template the error shows that it is read
    "chat_template_kwargs": lambda folders: {"enable_thinking": False},
    "kl_coef": lambda folders: 0.7,
    "max_prompt_tokens": lambda folders: 18,
    "max_new_tokens": lambda folders: 4,
    "temperature": lambda folders: 1.3,
    "action_mask": lambda folders: "special",
    "stop_token_ids": lambda folders: [65, 66, 67, 97],
    "dtype": lambda folders: "bfloat16",
    "device": lambda folders: "cuda:77",  # no machine has it; the error shows that the setting is read
}


def shown(arguments):
    """All that a user can see of a task: spaces, two episodes of fixed tokens, and the fast path. Errors show too."""
    try:
        env = TextGenEnv(**arguments)
        seen = [env.observation_space, env.action_space]
        for seed in range(6):
            seen.append(env.reset(seed=0 if seed == 0 else None))
            for token in (65, 101, 66, 97, 99)[: env.task.config.max_new_tokens]:
                seen.append(env.step(token))
                if seen[-1][2]:
                    break
        task = env.task
        sampling, generator = Sampling(temperature=task.config.temperature), torch.Generator().manual_seed(0)
        made = generate(task, task.load_reference().model, task.prompts, sampling, generator)
        scored = score_responses(task, made.state, task.prompts.texts)
        return [*seen, made.state.input_ids.tolist(), made.log_prob.tolist(), scored.score.tolist()]
    except ValueError as error:
        return str(error)


def same(first, second):
    """Equal, arrays and spaces included."""
    return repr(first) == repr(second)


@pytest.fixture(autouse=True)
def whole_arrays():
    """Every number of an array is compared."""
    with np.printoptions(threshold=10**6, precision=10):
        yield


def test_another_value_is_ready_for_every_setting():
    """A new setting must be added to the walk."""
    assert sorted(OTHER) == sorted(field.name for field in dataclasses.fields(TextGenConfig))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OTHER))
def test_every_setting_changes_something_or_is_refused(tasks, folders, name):
    """In every task, another value either shows or is refused; and there is a task where it shows."""
    effects = {}
    for kind, arguments in tasks.items():
        value = OTHER[name](folders)
        if name in arguments and same(value, arguments[name]):
            value = getattr(TextGenConfig(), name)
        result = shown(arguments | {name: value})
        refused = isinstance(result, str) and f"{name}=" in result and "would do nothing" in result
        assert refused or not same(result, shown(arguments)), f"{name} does nothing in {kind}"
        effects[kind] = not refused
    assert any(effects.values())


REFUSED = [
    ("models", dict(score_mean=1.0), "score_mean=1.0 would do nothing"),
    ("models", dict(score_mean=1.0, score_std=2.0), "score_mean=1.0 and score_std=2.0 would do nothing"),
    ("models", dict(reward_label="LABEL_0"), "reward_label='LABEL_0' would do nothing.*several labels"),
    ("function", dict(reward_label="x"), "reward_label='x' would do nothing"),
    ("live", dict(reward_label="x"), "reward_label='x' would do nothing"),
    ("models", dict(reward_ensemble=1.0), "reward_ensemble=1.0 would do nothing.*not an ensemble that is loaded here"),
    ("ensemble", dict(reward_label="LABEL_0"), "reward_label='LABEL_0' would do nothing"),
    ("models", dict(reward_timeout=1.0), "reward_timeout=1.0 would do nothing.*functions"),
    ("tokens", dict(score_clip=1.0), "score_clip=1.0 would do nothing.*at its tokens alone"),
    ("tokens", dict(score_normalization="running"), "score_normalization='running' would do nothing"),
    ("models", dict(chat_template_kwargs={"a": 1}), "chat_template_kwargs={'a': 1} would do nothing.*with chat=True"),
    ("fixed", dict(dtype="bfloat16"), "dtype='bfloat16' would do nothing.*live model"),
    ("live", dict(dtype="float16"), "dtype='float16' would do nothing"),
]


@pytest.mark.parametrize(("kind", "changes", "says"), REFUSED)
def test_unread_settings_are_refused(tasks, kind, changes, says):
    """The sentence names the setting, the reason and the remedy; single and vector environments agree."""
    for make in (gym.make, gym.make_vec):
        with pytest.raises(ValueError, match=says):
            make("TextGen-v0", **(tasks[kind] | changes))


def test_live_models_keep_their_label_and_sums_read_both(tasks):
    """What is read is accepted: a label of a loaded classifier, a timeout and normalization in a sum."""
    for kind, changes in (("labels", dict(reward_label="LABEL_2")), ("sum", dict(reward_timeout=9.0, score_clip=1.0))):
        config = build_task(TextGenConfig(**(tasks[kind] | changes))).config
        assert {name: getattr(config, name) for name in changes} == changes


@pytest.mark.parametrize("name", ["reference", "reward", "prompts"])
def test_parts_are_set_together(tasks, name):
    """One part left out, or one part alone, is refused with the words that name the embedded task's."""
    arguments = tasks["function"]
    others = [part for part in ("reference", "reward", "prompts") if part != name]
    with pytest.raises(ValueError, match=rf"got {' and '.join(others)} alone; give {name} too.*{name}='reviews'"):
        build_task(TextGenConfig(**(arguments | {name: None})))
    with pytest.raises(ValueError, match=rf"got {name} alone.*{others[0]}='reviews', {others[1]}='reviews'"):
        build_task(TextGenConfig(**(arguments | dict.fromkeys(others))))


def test_parts_of_the_embedded_task_by_name():
    """The embedded task named part by part is the embedded task; each name also stands beside one's own parts."""
    named = dict.fromkeys(("reference", "reward", "prompts"), "reviews")
    unnamed, task = (build_task(TextGenConfig(device="cpu", **parts)) for parts in ({}, named))
    assert task.config == unnamed.config and task.prompts.texts == unnamed.prompts.texts
    assert task.reference.model is unnamed.reference.model and task.reward.model is unnamed.reward.model
    summed = build_task(TextGenConfig(device="cpu", **(named | dict(reward={"reviews": 2.0, f"{HERE}:lengths": 1.0}))))
    assert summed.score_part_names == ("reviews", f"{HERE}:lengths")
    assert build_task(TextGenConfig(device="cpu", **(named | dict(prompts=["Review"])))).prompts.texts == ("Review",)
