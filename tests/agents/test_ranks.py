"""Several processes of torchrun learn as one does: the same rollouts, metrics, gradients and weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from agents.algorithms.registry import ALGORITHMS
from agents.ranks import ALONE
from tests.support import rank as worker
from tests.support.learning import same

ROOT = Path(__file__).parents[2]
REPLAY = dict(learning_starts=8, gradient_steps=2)
# 8 responses in minibatches of 2: of three ranks one has no row of a minibatch, and rollouts are shared unevenly.
CHANGES = dict(iterations=2, minibatch_size=2)


def case(learner: str = "ppo", task: dict | None = None, **changes: Any) -> dict[str, Any]:
    """A case on text."""
    own = {"ppo": dict(epochs=2), "dqn": REPLAY, "sac": REPLAY}.get(learner, {})
    groups = dict(group_size=2) if learner in ("rloo", "grpo") else {}
    return dict(learner=learner, algorithm=own, task=groups | (task or {}), changes=CHANGES | changes)


CASES = {
    **{name: case(name) for name in sorted(ALGORITHMS)},
    "stopped": case() | dict(algorithm=dict(epochs=4, target_kl=1e-7)),  # the updates end early, on all ranks alike
    "stopped, sharded": case(shard="full") | dict(algorithm=dict(epochs=4, target_kl=1e-7)),
    "masks": case(task=dict(action_mask="top_k:20"), kl_estimator="exact"),
    "curriculum": case(
        task=dict(prompt_sampling="prioritized", group_size=2, score_normalization="running"),
        **dict(kl_controller="adaptive", kl_target=0.5, kl_horizon=20),
    ),
    "adapters": case(lora_rank=2),
    "recomputed": case(old_log_probs="recomputed", gradient_checkpointing=True),
    "fewer rows than ranks": case(old_log_probs="recomputed", rollout_size=2),
    **{f"{name}, sharded": case(name, shard="full") for name in sorted(ALGORITHMS)},
    "masks, sharded": case(task=dict(action_mask="top_k:20"), kl_estimator="exact", mask_refresh=1, shard="full"),
    "adapters, sharded": case(lora_rank=2, mask_refresh=1, task=dict(action_mask="top_k:20"), shard="full"),
    "recomputed, sharded": case(old_log_probs="recomputed", gradient_checkpointing=True, shard="full"),
    "fewer rows than ranks, sharded": case(old_log_probs="recomputed", rollout_size=2, shard="full"),
    "control": dict(env="CartPole-v1", learner="ppo", algorithm=dict(epochs=2)),
    "control, a2c": dict(env="CartPole-v1", learner="a2c", algorithm={}),
    "control, reinforce": dict(env="CartPole-v1", learner="reinforce", algorithm={}),
    "control, sac": dict(env="CartPole-v1", learner="sac", algorithm=REPLAY),
    "normalized control": dict(env="Pendulum-v1", learner="ppo", algorithm=dict(epochs=2)),
    "control from replay": dict(env="CartPole-v1", learner="dqn", algorithm=REPLAY),
}


def unsharded(case: dict[str, Any]) -> dict[str, Any]:
    """The same case with all weights in one process."""
    return case | ({"changes": case["changes"] | {"shard": "none"}} if "changes" in case else {})


@pytest.fixture(scope="module")
def text(folders) -> dict[str, Any]:
    """Arguments of a small task, which other processes can read."""
    models = dict(reference=folders["gpt2"], reward=folders["gpt2_reward"], prompts=["a", "two words", "it is late"])
    return models | dict(kl_coef=0.3, max_prompt_tokens=16, max_new_tokens=12, temperature=0.7, device="cpu")


@pytest.fixture(scope="module")
def alone(text) -> dict[str, Any]:
    """What one process gets of every case."""
    return {name: worker.outcome(text, unsharded(case), ALONE) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=[pytest.param(count, marks=pytest.mark.slow) for count in (2, 3, 4)])
def together(request, text, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of several ranks gets of every case."""
    folder, port = tmp_path_factory.mktemp("ranks"), worker.free_port()
    torch.save(dict(settings=text, cases=CASES, output=str(folder)), folder / "job.pt")
    command = [sys.executable, "-m", "tests.support.rank", str(folder / "job.pt")]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=worker.environment(index, request.param, port))
        for index in range(request.param)
    ]
    assert [rank.wait(900) for rank in ranks] == [0] * len(ranks)
    return [torch.load(folder / f"{index}.pt", weights_only=False) for index in range(len(ranks))]


@pytest.mark.parametrize("name", CASES)
def test_ranks_learn_as_one(alone, together, name):
    """Every rank has the rollouts of one process, its metrics and its weights, to the rounding of sums in float32.

    A sum of n terms in another order differs by at most n · 2^-24 of the sum of their sizes; n is here some thousands,
    and errors of either sign cancel, so that a few 1e-5 is what is left at most.
    """
    expected = alone[name]
    for rank in together:
        found = rank[name]
        torch.testing.assert_close(found["actions"], expected["actions"], rtol=1e-4, atol=2e-5)  # some are numbers
        for one, other in zip(expected["metrics"], found["metrics"], strict=True):
            assert one.keys() == other.keys()
            for key in one.keys() - {"seconds", "rollout_seconds", "tokens_per_second", "frames_per_second"}:
                assert other[key] == pytest.approx(one[key], rel=1e-4, abs=2e-5), key
        for network, values in expected["weights"].items():
            torch.testing.assert_close(found["weights"][network], values, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "sharded" not in name])
def test_ranks_stay_equal(together, name):
    """All ranks have the same weights, to the bit: nothing that they decide can part them."""
    first, *others = (rank[name]["weights"] for rank in together)
    for other in others:
        assert all(same(other[network], values) for network, values in first.items())


def test_shares():
    """Shares cover all rows once, and differ by at most one; a rank may have none."""

    class Some(type(ALONE)):
        def __init__(self, index: int, count: int) -> None:
            self.index, self.count = index, count

    for rows, count in ((8, 1), (8, 3), (2, 4), (0, 2)):
        shares = [list(range(rows))[Some(index, count).share(rows)] for index in range(count)]
        assert [row for share in shares for row in share] == list(range(rows))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_is_identity():
    """One process changes no gradient, exchanges nothing, and deals all rows to itself."""
    rows, parameter = TensorDict({"mask": torch.ones(3, 2)}, batch_size=[3]), torch.nn.Parameter(torch.ones(2))
    ALONE.sum_gradients([parameter])
    assert parameter.grad is None and ALONE.deal(rows) is rows and ALONE.each(lambda: rows)[0] is rows
    assert (ALONE.together(lambda: 1), ALONE.lead(lambda: 2), ALONE.first) == (1, 2, True)
