"""A conformance suite: drives each environment class with random tokens and compares it with the fast path.

A *face* is an environment class over the same decision process: single, vector or TorchRL. Run the suite on your own
reward and prompts: `check_faces(build_task(TextGenConfig(reward=..., prompts=...)))`. It fails for a reward that is
random, that depends on other rows of the batch, or that pays a token for what comes after it. To check a face of your
own, write a `play_...` function for it and pass the events that it yields to `check_face`.
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

# Stepping reads one cached token at a time; the fast path reads whole texts in other batches. The same float32 sums in
# another order change a log-probability or a score by about 1e-6 of its size. Errors in the logic are larger.
TOLERANCE = 1e-4

Quantities = dict[str, Any]  # what a face returns at one moment, by name
Event = tuple[int, int | None, Quantities]  # row, the token just written (None: a reset), the result


def check_faces(
    task: Task, *, rows: int = 4, seed: int = 0, torchrl_env: Any = None, tolerance: float = TOLERANCE
) -> None:
    """Raise AssertionError, with face, row, step and quantity, where a face and the fast path differ.

    `torchrl_env` is a `TextGenTorchEnv(task, rows)`; without it that face is skipped, and torchrl is not needed. Frozen
    models in half precision need a larger `tolerance`, since their rounding errors are larger.
    """
    if task.config.score_normalization == "running":
        raise ValueError(
            "running normalization makes a score depend on the scores before it, so two faces cannot agree; check the "
            "same task with score_normalization='none'."
        )
    tokens = _draw_tokens(task, rows, seed)  # [N, rows]
    missing = set() if task.reference is not None else {"reference_log_prob"}
    env, vector_env = TextGenEnv(**vars(task.config)), TextGenVectorEnv(rows, **vars(task.config))
    check_face(task, "TextGenEnv", play_env(env, tokens, seed), missing, tolerance)
    check_face(task, "TextGenVectorEnv", play_vector_env(vector_env, tokens, seed), missing, tolerance)
    if torchrl_env is not None:
        check_face(task, "TextGenTorchEnv", play_torchrl_env(torchrl_env, tokens), {"response"}, tolerance)


def play_env(env: gym.Env, tokens: NDArray, seed: int) -> Iterator[Event]:
    """Step a single environment through each column of tokens [N, rows], seeded with seed + row."""
    for row, column in enumerate(tokens.T):
        yield row, None, _started(*env.reset(seed=seed + row))
        for token in column:
            observation, reward, terminated, _, info = env.step(token)
            info.pop("action_mask", None)  # about the next token; the fast path has no masks
            yield row, int(token), {**_text(observation), "reward": reward, "terminated": terminated, **info}
            if terminated:
                yield row, None, _started(*env.reset())


def play_vector_env(env: gym.vector.VectorEnv, tokens: NDArray, seed: int) -> Iterator[Event]:
    """Step a vector environment in autoreset mode NEXT_STEP through tokens [N, rows]."""
    observation, info = env.reset(seed=seed)
    yield from ((row, None, _started(observation, row_info(info, row), row)) for row in range(env.num_envs))
    ended = np.zeros(env.num_envs, dtype=bool)
    for actions in tokens:
        observation, reward, terminated, _, info = env.step(actions)
        info.pop("action_mask", None)
        for row, token in enumerate(actions.tolist()):
            info_of_row = row_info(info, row)
            if ended[row]:
                yield row, None, _started(observation, info_of_row, row)
            else:
                outcome = {"reward": reward[row], "terminated": terminated[row]}
                yield row, token, _text(observation, row) | outcome | info_of_row
        ended = terminated


def play_torchrl_env(env: Any, tokens: NDArray) -> Iterator[Event]:
    """Step a TorchRL environment, restarting the rows that end, through tokens [N, rows]."""
    data, rows = env.reset(), range(tokens.shape[1])
    yield from ((row, None, _started(data, data[row], row)) for row in rows)
    for actions in tokens:
        stepped, data = env.step_and_maybe_reset(data.set("action", torch.from_numpy(actions).to(env.device)))
        after = stepped["next"]
        for row in rows:
            names = ("reward", "terminated", "reference_log_prob")
            quantities = _text(after, row) | {name: after[name][row].item() for name in names}
            if quantities["terminated"]:
                quantities["score"] = after["score"][row].item()
                quantities["score_parts"] = {name: part[row].item() for name, part in after["score_parts"].items()}
                quantities["finish_reason"] = FINISH_REASONS[after["finish_code"][row].item()]
            yield row, int(actions[row]), quantities
            if quantities["terminated"]:
                yield row, None, _started(data, data[row], row)


def check_face(task: Task, face: str, events: Iterable[Event], missing: set[str], tolerance: float = TOLERANCE) -> None:
    """Compare the finished episodes of a face with the fast path, except quantities that the face does not return.

    missing: the names of these quantities. Raises AssertionError as `check_faces` does.
    """
    prompts = [_text(vars(task.prompts), row)["tokens"] for row in range(len(task.prompts))]
    current: dict[int, list[Event]] = {}
    finished: list[list[Event]] = []
    for row, token, quantities in events:
        episode = [] if token is None else current[row]
        where = f"{face}, row {row}, " + ("reset" if token is None else f"step {len(episode) - 1}")
        if token is None:
            prompt, tokens = quantities["prompt_index"], quantities["tokens"]
            assert prompts[prompt] == tokens, f"{where}: tokens are {tokens}, prompt {prompt} has {prompts[prompt]}"
        else:
            ends = token in task.stop_token_ids or len(episode) == task.config.max_new_tokens
            terminated = quantities["terminated"]
            assert terminated == ends, f"{where}: terminated is {terminated}, must be {ends}"
        current[row] = [*episode, (row, token, quantities)]
        finished += [current[row]] if token is not None and ends else []
    assert finished, f"{face}: no episode ended"
    starts = [episode[0][2]["prompt_index"] for episode in finished]
    for episode, expected_episode in zip(finished, _fast_path(task, starts, finished), strict=True):
        for step, ((row, token, got), expected) in enumerate(zip(episode, expected_episode, strict=True)):
            where = f"{face}, row {row}, " + ("reset" if token is None else f"step {step - 1}")
            expected = {name: value for name, value in expected.items() if name not in missing}
            assert got.keys() == expected.keys(), f"{where}: returns {sorted(got)}, must return {sorted(expected)}"
            for name, value in expected.items():
                assert _close(got[name], value, tolerance), f"{where}: {name} is {got[name]}, by the fast path {value}"


def _fast_path(task: Task, starts: list[int], episodes: Sequence[list[Event]]) -> list[list[Quantities]]:
    """The quantities of these episodes at reset and after each token; starts: their prompts' indices."""
    prompts, budget = task.prompts.select(starts), task.config.max_new_tokens
    state = start(prompts.input_ids, prompts.attention_mask, budget, task.pad_token_id)
    responses = [[token for _, token, _ in episode[1:]] for episode in episodes]
    for step in range(budget):
        tokens = [response[step] if step < len(response) else -1 for response in responses]
        column = torch.tensor(tokens, device=task.device)  # [B], -1 in rows that have ended
        state = state.append(column, column >= 0)
    scored = score_responses(task, state, prompts.texts, fields=prompts.fields)
    expected = []
    for row, (index, tokens) in enumerate(zip(starts, responses, strict=True)):
        prompt = _text(vars(prompts), row)
        moments = []
        for length in range(len(tokens) + 1):
            mask = prompt["mask"] + [True] * length + [False] * (budget - length)
            moments.append({"tokens": prompt["tokens"] + tokens[:length], "mask": mask})
        moments[0]["prompt_index"] = index
        for step, quantities in enumerate(moments[1:]):
            quantities["reward"] = scored.reward[row, step].item()
            quantities["reference_log_prob"] = scored.reference_log_prob[row, step].item()
            quantities["terminated"] = step == len(tokens) - 1
        end = {"finish_reason": scored.finish_reason(row), "response": scored.responses[row]}
        parts = {name: part[row].item() for name, part in scored.score_parts.items()}
        moments[-1] |= {"score": scored.score[row].item(), "score_parts": parts, **end}
        expected.append(moments)
    return expected


def _started(observation: Any, info: Any, row: int | None = None) -> Quantities:
    """The result of a reset: the prompt and its index."""
    return {**_text(observation, row), "prompt_index": int(info["prompt_index"])}


def _text(observation: Any, row: int | None = None) -> Quantities:
    """The tokens under the attention mask, and the mask, of an observation or of one of its rows."""
    ids, mask = observation["input_ids"], observation["attention_mask"]
    ids, mask = (ids, mask) if row is None else (ids[row], mask[row])
    is_token = [bool(value) for value in mask.tolist()]
    return {"tokens": [id for id, keep in zip(ids.tolist(), is_token, strict=True) if keep], "mask": is_token}


def _close(got: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(
            _close(got[name], value, tolerance) for name, value in expected.items()
        )
    if isinstance(expected, float):
        return abs(got - expected) <= tolerance * max(1.0, abs(expected))
    return bool(got == expected)


def _draw_tokens(task: Task, rows: int, seed: int) -> NDArray[np.int64]:
    """Tokens for two whole episodes per row, any id. Stop tokens end some early, except in the last row."""
    generator, steps = np.random.default_rng(seed), 2 * task.config.max_new_tokens + 2
    stops = list(task.stop_token_ids)
    ordinary = np.setdiff1d(np.arange(task.vocabulary), stops)
    tokens = generator.choice(ordinary, (steps, rows))
    ending = generator.random((steps, rows)) < 1 / (1 + task.config.max_new_tokens / 2)
    ending[0, 0], ending[:, -1] = True, False  # row 0 ends at its first token, the last row at its budget
    return np.where(ending, generator.choice(stops, (steps, rows)), tokens)
