"""Correctness on the device: interfaces, gradients, ratios, the embedded job, resuming there and on a CPU."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents import checkpoint, run_folder
from agents.algorithms.registry import ALGORITHMS
from agents.presets import defaults
from agents.run import build
from agents.text.networks import distribution_of
from agents.trainer import Trainer
from benchmarks import rows as result_rows
from benchmarks.cuda.scale import Row, Scale, finite, random_model, task_for
from benchmarks.support.start import command
from textenv import TextGenConfig, build_task
from textenv.conformance import check_faces
from textenv.generation import generate, random_numbers
from textenv.models.decoding import Decoding
from textenv.models.sampling import Sampling
from textenv.torchrl_env import TextGenTorchEnv

TOLERANCES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SEEDS = (0, 1, 2)
MISMATCH = ("mismatch_mean", "mismatch_max", "effective_sample_size")  # of sampling and training in bf16


def conformance(scale: Scale) -> Iterator[Row]:
    """Smallest tolerance within which stepping and the fast path agree, per dtype of the frozen models."""
    for dtype in ("float32", "bfloat16"):
        task = build_task(TextGenConfig(dtype=dtype))
        for tolerance in TOLERANCES:
            try:
                check_faces(task, torchrl_env=TextGenTorchEnv(task, 4), tolerance=tolerance)
            except AssertionError as error:
                difference = str(error)
            else:
                yield {"case": dtype, "agrees_within": tolerance}
                break
        else:
            yield {"case": dtype, "agrees_within": None, "error": difference}


def first_update(scale: Scale) -> Iterator[Row]:
    """The first step: distance of the ratios from 1 before it, and whether metrics and weights are finite after it.

    Ratios are those of the training forward, in its micro-batches and with gradients.
    """
    for dtype, precision in (("float32", "float32"), ("float32", "bf16"), ("bfloat16", "bf16")):
        trainer = _trainer("ppo", scale, f"dtype={dtype}", precision=precision)
        collector, policy = trainer.collector, trainer.algorithm.networks.policy
        rollout = collector.collect(policy)
        trainer.algorithm.prepare(rollout.data)
        rows = collector.training_rows(rollout.data)
        changes = []
        for batch in collector.micro_batches(rows):
            with collector.autocast():
                log_prob = distribution_of(policy, batch).log_prob(batch["action"])
            changes.append((log_prob.detach() - batch["action_log_prob"])[batch["mask"]].abs())
        change = torch.cat(changes)
        metrics = trainer._backward(rows)
        trainer._step(metrics)
        yield {
            "case": f"{precision} learners, {dtype} frozen models",
            "largest_log_ratio": float(change.max()),
            "mean_log_ratio": float(change.mean()),
            **{name: rollout.metrics[name] for name in MISMATCH if name in rollout.metrics},
            "finite": finite(list(_weights(trainer).values())) and all(map(_is_finite, metrics.values())),
        }


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def algorithms(scale: Scale) -> Iterator[Row]:
    """Two iterations of every algorithm: whether weights are finite, and their largest change."""
    for name in ALGORITHMS:
        try:
            trainer = _trainer(name, scale)
            before = {key: value.clone() for key, value in _weights(trainer).items()}
            for _ in trainer.iterate():
                pass
            after = _weights(trainer)
            change = max(float((after[key] - before[key]).abs().max()) for key in before)
            yield {"case": name, "finite": finite(list(after.values())), "largest_change": change}
        except Exception as error:  # the other algorithms still run
            yield {"case": name, "error": f"{type(error).__name__}: {error}"[:400]}


def main_job(scale: Scale) -> Iterator[Row]:
    """The embedded job over three seeds in parallel, in other forms beside them, and its recorded results on a CPU."""
    cases = {f"seed {seed}": ("--seed", str(seed)) for seed in SEEDS}
    cases |= {"eager": ("--compile", "False"), "float32": ("--precision", "float32"), "adapters": ("--lora-rank", "16")}
    with tempfile.TemporaryDirectory() as work:
        folders = {case: Path(work) / case for case in cases}
        started = {
            case: _start("train", "--run", str(folders[case]), *flags, *scale.job) for case, flags in cases.items()
        }
        for case, process in started.items():
            output = process.communicate()[0]
            if process.returncode:
                yield {"case": case, "error": output[-400:]}
                continue
            summary = json.loads((folders[case] / "summary.json").read_text(encoding="utf-8"))
            keys = ("score_before", "score_after", "gold_before", "gold_after", "kl_per_response", "seconds")
            yield {"case": case} | {key: summary[key] for key in keys}
    for row in result_rows.read_rows("main_job"):
        yield {"case": f"seed {row['seed']} on a CPU"} | {key: row[key] for key in ("score_after", "gold_after")}


def resume(scale: Scale) -> Iterator[Row]:
    """Largest weight difference between a run and the same run resumed from a checkpoint; the checkpoint on a CPU."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "run"
        parts = _configuration("ppo", scale, iterations=4)
        experiment, trainer = build(*parts)
        run_folder.create(folder)
        run_folder.save_config(folder, *parts, experiment.fingerprints())
        for iteration in trainer.iterate():
            if iteration.number == 2:
                checkpoint.save_checkpoint(folder, trainer)
        yield from _resumed(folder, trainer, parts)
        for case, flags in (
            ("evaluated on a CPU", ("evaluate", "--run", str(folder))),
            ("generates on a CPU", ("generate", "--run", str(folder), "--prompt", "The kettle")),
        ):
            process = _start(*flags, CUDA_VISIBLE_DEVICES="")
            output = process.communicate()[0]
            yield {"case": case, "works": process.returncode == 0, "output": output[-300:]}


def _resumed(folder: Path, trainer: Trainer, parts: tuple[Any, Any, Any]) -> Iterator[Row]:
    try:
        _, other = build(*parts)
        checkpoint.load_checkpoint(folder, other)
        for _ in other.iterate():
            pass
        uninterrupted, resumed = _weights(trainer), _weights(other)
        yield {
            "case": "resumed",
            "largest_change": max(float((uninterrupted[key] - resumed[key]).abs().max()) for key in uninterrupted),
        }
    except Exception as error:
        yield {"case": "resumed", "error": f"{type(error).__name__}: {error}"[:400]}


def one_rank(scale: Scale) -> Iterator[Row]:
    """Metrics of the last iteration of the same small run: without torchrun, under it, and with sharded weights."""
    cases: dict[str, tuple[int | None, tuple[str, ...]]] = {
        "alone": (None, ()),
        "torchrun": (1, ()),
        "sharded": (1, ("--shard", "full")),
    }
    small = ("--iterations", "2", "--rollout-size", "16", "--minibatch-size", "8", "--evaluation-prompts", "4")
    small += ("--precision", "float32", "--env-arg", "max_new_tokens=16")
    with tempfile.TemporaryDirectory() as work:
        for case, (ranks, flags) in cases.items():
            folder = Path(work) / case
            process = _start("train", "--run", str(folder), *small, *flags, ranks=ranks)
            output = process.communicate()[0]
            if process.returncode:
                yield {"case": case, "error": output[-400:]}
                continue
            last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
            yield {"case": case} | {name: last[name] for name in ("score", "actor_grad_norm", "tokens_per_second")}


def captured(scale: Scale) -> Iterator[Row]:
    """Tokens that a captured step writes otherwise than an eager one, and the log-probabilities of the equal ones.

    At first, with weights that moved in place as an optimizer moves them, and with fewer slots than rows.
    """
    for dtype in ("float32", "bfloat16"):
        task = build_task(TextGenConfig(dtype=dtype))
        model = copy.deepcopy(task.load_reference().model)  # its weights move below
        prompts = task.prompts.select(range(scale.rows[0]))
        chance = random_numbers(task, len(prompts), torch.Generator(scale.device).manual_seed(0))
        for case, slots in (("first weights", None), ("moved weights", None), ("slots", max(scale.rows[0] // 4, 1))):
            eager, fast = (
                generate(
                    task, model, prompts, Sampling(temperature=0.7), chance, Decoding(slots=slots, compile=compile)
                )
                for compile in (False, True)
            )
            equal = (eager.state.response_ids == fast.state.response_ids).all(1)
            gap = (eager.log_prob - fast.log_prob).abs()[equal]
            yield {
                "case": f"{dtype}, {case}",
                "equal_responses": float(equal.float().mean()),
                "largest_gap": float(gap.max()) if len(gap) else None,
            }
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(1.02)


def host_syncs(scale: Scale) -> Iterator[Row]:
    """Host synchronizations per decoded token, and where in the code they are."""
    model = random_model(scale.models[0], scale.vocabularies[0], scale.device, torch.bfloat16)
    task = task_for(model, scale, scale.rows[0], (0,))
    generator = torch.Generator(scale.device).manual_seed(0)
    prompts = task.prompts.select(range(scale.rows[0]))
    if scale.device.type != "cuda":
        yield {"case": "no CUDA device", "syncs_per_token": None}
        return
    for case, decoding in (("eager", Decoding()), ("captured", Decoding(compile=True))):
        generate(task, model, prompts, Sampling(), generator, decoding)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                generate(task, model, prompts, Sampling(), generator, decoding)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught)
        yield {
            "case": f"generate, {case}",
            "syncs_per_token": sum(places.values()) / scale.response,
            "places": dict(places.most_common(8)),
        }


def _configuration(
    algorithm: str, scale: Scale, *arguments: str, iterations: int = 2, **changes: Any
) -> tuple[Any, Any, Any]:
    """Settings of a short run with 32 responses per iteration. changes: to those of text."""
    train, settings, algorithm_config = defaults("TextGen-v0", algorithm)
    fields = vars(train) | {
        "iterations": iterations,
        "minibatch_size": 16,
        "schedule": "constant",
        "env_arg": (*train.env_arg, *arguments),
    }
    if not _on_policy(algorithm):
        algorithm_config = type(algorithm_config)(**vars(algorithm_config) | {"learning_starts": 32})
    text = vars(settings) | {"rollout_size": 32, "evaluation_prompts": 8} | changes
    return type(train)(**fields), type(settings)(**text), algorithm_config


def _on_policy(algorithm: str) -> bool:
    learner: Any = ALGORITHMS[algorithm][1]
    return learner.on_policy


def _trainer(algorithm: str, scale: Scale, *arguments: str, **changes: Any) -> Trainer:
    return build(*_configuration(algorithm, scale, *arguments, **changes))[1]


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.detach().cpu()
        for name, network in trainer.algorithm.networks.trained.items()
        for key, value in network.named_parameters()
    }


def _start(*arguments: str, ranks: int | None = None, **environment: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.Popen(command("agents", *arguments, ranks=ranks), env=os.environ | environment, **pipes)
