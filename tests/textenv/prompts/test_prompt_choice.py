"""The prompt of an episode: order, seed, groups and reset options, the same in every face."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from tests.support import tiny
from tests.support.faces import assert_same, random_tokens
from textenv import TextGenConfig, build_task
from textenv.dynamics import EpisodePrompt
from textenv.prompts.samplers import SAMPLERS, PrioritizedSampler
from textenv.torchrl_env import TextGenTorchEnv
from textenv.vector_env import TextGenVectorEnv

PROMPTS = [{"prompt": f"p{index}", "easy": index < 9, "weight": 0.5 * (index % 4)} for index in range(12)]


def easy_reward(prompts, responses):
    """1 for the easy prompts and 0 for the others, plus 0.01 per character of the response."""
    easy = {row["prompt"] for row in PROMPTS if row["easy"]}
    return [float(prompt in easy) + 0.01 * len(response) for prompt, response in zip(prompts, responses, strict=True)]


@pytest.fixture
def kind():
    """One architecture; no test here depends on it."""
    return "gpt2"


@pytest.fixture
def quick(settings):
    """A task of twelve prompts and short episodes, without a reference."""
    reward = "tests.textenv.prompts.test_prompt_choice:easy_reward"
    short = dict(kl_coef=0, max_new_tokens=3, stop_token_ids=list(range(150)))
    return {**settings, **short, "reward": reward, "prompts": PROMPTS}


def make(**settings):
    """A single environment without Gymnasium's checker."""
    return gym.make("TextGen-v0", disable_env_checker=True, **settings)


def drawn(env, count, seed=None):
    """The prompt indices of `count` episodes, each ended by its first token."""
    indices = []
    for episode in range(count):
        _, info = env.reset(seed=seed if episode == 0 else None)
        indices.append(info["prompt_index"])
        env.step(tiny.END if tiny.END in env.unwrapped.task.stop_token_ids else 0)
    return indices


# ---- order and seed


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("strategy", list(SAMPLERS))
def test_native_equals_sync(quick, strategy, mode):
    """The native vector environment equals SyncVectorEnv at every step, in all autoreset modes and orders."""
    quick = {**quick, "prompt_sampling": strategy, "group_size": 2}
    native = TextGenVectorEnv(3, autoreset_mode=mode, **quick)
    sync = SyncVectorEnv([lambda: make(**quick)] * 3, autoreset_mode=mode)
    for seed, steps in ((7, 18), ([3, 3, None], 6)):
        assert_same(native.reset(seed=seed), sync.reset(seed=seed), f"reset {seed}")
        for step, actions in enumerate(random_tokens(steps, 3)):
            result, expected = native.step(actions), sync.step(actions)
            assert_same(result, expected, f"seed {seed}, step {step}")
            if mode is AutoresetMode.DISABLED and result[2].any():
                resets = [env.reset(options={"reset_mask": result[2].copy()}) for env in (native, sync)]
                assert_same(*resets, f"reset after step {step}")


@pytest.mark.parametrize("strategy", list(SAMPLERS))
def test_torchrl_equals_native(quick, strategy):
    """With the same seed, the TorchRL environment plays the prompts of the vector environment."""
    quick = {**quick, "prompt_sampling": strategy, "group_size": 2}
    native = TextGenVectorEnv(3, autoreset_mode="SameStep", **quick)
    env = TextGenTorchEnv(build_task(TextGenConfig(**quick)), 3)
    env.set_seed(11)
    data, (observation, info) = env.reset(), native.reset(seed=11)
    current, seen = info["prompt_index"], set()
    for actions in random_tokens(20, 3):
        assert data["prompt_index"][:, 0].tolist() == current.tolist()
        assert data["input_ids"].tolist() == observation["input_ids"].tolist()
        _, data = env.step_and_maybe_reset(data.set("action", torch.from_numpy(actions)))
        observation, _, _, _, info = native.step(actions)
        if "prompt_index" in info:
            current = np.where(info["_prompt_index"], info["prompt_index"], current)
        seen |= set(current.tolist())
    assert len(seen) > 3


@pytest.mark.parametrize("strategy", list(SAMPLERS))
def test_seed_decides_the_order(quick, strategy):
    """A seeded reset restarts rounds, groups and curricula, whatever was played before; an unseeded one goes on."""
    quick = {**quick, "prompt_sampling": strategy, "group_size": 2}
    env = make(**quick)
    first = drawn(env, 15, seed=5)
    assert drawn(env, 15, seed=5) == drawn(make(**quick), 15, seed=5) == first
    assert drawn(env, 15, seed=6) != first
    assert drawn(env, 7, seed=5) + drawn(env, 8) == first
    assert all(first[start] == first[start + 1] for start in range(0, 14, 2))


def test_strategies_by_name(quick):
    """`shuffle` plays each prompt once per round, `weighted` never one of weight 0; the default is `uniform`."""
    rounds = drawn(make(**{**quick, "prompt_sampling": "shuffle"}), 24, seed=0)
    assert sorted(rounds[:12]) == sorted(rounds[12:]) == list(range(12))
    weighted = set(drawn(make(**{**quick, "prompt_sampling": "weighted"}), 60, seed=0))
    assert weighted == {index for index in range(12) if index % 4}
    assert drawn(make(**{**quick, "prompt_sampling": "uniform"}), 20, seed=0) == drawn(make(**quick), 20, seed=0)


def test_prioritized_environment(quick):
    """With `prioritized`, prompts with low scores are drawn more often than their uniform share of a quarter."""
    env = make(**{**quick, "prompt_sampling": "prioritized"})
    drawn(env, 40, seed=0)
    hard = np.mean([index >= 9 for index in drawn(env, 200)])
    assert hard > 0.35  # a quarter, and three standard deviations of 200 draws


@pytest.mark.parametrize("normalization", ["none", "running"])
def test_prioritized_updates_from_scores(quick, folders, normalization):
    """The sampler of each row is updated with the raw scores of its episodes.

    Not with the return, which has the penalty, nor with normalized scores: their units change with the statistics.
    """
    quick = {**quick, "prompt_sampling": "prioritized", "kl_coef": 0.3, "score_normalization": normalization}
    env = TextGenVectorEnv(2, autoreset_mode="SameStep", **quick)
    expected = [PrioritizedSampler(12) for _ in range(2)]
    _, info = env.reset(seed=0)
    current = info["prompt_index"]
    for actions in random_tokens(25, 2):
        _, _, ended, _, info = env.step(actions)
        for row in np.flatnonzero(ended):
            final = info["final_info"]
            score = final["score"] if normalization == "none" else final["score_parts"]["raw"]
            expected[row].update([current[row]], [score[row]])
            current[row] = info["prompt_index"][row]
    samplers = env.dynamics.samplers
    assert [sampler.state_dict() for sampler in samplers] == [sampler.state_dict() for sampler in expected]
    assert expected[0].episodes > 5


def test_equal_seeds_make_groups(quick):
    """Rows with equal seeds play equal prompts, forever in orders that do not depend on returns."""
    env = TextGenVectorEnv(8, autoreset_mode="SameStep", prompt_sampling="shuffle", **quick)
    for seed in ([7] * 4 + [8] * 4, [1] * 4 + [2] * 4):
        _, info = env.reset(seed=seed)
        episodes = [info["prompt_index"]] + [env.step(np.zeros(8, int))[4]["prompt_index"] for _ in range(5)]
        for indices in episodes:
            assert len(set(indices[:4])) == len(set(indices[4:])) == 1
        assert any(indices[0] != indices[4] for indices in episodes)


# ---- options


def text_of(observation):
    """The prompt in an observation, or a list of them for a vector observation."""
    ids, mask = observation["input_ids"][..., :16], observation["attention_mask"][..., :16]
    decode = tiny.tokenizer().decode
    if ids.ndim == 1:
        return decode(ids[mask == 1])
    return [decode(row[real == 1]) for row, real in zip(ids, mask, strict=True)]


def test_options(quick):
    """A reset plays the caller's own prompt, or one by index; the sampler's order is not disturbed."""
    env, plain = make(**quick), make(**quick)
    options = [
        ({"prompt": "my own"}, "my own", -1),
        ({"prompt": {"prompt": "with", "answer": 4}}, "with", -1),
        ({"prompt_index": 3}, "p3", 3),
        ({"prompt_index": np.int64(11)}, "p11", 11),
    ]
    assert env.reset(seed=1)[1] == plain.reset(seed=1)[1]
    for option, text, index in options:
        before = copy.deepcopy(option)
        observation, info = env.reset(options=option)
        assert (text_of(observation), info) == (text, {"prompt_index": index}) and option == before
        assert env.unwrapped.dynamics.episode_prompts[0].text == text
    for empty in ({}, None):
        assert_same(env.reset(options=empty), plain.reset(options=empty), "after options")


def test_fields_of_the_current_prompt(quick):
    """The dynamics stores the further fields of each row's prompt, also of a prompt from options."""
    env = make(**quick)
    fields = {"easy": False, "weight": 0.5}
    for options, expected in [
        ({"prompt_index": 9}, EpisodePrompt(9, "p9", fields)),
        ({"prompt": {"prompt": "x", **fields}}, EpisodePrompt(-1, "x", fields)),
        ({"prompt": "x"}, EpisodePrompt(-1, "x", {})),
    ]:
        env.reset(options=options)
        assert env.unwrapped.dynamics.episode_prompts == [expected]


def bonus_reward(prompts, responses, bonus=None):
    """The prompts' field `bonus`; 100 for prompts without it."""
    return [100.0] * len(prompts) if bonus is None else [float(value) for value in bonus]


@pytest.mark.parametrize("ends", [[0, 0, 0], [0, 200, 0], [200, 0, 200]])
def test_fields_do_not_depend_on_other_rows(quick, ends):
    """A reward gets the same fields for a prompt, whichever rows end at the same step, with fields or without."""
    prompts = [{"prompt": "a", "bonus": 1}, {"prompt": "b", "bonus": 2}]
    reward = "tests.textenv.prompts.test_prompt_choice:bonus_reward"
    env = TextGenVectorEnv(3, **{**quick, "prompts": prompts, "reward": reward, "score_normalization": "running"})
    env.reset(options={"prompt_indices": [0, 0, 1]})
    env.reset(options={"prompt": "bare", "reset_mask": np.array([False, True, False])})
    *_, ended, _, info = env.step(np.array(ends))
    assert ended.tolist() == [token < 150 for token in ends]
    assert info["score_parts"]["raw"][ended].tolist() == np.array([1.0, 100.0, 2.0])[ended].tolist()
    assert env.task.normalizer.statistics.count == ended.sum()


def needs_bonus(prompts, responses, bonus):
    """The prompts' field `bonus`, which is required."""
    return bonus


def test_missing_field_is_refused_at_reset(quick):
    """A caller's prompt without a field that the reward needs is refused at reset, before it is played."""
    settings = {
        **quick,
        "prompts": [{"prompt": "a", "bonus": 1}],
        "reward": "tests.textenv.prompts.test_prompt_choice:needs_bonus",
    }
    for env in (make(**settings), TextGenVectorEnv(2, **settings)):
        with pytest.raises(ValueError, match="needs the prompts' field 'bonus', and they have no fields"):
            env.reset(options={"prompt": "bare"})
        env.reset(options={"prompt": {"prompt": "bare", "bonus": 5}})


def test_prioritized_updates_after_options(quick):
    """The sampler is updated after a prompt chosen by index, and not after a prompt of the caller's own."""
    env = make(**{**quick, "prompt_sampling": "prioritized"})
    for options in ({"prompt_index": 4}, {"prompt": "p5"}):
        env.reset(options=options)
        env.step(0)
    returns = env.unwrapped.dynamics.samplers[0].state_dict()["returns"]
    assert [index for index, values in enumerate(returns) if values] == [4]


@pytest.mark.parametrize("option", [{"prompt": "my own"}, {"prompt_index": 3}])
def test_vector_options_equal_sync(quick, option):
    """One option applies to all rows that are reset, as in SyncVectorEnv; automatic resets draw from the sampler."""
    native = TextGenVectorEnv(3, **quick)
    sync = SyncVectorEnv([lambda: make(**quick)] * 3)
    for mask in (None, np.array([True, False, True])):
        options = option if mask is None else {**option, "reset_mask": mask}
        passed = copy.deepcopy(options)
        result, expected = native.reset(seed=2, options=passed), sync.reset(seed=2, options=copy.deepcopy(options))
        assert_same(result, expected, "reset")
        assert passed.keys() == options.keys()  # Gymnasium's vector environments remove the mask from the caller's dict
        for actions in random_tokens(12, 3):
            assert_same(native.step(actions), sync.step(actions), "step")


def test_vector_options_of_rows(quick):
    """Lists hold one prompt or index per row; a reset mask selects rows."""
    env = TextGenVectorEnv(3, **quick)
    observation, info = env.reset(options={"prompts": ["a", "b", "c"]})
    assert text_of(observation) == ["a", "b", "c"] and info["prompt_index"].tolist() == [-1] * 3
    mask = np.array([True, False, True])
    observation, info = env.reset(options={"prompt_indices": np.array([5, 6, 7]), "reset_mask": mask})
    assert text_of(observation) == ["p5", "b", "p7"]
    assert info["prompt_index"].tolist() == [5, 0, 7] and info["_prompt_index"].tolist() == mask.tolist()


def test_torchrl_options(quick):
    """The TorchRL environment takes the same options, for one reset only."""
    env = TextGenTorchEnv(build_task(TextGenConfig(**quick)), 2)
    for options, expected in (({"prompt_index": 3}, [3, 3]), ({"prompts": ["a", "b"]}, [-1, -1])):
        data = env.reset(options=options)
        assert data["prompt_index"][:, 0].tolist() == expected
    assert text_of({"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}) == ["a", "b"]
    seen = set()
    for _ in range(8):
        data = env.step_and_maybe_reset(data.set("action", torch.zeros(2, dtype=torch.long)))[1]
        seen |= set(data["prompt_index"][:, 0].tolist())
    assert min(seen) >= 0 and len(seen) > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"promt": "x"}, "no option 'promt'; known options are .*prompt, prompt_index"),
        ({"prompt": "x", "prompt_index": 1}, r"\['prompt', 'prompt_index'\] contradict each other; pass only one"),
        ({"prompt": ""}, "prompt number 0 is empty"),
        ({"prompt": "x" * 17}, "prompt number 0 has 17 tokens, more than max_prompt_tokens=16"),
        ({"prompt": 7}, "prompts must be texts, chats .*number 0 has type int"),
        ({"prompt": None}, "prompts must be texts, chats .*number 0 has type NoneType"),
        ({"prompt": [{"role": "user", "content": "hi"}]}, "prompt number 0 is a chat .*pass chat=True"),
        ({"prompt_index": 12}, "index must be a whole number from 0 to 11, got 12"),
        ({"prompt_index": -1}, "index must be a whole number from 0 to 11, got -1"),
        ({"prompt_index": 1.0}, "index must be a whole number from 0 to 11, got 1.0"),
        ({"prompt_index": True}, "index must be a whole number from 0 to 11, got True"),
        (["prompt"], "options must be a dict, got list"),
    ],
)
def test_bad_options(quick, options, message):
    """Unknown options and invalid prompts are refused by all faces; no state has changed and no prompt is drawn."""
    env, untouched = make(**quick), make(**quick)
    assert_same(env.reset(seed=0), untouched.reset(seed=0), "reset")
    vector = TextGenVectorEnv(2, **quick)
    for one in (env, vector):
        with pytest.raises(ValueError, match=message):
            one.reset(seed=9, options=options)
    assert_same(env.step(200), untouched.step(200), "step")
    assert_same(env.reset(), untouched.reset(), "the next prompt")


def test_bad_vector_options(quick):
    """Lists need one entry per row; a single environment takes none."""
    env = TextGenVectorEnv(2, **quick)
    for options in ({"prompts": ["a"]}, {"prompts": "ab"}, {"prompt_indices": [1, 2, 3]}, {"prompt_indices": 1}):
        with pytest.raises(ValueError, match=r"must be a list of 2 \(num_envs\), one per row, got"):
            env.reset(options=options)
    with pytest.raises(ValueError, match=r"index must be .* got None"):
        env.reset(options={"prompt_indices": [1, None]})
    with pytest.raises(ValueError, match="no option 'prompts'; known options are prompt, prompt_index"):
        make(**quick).reset(options={"prompts": ["a"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_sampling": "best"}, r"prompt_sampling must be None or one of \['uniform', .*got 'best'"),
        ({"prompt_sampling": 3}, "prompt_sampling must be a text or None, got 3"),
        ({"prompt_sampling": ["shuffle"]}, "prompt_sampling must be a text or None, got .'shuffle'"),
        ({"group_size": 0}, "group_size must be a whole number of at least 1, got 0"),
        ({"group_size": 2.0}, "group_size must be a whole number, got 2.0"),
        ({"group_size": True}, "group_size must be a whole number, got True"),
        ({"chat": "yes"}, "chat must be True or False, got 'yes'"),
        ({"chat": 1}, "chat must be True or False, got 1"),
        ({"chat": True}, "chat is on and the reference's tokenizer has no chat template"),
        ({"prompt_sampling": "weighted", "prompts": ["a"]}, "draws by the prompts' weights, and they have none"),
        (
            {"prompt_sampling": "weighted", "prompts": [{"prompt": "a", "weight": -1}]},
            "weight of prompt number 0 must be a finite number, 0 or more, got -1",
        ),
    ],
)
def test_bad_arguments(quick, changes, message):
    """Wrong orders, groups, chats and weights are refused when the environment is made."""
    for face in (make, lambda **settings: TextGenVectorEnv(2, **settings)):
        with pytest.raises(ValueError, match=message):
            face(**{**quick, **changes})
