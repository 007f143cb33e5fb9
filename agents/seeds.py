"""The random streams of a run: every generator's seed comes from one `numpy.random.SeedSequence` of the run's seed.

Generators seeded with the same number, or with neighboring ones, may draw the same numbers. Children of a SeedSequence
do not, between streams, between members of a stream, and between runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# A stream's place is its spawn key: a new one goes to the end, so that the others keep their numbers.
STREAMS = ("split", "prompts", "sampling", "minibatches", "networks", "resets", "evaluation", "best-of-n", "pairs")
EVERY_RUN = 0  # in place of the run's seed, where runs with different seeds must draw the same


def seed_of(run_seed: int, stream: str, member: int = 0) -> int:
    """The seed, below 2^32, of a stream of `STREAMS`; members of a stream, such as networks, have their own."""
    sequence = np.random.SeedSequence(run_seed, spawn_key=(STREAMS.index(stream), member))
    return int(sequence.generate_state(1)[0])


def torch_generator(run_seed: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of a stream."""
    return torch.Generator(device).manual_seed(seed_of(run_seed, stream))


@contextmanager
def initial_weights(seed: int) -> Iterator[None]:
    """Draw initial weights, which are made on the CPU, by a seed. No global generator is changed, nor any of CUDA."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed all devices
        yield


def evaluation_seed() -> int:
    """The seed of every evaluation in every run, so that policies are measured on the same episodes."""
    return seed_of(EVERY_RUN, "evaluation")
