"""TextGen-v0 as a gymnasium.Env: one episode at a time. A face of dynamics.py, with no logic of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from textenv.config import read_settings
from textenv.dynamics import TextDynamics, Transition
from textenv.options import choose_prompts
from textenv.render import ansi
from textenv.state import TextState
from textenv.task import Task, build_task

Observation = dict[str, Any]  # input_ids, attention_mask: arrays [L]


class TextGenEnv(gym.Env[Observation, np.int64]):
    """Text generation as a Markov decision process.

    ## Description
    A language model writes a response to a prompt, one token at a time. The state is the context, an action is
    the next token, and the reward is a reward model's score for the whole response, with a penalty for leaving
    a frozen reference model: the setting of reinforcement learning from human feedback (Ziegler et al. 2019,
    Ouyang et al. 2022). With no arguments it is the embedded task, product reviews, and needs no network.

    ## Action Space
    `Discrete(V)`: a token id, V the width of the reference's logits. Every id is legal.

    ## Observation Space
    `Dict(input_ids=Box(0, V-1, (L,), int64), attention_mask=MultiBinary(L))` with
    L = `max_prompt_tokens` + `max_new_tokens`. Prompts are left-padded, so that every response starts in column
    `max_prompt_tokens`. Columns whose mask is 0 hold no token, whatever their id.

    ## Rewards
    `kl_coef · log π_ref(a|s)` at each token, and the score at the last one. A learner that subtracts
    `kl_coef · log π(a|s)` of its own policy optimises `score − kl_coef · KL(π, π_ref)`.

    ## Starting State
    A prompt drawn from `prompts` as `prompt_sampling` says, and an empty response. A seed decides all prompts that
    follow it: `reset(seed=...)` also begins a shuffled round, a group or a curriculum anew.
    `reset(options={"prompt": "..."})` plays a prompt of the caller's own (anything that is one entry of `prompts`),
    `{"prompt_index": i}` one of the environment's; a vector environment plays it in all rows that are reset, and
    takes one a row as `"prompts"` or `"prompt_indices"`. Options reach explicit resets only, never automatic ones.
    In a vector environment rows of equal seeds start from equal prompts: `reset(seed=[7] * 4 + [8] * 4)` makes two
    groups of four.

    ## Episode End
    Termination: a stop token (`finish_reason="stop"`), or the budget of `max_new_tokens` (`"length"`).
    Truncation: never, unless by Gymnasium's `TimeLimit`.

    ## Arguments
    Names and numbers, so that `env.spec` goes to JSON and back. Live objects work too, though not through JSON:
    `textenv.shared(model)` hands one in without the copy that `env.spec` makes of it for every wrapper.

    `reference`: a causal language model's folder or hub name, or `textenv.shared(LanguageModel(...))`.
    `reward`: a reward model's folder or hub name, `"module:function"`, a function
    `f(prompts, responses) -> list of floats`, or `{name: weight}`. `reward_label`: which label, if it has several.
    `prompts`: a list, a `.jsonl` path (field `prompt`), a `datasets.Dataset`, or `"module:function"`; of texts, chats
    (lists of `{"role", "content"}`), or rows with a field `prompt` and others. `prompt_sampling`: `"uniform"` (with
    replacement, the default), `"shuffle"` (rounds without), `"weighted"` (by the field `weight`), `"prioritised"` (by
    low recent scores, Jiang et al. 2021; each row of a vector environment by its own). `group_size=1`: episodes in a
    row on the same prompt. `chat=False`: put prompts through the tokenizer's chat template. `kl_coef=0.1` (0 loads no
    reference), `max_prompt_tokens=24`, `max_new_tokens=48`, `temperature=0.7`, `action_mask=None` (or
    `"special"`, `"top_k:N"`, `"top_p:P"`, `"words:A,B"`, `"regex:PATTERN"`, `"module:function"`, a list of these),
    `stop_token_ids=None` (the model's own), `dtype="float32"`, `device="auto"`.

    ## Information
    At reset `prompt_index`, -1 for a prompt given by options. At every step `reference_log_prob` (unless `kl_coef`
    is 0); at the end also `score`, `finish_reason` and `response`, the text without special tokens.

    With `action_mask`, at reset and at every step also `action_mask`, int8 [V], 1 = may come next. It is advice:
    every token stays legal, and its reward is what it is without masks. `action_masks()` gives it as bool [V].

    ## Version History
    * v0: first version
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"], "render_fps": 10}

    def __init__(self, *, render_mode: str | None = None, **settings: Any) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None or 'ansi', got {render_mode!r}.")
        self.render_mode = render_mode
        self.task = build_task(read_settings(settings))
        self.dynamics = TextDynamics(self.task, rows=1)
        self.observation_space, self.action_space = make_spaces(self.task)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode with a prompt drawn by the environment's own generator, or with the one in options."""
        chosen = choose_prompts(options, self.task, [0], num_envs=0)
        super().reset(seed=seed)
        if seed is not None:
            self.dynamics.seed(0)
        if chosen is None:
            state = self.dynamics.reset([0], [self.dynamics.draw(0, self.np_random)])
        else:
            state = self.dynamics.begin([0], *chosen)
        return observe(state, 0), {"prompt_index": self.dynamics.prompt_index[0], **self._mask_info()}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Writes one token. Raises ValueError for what is no token id, and after the episode's end."""
        tokens = torch.from_numpy(as_tokens(action, 1)).to(self.task.device)
        transition = self.dynamics.step(tokens)
        reward, ended = float(transition.reward[0]), bool(transition.terminated[0])
        info = step_info(self.task, transition, 0) | self._mask_info()
        return observe(transition.state, 0), reward, ended, False, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [V], as sb3-contrib asks for it. All of them without `action_mask`."""
        return self.dynamics.action_mask()[0].cpu().numpy().copy()

    def _mask_info(self) -> dict[str, Any]:
        return {"action_mask": self.action_masks().astype(np.int8)} if self.task.masks else {}

    def render(self) -> str | None:  # type: ignore[override]
        """The text so far, as `render_mode="ansi"` asks."""
        return ansi(self.dynamics.state, 0, self.task.tokenizer) if self.render_mode == "ansi" else None


def make_spaces(task: Task) -> tuple[spaces.Dict, spaces.Discrete]:
    """Observation and action space of one row."""
    observation = spaces.Dict(
        input_ids=spaces.Box(0, task.vocabulary - 1, (task.width,), np.int64),
        attention_mask=spaces.MultiBinary(task.width),
    )
    return observation, spaces.Discrete(task.vocabulary)


def observe(state: TextState, row: int) -> Observation:
    """A fresh observation of one row."""
    return {
        "input_ids": state.input_ids[row].cpu().numpy().copy(),
        "attention_mask": state.attention_mask[row].cpu().numpy().astype(np.int8),
    }


def step_info(task: Task, transition: Transition, row: int) -> dict[str, Any]:
    """What `info` says of one row's step."""
    info: dict[str, Any] = {}
    if task.reference is not None:
        info["reference_log_prob"] = float(transition.reference_log_prob[row])
    if row in transition.responses:
        info["score"] = float(transition.score[row])
        info["finish_reason"] = transition.finish_reason(row)
        info["response"] = transition.responses[row]
    return info


def as_tokens(action: Any, rows: int) -> NDArray[np.int64]:
    """Whole numbers, int64 [rows], from whatever a client passes as an action."""
    array = np.asarray(action.cpu() if isinstance(action, torch.Tensor) else action)
    if array.dtype.kind not in "iu" or array.size != rows:
        raise ValueError(
            f"an action must be {'one token id' if rows == 1 else f'{rows} token ids'} (whole numbers), got {action!r}."
        )
    return array.reshape(rows).astype(np.int64)
