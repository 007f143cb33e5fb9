"""A run from beginning to end: build, measure, train, measure again, and leave the results in a folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from rich.console import Console

from agents import checkpoint, plots, report
from agents.config import TrainConfig
from agents.evaluation import Evaluation, evaluate, find_gold, mean, split_prompts
from agents.networks import language_model_of
from agents.rollout import collect
from agents.trainer import Trainer
from textenv.env import TextGenEnv
from textenv.loading import quietly
from textenv.prompts import Prompts
from textenv.task import Task

EVALUATION_SEED = 0  # the same responses are drawn whenever the same policy is measured


def make_task(config: TrainConfig) -> Task:
    """The task inside the environment that the configuration names."""
    try:
        env = gym.make(config.env, **config.env_arguments()).unwrapped
    except (gym.error.Error, TypeError) as error:
        raise ValueError(f"gym.make cannot make {config.env!r}: {error}") from error
    if not isinstance(env, TextGenEnv):
        raise ValueError(f"the learners here write text, and {config.env!r} is no TextGen environment; use TextGen-v0.")
    spec = env.spec
    if spec is not None and spec.max_episode_steps is not None:
        raise ValueError(
            f"the learners here write whole responses, and max_episode_steps={spec.max_episode_steps} would cut them "
            "unscored; use max_new_tokens, whose end is scored."
        )
    return env.task


def train(config: TrainConfig, algorithm_config: Any) -> dict[str, Any]:
    """Trains, and returns the summary that it also writes."""
    console = Console()
    folder = Path(config.run or default_folder(config))
    if config.resume:
        checkpoint.check_same(folder, config, algorithm_config)
    elif folder.exists():
        checkpoint.refuse(folder)
    task = make_task(config)
    prompts, held_out = split_prompts(task, config)
    gold = find_gold(task, config)
    trainer = Trainer(config, algorithm_config, task, prompts)
    if config.resume:
        checkpoint.load_checkpoint(folder, trainer)
    else:
        checkpoint.save_config(folder, config, algorithm_config)
        checkpoint.save_checkpoint(folder, trainer)  # from here on the run can be resumed, whatever happens
    console.print(describe(config, task, prompts, held_out, folder), highlight=False)
    before = measure(task, task.load_reference().model, held_out, gold, config)
    scalars = report.Scalars(folder, trainer.iteration)
    with report.Bar(console, config.iterations, trainer.iteration) as bar:
        for iteration in trainer.iterate():
            metrics = iteration.metrics
            if gold is not None:
                texts = list(iteration.rollout.prompts)
                metrics["gold"] = mean(list(gold(texts, iteration.rollout.judgement.responses)))
            scalars.write(iteration.number, metrics)
            bar.show(iteration.number, metrics)
            if iteration.number % config.checkpoint_every == 0 or iteration.number == config.iterations:
                checkpoint.save_checkpoint(folder, trainer)
    scalars.close()
    after = measure(task, language_model_of(trainer.actor), held_out, gold, config)
    summary = write_results(folder, trainer, (before, after), scalars.rows, held_out)
    show_summary(console, summary, folder)
    return summary


def measure(task: Task, model: Any, held_out: Prompts, gold: Callable | None, config: TrainConfig) -> Evaluation:
    """Held-out prompts, with the seed that every measurement of a run shares."""
    return evaluate(task, model, held_out, gold, EVALUATION_SEED, (config.rollout, config.micro_batch))


def write_results(
    folder: Path,
    trainer: Trainer,
    evaluations: tuple[Evaluation, Evaluation],
    rows: list[dict[str, Any]],
    held_out: Prompts,
) -> dict[str, Any]:
    """The actor, the pictures, the samples and the summary."""
    config, (before, after) = trainer.config, evaluations
    model = language_model_of(trainer.actor)
    with quietly():
        model.save_pretrained(folder / "actor")
        trainer.task.tokenizer.save_pretrained(folder / "actor")
    report.write_samples(folder / "samples.md", before, after)
    summary = {"env": config.env, "algorithm": config.algorithm, "seed": config.seed}
    summary |= report.make_summary(before, after)
    summary |= {"iterations": trainer.iteration, "tokens": trainer.tokens, "seconds": trainer.seconds}
    summary |= report.machine(trainer.task.device)
    report.write_json(folder / "summary.json", summary)
    plots.draw_curves(folder / "curves.png", rows, f"{config.algorithm} on {config.env}, seed {config.seed}")
    plots.draw_credit(folder / "credit.png", assign_credit(trainer, held_out))
    return summary


def assign_credit(trainer: Trainer, held_out: Prompts) -> plots.Credit:
    """Where the credit went in one response to a held-out prompt: the one of median length among eight."""
    generator = torch.Generator(trainer.task.device).manual_seed(EVALUATION_SEED)
    prompts = held_out.select(range(min(8, len(held_out))))
    rollout = collect(trainer.task, language_model_of(trainer.actor), prompts, generator, len(prompts))
    trainer.algorithm.prepare(rollout.data, len(prompts))
    lengths = rollout.data["mask"].sum(1)
    row = int(lengths.argsort()[len(lengths) // 2])
    data, length = rollout.data[row], int(lengths[row])
    penalty = trainer.task.config.kl_coef * (data["action_log_prob"] - data["reference_log_prob"])
    tokenizer = trainer.task.tokenizer
    return plots.Credit(
        prompt=prompts.texts[row],
        tokens=[repr(tokenizer.decode([token]))[1:-1] for token in data["action"][:length].tolist()],
        penalty=penalty[:length].tolist(),
        value=data["state_value"][:length, 0].tolist(),
        td_error=data["td_error"][:length, 0].tolist(),
        advantage=data["raw_advantage"][:length, 0].tolist(),
        score=float(data["score"]),
    )


def default_folder(config: TrainConfig) -> str:
    """A folder for a run without a name."""
    return f"runs/{config.env}-{config.algorithm}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def describe(config: TrainConfig, task: Task, prompts: Prompts, held_out: Prompts, folder: Path) -> str:
    """What is about to happen, in a line or two."""
    return (
        f"{config.algorithm} on {config.env} ({task.device}): {len(prompts)} prompts, {len(held_out)} held out; "
        f"reward {task.reward.name}, kl_coef {task.config.kl_coef:g}; {config.iterations} iterations of "
        f"{config.rollout} responses.\nresults in {folder}/"
    )


def show_summary(console: Console, summary: dict[str, Any], folder: Path) -> None:
    """The result in a few lines, for the terminal."""
    deviations = (summary["score_after"] - summary["score_before"]) / max(summary["score_std_before"], 1e-8)
    lines = [
        f"score {summary['score_before']:+.2f} → {summary['score_after']:+.2f} ({deviations:+.1f} standard deviations)",
        f"KL {summary['kl_per_response']:.1f} nats a response, length {summary['length_before']:.0f} → "
        f"{summary['length_after']:.0f} tokens, {summary['tokens']} tokens in {summary['seconds']:.0f} s",
        f"read {folder}/samples.md, look at {folder}/curves.png and credit.png, try: "
        f'python -m agents generate --run {folder} --prompt "..."',
    ]
    if "gold_before" in summary:
        lines.insert(1, f"gold  {summary['gold_before']:+.2f} → {summary['gold_after']:+.2f}")
    console.print("\n".join(lines), highlight=False)
