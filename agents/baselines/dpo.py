"""`python -m agents dpo`: a policy from preference pairs without a rollout, measured as a run's (Rafailov et al. 2023).

The pairs are a file's, or samples of the reference between which the reward chooses. The loss is on the distribution
that the environment samples from, at its temperature, and β is its `kl_coef`: so the numbers stand beside a run's.
Owns the order of the work: everything that can be wrong comes first, and the reference is not in memory while the
policy learns.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
from rich.console import Console
from transformers import PreTrainedModel

from agents.baselines.pairs import Rows, read_pairs, sample_pairs, text_of, tokenize
from agents.baselines.results import PAIRS, Measured, Results, result_lines, write_results
from agents.baselines.setting import Setting, SettingConfig, open_setting
from agents.config import check_counts, id_of
from agents.reporting.report import Bar
from agents.text.fingerprints import HELD_OUT, fingerprints, save_prompts
from textenv.settings import check_types
from textenv.task import is_embedded
from textenv.training.dpo import Pairs, PreferenceConfig, fit, measure_pairs, reference_log_probs
from textenv.training.files import write_text
from textenv.training.loop import Job, LoopConfig, file_hash, split_rows, total_steps

DEFAULT = PreferenceConfig()
# Of the embedded task's model, of a million weights; one of a billion forgets how to write at such a rate.
EMBEDDED = PreferenceConfig(learning_rate=2e-4)
LOOP = LoopConfig()
CONTENTS = "content of"  # fingerprints, in what a training was started with

Objective = tuple[float, float]  # β, and the temperature of both distributions


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """From what, and to where."""

    output: Path  # folder for the model (actor/), samples, curves and numbers
    base: str | None = None  # folder or hub name of the model to start from, the reference; default: the environment's
    # JSONL of {prompt, chosen, rejected}; default: responses of the reference, between which the reward chooses
    data: Path | None = None
    pairs: int = 4096  # pairs to sample where there is no data
    beta: float | None = None  # β, weight of the KL to the reference; default: the environment's kl_coef

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, ("pairs",))
        if self.beta is not None and self.beta <= 0:
            raise ValueError(f"beta must be above 0, got {self.beta}; 0.1 is usual.")
        if self.data is not None and self.pairs != DPOConfig.pairs:
            raise ValueError("pairs is the number of pairs to sample where there is no data; leave one of them out.")


@dataclass(frozen=True)
class _Start:
    """Everything that the training needs, and how to measure what comes of it."""

    job: Job
    model: PreTrainedModel  # the policy
    objective: Objective
    training: Pairs
    held_out: Pairs
    clusters: list[str]  # their prompts
    before: Measured
    reopen: Callable[[], Setting]
    rows: Rows  # all of them
    scored: bool  # whether there is a reward to report


def dpo(
    config: DPOConfig, where: SettingConfig, learning: PreferenceConfig = DEFAULT, loop: LoopConfig = LOOP
) -> dict[str, Any]:
    """Train, write the results to the output folder, and return the summary, which is also written to summary.json."""
    Job(config.output, {}, loop).check(compare=False)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    start = _prepare(config, where, (learning, loop), console)  # the reference leaves memory with its return
    with start.job.held():
        summary = _learn(config, where, learning, start)
    console.print("\n".join(result_lines(summary, config.output)))
    return summary


def _learn(config: DPOConfig, where: SettingConfig, learning: PreferenceConfig, start: _Start) -> dict[str, Any]:
    """Train, measure, and write everything to the output folder. Returns the summary."""
    if config.data is None:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in start.rows.rows)
        write_text(config.output / PAIRS, "".join(lines))
    trained = fit(
        start.model, start.training, learning, start.objective, start.job, lambda: _held_out_numbers(start, learning)
    )
    setting = start.reopen()
    after = _measure(setting, start.model, start.objective, start.scored)
    numbers = measure_pairs(start.model, start.held_out, learning, start.objective)
    settings = {"env": where.env, "env_arg": list(where.env_arg), "base": config.base, **asdict(learning)}
    settings |= {"beta": start.objective[0], "temperature": start.objective[1]}
    settings |= {"held_out": where.held_out, "gold": where.gold}
    results = Results(
        task=setting.task,
        settings=settings,
        data=_data(config, start),
        fingerprints=start.job.started_with[CONTENTS],
        trained=trained,
        held_out=numbers,
        clusters=start.clusters,
        before=start.before,
        after=after,
    )
    save_prompts(config.output / HELD_OUT, setting.held_out)
    summary = write_results(config.output, start.model, results)
    start.job.finish()
    return summary


def _prepare(
    config: DPOConfig, where: SettingConfig, how: tuple[PreferenceConfig, LoopConfig], console: Console
) -> _Start:
    """Build the task, read or sample the pairs, and measure what the policy starts from."""
    learning, loop = how
    read = None if config.data is None else read_pairs(config.data)
    if read is None and learning.max_length != PreferenceConfig.max_length:
        raise ValueError(
            "max_length is for pairs of a file; sampled responses end at --env.max-new-tokens. Leave it out, or give "
            "--data."
        )
    if read is not None and "margin" in read[0]:
        console.print("note: the pairs have margins, which these losses do not read.")
    changes = _changes(config, where, read)
    own, evaluated, share = list[Any](), None, learning.held_out_pairs
    if read is not None and "prompts" in changes:
        changes["prompts"] = _prompts(read)
        if where.held_out is None:  # some of the prompts are evaluated on, and no pair of those kept apart is left
            parts, share = split_rows(read, share, learning.seed), 0.0
            changes["prompts"], own = _prompts(parts[0]), _prompts(parts[1])
            evaluated = own[: where.evaluation_prompts]

    def reopen() -> Setting:
        return open_setting(where, learning.seed, changes, evaluated)

    setting = reopen()
    task = setting.task
    job = Job(config.output, _started_with(config, where, learning, setting), loop)
    job.check()
    if task.masks:
        raise ValueError(
            "the loss of dpo is of the whole distribution of a policy, and action_mask cuts it; leave action_mask out."
        )
    objective = _objective(config, setting)
    rows = (
        sample_pairs(setting, config.pairs, learning.seed, console)
        if read is None
        else tokenize(read, task, learning.max_length)
    )
    apart = {*setting.held_out.texts, *map(text_of, own)}
    training, held_out = _split(rows, apart, share, learning.seed)
    console.print(_title(config, setting, objective, (learning, len(training.pairs), len(held_out.pairs))))
    reference, scored = task.load_reference().model, changes.get("reward") is not unscored
    before = _measure(setting, reference, objective, scored)
    model = copy.deepcopy(reference).float().requires_grad_(True).eval()  # as trained, so that h starts at 0
    pairs, held_out_pairs = (
        _with_reference(model, part, learning, (objective[1], console)) for part in (training, held_out)
    )
    clusters = [text_of(row["prompt"]) for row in held_out.rows]
    return _Start(job, model, objective, pairs, held_out_pairs, clusters, before, reopen, rows, scored)


def unscored(prompts: list[str], responses: list[str]) -> list[float]:
    """The reward where none is named: 0, which is not reported."""
    return [0.0] * len(responses)


def _changes(config: DPOConfig, where: SettingConfig, read: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Arguments of gym.make that the command's own settings and the pairs decide.

    With data, a model of the user's own needs no reward and no prompts: there are pairs to learn from, and theirs are
    the prompts. Those two are then placeholders here. Chats are written by the chat template.
    """
    arguments = gym.spec(id_of(where.env)).kwargs | where.arguments()
    if config.base is not None and "reference" in where.arguments():
        raise ValueError("--base and --env.reference name the same model; leave one of them out.")
    if config.beta is not None and "kl_coef" in where.arguments():
        raise ValueError("--beta and --env.kl-coef are the same β; leave one of them out.")
    changes: dict[str, Any] = {} if config.base is None else {"reference": config.base}
    reference = (arguments | changes).get("reference")
    if read is None or reference is None or is_embedded(reference):
        return changes
    placeholders: dict[str, Any] = {"reward": unscored, "prompts": []}
    if not isinstance(read[0]["prompt"], str):
        placeholders["chat"] = True
    return changes | {name: value for name, value in placeholders.items() if arguments.get(name) is None}


def _objective(config: DPOConfig, setting: Setting) -> Objective:
    beta = setting.task.config.kl_coef if config.beta is None else config.beta
    if beta == 0:
        raise ValueError("kl_coef is 0, and without a KL to the reference there is no DPO; give --beta 0.1 or so.")
    return beta, setting.task.config.temperature


def _prompts(rows: list[dict[str, Any]]) -> list[Any]:
    """The distinct prompts of rows, in their order."""
    return list({json.dumps(row["prompt"]): row["prompt"] for row in rows}.values())


def _split(rows: Rows, apart: Collection[str], share: float, seed: int) -> tuple[Rows, Rows]:
    """Pairs to train on, and held-out ones: those of the prompts that are kept apart, and more up to the share.

    No pair to train on has a prompt that the policy is evaluated on.
    """
    indexed: list[dict[str, Any]] = [row | {"index": index} for index, row in enumerate(rows.rows)]
    outside = [row for row in indexed if text_of(row["prompt"]) not in apart]
    inside = [row["index"] for row in indexed if text_of(row["prompt"]) in apart]
    if not outside:
        raise ValueError("every pair has a prompt that is held out for the evaluation; give pairs of other prompts.")
    missing, prompts = share * len(indexed) - len(inside), {text_of(row["prompt"]) for row in outside}
    if not inside or (missing >= 1 and len(prompts) > 1):
        outside, more = split_rows(outside, missing / len(outside), seed)
        inside += [row["index"] for row in more]
    return rows.select([row["index"] for row in outside]), rows.select(inside)


def _with_reference(
    reference: PreTrainedModel, rows: Rows, learning: PreferenceConfig, how: tuple[float, Console]
) -> Pairs:
    """Pairs with the reference's log-probabilities. how: the temperature, and where to show progress."""
    size, count = max(1, learning.batch_size // learning.gradient_accumulation), len(rows.pairs)
    with Bar(how[1], count, 0, ("reading with the reference", "pair")) as bar:

        def tell(done: int) -> None:
            if how[1].is_terminal or done == count or (10 * done) // count > (10 * (done - size)) // count:
                bar.show(done, "read by the reference")

        return Pairs(rows.pairs, reference_log_probs(reference, rows.pairs, how[0], size, tell))


def _measure(setting: Setting, model: PreTrainedModel, objective: Objective, scored: bool) -> Measured:
    evaluation = setting.evaluate(model)
    if not scored:
        evaluation = replace(evaluation, score=[])
    return Measured(evaluation, setting.records(model, evaluation, objective[0]))


def _held_out_numbers(start: _Start, learning: PreferenceConfig) -> dict[str, float]:
    measured = measure_pairs(start.model, start.held_out, learning, start.objective)
    return {f"held_out_{name}": sum(values) / len(values) for name, values in measured.items()}


def _title(config: DPOConfig, setting: Setting, objective: Objective, job: tuple[PreferenceConfig, int, int]) -> str:
    learning, training, held_out = job
    return (
        f"{learning.loss} on {'pairs chosen by the reward' if config.data is None else config.data} "
        f"({setting.task.device}): {training} pairs, {held_out} held out; β {objective[0]:g}, temperature "
        f"{objective[1]:g}; {total_steps(learning, training)} steps of {learning.batch_size} pairs at learning rate "
        f"{learning.learning_rate:g}; evaluated on {len(setting.held_out)} held-out prompts.\n"
        f"results in {config.output}/"
    )


def _data(config: DPOConfig, start: _Start) -> dict[str, Any]:
    source = f"{config.pairs} sampled, chosen by the reward" if config.data is None else str(config.data)
    counts = {"training pairs": len(start.training.pairs), "held-out pairs": len(start.held_out.pairs)}
    return {"pairs": source, **counts, "SHA-256 of the tokens": start.rows.hash()}


def _started_with(
    config: DPOConfig, where: SettingConfig, learning: PreferenceConfig, setting: Setting
) -> Mapping[str, Any]:
    """What decides the weights: contents of the data and of the models, and the settings."""
    data = config.pairs if config.data is None else file_hash(config.data)
    contents = fingerprints(setting.task, setting.training, setting.held_out)
    own = {"data": data, "base": config.base, "beta": config.beta, CONTENTS: contents}
    return own | {"settings": asdict(learning), "environment": asdict(where) | {"env_arg": where.arguments()}}
