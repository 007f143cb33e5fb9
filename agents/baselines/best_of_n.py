"""`python -m agents best-of-n`: the best of n samples by the score, without any learning.

Its score, gold score and KL for each n show how far the reward can be trusted, and what a learner has to beat at the
same KL (Gao et al. 2023). One set of N samples per prompt serves every n. Owns the sampling, its file of responses,
from which a stopped job goes on, and the results; the mathematics is in order.py, the picture in frontier.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from agents.baselines.frontier import Curve, check_same_task, draw_frontier, read_run, reward_of
from agents.baselines.order import best_of_weights, kl_bound
from agents.baselines.setting import Setting, SettingConfig, load_policy, open_setting
from agents.config import check_counts
from agents.reporting.report import Bar, machine
from agents.seeds import seed_of
from agents.text.evaluation import rate
from agents.text.fingerprints import fingerprints, of_weights
from textenv.generation import generate, random_numbers, score_responses
from textenv.json_lines import read_json_lines
from textenv.models.sampling import Sampling
from textenv.prompts.tokenized import Prompts
from textenv.settings import check_new_folder, check_types
from textenv.state import own_settings
from textenv.task import Task
from textenv.training.files import LOCK, UNFINISHED, locked, remove_unfinished, replacing, write_json

RESPONSES, STARTED, RESULTS, PICTURE = "responses.jsonl", "config.json", "best_of_n.json", "best_of_n.png"
FIRST = {LOCK, f"{STARTED}{UNFINISHED}"}  # all that a process leaves which is killed before its job has begun

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig:
    """What is sampled, and what it is drawn beside."""

    output: Path  # folder for the numbers, the picture and the responses
    model: str | None = None  # folder or hub name of the model to sample from, such as RUN/actor; default: reference
    samples: int = 64  # N, responses to each prompt; every n up to it is measured
    run: tuple[Path, ...] = ()  # folders of finished runs, whose curves are drawn beside; repeatable
    batch_size: int = 512  # responses written at a time; affects speed and memory, and results by rounding alone
    seed: int = 0  # of the samples, and of the split of the prompts
    resume: bool = False  # go on with a job that was stopped, in its output folder

    def __post_init__(self) -> None:
        check_types(self)
        check_counts(self, ("samples", "batch_size"))
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be 0 or more and below 2^32, got {self.seed}.")


def best_of_n(config: BestOfNConfig, where: SettingConfig) -> list[Row]:
    """Sample, measure, and write table, picture and responses to the output folder. Returns a row for each n."""
    curves = [read_run(folder) for folder in config.run]  # raises before any work
    if not config.resume:
        _check_new(config.output)
    setting = open_setting(where, config.seed)
    reference = setting.task.load_reference().model
    model = reference if config.model is None else load_policy(config.model, setting.task)
    started = started_with(config, where, setting, model)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    reward = reward_of(where.env, where.arguments())
    for folder in config.run:
        if check_same_task(folder, started["hashes"], reward):
            console.print(f"note: the curve of {str(folder)!r} is of other held-out prompts than these samples.")
    _claim(config)
    with locked(config.output):
        done = _open(config, setting, started)
        console.print(_title(config, setting))
        samples = _sample_all(config, setting, model, done, console)
        rows = best_of(samples, config.samples)
        curve = Curve("best of n", [row | {"label": str(row["n"])} for row in rows])
        draw_frontier(config.output / PICTURE, [curve, *curves])
        results = {"rows": rows, "prompts": len(samples)}
        write_json(config.output / RESULTS, results | asdict(where) | _plain(config) | machine(setting.task.device))
    console.print("\n".join([*table(rows), f"look at {config.output / PICTURE}, read {config.output / RESPONSES}"]))
    return rows


def best_of(samples: Sequence[Row], count: int) -> list[Row]:
    """For n = 1, 2, 4, ... and N: the bound of the KL, and means with standard errors over the prompts.

    samples: a row for each prompt, with `score`, `log_ratio` and perhaps `gold`, N numbers each.
    """
    names = [name for name in ("score", "gold", "log_ratio", "length") if name in samples[0]]
    numbers = {name: torch.tensor([row[name] for row in samples], dtype=torch.float64) for name in names}  # [M, N]
    rows = []
    for n in sizes(count):
        weights = best_of_weights(numbers["score"], n)  # [M, N]
        means = {name: (weights * values).sum(1) for name, values in numbers.items()}  # [M] each
        # log(π_best/π_ref) = log(π_best/π) + log(π/π_ref): the bound is of the first, the second is measured.
        row: Row = {"n": n, "kl": kl_bound(n) + float(means.pop("log_ratio").mean())}
        for name, values in means.items():
            error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else None
            row |= {name: float(values.mean()), f"{name}_error": error}
        rows.append(row)
    return rows


def sizes(count: int) -> list[int]:
    """1, 2, 4, ... and N."""
    return sorted({*(2**power for power in range(count.bit_length())), count})


def table(rows: Sequence[Row]) -> list[str]:
    """The results as lines of text."""
    names = [name for name in ("score", "gold", "length") if name in rows[0]]
    lines = [f"{'n':>5} {'KL at most':>11} " + " ".join(f"{name:>16}" for name in names)]
    for row in rows:
        cells = []
        for name in names:
            error = row[f"{name}_error"]
            mean = f"{row[name]:.1f}" if name == "length" else f"{row[name]:+.2f}"
            cells.append(mean + ("" if error is None else f" ± {error:.2f}"))
        lines.append(f"{row['n']:>5} {row['kl']:>11.2f} " + " ".join(f"{cell:>16}" for cell in cells))
    return lines


@own_settings()
def sample_prompts(
    setting: Setting, model: PreTrainedModel, prompts: Prompts, numbers: Tensor, frozen: bool
) -> Iterator[Row]:
    """N responses to each prompt: a row with `prompt`, `responses`, `score`, `log_ratio`, `length`, and `gold`.

    numbers: random ones, float64 [M · N, R]. frozen: whether the model is the reference, so that log(π/π_ref) is 0.
    """
    task, count = setting.task, len(numbers) // len(prompts)
    repeated = prompts.select([row for row in range(len(prompts)) for _ in range(count)])
    generation = generate(task, model, repeated, Sampling(temperature=task.config.temperature), numbers)
    scored = score_responses(task, generation.state, repeated.texts, fields=repeated.fields)
    ratio = torch.zeros_like(generation.log_prob) if frozen else generation.log_prob - scored.reference_log_prob
    columns: dict[str, Any] = {
        "responses": scored.responses,
        "score": scored.score.tolist(),
        "log_ratio": ratio.sum(1).tolist(),
        "length": generation.state.generated_length.tolist(),
    }
    if setting.gold is not None:
        columns["gold"] = rate(setting.gold, list(repeated.texts), scored.responses)
    for index, prompt in enumerate(prompts.texts):
        own = slice(index * count, (index + 1) * count)
        yield {"prompt": prompt} | {name: values[own] for name, values in columns.items()}


def _sample_all(
    config: BestOfNConfig, setting: Setting, model: PreTrainedModel, done: list[Row], console: Console
) -> list[Row]:
    """All rows, those of a stopped job first. Each batch is in the file of responses before the next one starts."""
    reference = setting.task.load_reference()
    frozen = model is reference.model
    task = replace(setting.task.without_normalization(), reference=None if frozen else reference)
    setting, rows, prompts = replace(setting, task=task), list(done), setting.held_out
    with _resumable(config), Bar(console, len(prompts), len(done), ("sampling", "prompt")) as bar:
        for start in range(len(done), len(prompts), _at_once(config)):
            indices = range(start, min(start + _at_once(config), len(prompts)))
            numbers = torch.cat([_numbers(task, config, index) for index in indices])
            batch = list(sample_prompts(setting, model, prompts.select(indices), numbers, frozen))
            with (config.output / RESPONSES).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch)
            rows += batch
            best = [max(row["score"]) for row in rows]
            bar.show(len(rows), f"score of the best of {config.samples} {sum(best) / len(best):+.2f}")
    return rows


@contextmanager
def _resumable(config: BestOfNConfig) -> Iterator[None]:
    """Add to an error how to go on; not to a ValueError, which would come again."""
    try:
        yield
    except (KeyboardInterrupt, OSError, RuntimeError) as error:
        error.add_note(f"Give --resume to go on with the prompts that {str(config.output / RESPONSES)!r} has not yet.")
        raise


def _at_once(config: BestOfNConfig) -> int:
    """Prompts of a batch."""
    return max(1, config.batch_size // config.samples)


def _numbers(task: Task, config: BestOfNConfig, prompt: int) -> Tensor:
    """The random numbers of one prompt's responses, whatever is sampled beside it. Float64 [N, R]."""
    generator = torch.Generator(task.device).manual_seed(seed_of(config.seed, "best-of-n", prompt))
    return random_numbers(task, config.samples, generator)


def started_with(
    config: BestOfNConfig, where: SettingConfig, setting: Setting, model: PreTrainedModel
) -> dict[str, Any]:
    """What decides the responses and their numbers, as JSON gives it back."""
    task = setting.task
    named = {name: getattr(task.config, name) for name in ("temperature", "max_new_tokens", "dtype")}
    hashes = fingerprints(task, setting.training, setting.held_out) | {"model": of_weights(model)}
    how = {name: getattr(config, name) for name in ("samples", "batch_size", "seed")} | {"reward": task.reward.name}
    return json.loads(json.dumps(asdict(where) | {"env_arg": where.arguments()} | how | named | {"hashes": hashes}))


def _check_new(folder: Path) -> None:
    """Raise ValueError for the folder of a new job that holds more than a killed process leaves before its job."""
    found = set(os.listdir(folder)) if os.path.isdir(folder) and os.access(folder, os.R_OK | os.W_OK) else set()
    if not found or found - FIRST:
        check_new_folder(folder, "output folder")


def _claim(config: BestOfNConfig) -> None:
    """Create the folder of a new job. Raises ValueError if there is no job to resume."""
    if not config.resume:
        config.output.mkdir(parents=True, exist_ok=True)
    elif not os.path.isfile(config.output / STARTED):
        raise ValueError(f"{str(config.output)!r} holds no job to resume; leave --resume out.")


def _open(config: BestOfNConfig, setting: Setting, started: Mapping[str, Any]) -> list[Row]:
    """Begin a new job, or read the rows of a stopped one. Raises ValueError if it was another job."""
    if config.resume:
        remove_unfinished(config.output)
        _check_same(config.output, started)
        return _rows_done(config, setting)
    _check_new(config.output)  # another process may have begun here while this one loaded its models
    write_json(config.output / STARTED, started)
    return []


def _check_same(folder: Path, started: Mapping[str, Any]) -> None:
    """Raise ValueError if a stopped job was started with anything else."""
    file = folder / STARTED
    try:
        before = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"{str(file)!r} is damaged, so this job cannot be resumed; choose another output folder.")
    changed = sorted(name for name in started if started[name] != before.get(name))
    if changed:
        raise ValueError(
            f"the job in {str(folder)!r} was started with another content of: {', '.join(changed)}; resume with "
            "what it was started with, or choose another output folder."
        )


def _rows_done(config: BestOfNConfig, setting: Setting) -> list[Row]:
    """The rows of a stopped job: those of whole batches, since what is sampled beside a prompt decides its rounding.

    Its file keeps no others. Raises ValueError for rows that this job has not written.
    """
    file, texts = config.output / RESPONSES, setting.held_out.texts
    if not os.path.isfile(file):
        return []
    content = file.read_bytes()
    lines = [line for line in content.split(b"\n")[:-1] if line.strip()]  # a process may be killed while it writes one
    count = len(lines) if len(lines) >= len(texts) else len(lines) - len(lines) % _at_once(config)
    kept = b"".join(line + b"\n" for line in lines[:count])
    if kept != content:
        with replacing(file) as new:
            new.write(kept)
    read = read_json_lines(file, '{"prompt": "...", "responses": []}')
    names = ["responses", "score", "log_ratio", "length", *(["gold"] if setting.gold is not None else [])]
    for index, (place, row) in enumerate(read):
        if index >= len(texts) or not _is_of(row, texts[index], names, config.samples):
            raise ValueError(
                f"{place}: not what this job writes there, which is prompt {index + 1} of {len(texts)} with "
                f"{config.samples} each of {', '.join(names)}; remove this line and all below it, and --resume."
            )
    return [row for _, row in read]


def _is_of(row: Any, prompt: str, names: Sequence[str], count: int) -> bool:
    """Whether a row is of a prompt, and has `count` responses and numbers."""
    if not isinstance(row, dict) or row.get("prompt") != prompt:
        return False
    columns = [row.get(name) for name in names]
    return all(
        isinstance(column, list)
        and len(column) == count
        and all(type(value) in ((str,) if name == "responses" else (int, float)) for value in column)
        for name, column in zip(names, columns, strict=True)
    )


def _title(config: BestOfNConfig, setting: Setting) -> str:
    return (
        f"best of n ({setting.task.device}): {config.samples} responses of {config.model or 'the reference'} to each "
        f"of {len(setting.held_out)} held-out prompts; reward {setting.task.reward.name}\nresults in {config.output}/"
    )


def _plain(config: BestOfNConfig) -> dict[str, Any]:
    return {"model": config.model, "samples": config.samples, "seed": config.seed, "run": [str(p) for p in config.run]}
