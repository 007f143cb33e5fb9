"""Reward functions: forms, prompt fields, threads, and error messages."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.support import tiny
from tests.support.episodes import written
from textenv import TextGenConfig, build_task, per_batch, per_response, shared
from textenv.conformance import check_faces
from textenv.rewards import library
from textenv.rewards.base import WeightedSum, read_scores
from textenv.rewards.build import check_fields
from textenv.rewards.calling import CallFailed, CallOverdue, call_each
from textenv.rewards.functions import FunctionReward, find_fields
from textenv.vector_env import TextGenVectorEnv

pytestmark = pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
FOREVER = 20.0  # seconds that a hanging function waits: far longer than a test should take


@pytest.fixture(autouse=True)
def kind_of_models(kind):
    """One architecture is enough here."""


def two_responses(**more):
    """A batch of two finished responses: "abc" and "d", to the prompts "x" and "yz"."""
    ids = {letter: tiny.tokenizer()(letter).input_ids[0] for letter in "abcdxyz"}
    texts = [[ids["x"]], [ids["y"], ids["z"]]], [[ids["a"], ids["b"], ids["c"]], [ids["d"]]]
    return written(*texts, tiny.tokenizer(), **more)


# ---- calls


def test_calls_run_concurrently():
    """With four workers, four calls run at once: each waits for the other three."""
    together = threading.Barrier(4)

    def function(index):
        together.wait(timeout=FOREVER)
        return index**2

    assert call_each(function, 8, workers=4) == [index**2 for index in range(8)]


def test_threads_have_the_callers_device(monkeypatch):
    """A process whose CUDA device is not the first one finds the same device in its rewards."""
    present = threading.local()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(present, "device", device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(present, "device", 0))  # as CUDA: by thread
    torch.cuda.set_device(3)
    assert call_each(lambda index: torch.cuda.current_device(), 4, workers=2) == [3] * 4


def test_at_most_workers_calls_at_once():
    """At most `workers` calls run at a time. One worker without a time limit runs in the caller's thread."""
    running, most, lock, threads = 0, 0, threading.Lock(), set()

    def function(index):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            threads.add(threading.current_thread())
        time.sleep(0.005)
        with lock:
            running -= 1

    call_each(function, 9, workers=3)
    assert most <= 3 and threading.main_thread() not in threads
    threads.clear()
    call_each(function, 2)
    assert threads == {threading.main_thread()}


def test_the_overdue_call_is_named():
    """The error has the index of the call that exceeds the limit. Each call's time counts from its own start."""
    hang = threading.Event()

    def function(index):
        return hang.wait(FOREVER) if index == 2 else time.sleep(0.05)

    started = time.monotonic()
    with pytest.raises(CallOverdue) as raised:
        call_each(function, 5, workers=2, timeout=0.4)
    hang.set()
    assert raised.value.index == 2 and time.monotonic() - started < FOREVER / 2
    assert call_each(lambda index: time.sleep(0.15), 6, workers=1, timeout=0.6) == [None] * 6  # 0.9 s in all


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3)])
def test_the_failed_call_is_named_and_later_calls_are_not_made(error):
    """The first exception stops all calls, even SystemExit, which would end a thread silently."""
    calls = []

    def function(index):
        calls.append(index)
        if index == 1:
            raise error

    with pytest.raises(CallFailed) as raised:
        call_each(function, 50, timeout=FOREVER)
    assert raised.value.index == 1 and raised.value.error is error and calls == [0, 1]


def test_a_hung_call_does_not_block_the_process():
    """After a call hangs, the process can make more calls, and it exits when its main thread ends."""
    script = (
        "import importlib.util, sys, time\n"
        f"spec = importlib.util.spec_from_file_location('calling', {str(Path('textenv/rewards/calling.py').resolve())!r})\n"
        "calling = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(calling)\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        calling.call_each(lambda _: time.sleep(3600), 3, workers=2, timeout=0.05)\n"
        "    except calling.CallOverdue:\n"
        "        print('overdue')\n"
        "print(calling.call_each(lambda index: index, 3, timeout=5))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split("\n")[:3] == ["overdue", "overdue", "[0, 1, 2]"]


# ---- forms of functions


async def slow_lengths(prompts, responses):
    """An async reward whose inner tasks wait for each other."""
    together = asyncio.Barrier(len(responses))

    async def length(text):
        await together.wait()
        return float(len(text))

    return await asyncio.gather(*(length(text) for text in responses))


async def slow_length(prompt, response):
    """An async reward of one response."""
    await asyncio.sleep(0)
    return len(response)


def test_async_functions():
    """`async def` works per batch and per response, with and without a time limit, and inside a running event loop."""
    functions = [slow_lengths, per_response(workers=2)(slow_length), per_response()(slow_length)]
    for function in functions:
        for timeout in (None, FOREVER):
            reward = FunctionReward(function, "slow", timeout=timeout)
            assert reward(two_responses()).total.tolist() == [3.0, 1.0]

            async def notebook(reward=reward):
                return reward(two_responses()).total.tolist()

            assert asyncio.run(notebook()) == [3.0, 1.0]


def test_a_function_of_one_response():
    """per_response calls the function once per response; the decorated function can still be called directly."""
    weighted = per_response(workers=3)(lambda prompt, response: 10 * len(prompt) + len(response))
    assert FunctionReward(weighted, "f")(two_responses()).total.tolist() == [13.0, 21.0]
    assert weighted("ab", "c") == 21


def test_a_function_of_the_batch():
    """per_batch passes the ResponseBatch: tokens, masks and how responses ended."""

    @per_batch
    def stops(batch):
        return 10 * batch.state.length + batch.stopped

    assert FunctionReward(stops, "f")(two_responses(stopped=[True, False])).total.tolist() == [31.0, 10.0]


def test_workers_are_counted():
    """per_response without parentheses, or with an invalid number of workers, raises an error with the right syntax."""
    for workers in (len, 0, -1, 1.5, True, "4"):
        with pytest.raises(ValueError, match=r"number of workers, 1 or more, got .*@per_response\(\)"):
            per_response(workers)


def test_functions_by_name_in_the_environment(settings):
    """Decorated functions work by name, in `shared` and directly, and their part has the function's name."""
    for reward in ("tests.textenv.rewards.test_functions:letters", letters, shared(letters)):
        env = gym.make("TextGen-v0", **{**settings, "reward": reward, "kl_coef": 0})
        env.reset(seed=0)
        env.step(tiny.tokenizer()("a").input_ids[0])
        *_, info = env.step(tiny.END)
        name = reward if isinstance(reward, str) else "letters"
        assert info["score"] == 1.0 and info["score_parts"] == {name: 1.0}


@per_response(workers=2)
def letters(prompt, response):
    """Characters of the response."""
    return len(response)


# ---- fields


def test_prompt_fields():
    """A parameter after the first two gets the prompt field of its name: all values, or one per response."""
    fields = {"answer": ["abc", "e"], "weight": (2, 3)}

    def batch(prompts, responses, answer, *, weight):
        return [w * (a == r) for a, r, w in zip(answer, responses, weight, strict=True)]

    @per_response()
    def single(prompt, response, **fields):
        return sorted(fields) == ["answer", "weight"] and fields["weight"] * (fields["answer"] == response)

    for function in (batch, single):
        assert FunctionReward(function, "f")(two_responses(fields=fields)).total.tolist() == [2.0, 0.0]
    optional = FunctionReward(lambda prompts, responses, bonus=(5, 6): list(bonus), "f")
    assert optional(two_responses()).total.tolist() == [5.0, 6.0]
    assert optional(two_responses(fields={"bonus": [7, 8]})).total.tolist() == [7.0, 8.0]
    changed = FunctionReward(lambda prompts, responses, answer: answer.clear() or [0, 0], "rude")
    changed(two_responses(fields=fields))
    assert fields["answer"] == ["abc", "e"]


def test_missing_prompt_fields_are_named():
    """A required field that the prompts lack raises an error, in the call and in `check_fields`, alone and in a sum."""
    reward = FunctionReward(lambda prompts, responses, answer: [0, 0], "grade")
    says = r"reward 'grade' needs the prompts' field 'answer', and they have {}; add the field 'answer' to every"
    with pytest.raises(ValueError, match=says.format("no fields")):
        reward(two_responses())
    with pytest.raises(ValueError, match=says.format(r"\['reference'\]")):
        check_fields(WeightedSum([(1.0, reward)]), ["reference"])
    check_fields(WeightedSum([(1.0, reward)]), ["answer", "more"])


def test_prompt_fields_in_the_environment(settings):
    """Prompt fields reach functions in every face; a missing field raises an error when the environment is made."""
    letters = tiny.tokenizer()
    prompts = [{"prompt": "a", "answer": "x"}, {"prompt": "the cat", "answer": "y"}]
    reward = {"textenv.rewards.library:exact_match": 1.0, "tests.textenv.rewards.test_functions:letters": 0.1}
    settings = {**settings, "prompts": prompts, "reward": reward, "kl_coef": 0}
    env = gym.make("TextGen-v0", **settings)
    for index, right in enumerate("xy"):
        for text in "xy":
            env.reset(options={"prompt_index": index})
            env.step(letters(text).input_ids[0])
            *_, info = env.step(tiny.END)
            assert info["score_parts"] == dict(zip(reward, (float(text == right), 1.0), strict=True))
    task = build_task(TextGenConfig(**{**settings, "stop_token_ids": [tiny.END, *letters("xyz").input_ids]}))
    check_faces(task, rows=2)
    with pytest.raises(ValueError, match=r"'textenv.rewards.library:exact_match' needs the prompts' field 'answer'"):
        gym.make("TextGen-v0", **{**settings, "prompts": ["a", "b"]})


def test_a_function_with_trls_signature():
    """It is told the signature that is right here, with the fields it asks for."""

    def by_length(completions, answer, **kwargs):
        return [float(len(one[0]["content"])) for one in completions]

    def of_both(prompts, completions, completion_ids=None):
        return [0.0] * len(prompts)

    with pytest.raises(ValueError, match=r"TRL's signature, .*def by_length\(prompts, responses, answer, \*\*kwargs\)"):
        find_fields(by_length, "by_length")
    with pytest.raises(ValueError, match=r"Rename completions to responses .*def of_both\(prompts, responses\)"):
        find_fields(of_both, "of_both")


@pytest.mark.parametrize("function", [lambda: [], lambda responses: [], per_response()(lambda *, prompt: 0)])
def test_functions_with_too_few_parameters(function):
    """A function that cannot take prompts and responses raises an error when the reward is built."""
    with pytest.raises(ValueError, match="reward 'f' must take two arguments, prompts and responses, got the"):
        FunctionReward(function, "f")


# ---- failures


BROKEN = threading.Event()  # while set, rewards fail on the response "x" of row 7
HANG = threading.Event()


@per_response(workers=4)
def raises(prompt, response):
    """Raises for the response "x"."""
    if BROKEN.is_set() and response == "x":
        json.loads("lost")  # raised inside a library; the error must name this line
    return len(response)


@per_response(workers=2)
def hangs(prompt, response):
    """Hangs for the response "x"."""
    if BROKEN.is_set() and response == "x":
        HANG.wait(FOREVER)
    return len(response)


def batch_of(wrong):
    """A plain function that, while BROKEN is set, returns `wrong(numbers, index of "x")` instead of its numbers."""

    def function(prompts, responses):
        numbers = [float(len(response)) for response in responses]
        return wrong(numbers, responses.index("x")) if BROKEN.is_set() else numbers

    return function


def returns_for_x(value):
    """A plain function that returns a wrong value for "x"."""
    return batch_of(lambda numbers, index: [*numbers[:index], value, *numbers[index + 1 :]])


async def hangs_async(prompts, responses):
    """Hangs in a coroutine."""
    if BROKEN.is_set():
        await asyncio.sleep(FOREVER)
    return [float(len(response)) for response in responses]


@per_batch
def raises_on_tokens(batch):
    """Raises for a whole batch."""
    if BROKEN.is_set():
        raise RuntimeError("no tokens")
    return batch.state.length - batch.stopped.long()


ROW_7 = r"row 7 \(prompt '{prompt}', response 'x'\)"
BATCH = r"a batch of 3 responses, the first of them row 5 \(prompt '[^']+', response 'o'\)"
WRONG = {
    "raises": (raises, r"raised JSONDecodeError: .*\(/.*test_functions.py, line \d+\) for " + ROW_7),
    "hangs": (hangs, "took longer than reward_timeout=0.5 seconds for " + ROW_7 + "; make it faster"),
    "nan": (returns_for_x(math.nan), "returned nan for " + ROW_7 + "; return a finite number"),
    "type": (returns_for_x(None), "must return a list of 3 numbers.*first that is not a number is None, for " + ROW_7),
    "text": (returns_for_x("1"), "must return a list of 3 numbers.*first that is not a number is '1', for " + ROW_7),
    "length": (
        batch_of(lambda numbers, place: numbers[1:]),
        r"must return one number per response, 3 in all, got shape \(2,\)",
    ),
    "nothing": (batch_of(lambda numbers, place: None), "must return a list of 3 numbers, got NoneType"),
    "batch": (batch_of(lambda numbers, place: 1 / 0), "raised ZeroDivisionError: .* for " + BATCH),
    "async": (hangs_async, "took longer than reward_timeout=0.5 seconds for " + BATCH),
    "tokens": (raises_on_tokens, "raised RuntimeError: no tokens .* for " + BATCH),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_row_7_of_64(settings, wrong):
    """If a reward fails in one of 64 rows, the error names the reward and, where known, the prompt and response.

    The step is undone: a retry gives the same result as an environment that never failed, and so does `reset`.
    """
    function, says = WRONG[wrong]
    settings = {**settings, "reward": shared(function), "reward_timeout": 0.5, "max_new_tokens": 4}
    env, untouched = (TextGenVectorEnv(64, **{**settings, "reward_timeout": limit}) for limit in (0.5, None))
    letters = np.full((3, 64), tiny.tokenizer()("o").input_ids[0])
    letters[0, 7] = tiny.tokenizer()("x").input_ids[0]
    letters[1, [5, 7, 9]] = tiny.END
    BROKEN.clear()
    for environment in (env, untouched):
        environment.reset(seed=3)
        environment.step(letters[0])
    BROKEN.set()
    for _ in range(2):
        with pytest.raises(
            ValueError, match="reward '[a-z_]+' " + says.format(prompt=env.dynamics.episode_prompts[7].text)
        ):
            env.step(letters[1])
    BROKEN.clear()
    HANG.set()
    for actions in letters[1:]:
        same(env.step(actions), untouched.step(actions))
    HANG.clear()
    same(env.reset(seed=4), untouched.reset(seed=4))
    for _ in range(4):
        got, wanted = env.step(letters[2]), untouched.step(letters[2])
        same(got, wanted)
    assert got[2].all() and got[4]["score"].tolist() == [4.0] * 64


def same(got, wanted):
    """Assert that nested structures are equal to the bit."""
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        got, wanted = list(got.values()), list(wanted.values())
    if isinstance(wanted, list | tuple):
        for left, right in zip(got, wanted, strict=True):
            same(left, right)
    else:
        assert np.array_equal(got, wanted)


def test_reset_after_a_failed_reward(settings):
    """After a failed reward and `reset`, the single environment works, through all of Gymnasium's wrappers."""
    env = gym.make("TextGen-v0", **{**settings, "reward": shared(returns_for_x(math.nan))})
    BROKEN.set()
    env.reset(seed=0)
    env.step(tiny.tokenizer()("x").input_ids[0])
    with pytest.raises(ValueError, match=r"returned nan for row 0 \(prompt"):
        env.step(tiny.END)
    BROKEN.clear()
    env.reset(seed=1)
    *_, terminated, _, info = env.step(tiny.END)
    assert terminated and info["score"] == 0.0


async def raises_async(prompts, responses):
    """Raises inside a coroutine."""
    raise RuntimeError("no network")


def test_errors_name_the_line_of_the_function():
    """The message names the line of the user's function, also in a coroutine, or of a ready-made reward."""
    for function in (raises_async, per_response()(raises_async), per_batch(lambda batch: 1 / 0)):
        for timeout in (None, FOREVER):
            with pytest.raises(ValueError, match=r"\(/[^ ]*test_functions.py, line \d+\) for "):
                FunctionReward(function, "f", timeout=timeout)(two_responses())
    with pytest.raises(ValueError, match=r"contains no number \(/[^ ]*library.py, line \d+\) for row 1"):
        FunctionReward(library.numeric_match, "f")(two_responses(fields={"answer": ["1", "none"]}))


def test_long_texts_are_truncated_in_messages():
    """An error message quotes only the beginning of a long response."""
    long = written([[65]], [tiny.tokenizer()("word " * 200).input_ids], tiny.tokenizer())
    with pytest.raises(ValueError, match="returned nan for row 0") as raised:
        read_scores(FunctionReward(lambda prompts, responses: [math.nan], "f"), long)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "3", True])
def test_bad_reward_timeout(settings, value):
    """reward_timeout must be a finite number of seconds above 0, or None."""
    with pytest.raises(ValueError, match=r"reward_timeout must be (a finite number or None|above 0)"):
        build_task(TextGenConfig(**{**settings, "reward_timeout": value}))


def test_a_time_limit_longer_than_threads_can_wait():
    """A limit beyond threading.TIMEOUT_MAX works."""
    assert FunctionReward(lambda prompts, responses: [1, 2], "f", timeout=1e300)(two_responses()).total.tolist() == [
        1.0,
        2.0,
    ]


def test_scores_are_detached():
    """A function may return a tensor that requires gradients; the score does not require them."""
    weight = torch.ones(2, requires_grad=True)
    assert not FunctionReward(lambda prompts, responses: 2 * weight, "f")(two_responses()).total.requires_grad
