"""Where the baselines are measured: the environment, prompts and gold rater that a run with the same settings has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel

from agents.config import TrainConfig, check_counts
from agents.domains import TEXT, domain_of
from agents.seeds import evaluation_seed
from agents.text.config import TextConfig
from agents.text.evaluation import Evaluation, Gold, evaluate, find_gold, split_prompts
from agents.text.experiment import task_of
from agents.text.records import policy_records
from textenv.config import DTYPES, NAMES
from textenv.models.loading import load_causal_lm, load_tokenizer
from textenv.models.probe import check_causal
from textenv.prompts.tokenized import Prompts
from textenv.settings import check_types
from textenv.task import Task


@dataclass(frozen=True, kw_only=True)
class SettingConfig:
    """The environment, and what is measured on its held-out prompts: the settings of `train` with these names."""

    env: str = "TextGen-v0"  # Gymnasium id of a text environment, or module:id where importing the module registers it
    env_arg: tuple[str, ...] = ()  # NAME=VALUE for gym.make, e.g. temperature=1.0; VALUE is JSON, a literal or text
    evaluation_prompts: int = 256  # held-out prompts, the same as those of a run with this environment and seed
    # evaluation prompts: .jsonl or module:function; default: the embedded task's, or a random part of the prompts
    held_out: str | None = None
    # module:function(prompts, responses) giving gold scores, reported but not optimized; default: the embedded task's
    gold: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, ("evaluation_prompts",))
        self.arguments()
        if domain_of(self.env) is not TEXT:
            raise ValueError(f"--env must be an environment of text, such as TextGen-v0, got {self.env!r}.")

    def arguments(self) -> dict[str, Any]:
        """The arguments of gym.make."""
        return TrainConfig(env_arg=self.env_arg).env_arguments(texts=NAMES)

    def measured(self) -> TextConfig:
        """The same settings as a run's."""
        names = ("evaluation_prompts", "held_out", "gold")
        return TextConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Setting:
    """A task, its prompts on both sides of the split, and its gold rater."""

    task: Task
    training: Prompts
    held_out: Prompts
    gold: Gold | None

    def evaluate(self, model: PreTrainedModel) -> Evaluation:
        """One response to each held-out prompt, measured as a run measures its policy.

        By the same random numbers, if the run's rollouts have 128 responses, as they do by default.
        """
        return evaluate(self.task, model, self.held_out, self.gold, evaluation_seed())

    def records(self, model: PreTrainedModel, evaluation: Evaluation, beta: float) -> list[dict[str, Any]]:
        """The first responses of its evaluation, token by token. beta: β of the penalty."""
        return [record.as_json() for record in policy_records(self.task, model, self.held_out, evaluation, beta)]


def open_setting(
    config: SettingConfig,
    seed: int,
    changes: Mapping[str, Any] = MappingProxyType({}),
    held_out: Sequence[Any] | None = None,
) -> Setting:
    """Build the environment's task and split its prompts.

    seed: of the split. changes: arguments of gym.make besides, or instead of, those of the configuration. held_out:
    prompts to evaluate on, instead of a split.
    """
    task = task_of(config.env, config.arguments() | dict(changes))
    settings = config.measured()
    parts = split_prompts(task, settings, seed) if held_out is None else (task.prompts, task.read_prompts(held_out))
    return Setting(task, *parts, find_gold(task, settings))


def load_policy(name: str, task: Task) -> PreTrainedModel:
    """The model in a folder, such as a run's `actor`, for a task.

    Raises ValueError for a model that writes other tokens than the task's reference.
    """
    model = load_causal_lm(name, task.device, DTYPES[task.config.dtype])
    if load_tokenizer(name).get_vocab() != task.tokenizer.get_vocab():
        raise ValueError(
            f"the tokenizer of {name!r} has another vocabulary than the reference's, so the two write different "
            "tokens; give a model that started from the reference, or name its own with --env.reference."
        )
    check_causal(model, "policy", task.config.width)
    return model
