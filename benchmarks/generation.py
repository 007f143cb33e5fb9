"""Tokens per second of generation: here, by Hugging Face's `generate`, and of a forward over the finished texts.

`python -m benchmarks.generation`. The forward reads whole texts at once, without gradients: the best that the machine
can do with the same model. All run in turns, on one thread, with the same model, prompts, temperature and stop ids;
seconds are those of the CPU. *Fixed*: the stop id is one that is hardly ever written, so responses fill the budget.
*Ragged*: they end after 19 of 48 tokens on average, by the embedded model's own end token, or by stop ids chosen from a
sample. Responses that are written here come with their log-probabilities, those of `generate` without.

Scoring (the reference's log-probabilities and the reward model's scores) is timed on the very responses that were
written in the same turn. Last, the embedded task stepped by an ordinary client through its environments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from matplotlib.figure import Figure
from transformers import PreTrainedModel

import textenv  # registers TextGen-v0
from benchmarks import rows as result_rows
from benchmarks.support import models, ours
from benchmarks.support.measure import Times, interleaved, one_thread, ratios, show, table
from benchmarks.support.pictures import logarithmic
from textenv.prompts.tokenized import Prompts
from textenv.state import TextState, left_aligned
from textenv.task import Task

SHAPES = ("GPT-2, 0.2M", models.EMBEDDED, "Llama, 1M", "GPT-2, 10M", "Llama, 25M")
LARGE = "Llama, 135M"  # random weights; SmolLM2-135M in its place if there is a folder of it
MEAN = 19 / 48  # of the budget, the mean length of ragged responses


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and repeats."""

    names: tuple[str, ...] = (*SHAPES, LARGE)  # models: shapes of random weights, and `embedded`
    smollm2: Path | None = None  # folder of SmolLM2-135M, which then stands in for the random model of its shape
    rows: tuple[int, ...] = (64, 256)  # responses written in parallel
    large_rows: int = 64  # the most rows of models of more than 100M parameters
    kinds: tuple[str, ...] = ("fixed", "ragged")  # lengths
    prompt: int = 24  # widest prompt, tokens
    response: int = 48  # budget, tokens
    repeats: int = 7  # turns; a model of more than 100M parameters gets three
    step_rows: int = 64  # episodes stepped in parallel
    seed: int = 0  # of the tokens
    output: Path | None = None  # folder of the results; by default benchmarks/results
    quick: bool = False  # small sizes, to see that it runs


QUICK: dict[str, Any] = {
    "names": ("GPT-2, 0.2M", models.EMBEDDED),
    "rows": (4, 8),
    "prompt": 24,
    "response": 8,
    "repeats": 2,
    "step_rows": 4,
}


def tasks_of(name: str, count: int, settings: Settings) -> dict[str, Task]:
    """A task for each kind of lengths, by kind."""
    if name == models.EMBEDDED:
        ragged = models.embedded_task(max_prompt_tokens=settings.prompt, max_new_tokens=settings.response)
        ragged = replace(ragged, prompts=ragged.prompts.select(range(count)))
        assert ragged.reference is not None
        tasks = {"fixed": replace(ragged, stop_token_ids=(models.least_likely_id(ragged.reference.model),))}
        return tasks | {"ragged": ragged}
    language = models.language_model(name, settings.smollm2)
    fixed = models.task_of(language, count, settings.prompt, settings.response, shortest=settings.prompt // 2)
    tokens = ours.write(fixed, language.model, fixed.prompts, torch.Generator().manual_seed(1)).state.response_ids
    stops = models.stops_for_mean(tokens, fixed.vocabulary, MEAN * settings.response)
    return {"fixed": fixed, "ragged": replace(fixed, stop_token_ids=stops)}


@torch.no_grad()
def write_by_transformers(task: Task, model: Any, prompts: Prompts) -> int:
    """Responses by Hugging Face's `generate`; returns the number of tokens up to the stops."""
    texts = model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask.long(),
        do_sample=True,
        temperature=task.config.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=task.config.max_new_tokens,
        eos_token_id=list(task.stop_token_ids),
        pad_token_id=task.pad_token_id,
    )
    stopping = torch.zeros(task.vocabulary, dtype=torch.bool)
    stopping[list(task.stop_token_ids)] = True
    return int(models.lengths_with(texts[:, prompts.input_ids.shape[1] :], stopping).sum())


@torch.no_grad()
def read(model: PreTrainedModel, state: TextState, rows_per_pass: int = 32) -> int:
    """Forward whole texts, those of similar length together, without padding them to the widest of all."""
    order = state.attention_mask.sum(1).argsort()
    for part in order.split(rows_per_pass):
        ids, _ = left_aligned(state.input_ids[part], state.attention_mask[part])
        model(input_ids=ids, use_cache=False)
    return int(state.length.sum())


def measure(name: str, kind: str, task: Task, count: int, settings: Settings) -> dict[str, Any]:
    """One row of the table."""
    assert task.reference is not None
    model, prompts = task.reference.model, task.prompts.select(range(count))
    generator, latest = torch.Generator().manual_seed(settings.seed), dict[str, TextState]()
    torch.manual_seed(settings.seed)

    def way(variant: str) -> Callable[[], float]:
        def call() -> float:
            latest["state"] = ours.write(task, model, prompts, generator, variant).state
            return int(latest["state"].length.sum())

        return call

    def scoring() -> float:
        ours.score(task, latest["state"], prompts)
        return int(latest["state"].length.sum())

    methods: dict[str, Callable[[], float]] = {"generate": lambda: write_by_transformers(task, model, prompts)}
    methods |= {variant: way(variant) for variant in reversed(ours.GENERATE)}  # `ours` last: its texts are scored
    methods |= {"scoring": scoring, "forward": lambda: read(model, latest["state"])}
    large = models.parameters_of(model) > 100e6
    times = interleaved(methods, min(settings.repeats, 3) if large else settings.repeats)
    return describe(times) | {
        "model": name,
        "parameters": models.parameters_of(model),
        "rows": count,
        "lengths": kind,
        "mean_length": sum(times["ours"].work) / len(times["ours"].work) / count,
        "mean_length_generate": sum(times["generate"].work) / len(times["generate"].work) / count,
    }


def describe(times: dict[str, Times]) -> dict[str, Any]:
    """Speeds, and ratios of the cost of a token, turn by turn."""
    row: dict[str, Any] = {"tokens_per_second": {name: each.speed for name, each in times.items()}}
    for name in ours.GENERATE:
        own = times[name]
        row[f"{name} / generate"] = ratios(times["generate"].costs(), own.costs())
        row[f"{name} / generate, clock"] = ratios(times["generate"].costs(clock=True), own.costs(clock=True))
        row[f"{name} / forward"] = ratios(times["forward"].costs(), own.costs())
    row["scoring / generation, time"] = ratios(times["scoring"].costs(), times["ours"].costs())
    return row | {"all": {name: asdict(each) for name, each in times.items()}}


@torch.no_grad()
def run_steps(env: VectorEnv, model: PreTrainedModel, temperature: float, steps: int) -> int:
    """Run `steps` steps with a policy that reads observations; returns the number of tokens written."""
    observation, _ = env.reset(seed=0)
    ended, tokens = np.zeros(env.num_envs, dtype=bool), 0
    for _ in range(steps):
        ids, mask = (torch.from_numpy(observation[key]).long() for key in ("input_ids", "attention_mask"))
        ids, length = left_aligned(ids, mask)
        chosen = model(input_ids=ids).logits[torch.arange(len(length)), length - 1] / temperature  # [B, V]
        observation, _, terminated, _, _ = env.step(torch.distributions.Categorical(logits=chosen).sample().numpy())
        tokens += int((~ended).sum())  # a row that ended in the step before only resets
        ended = terminated
    return tokens


def stepping(settings: Settings) -> dict[str, Any]:
    """The embedded task by single environments, by the vector environment, and by the fast path with its scores."""
    count = settings.step_rows
    vector = gym.make_vec("TextGen-v0", num_envs=count, device="cpu")
    single = [lambda: gym.make("TextGen-v0", device="cpu")] * count
    sync = SyncVectorEnv(single, autoreset_mode=AutoresetMode.NEXT_STEP)
    task = models.embedded_task()
    assert task.reference is not None
    model, prompts, temperature = task.reference.model, task.prompts.select(range(count)), task.config.temperature
    generator = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)

    def fast() -> int:
        state = ours.write(task, model, prompts, generator).state
        ours.score(task, state, prompts)
        return int(state.length.sum())

    steps = min(24, settings.response)
    methods: dict[str, Callable[[], float]] = {
        "single environments": lambda: run_steps(sync, model, temperature, steps),
        "vector environment": lambda: run_steps(vector, model, temperature, steps),
        "fast path": fast,
    }
    times = interleaved(methods, min(settings.repeats, 5))
    row: dict[str, Any] = {"model": models.EMBEDDED, "rows": count, "lengths": "stepping"}
    row["tokens_per_second"] = {name: each.speed for name, each in times.items()}
    for name in ("single environments", "vector environment"):
        row[f"fast path / {name}"] = ratios(times[name].costs(), times["fast path"].costs())
    return row | {"all": {name: asdict(each) for name, each in times.items()}}


def lines_of(results: list[dict[str, Any]]) -> str:
    """The table of all models."""
    header = ["model", "rows", "lengths", *(f"{name} / generate" for name in ours.GENERATE)]
    header += ["ours / forward", "scoring / generation, time", "tokens/s: generate", *ours.GENERATE, "forward"]
    lines = []
    for row in results:
        speed = row["tokens_per_second"]
        lines.append(
            [
                f"{row['model']} ({row['parameters'] / 1e6:.1f}M)",
                row["rows"],
                f"{row['lengths']}, mean {row['mean_length']:.0f}",
                *(show(row[f"{name} / generate"]) for name in ours.GENERATE),
                show(row["ours / forward"]),
                show(row["scoring / generation, time"]),
                *(f"{speed[name]:,.0f}" for name in ("generate", *ours.GENERATE, "forward")),
            ]
        )
    return table(header, lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second against parameters, a panel for each kind of lengths."""
    kinds = list(dict.fromkeys(row["lengths"] for row in results))
    counts = list(dict.fromkeys(row["rows"] for row in results))
    figure = Figure(figsize=(5.5 * len(kinds), 4), layout="constrained")
    colors = {"forward": "tab:gray", "generate": "tab:orange"}
    colors |= dict(zip(ours.GENERATE, ("tab:blue", "tab:green", "tab:purple"), strict=False))
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for count, style in zip(counts, ("-", "--", ":"), strict=False):
            shown = sorted(
                (row for row in results if (row["lengths"], row["rows"]) == (kind, count)),
                key=lambda row: row["parameters"],
            )
            for name, color in colors.items():
                speeds = [row["tokens_per_second"][name] for row in shown]
                axes.plot([row["parameters"] for row in shown], speeds, style, color=color, marker=".")
                if count == counts[0]:
                    axes.plot([], [], color=color, label=name)
            axes.plot([], [], style, color="black", label=f"{count} rows")
        axes.set(xlabel="parameters", ylabel="tokens per CPU second, one thread", title=kind)
        logarithmic(axes, sorted({row["parameters"] for row in results if row["lengths"] == kind}))
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(settings: Settings) -> None:
    """Measure everything and print the tables."""
    one_thread()
    settings = replace(settings, **QUICK) if settings.quick else settings
    folder, results = result_rows.folder(settings.output, settings.quick), []
    for name in settings.names:
        name = models.SMOLLM2 if name == LARGE and settings.smollm2 else name
        large = name in (LARGE, models.SMOLLM2)
        counts = [count for count in settings.rows if not large or count <= settings.large_rows]
        tasks = tasks_of(name, max(counts), settings)
        for count in counts:
            for kind in settings.kinds:
                results.append(measure(name, kind, tasks[kind], count, settings))
                print(lines_of(results[-1:]).splitlines()[-1], flush=True)
    steps = stepping(settings)
    path = result_rows.write("generation", [*results, steps], vars(settings) | {"textenv": textenv.__version__}, folder)
    draw(results, folder / "generation.png")
    print(f"\n{lines_of(results)}\n")
    for name in ("single environments", "vector environment"):
        print(f"fast path / {name}: {show(steps[f'fast path / {name}'], 1)}")
    print(f"written to {path}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
