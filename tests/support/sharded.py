"""One process of two that shard a model of every architecture: `python -m tests.support.sharded OUTPUT`.

The first rank writes what came of each to OUTPUT, a JSON file: how far gradients are off, relative to the largest of
their weight, whether the twin has the weights, and how many layers there are; or why it was refused.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from tensordict import TensorDict
from torch.distributed.device_mesh import DeviceMesh

from agents.ranks import Ranks, connected, full
from agents.text.networks import TextActor
from agents.text.sharding import add_twin, in_step, layers_of, shard_network, twin_of, whole
from tests.support import families, tiny
from textenv.models.language_model import cast_weights


def batch(seed: int) -> TensorDict:
    """Two texts of random tokens."""
    ids = torch.randint(3, tiny.VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(seed))
    inside = torch.ones(2, 14, dtype=torch.bool)
    return TensorDict(dict(input_ids=ids, attention_mask=inside, action=ids[:, 6:], mask=inside[:, 6:]), batch_size=[2])


def backward(actor: TextActor, seed: int) -> None:
    """Add the gradients of a batch's log-probabilities."""
    data = batch(seed)
    actor.distribution(data).log_prob(data["action"]).sum().backward()


def shard(name: str, ranks: Ranks, mesh: DeviceMesh) -> dict[str, Any] | None:
    """Every rank's gradients of its own batch against one model's of both; None for what cannot be compared."""
    try:
        model = families.build(name)
        plain = TextActor(copy.deepcopy(model), 0.7)
        for rank in range(ranks.count):
            backward(plain, rank)
    except Exception:  # of many kinds: it cannot be built small, or its forward wants more than tokens
        return None
    actor = TextActor(model, 0.7)
    try:
        add_twin(actor, torch.float32)
        shard_network(actor, model, mesh)
    except ValueError as error:
        return {"refused": str(error)}
    for _ in in_step([0], ranks):
        backward(actor, ranks.index)
    worst = 0.0
    for one, other in zip(plain.parameters(), actor.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            difference = (full(other.grad) - one.grad).abs().max() / one.grad.abs().max().clamp_min(1e-6)
            worst = max(worst, float(difference))
    twin = twin_of(actor)
    assert twin is not None
    with whole(twin):
        equal = all(map(torch.equal, twin.parameters(), plain.parameters()))
    return {"difference": worst, "twin": equal and half_equal(plain), "layers": len(layers_of(model))}


@torch.no_grad()
def half_equal(actor: TextActor) -> bool:
    """Whether the bfloat16 twin of a policy is the model in bfloat16, where its architecture can be in that at all."""
    add_twin(actor, torch.bfloat16)
    twin, ids = twin_of(actor), batch(0)["input_ids"]
    assert twin is not None
    try:
        expected = cast_weights(copy.deepcopy(actor.model), torch.bfloat16)(input_ids=ids, use_cache=False).logits
    except RuntimeError:
        return True
    with whole(twin):
        logits = twin(input_ids=ids, use_cache=False).logits
    return float((logits - expected).abs().max()) < 0.05 * float(expected.std())


def main(output: Path) -> None:
    """Every architecture."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with connected(120) as ranks:
        mesh = ranks.mesh(torch.device("cpu"))
        found = {name: shard(name, ranks, mesh) for name in families.names()}
        if ranks.first:
            output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
