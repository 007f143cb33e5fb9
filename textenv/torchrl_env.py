"""TextGen-v0 as a TorchRL environment: n rows as TensorDicts, no numpy and no copies between devices.

The decision process itself is in dynamics.py. This is the only file of textenv that imports torchrl.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from gymnasium.utils.seeding import np_random
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from textenv.dynamics import TextDynamics
from textenv.env import as_rows
from textenv.prompts.reset_options import choose_prompts
from textenv.state import LENGTH, TextState, own_settings
from textenv.task import Task


class TextGenTorchEnv(EnvBase):
    """TextGen-v0 with B = `rows` parallel episodes.

    Observations: `input_ids` int64 [B, L] and `attention_mask` bool [B, L]. The information of the Gymnasium
    environments is in the TensorDict too: `prompt_index` int64 [B, 1] (-1 for a prompt passed in options),
    `reference_log_prob` [B, 1], `score` and `("score_parts", name)` [B, 1] (zero before the end), `finish_code` int64
    [B, 1] (0 running, 1 stop, 2 length), and with action masks `action_mask` bool [B, V].

    The reward is `score + kl_coef · log π_ref(a|s)`, without the policy's part of the penalty. The code that samples
    an action can write `action_log_prob` beside it; a learner needs it to subtract `kl_coef · log π(a|s)`.

    With equal seeds the prompts are those of the vector environment. `reset(options={...})` takes the same options,
    for that reset only.
    """

    @own_settings()
    def __init__(self, task: Task, rows: int, seed: int = 0) -> None:
        if not isinstance(task, Task):
            raise ValueError(
                f"task must be a Task, got {type(task).__name__}; build one with build_task(TextGenConfig(...))."
            )
        rows = as_rows("rows", rows)
        shape, device = torch.Size([rows]), task.device
        flag, text = torch.Size([rows, 1]), torch.Size([rows, task.width])
        super().__init__(device=device, batch_size=shape)
        self.task, self.dynamics = task, TextDynamics(task, rows)
        self.observation_spec = Composite(
            input_ids=Bounded(0, task.vocabulary - 1, shape=text, dtype=torch.int64, device=device),
            attention_mask=Binary(n=task.width, shape=text, dtype=torch.bool, device=device),
            prompt_index=Bounded(-1, len(task.prompts) - 1, shape=flag, dtype=torch.int64, device=device),
            reference_log_prob=Unbounded(shape=flag, device=device),
            score=Unbounded(shape=flag, device=device),
            score_parts=Composite(
                {name: Unbounded(shape=flag, device=device) for name in task.score_part_names},
                shape=shape,
                device=device,
            ),
            finish_code=Bounded(0, LENGTH, shape=flag, dtype=torch.int64, device=device),
            shape=shape,
            device=device,
        )
        if task.masks:
            masks = torch.Size([rows, task.vocabulary])
            self.observation_spec["action_mask"] = Binary(
                n=task.vocabulary, shape=masks, dtype=torch.bool, device=device
            )
        self.action_spec = Categorical(n=task.vocabulary, shape=shape, dtype=torch.int64, device=device)
        self.reward_spec = Unbounded(shape=flag, device=device)
        flags = {
            name: Binary(n=1, shape=flag, dtype=torch.bool, device=device)
            for name in ("done", "terminated", "truncated")
        }
        self.full_done_spec = Composite(flags, shape=shape, device=device)
        self._set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        first = 0 if seed is None else int(seed)
        self.generators = [np_random(first + row)[0] for row in range(self.batch_size[0])]
        for row in range(self.batch_size[0]):
            self.dynamics.seed(row)

    @own_settings()
    def _reset(
        self, tensordict: TensorDictBase | None = None, options: Mapping[str, Any] | None = None, **kwargs: object
    ) -> TensorDictBase:
        if kwargs:
            raise TypeError(
                f"reset takes a TensorDict and options={{...}}, got {sorted(kwargs)}; to seed, call set_seed before it."
            )
        mask = None if tensordict is None else tensordict.get("_reset", None)
        count = self.batch_size[0]
        rows = list(range(count)) if mask is None else mask.reshape(count).nonzero()[:, 0].tolist()
        chosen = choose_prompts(options, self.task.prompts, self.task.read_prompts, rows, count)
        if chosen is None:
            state = self.dynamics.reset(rows, [self.dynamics.draw(row, self.generators[row]) for row in rows])
        else:
            state = self.dynamics.begin(rows, *chosen)
        zeros = self.observation_spec.zero().update(self.full_done_spec.zero())
        return zeros.update(self._context(state))

    @own_settings()
    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        transition = self.dynamics.step(self._tokens(tensordict["action"]), self._active(tensordict))
        done = ~self.dynamics.running
        values = {
            "reward": transition.reward,
            "reference_log_prob": transition.reference_log_prob,
            "score": transition.score,
            "finish_code": transition.finish_code,
            "done": done,
            "terminated": done.clone(),
            "truncated": torch.zeros_like(done),
        }
        data: dict[str, Any] = {name: value[:, None] for name, value in values.items()}  # [B, 1] each
        data["score_parts"] = {name: part[:, None] for name, part in transition.score_parts.items()}
        data |= self._context(transition.state)
        return TensorDict(data, batch_size=self.batch_size, device=self.device)

    def _tokens(self, action: Tensor) -> Tensor:
        """The action as token ids on the models' device, whatever device the TensorDict is on."""
        if action.shape != self.batch_size or action.is_floating_point() or action.dtype is torch.bool:
            raise ValueError(
                f"the action must be token ids, int64 {list(self.batch_size)}, got {action.dtype} "
                f"{list(action.shape)}; convert one-hot actions with argmax(-1)."
            )
        return action.to(self.task.device, torch.int64)

    def _active(self, tensordict: TensorDictBase) -> Tensor:
        """The rows that take a step: those with a running episode, among those in TorchRL's `_step` mask."""
        requested = tensordict.get("_step", None)
        running = self.dynamics.running
        return running if requested is None else running & requested.reshape(self.batch_size).to(running.device)

    def _context(self, state: TextState) -> dict[str, Tensor]:
        """The observed texts, their prompts' indices and the action masks."""
        masks = {"action_mask": self.dynamics.action_mask()} if self.task.masks else {}
        return {
            **masks,
            "input_ids": state.input_ids,
            "attention_mask": state.attention_mask,
            "prompt_index": torch.tensor(self.dynamics.prompt_index)[:, None],
        }
