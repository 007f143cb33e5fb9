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
from textenv.prompts.reset_options import choose_prompts
from textenv.rendering.viewers import FPS, VIEWERS, check_render_mode, make_viewer
from textenv.state import TextState
from textenv.task import Task, build_task

Observation = dict[str, Any]  # input_ids, attention_mask: arrays [L]


class TextGenEnv(gym.Env[Observation, np.int64]):
    """Text generation as a Markov decision process.

    | | |
    |---|---|
    | Action Space | `Discrete(1024)` |
    | Observation Space | `Dict('attention_mask': MultiBinary(72), 'input_ids': Box(0, 1023, (72,), int64))` |
    | import | `gymnasium.make("textenv:TextGen-v0")` |

    ## Description
    A language model writes a response to a prompt, one token at a time. The state is the context, an action is
    the next token, and the reward is a reward model's score for the whole response, with a penalty for leaving
    a frozen reference model: the setting of reinforcement learning from human feedback (Ziegler et al. 2019,
    Ouyang et al. 2022). With no arguments it is the embedded task, product reviews, and needs no network; the
    table above is that task's.

    ```python
    >>> import gymnasium as gym
    >>> import textenv
    >>> gym.register_envs(textenv)
    >>> env = gym.make("TextGen-v0")
    >>> observation, info = env.reset(seed=0)
    >>> terminated = False
    >>> while not terminated:
    ...     action = env.action_space.sample()  # here goes your policy
    ...     observation, reward, terminated, truncated, info = env.step(action)
    >>> sorted(info)
    ['finish_reason', 'reference_log_prob', 'response', 'score', 'score_parts']

    ```

    ## Action Space
    `Discrete(V)`: a token id, V the width of the reference's logits. Every id is legal.

    ## Observation Space
    `Dict(input_ids=Box(0, V-1, (L,), int64), attention_mask=MultiBinary(L))` with
    L = `max_prompt_tokens` + `max_new_tokens`. Prompts are left-padded, so that every response starts in column
    `max_prompt_tokens`. Columns whose mask is 0 hold no token, whatever their id.

    ## Rewards
    `kl_coef · log π_ref(a|s)` at each token, and the score at the last one, save what rewards of single tokens
    (`textenv.per_token`) have paid before. A learner that subtracts
    `kl_coef · log π(a|s)` of its own policy optimizes `score − kl_coef · KL(π, π_ref)`.

    ## Starting State
    A prompt drawn from `prompts` as `prompt_sampling` says, and an empty response. A seed decides all prompts that
    follow it: `reset(seed=...)` also begins a shuffled round, a group or a curriculum anew.
    `reset(options={"prompt": "..."})` plays a prompt of the caller's own (anything that is one entry of `prompts`),
    `{"prompt_index": i}` one of the environment's; a vector environment plays it in all rows that are reset, and
    takes one a row as `"prompts"` or `"prompt_indices"`. Options reach explicit resets only, never automatic ones.
    In a vector environment rows of equal seeds start from equal prompts: `reset(seed=[7] * 4 + [8] * 4)` makes two
    groups of four.

    ## Episode End
    Termination:
    * a stop token is written (`finish_reason="stop"`);
    * the budget of `max_new_tokens` is used up (`"length"`); it is part of the state, and the response is scored.

    Truncation:
    * never by the environment itself; `max_episode_steps` of `gym.make` and `gym.make_vec` truncates, without a score.

    ## Arguments
    Names and numbers, so that `env.spec` goes to JSON and back. Live objects work too, though not through JSON:
    `textenv.shared(model)` hands one in without the copy that `env.spec` makes of it for every wrapper.

    * `reference=None`: a causal language model's folder or hub name, or `textenv.shared(LanguageModel(...))`; None is
      the embedded task's own, as for `reward` and `prompts`.
    * `reward=None`: a reward model's folder or hub name, `"module:function"`, a function
      `f(prompts, responses) -> list of floats`, `"evaluate:METRIC:KEY"`, or `{name: weight}` of these; ready-made
      ones are in `textenv.rewards.library`, other forms of functions under `textenv.per_response`, `per_token` and
      `per_batch`.
    * `reward_label=None`: which label of the reward model counts, if it has several.
    * `reward_timeout=None`: seconds that a reward function may take.
    * `score_normalization="none"`: what becomes of the score before it is paid: `"fixed"` (by `score_mean` and
      `score_std`) or `"running"` (by all scores so far).
    * `score_mean=0.0`: subtracted by `"fixed"`.
    * `score_std=1.0`: divided by, in `"fixed"`.
    * `score_clip=None`: the greatest size of a normalized score.
    * `prompts=None`: a list, a `.jsonl` path (field `prompt`), a `datasets.Dataset`, or `"module:function"`; of texts,
      chats (lists of `{"role", "content"}`), or rows with a field `prompt` and others, which reward functions may read.
    * `prompt_sampling=None`: `"uniform"` (with replacement; what None means here), `"shuffle"` (rounds without),
      `"weighted"` (by the field `weight`), or `"prioritized"` (by low recent scores, Jiang et al. 2021; each row of a
      vector environment by its own).
    * `group_size=1`: episodes in a row on the same prompt.
    * `chat=False`: put prompts through the tokenizer's chat template.
    * `kl_coef=0.1`: weight of the penalty for leaving the reference; 0 loads no reference.
    * `max_prompt_tokens=24`: columns for the prompt; a longer one is refused.
    * `max_new_tokens=48`: the budget of a response.
    * `temperature=0.7`: of the reference's distribution, and of the policies here.
    * `action_mask=None`: which tokens may come next: `"special"`, `"top_k:N"`, `"top_p:P"`, `"words:A,B"`,
      `"regex:PATTERN"`, `"module:function"`, or a list of these. It is advice: every token stays legal, and its
      reward is what it is without masks.
    * `stop_token_ids=None`: tokens that end a response; None is the model's own.
    * `dtype="float32"`: of the frozen models' weights; `"bfloat16"` and `"float16"` are the others.
    * `device="auto"`: `"auto"` is CUDA where there is one.
    * `render_mode=None`: `"ansi"` (text for a terminal), `"human"` (typed into the terminal while it is written) or
      `"rgb_array"` (a picture). Tokens are the redder, the less likely the reference found them.

    ```python
    >>> env = gym.make("TextGen-v0", max_new_tokens=3, kl_coef=0, render_mode="ansi")
    >>> env
    <OrderEnforcing<PassiveEnvChecker<TextGenEnv<TextGen-v0>>>>
    >>> envs = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=3, autoreset_mode="SameStep")
    >>> envs
    TextGenVectorEnv(TextGen-v0, num_envs=4)

    ```

    ## Information
    * `prompt_index` (reset): int, which of `prompts` is played; -1 for a prompt given by options.
    * `reference_log_prob` (every step, if `kl_coef > 0`): float, log π_ref of the token just written.
    * `score` (last step): float, all that the reward paid for the response.
    * `score_parts` (last step): dict of floats, what each reward gave under its name, before weights and
      normalization; with normalization also `raw`, their sum.
    * `finish_reason` (last step): `"stop"` or `"length"`.
    * `response` (last step): its text, without special tokens.
    * `action_mask` (reset and every step, if `action_mask is not None`): int8 [V], 1 = may come next;
      `action_masks()` gives it as bool [V].

    ## Version History
    * v0: first version
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": list(VIEWERS), "render_fps": FPS}

    def __init__(self, *, render_mode: str | None = None, **settings: Any) -> None:
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self.task = build_task(read_settings(settings))
        self.dynamics = TextDynamics(self.task, rows=1)
        self.observation_space, self.action_space = make_spaces(self.task)
        self.viewer = make_viewer(render_mode, self.task, rows=1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode with a prompt drawn by the environment's own generator, or with the one in options."""
        chosen = choose_prompts(options, self.task.prompts, self.task.read_prompts, [0], num_envs=0)
        super().reset(seed=seed)
        if seed is not None:
            self.dynamics.seed(0)
        if chosen is None:
            state = self.dynamics.reset([0], [self.dynamics.draw(0, self.np_random)])
        else:
            state = self.dynamics.begin([0], *chosen)
        if self.viewer is not None:
            self.viewer.restart([0], state)
        return observe(state, 0), {"prompt_index": self.dynamics.prompt_index[0], **self._mask_info()}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Writes one token. Raises ValueError for what is no token id, and after the episode's end."""
        tokens = torch.from_numpy(as_tokens(action, 1)).to(self.task.device)
        transition = self.dynamics.step(tokens)
        if self.viewer is not None:
            self.viewer.record(transition, torch.ones_like(transition.terminated))
        reward, ended = float(transition.reward[0]), bool(transition.terminated[0])
        info = step_info(self.task, transition, 0) | self._mask_info()
        return observe(transition.state, 0), reward, ended, False, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [V], as sb3-contrib asks for it. All of them without `action_mask`."""
        return self.dynamics.action_mask()[0].cpu().numpy().copy()

    def _mask_info(self) -> dict[str, Any]:
        return {"action_mask": self.action_masks().astype(np.int8)} if self.task.masks else {}

    def render(self) -> Any:
        """The episode so far: text (`ansi`), a picture (`rgb_array`), or None (`human` types by itself)."""
        return None if self.viewer is None else self.viewer.frames()[0]

    def close(self) -> None:
        """Ends what is being shown; there is nothing else to close."""
        if self.viewer is not None:
            self.viewer.close()


def make_spaces(task: Task) -> tuple[spaces.Dict, spaces.Discrete]:
    """Observation and action space of one row."""
    observation = spaces.Dict(
        input_ids=spaces.Box(0, task.vocabulary - 1, (task.width,), np.int64),
        attention_mask=spaces.MultiBinary(task.width),
    )
    return observation, spaces.Discrete(task.vocabulary)


def observe(state: TextState, row: int | slice = slice(None)) -> Observation:
    """A fresh observation of one row, or of all rows together."""
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
        info["score_parts"] = {name: float(part[row]) for name, part in transition.score_parts.items()}
        info["finish_reason"] = transition.finish_reason(row)
        info["response"] = transition.responses[row]
    return info


def as_rows(name: str, given: Any) -> int:
    """How many episodes an environment is to hold side by side, by the argument of that name."""
    if isinstance(given, bool) or not isinstance(given, int | np.integer) or given < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {given!r}.")
    return int(given)


def as_tokens(action: Any, rows: int) -> NDArray[np.int64]:
    """Whole numbers, int64 [rows], from whatever a client passes as an action."""
    array = np.asarray(action.cpu() if isinstance(action, torch.Tensor) else action)
    if array.dtype.kind not in "iu" or array.size != rows:
        raise ValueError(
            f"an action must be {'one token id' if rows == 1 else f'{rows} token ids'} (whole numbers), got {action!r}."
        )
    return array.reshape(rows).astype(np.int64)
