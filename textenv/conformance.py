"""Do all faces tell one story? Drives each with random tokens and compares what it shows with the fast path.

Run it on your own reward and prompts: `check_faces(build_task(TextGenConfig(reward=..., prompts=...)))`. A reward
that is random, that looks at its neighbors in the batch, or that pays a token for what comes after it, fails here.
A face of your own can be checked too:
write a `play_...` function for it and hand what it yields to `check_face`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from textenv.env import TextGenEnv
from textenv.generation import score_responses
from textenv.state import FINISH_REASONS, start
from textenv.task import Task
from textenv.vector_env import TextGenVectorEnv, row_info

# Stepping reads one cached token at a time, the fast path whole texts in other batches: the same float32 sums in
# another order, which moves a log-probability or a score by about 1e-6 of its size. Real differences are larger.
TOLERANCE = 1e-4

Shown = dict[str, Any]  # what a face shows at one moment, by quantity
Event = tuple[int, int | None, Shown]  # row, the token just written (None: a reset), what it led to


def check_faces(
    task: Task, *, rows: int = 4, seed: int = 0, torchrl_env: Any = None, tolerance: float = TOLERANCE
) -> None:
    """Raises AssertionError that names face, row, step and quantity where a face and the fast path differ.

    `torchrl_env` is a `TextGenTorchEnv(task, rows)`; without it that face, and torchrl, are left out. Frozen models in
    half precision need a larger `tolerance`: theirs are the rounding errors of their dtype.
    """
    if task.config.score_normalization == "running":
        raise ValueError(
            "running normalization pays a response by what was scored before it, so no two faces can agree; check the "
            "same task with score_normalization='none'."
        )
    tokens = _draw_tokens(task, rows, seed)  # [N, rows]
    hidden = set() if task.reference is not None else {"reference_log_prob"}
    env, vector_env = TextGenEnv(**vars(task.config)), TextGenVectorEnv(rows, **vars(task.config))
    check_face(task, "TextGenEnv", play_env(env, tokens, seed), hidden, tolerance)
    check_face(task, "TextGenVectorEnv", play_vector_env(vector_env, tokens, seed), hidden, tolerance)
    if torchrl_env is not None:
        check_face(task, "TextGenTorchEnv", play_torchrl_env(torchrl_env, tokens), {"response"}, tolerance)


def play_env(env: gym.Env, tokens: NDArray, seed: int) -> Iterator[Event]:
    """Steps a single environment through each column of tokens [N, rows], seeded with seed + row."""
    for row, column in enumerate(tokens.T):
        yield row, None, _started(*env.reset(seed=seed + row))
        for token in column:
            observation, reward, terminated, _, info = env.step(token)
            info.pop("action_mask", None)  # advice about the next token, no part of this one's story
            yield row, int(token), {**_text(observation), "reward": reward, "terminated": terminated, **info}
            if terminated:
                yield row, None, _started(*env.reset())


def play_vector_env(env: gym.vector.VectorEnv, tokens: NDArray, seed: int) -> Iterator[Event]:
    """Steps a vector environment in autoreset mode NEXT_STEP through tokens [N, rows]."""
    observation, info = env.reset(seed=seed)
    yield from ((row, None, _started(observation, row_info(info, row), row)) for row in range(env.num_envs))
    ended = np.zeros(env.num_envs, dtype=bool)
    for actions in tokens:
        observation, reward, terminated, _, info = env.step(actions)
        info.pop("action_mask", None)
        for row, token in enumerate(actions.tolist()):
            own = row_info(info, row)
            if ended[row]:
                yield row, None, _started(observation, own, row)
            else:
                paid = {"reward": reward[row], "terminated": terminated[row]}
                yield row, token, _text(observation, row) | paid | own
        ended = terminated


def play_torchrl_env(env: Any, tokens: NDArray) -> Iterator[Event]:
    """Steps a TorchRL environment, which starts ended rows anew, through tokens [N, rows]."""
    data, rows = env.reset(), range(tokens.shape[1])
    yield from ((row, None, _started(data, data[row], row)) for row in rows)
    for actions in tokens:
        stepped, data = env.step_and_maybe_reset(data.set("action", torch.from_numpy(actions).to(env.device)))
        after = stepped["next"]
        for row in rows:
            numbers = ("reward", "terminated", "reference_log_prob")
            shown = _text(after, row) | {name: after[name][row].item() for name in numbers}
            if shown["terminated"]:
                shown["score"] = after["score"][row].item()
                shown["score_parts"] = {name: part[row].item() for name, part in after["score_parts"].items()}
                shown["finish_reason"] = FINISH_REASONS[after["finish_code"][row].item()]
            yield row, int(actions[row]), shown
            if shown["terminated"]:
                yield row, None, _started(data, data[row], row)


def check_face(task: Task, face: str, events: Iterable[Event], hidden: set[str], tolerance: float = TOLERANCE) -> None:
    """Compares the finished episodes of a face with the fast path; `hidden` are quantities it does not show."""
    prompts = [_text(vars(task.prompts), row)["tokens"] for row in range(len(task.prompts))]
    current: dict[int, list[Event]] = {}
    finished: list[list[Event]] = []
    for row, token, shown in events:
        episode = [] if token is None else current[row]
        where = f"{face}, row {row}, " + ("reset" if token is None else f"step {len(episode) - 1}")
        if token is None:
            prompt, tokens = shown["prompt_index"], shown["tokens"]
            assert prompts[prompt] == tokens, f"{where}: tokens are {tokens}, of prompt {prompt} {prompts[prompt]}"
        else:
            ends = token in task.stop_token_ids or len(episode) == task.config.max_new_tokens
            assert shown["terminated"] == ends, f"{where}: terminated is {shown['terminated']}, must be {ends}"
        current[row] = [*episode, (row, token, shown)]
        finished += [current[row]] if token is not None and ends else []
    assert finished, f"{face}: no episode ended"
    starts = [episode[0][2]["prompt_index"] for episode in finished]
    for episode, story in zip(finished, _fast_path(task, starts, finished), strict=True):
        for step, ((row, token, got), wanted) in enumerate(zip(episode, story, strict=True)):
            where = f"{face}, row {row}, " + ("reset" if token is None else f"step {step - 1}")
            expected = {name: value for name, value in wanted.items() if name not in hidden}
            assert got.keys() == expected.keys(), f"{where}: shows {sorted(got)}, must show {sorted(expected)}"
            for name, value in expected.items():
                assert _close(got[name], value, tolerance), f"{where}: {name} is {got[name]}, by the fast path {value}"


def _fast_path(task: Task, starts: list[int], episodes: Sequence[list[Event]]) -> list[list[Shown]]:
    """What episodes from these prompts must show at their reset and after each of their tokens."""
    prompts, budget = task.prompts.select(starts), task.config.max_new_tokens
    state = start(prompts.input_ids, prompts.attention_mask, budget, task.pad_token_id)
    written = [[token for _, token, _ in episode[1:]] for episode in episodes]
    for step in range(budget):
        column = torch.tensor([row[step] if step < len(row) else -1 for row in written], device=task.device)
        state = state.append(column, column >= 0)
    scored = score_responses(task, state, prompts.texts, fields=prompts.fields)
    stories = []
    for row, (index, tokens) in enumerate(zip(starts, written, strict=True)):
        prompt = _text(vars(prompts), row)
        story = []
        for length in range(len(tokens) + 1):
            mask = prompt["mask"] + [True] * length + [False] * (budget - length)
            story.append({"tokens": prompt["tokens"] + tokens[:length], "mask": mask})
        story[0]["prompt_index"] = index
        for step, shown in enumerate(story[1:]):
            shown["reward"] = scored.reward[row, step].item()
            shown["reference_log_prob"] = scored.reference_log_prob[row, step].item()
            shown["terminated"] = step == len(tokens) - 1
        end = {"finish_reason": scored.finish_reason(row), "response": scored.responses[row]}
        parts = {name: part[row].item() for name, part in scored.score_parts.items()}
        story[-1] |= {"score": scored.score[row].item(), "score_parts": parts, **end}
        stories.append(story)
    return stories


def _started(observation: Any, info: Any, row: int | None = None) -> Shown:
    """What a reset shows: the prompt, and which one of the task's it is."""
    return {**_text(observation, row), "prompt_index": int(info["prompt_index"])}


def _text(observation: Any, row: int | None = None) -> Shown:
    """Real tokens and mask of an observation, or of one of its rows."""
    ids, mask = observation["input_ids"], observation["attention_mask"]
    ids, mask = (ids, mask) if row is None else (ids[row], mask[row])
    real = [bool(one) for one in mask.tolist()]
    return {"tokens": [id for id, counts in zip(ids.tolist(), real, strict=True) if counts], "mask": real}


def _close(got: Any, wanted: Any, tolerance: float) -> bool:
    if isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(
            _close(got[name], value, tolerance) for name, value in wanted.items()
        )
    if isinstance(wanted, float):
        return abs(got - wanted) <= tolerance * max(1.0, abs(wanted))
    return bool(got == wanted)


def _draw_tokens(task: Task, rows: int, seed: int) -> NDArray[np.int64]:
    """Tokens for two whole episodes a row: any id; early ends by stop tokens, save in the last row."""
    generator, steps = np.random.default_rng(seed), 2 * task.config.max_new_tokens + 2
    stops = list(task.stop_token_ids)
    ordinary = np.setdiff1d(np.arange(task.vocabulary), stops)
    tokens = generator.choice(ordinary, (steps, rows))
    ending = generator.random((steps, rows)) < 1 / (1 + task.config.max_new_tokens / 2)
    ending[0, 0], ending[:, -1] = True, False  # row 0 ends at its first token, the last row at its budget
    return np.where(ending, generator.choice(stops, (steps, rows)), tokens)
