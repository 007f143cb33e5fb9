"""The native vector environment's own promises: batched rewards, the last observation of an episode, what a cut one pays.

Its time limits are compared with Gymnasium's in test_gymnasium_wrappers.py.
"""

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from tests.support import tiny
from tests.support.faces import random_tokens
from textenv.vector_env import TextGenVectorEnv

STOPS = list(range(75))  # a quarter of all ids


def length_reward(prompts, responses):
    """The number of characters."""
    return [float(len(response)) for response in responses]


@pytest.fixture
def kind():
    """One architecture: nothing here depends on it."""
    return "gpt2"


@pytest.fixture
def quick(settings):
    """A task with a reward in Python and ragged responses."""
    return {**settings, "reward": length_reward, "stop_token_ids": STOPS, "max_new_tokens": 6}


def test_a_row_cut_by_the_limit_is_over(quick):
    """Without automatic resets a truncated row takes no token until it is reset, and has paid no score."""
    env = TextGenVectorEnv(2, max_episode_steps=1, autoreset_mode="Disabled", **{**quick, "kl_coef": 0})
    env.reset(seed=0)
    _, rewards, terminated, truncated, info = env.step(np.array([200, 200]))
    assert (rewards.tolist(), terminated.tolist(), truncated.tolist(), info) == ([0, 0], [False] * 2, [True] * 2, {})
    with pytest.raises(ValueError, match=r"row 0 is over.*call reset\("):
        env.step(np.array([200, 200]))
    env.reset(options={"reset_mask": np.array([True, True])})
    env.step(np.array([200, 200]))


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_one_reward_call_a_step(quick, mode):
    """All rows that end in one step are scored in one call, and none that goes on is."""
    batches = []

    def counting(prompts, responses):
        batches.append(len(responses))
        return [0.0] * len(responses)

    env = TextGenVectorEnv(4, autoreset_mode=mode, **{**quick, "reward": counting, "kl_coef": 0})
    env.reset(seed=0)
    ended = []
    for actions in random_tokens(25, 4):
        _, _, done, _, _ = env.step(actions)
        ended += [int(done.sum())] if done.any() else []
        if mode is AutoresetMode.DISABLED and done.any():
            env.reset(options={"reset_mask": done})
    assert batches == ended and max(batches) > 1


def test_final_observation(quick):
    """In mode SAME_STEP `final_obs` shows the whole response, and the observation the next prompt."""
    env = TextGenVectorEnv(2, autoreset_mode="SameStep", **{**quick, "prompts": ["ab"]})
    env.reset(seed=0)
    env.step(np.array([200, 201]))
    observation, _, ended, _, info = env.step(np.array([tiny.PAD, STOPS[3]]))
    assert ended.tolist() == [False, True] and info["final_obs"][0] is None
    last = info["final_obs"][1]
    assert last["input_ids"][16:18].tolist() == [201, STOPS[3]] and last["attention_mask"].sum() == 4
    assert observation["attention_mask"].sum(1).tolist() == [4, 2]
    assert info["final_info"]["finish_reason"].tolist() == [None, "stop"]
    assert "score" not in info and info["_final_info"].tolist() == [False, True]


def test_partial_resets_leave_the_mask_to_the_caller(quick):
    """Gymnasium's statistics read the mask after the environment: rows that go on keep their episode's count."""
    env = RecordEpisodeStatistics(TextGenVectorEnv(2, autoreset_mode="Disabled", **{**quick, "kl_coef": 0}))
    env.reset(seed=0)
    env.step(np.array([200, STOPS[0]]))
    env.reset(options={"reset_mask": np.array([False, True])})
    _, _, ended, _, info = env.step(np.array([STOPS[0], STOPS[0]]))
    assert ended.all() and info["episode"]["l"].tolist() == [2, 1]


@pytest.mark.parametrize("spelling", ["same_step", "SAME_STEP", "SameStep", "samestep"])
def test_autoreset_modes_in_any_spelling(quick, spelling):
    """Gymnasium has a name and a value for each mode; all spellings of either are taken."""
    assert TextGenVectorEnv(2, autoreset_mode=spelling, **quick).autoreset_mode is AutoresetMode.SAME_STEP
    with pytest.raises(ValueError, match=r"one of \['NextStep', 'SameStep', 'Disabled'\], got 'sometimes'"):
        TextGenVectorEnv(2, autoreset_mode="sometimes", **quick)
