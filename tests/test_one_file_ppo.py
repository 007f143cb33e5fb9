"""`examples/one_file_ppo.py` computes what `python -m agents train` computes, and stays one short file.

Both run two iterations on the same prompts, with the same sampled tokens and the same orders of minibatches. In the first
iteration the actor still is the reference; only the second has a penalty, and learning rates that have fallen.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import runpy
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from agents.algorithms.ppo import PPO
from agents.presets import defaults
from agents.text.collector import TextCollector
from agents.text.networks import TextNetworkFactory
from agents.trainer import Trainer
from textenv import TextGenConfig, build_task

PATH = Path(__file__).parent.parent / "examples" / "one_file_ppo.py"
ITERATIONS, RESPONSES, MINIBATCH = 2, 32, 8
# Float32 on both sides, whose sums run in other orders: the trainer reads micro-batches, drops other columns of padding,
# and has its own key/value cache, GAE and fused AdamW. Largest differences seen: 1.2e-5 in a response's KL (a sum of some
# 18 log-probabilities), 6e-6 in a log-probability, 3e-6 in values and advantages, 1e-6 in losses and norms, and 7e-6 in a
# weight, where Adam divides gradients that are almost zero by their own size. One step moves most weights by 1e-4.
CLOSE = dict(atol=5e-5, rtol=0)
CLOSE_STEP = 1e-5


@dataclass
class Run:
    """What one of the two programs computed."""

    rollouts: list[dict[str, Tensor]] = field(default_factory=list)  # an iteration each: [B, R]; `score`, `kl` [B]
    steps: list[dict[str, float]] = field(default_factory=list)  # an optimizer step each: losses, gradient norms
    weights: dict[str, list[Tensor]] = field(default_factory=dict)  # of actor and critic, after the last step
    names: dict[str, list[str]] = field(default_factory=dict)  # of these weights, in the example


# ---- Equal to the trainer


def run_trainer() -> Run:
    """Two iterations of the real trainer. Only this function knows what is inside it."""
    config, text, ppo = defaults("TextGen-v0", "ppo")
    config = replace(config, iterations=ITERATIONS, minibatch_size=MINIBATCH)
    text = replace(text, rollout_size=RESPONSES, micro_batch_tokens=80)
    task = build_task(TextGenConfig(device="cpu"))
    algorithm = PPO(ppo, TextNetworkFactory(task))
    trainer, run = Trainer(config, algorithm, TextCollector(task, task.prompts, text, seed=0)), Run()
    after_step = algorithm.after_step
    keys = dict(
        action="action",
        mask="mask",
        log_prob="action_log_prob",
        reward="reward",
        value="state_value",
        advantage="advantage",
        value_target="value_target",
        score="score",
    )
    with pytest.MonkeyPatch.context() as patch:
        fix_orders(patch)
        patch.setattr(trainer.collector.sampler, "draw", lambda generator, count: list(range(count)))
        patch.setattr(algorithm, "after_step", lambda metrics: run.steps.append(dict(metrics)) or after_step(metrics))
        for iteration in trainer.iterate():
            data = iteration.rollout.data
            rollout = {name: data[key].squeeze(-1).clone() for name, key in keys.items()}
            log_ratio = (data["action_log_prob"] - data["reference_log_prob"]).where(data["mask"], 0.0)
            run.rollouts.append(rollout | {"kl": log_ratio.sum(1)})
    run.weights = {name: list(algorithm.networks.trained[name].parameters()) for name in ("actor", "critic")}
    return run


def fix_orders(patch):
    """Both programs shuffle alike: prompts not at all, minibatches by the number of the epoch."""
    shuffle, epoch = torch.randperm, itertools.count()

    def randperm(size, **_):
        if size != RESPONSES:
            return torch.arange(size)
        return shuffle(size, generator=torch.Generator().manual_seed(next(epoch)))

    patch.setattr(torch, "randperm", randperm)


class Recorder:
    """Wraps functions of the example: feeds `multinomial` given tokens, and keeps what the others are passed and give."""

    def __init__(self, rollouts: list[dict[str, Tensor]]) -> None:
        """rollouts: `action` and `mask` [B, R], the tokens that are sampled."""
        widths = [int(rollout["mask"].any(0).sum()) for rollout in rollouts]
        self.tokens = [
            rollout["action"][:, t, None] for rollout, width in zip(rollouts, widths, strict=True) for t in range(width)
        ]
        self.drawn: list[Tensor] = []  # probability of every token fed in this iteration, [B, 1] each
        self.run = Run()
        self.norms: list[float] = []

    def multinomial(self, probabilities, count):
        tokens = self.tokens.pop(0)
        self.drawn.append(probabilities.gather(1, tokens))
        return tokens

    def update(self, original):
        def wrapped(actor, critic, optimizer, rollout, *rest):
            sampled = torch.cat(self.drawn, 1).log() * rollout["mask"]  # the distribution that is really drawn from
            self.drawn.clear()
            self.run.rollouts.append(rollout | {"sampled_log_prob": sampled})
            original(actor, critic, optimizer, rollout, *rest)

        return wrapped

    def loss(self, original):
        def wrapped(*arguments):
            loss = original(*arguments)
            if original.__name__ == "policy_loss":
                self.run.steps.append({})
            self.run.steps[-1][original.__name__] = float(loss.detach())
            return loss

        return wrapped

    def clip_grad_norm(self, original):
        def wrapped(parameters, bound):
            name = "critic_grad_norm" if "actor_grad_norm" in self.run.steps[-1] else "actor_grad_norm"
            self.run.steps[-1][name] = float(original(parameters, bound))

        return wrapped


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PATH.parent))
        yield importlib.import_module("one_file_ppo")


@pytest.fixture(scope="module")
def runs(example):
    """The trainer's run, and that of the example's `main` with the trainer's tokens in place of its own."""
    trainers = run_trainer()
    recorder = Recorder(trainers.rollouts)
    with pytest.MonkeyPatch.context() as patch:
        fix_orders(patch)
        patch.setattr(TextGenConfig, "torch_device", lambda _: torch.device("cpu"))
        patch.setattr(torch, "multinomial", recorder.multinomial)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", recorder.clip_grad_norm(torch.nn.utils.clip_grad_norm_))
        patch.setattr(example, "update", recorder.update(example.update))
        for name in ("policy_loss", "value_loss"):
            patch.setattr(example, name, recorder.loss(getattr(example, name)))
        settings = example.Settings(iterations=ITERATIONS, rollout_size=RESPONSES, minibatch_size=MINIBATCH)
        actor, critic = example.main(settings)
    assert not recorder.tokens
    for name, network in {"actor": actor, "critic": critic}.items():
        names, weights = zip(*network.named_parameters(), strict=True)
        recorder.run.names[name], recorder.run.weights[name] = list(names), list(weights)
    return trainers, recorder.run


def test_the_rollouts_are_the_trainers(runs):
    """Masks, log-probabilities, scores, KL, penalized rewards, values, whitened advantages and value targets."""
    trainers, examples = runs
    for theirs, ours in zip(trainers.rollouts, examples.rollouts, strict=True):
        width = ours["mask"].shape[1]
        assert torch.equal(theirs["mask"][:, :width], ours["mask"]) and not theirs["mask"][:, width:].any()
        theirs = theirs | {"sampled_log_prob": theirs["log_prob"]}
        for key in theirs.keys() - {"mask", "action"}:
            expected = theirs[key] if key in ("score", "kl") else theirs[key][:, :width]
            torch.testing.assert_close(ours[key], expected, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
    assert trainers.rollouts[1]["kl"].abs().max() > 0.1  # or the penalty would not be tested


def test_every_step_is_the_trainers(runs):
    """The losses and both gradient norms of every optimizer step."""
    trainers, examples = runs
    assert len(trainers.steps) == len(examples.steps)
    for key in ("policy_loss", "value_loss", "actor_grad_norm", "critic_grad_norm"):
        expected = [step[key] for step in trainers.steps]
        assert [step[key] for step in examples.steps] == pytest.approx(expected, abs=CLOSE_STEP), key
    assert any(step["clip_fraction"] > 0 for step in trainers.steps)  # or the clip would not be tested
    assert any(step["critic_grad_norm"] > 1 for step in trainers.steps)  # nor the bound on norms


@pytest.mark.parametrize("network", ["actor", "critic"])
def test_the_trained_weights_are_the_trainers(runs, network):
    """All weights after the last step, except the biases of attention keys.

    A key's bias changes no attention, so its gradient is 0. Float32 makes it noise, which Adam scales up to whole steps.
    """
    trainers, examples = runs
    names = examples.names[network]
    for name, theirs, ours in zip(names, trainers.weights[network], examples.weights[network], strict=True):
        theirs, ours = theirs.detach().clone(), ours.detach().clone()
        if name.endswith("attn.c_attn.bias"):  # of queries, keys and values
            for bias in (theirs, ours):
                bias.chunk(3)[1].zero_()
        torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_the_settings_are_the_trainers(example):
    """Every setting stands in the trainer's configuration under the same name, with the same default."""
    trainers = {name: value for part in defaults("TextGen-v0", "ppo") for name, value in asdict(part).items()}
    settings = asdict(example.Settings())
    assert settings == {name: trainers[name] for name in settings}


# ---- One short file that runs


def run_shrunk(capsys, monkeypatch, seed: int) -> tuple[list[str], list[float]]:
    """The program from its command line: what it prints, without times, and the actor's learning rate at every step."""
    arguments = ["--iterations", "2", "--rollout-size", "8", "--minibatch-size", "4", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", [PATH.name, *arguments, "--seed", str(seed)])
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    runpy.run_path(str(PATH), run_name="__main__")
    hook.remove()
    return [re.sub(r"  \S+ s$", "", line) for line in capsys.readouterr().out.splitlines()], rates


def test_it_runs(capsys, monkeypatch):
    """Two iterations print score, KL and length, and four responses; the seed alone decides them."""
    lines, rates = run_shrunk(capsys, monkeypatch, seed=0)
    for number, line in enumerate(lines[:2], 1):
        assert re.fullmatch(rf"iteration {number}/2  score [+-]\d\.\d\d  KL -?\d\.\d\d  length \d+\.\d", line), line
    assert len(lines) == 6 and all("Review of" in line for line in lines[2:])
    assert rates == [1e-4, 1e-4, 5e-5, 5e-5]
    assert run_shrunk(capsys, monkeypatch, seed=0)[0] == lines
    assert run_shrunk(capsys, monkeypatch, seed=1)[0] != lines


def test_it_is_short_and_on_its_own():
    """At most 230 lines; nothing of agents or TorchRL, and of textenv only what Gymnasium registers."""
    source = PATH.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 230
    imported, used = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Name):
            used.add(node.id)
    assert imported == {"copy", "time", "dataclasses", "gymnasium", "torch", "tyro", "textenv"}
    assert "textenv" not in used
