"""TextGen-v0 as a gymnasium.Env: one episode at a time. The decision process itself is in dynamics.py."""

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
from textenv.state import TextState, own_settings
from textenv.task import Task, build_task

Observation = dict[str, Any]  # input_ids and attention_mask, arrays [L]


class TextGenEnv(gym.Env[Observation, np.int64]):
    """Text generation as a Markov decision process.

    | | |
    |---|---|
    | Action Space | `Discrete(1024)` |
    | Observation Space | `Dict('attention_mask': MultiBinary(72), 'input_ids': Box(0, 1023, (72,), int64))` |
    | import | `gymnasium.make("textenv:TextGen-v0")` |

    ## Description
    A language model writes a response to a prompt, one token at a time. The state is the context, an action is the
    next token, and the reward is a reward model's score of the whole response, with a penalty for leaving a frozen
    reference model. This is the setting of reinforcement learning from human feedback (Ziegler et al. 2019, Ouyang et
    al. 2022). Without arguments it is the embedded task, writing product reviews, which works offline; the table above
    describes that task.

    ```python
    >>> import gymnasium as gym
    >>> import textenv
    >>> gym.register_envs(textenv)
    >>> env = gym.make("TextGen-v0")
    >>> observation, info = env.reset(seed=0)
    >>> terminated = False
    >>> while not terminated:
    ...     action = env.action_space.sample()  # your policy goes here
    ...     observation, reward, terminated, truncated, info = env.step(action)
    >>> sorted(info)
    ['finish_reason', 'reference_log_prob', 'response', 'score', 'score_parts']

    ```

    ## Action Space
    `Discrete(V)`: a token id. V is the width of the reference's logits. Every id is legal.

    ## Observation Space
    `Dict(input_ids=Box(0, V-1, (L,), int64), attention_mask=MultiBinary(L))`, with
    L = `max_prompt_tokens` + `max_new_tokens`. Prompts are left-padded, so that every response starts in column
    `max_prompt_tokens`. Columns whose mask is 0 hold no token, whatever their id. Ids are never decoded and encoded
    again: an observation holds exactly the tokens that the policy wrote.

    ## Rewards
    Each step pays `kl_coef · log π_ref(a|s)`. The last step also pays the score, minus what per-token rewards
    (`textenv.per_token`) have already paid. A learner that subtracts `kl_coef · log π(a|s)` of its own policy optimizes
    `score − kl_coef · KL(π, π_ref)`; the environment cannot do so, since it does not know the policy.

    ## Starting State
    A prompt drawn from `prompts` by the strategy `prompt_sampling`, and an empty response. `reset(seed=...)` decides
    all prompts that follow: it also restarts a shuffled round, a group or a curriculum.

    `reset(options=...)` chooses the prompt of this episode. Automatic resets of a vector environment ignore options.
    * `{"prompt": "..."}`: a prompt of your own, in any form that an entry of `prompts` may have; in a vector
      environment, for all rows that are reset.
    * `{"prompt_index": i}`: one of the environment's prompts; likewise.
    * `{"prompts": [...]}` and `{"prompt_indices": [...]}`: one for each row of a vector environment.

    In a vector environment, rows with equal seeds start from equal prompts: `reset(seed=[7] * 4 + [8] * 4)` makes two
    groups of four.

    ## Episode End
    Termination:
    * a stop token is written (`finish_reason="stop"`);
    * the budget of `max_new_tokens` is used up (`"length"`). This is a termination, because the budget is part of the
      state and the response is scored.

    Truncation:
    * never by the environment itself; `max_episode_steps` of `gym.make` and `gym.make_vec` truncates, without a score.

    ## Arguments
    Arguments are names and numbers, so that `env.spec` can be saved as JSON. Live objects work too, but not in JSON.
    Gymnasium copies arguments for `env.spec` and for every wrapper; `textenv.shared(model)` passes a model uncopied.

    `reference`, `reward` and `prompts` are set together; without any it is the embedded task. Beside parts of your own,
    `"reviews"` names the embedded task's, as in `reference="reviews", reward=helpful, prompts="reviews"`. A setting
    that would do nothing, such as `score_mean` without normalization, is refused.

    * `reference=None`: the folder or hub name of a causal language model, or `textenv.shared(model, tokenizer)`. The
      model consists of attention layers and has safetensors weights and an end token.
    * `reward=None`: scores a response. One of: the folder or hub name of a sequence-classification model, whose
      tokenizer may differ from the reference's; `"module:function"`, or a function
      `f(prompts, responses) -> list of floats`; `"evaluate:METRIC:KEY"`, a metric of Hugging Face's evaluate; or
      `{name: weight}`, a weighted sum of these. Functions may be `async`, and may take further arguments, which are
      fields of the prompts, such as `answer`. `textenv.per_response`, `per_token` and `per_batch` mark functions of one
      response, of tokens, and of tensors. `textenv.rewards.library` has length, repetition, unfinished, exact match and
      numeric match.
    * `reward_label=None`: the label of the reward model that is the score, if the model has several.
    * `reward_ensemble="mean"`: how the members of an ensemble of reward models become one score: `"mean"`, `"min"`, or
      a number κ, for mean − κ · std. An ensemble is a folder that `python -m agents reward-model` has written with
      `--models` or `--heads`.
    * `reward_timeout=None`: seconds that one call of a reward function may take; the error names the reward.
    * `score_normalization="none"`: applied to the score before it is paid: `"fixed"` (by `score_mean` and `score_std`)
      or `"running"` (by the statistics of all scores so far).
    * `score_mean=0.0`: subtracted from the score by `"fixed"`.
    * `score_std=1.0`: the score's divisor in `"fixed"`.
    * `score_clip=None`: clips the score that is paid at the last token to ± this number.
    * `prompts=None`: a list, a `.jsonl` path (field `prompt`), a `datasets.Dataset`, or `"module:function"`. Entries
      are texts, chats (lists of `{"role", "content"}`), or rows with a field `prompt` and further fields, which reward
      functions may read.
    * `prompt_sampling=None`: `"uniform"` (with replacement, the default here), `"shuffle"` (rounds without
      replacement), `"weighted"` (by the field `weight`), or `"prioritized"` (low recent scores first, Jiang et al.
      2021; each row of a vector environment by its own scores).
    * `group_size=1`: consecutive episodes on the same prompt.
    * `chat=False`: format prompts with the tokenizer's chat template.
    * `chat_template_kwargs=None`: further variables of that template, such as `{"enable_thinking": False}`.
    * `kl_coef=0.1`: weight of the penalty for leaving the reference, β; 0 loads no reference.
    * `max_prompt_tokens=24`: columns for the prompt; a longer prompt is refused.
    * `max_new_tokens=48`: the token budget of a response.
    * `temperature=0.7`: sampling temperature of the reference's distribution; policies are expected to use it too.
    * `action_mask=None`: which tokens may come next: `"special"` (no special tokens), `"top_k:N"` or `"top_p:P"` (of
      a mask policy, NLPO), `"words:A,B"`, `"regex:PATTERN"`, `"module:function"`, or a list of these. Masks are advice:
      every token stays legal, and rewards do not depend on masks.
    * `stop_token_ids=None`: tokens that end a response; None is the model's own.
    * `dtype="float32"`: of the frozen models' weights; also `"bfloat16"` or `"float16"`.
    * `device="auto"`: where the frozen models run; `"auto"` is CUDA if available.
    * `render_mode=None`: `"ansi"` (text for a terminal), `"human"` (typed into the terminal while it is written) or
      `"rgb_array"` (an image). The less likely the reference found a token, the redder it is.

    ```python
    >>> env = gym.make("TextGen-v0", max_new_tokens=3, kl_coef=0, render_mode="ansi")
    >>> env
    <OrderEnforcing<PassiveEnvChecker<TextGenEnv<TextGen-v0>>>>
    >>> envs = gym.make_vec("TextGen-v0", num_envs=4, max_new_tokens=3, autoreset_mode="SameStep")
    >>> envs
    TextGenVectorEnv(TextGen-v0, num_envs=4)

    ```

    ## Information
    * `prompt_index` (reset): int, the index in `prompts`; -1 for a prompt passed in options.
    * `reference_log_prob` (every step, if `kl_coef > 0`): float, log π_ref of the token just written.
    * `score` (last step): float, the response's score after normalization: all that the reward paid for it.
    * `score_parts` (last step): dict of floats, each reward's score under its name, before weights and normalization;
      with normalization also `raw`, their weighted sum. An ensemble's also has `disagreement`, the std over its
      members.
    * `finish_reason` (last step): `"stop"` or `"length"`.
    * `response` (last step): the text, without special tokens.
    * `action_mask` (reset and every step, if `action_mask is not None`): int8 [V], 1 = may come next;
      `action_masks()` returns it as bool [V].

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

    @own_settings()
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode with the prompt in `options`, or one drawn by the environment's generator."""
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

    @own_settings()
    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append one token. Raises ValueError for anything but a token id, and after the episode's end."""
        tokens = torch.from_numpy(as_tokens(action, 1)).to(self.task.device)
        transition = self.dynamics.step(tokens)
        if self.viewer is not None:
            self.viewer.record(transition, torch.ones_like(transition.terminated))
        reward, ended = float(transition.reward[0]), bool(transition.terminated[0])
        info = step_info(self.task, transition, 0) | self._mask_info()
        return observe(transition.state, 0), reward, ended, False, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [V]: all of them without `action_mask`. sb3-contrib calls this method."""
        return self.dynamics.action_mask()[0].cpu().numpy().copy()

    def _mask_info(self) -> dict[str, Any]:
        return {"action_mask": self.action_masks().astype(np.int8)} if self.task.masks else {}

    @own_settings()
    def render(self) -> Any:
        """The episode so far: text (`ansi`), an image (`rgb_array`), or None (`human` types while it is written)."""
        return None if self.viewer is None else self.viewer.frames()[0]

    def close(self) -> None:
        """Close the viewer. Calling it again, or without a viewer, does nothing."""
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
    """The observation of one row, or of all rows, in new arrays."""
    return {
        "input_ids": state.input_ids[row].cpu().numpy().copy(),
        "attention_mask": state.attention_mask[row].cpu().numpy().astype(np.int8),
    }


def step_info(task: Task, transition: Transition, row: int) -> dict[str, Any]:
    """The `info` of one row's step."""
    info: dict[str, Any] = {}
    if task.reference is not None:
        info["reference_log_prob"] = float(transition.reference_log_prob[row])
    if row in transition.responses:
        info["score"] = float(transition.score[row])
        info["score_parts"] = {name: float(part[row]) for name, part in transition.score_parts.items()}
        info["finish_reason"] = transition.finish_reason(row)
        info["response"] = transition.responses[row]
    return info


def as_rows(name: str, value: Any) -> int:
    """Validate a number of parallel episodes. Raises ValueError that calls the argument by `name`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    return int(value)


def as_tokens(action: Any, rows: int) -> NDArray[np.int64]:
    """An action in any integer form (number, list, array, tensor) as int64 [rows]."""
    array = np.asarray(action.cpu() if isinstance(action, torch.Tensor) else action)
    if array.dtype.kind not in "iu" or array.size != rows:
        raise ValueError(
            f"an action must be {'one token id' if rows == 1 else f'{rows} token ids'} (whole numbers), got {action!r}."
        )
    return array.reshape(rows).astype(np.int64)
