"""The Kullback–Leibler penalty that ties a policy to its reference: estimators, rewards, and the penalty's weight.

All pure functions, but for the two small controllers at the end, which hold β. The whole reward of a token is
split in two (DESIGN §2): the environment pays the part that depends on state and action alone, the learner
subtracts the part that depends on its own policy.

Estimators (Schulman 2020, http://joschu.net/blog/kl-approx.html) of KL(π‖π_ref) from one token sampled by π, with
d = log π − log π_ref. k1 and k3 have the KL as their mean, k2 has not; k2 and k3 are never negative. Where action
masks or top-k keep π from tokens that π_ref may choose, k3's mean too falls short of the KL, by the probability that
π_ref gives them. A mean is not a gradient. With the estimate as a part of the reward, which is a constant to the
policy gradient:

- k1 gives the gradient of KL(π‖π_ref). It is the only one that does, and so the default;
- k3 gives, in each state, that gradient less the gradient of KL(π_ref‖π), and the two all but cancel near the
  reference; k2 gives another one again;
- the exact KL of a state does not depend on the token chosen there, so it moves no probability in that state: it
  only makes states with a large KL worth avoiding.

As a term of the loss, differentiated through log π, it is the other way round: k1 has a mean gradient of zero, k2
that of KL(π‖π_ref), k3 that of KL(π_ref‖π), and the exact KL its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def environment_reward(score: Tensor, reference_log_prob: Tensor, kl_coef: float | Tensor) -> Tensor:
    """The reward of `step`: `score_t + β · log π_ref(a_t | s_t)`.

    score: float [...], what the score pays at each token, which is zero before the last one unless a reward pays
    every token; reference_log_prob: float [...]; kl_coef: β, a number or broadcast against them.
    """
    return score + kl_coef * reference_log_prob


def penalized_reward(score: Tensor, kl: Tensor, kl_coef: float | Tensor) -> Tensor:
    """The reward that a learner optimizes: `score_t − β · KL_t`. Summed over a response it is score − β · KL.

    score: float [B, R], what the score pays at each token; kl: float [B, R], an estimate of the KL at each token, in
    nats; kl_coef: β, a number or [B, 1]. With k1 it is `environment_reward(...) − β · log π(a_t | s_t)`.
    """
    return score - kl_coef * kl


def k1(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """The log-ratio d itself: its mean is the KL, its variance the largest. Float [...], as are both arguments."""
    return log_prob - reference_log_prob


def k2(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """½ d²: never negative, little variance, and a mean that is off by a term of third order in d. Float [...]."""
    return 0.5 * (log_prob - reference_log_prob).square()


def k3(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """exp(−d) − 1 + d: its mean is the KL, it is never negative, and huge where π_ref is far above π. Float [...]."""
    difference = log_prob - reference_log_prob
    return torch.expm1(-difference) + difference


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
EXACT = "exact"  # the name of `exact_kl` in settings; it needs whole distributions, the others one token of them


def exact_kl(logits: Tensor, reference_logits: Tensor, temperature: float) -> Tensor:
    """KL(π‖π_ref) summed over the vocabulary, nats.

    logits: [..., V], -inf where a token cannot be chosen. Returns float32 [...], infinite where π may choose what
    π_ref cannot. Temperature divides both.
    """
    log_prob = (logits.float() / temperature).log_softmax(-1)
    reference_log_prob = (reference_logits.float() / temperature).log_softmax(-1)
    # 0 · log 0 is 0 here, and inf − inf never arises, in the gradient neither
    difference = (log_prob - reference_log_prob).masked_fill(log_prob == -torch.inf, 0.0)
    return (log_prob.exp() * difference).sum(-1)


UNITS = ("token", "response")


def adapted(coef: float, kl: float, target: float, horizon: float, responses: int) -> float:
    """β after one look at the KL (Ziegler et al. 2019): `β (1 + e · n / horizon)`, e = KL/target − 1 within ±0.2.

    kl and target: nats, in the same unit; n = responses that the KL was measured on, at most `horizon` of them, so
    that one update moves β by a fifth at most. Raises ValueError for a KL that is no number.
    """
    if math.isnan(kl):
        raise ValueError("the measured KL is no number, so β cannot follow it; look at the log-probabilities.")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * min(responses / horizon, 1.0))


class Controller(Protocol):
    """Who sets β."""

    coef: float  # β, the weight of the penalty from now on

    def update(self, kl: float, tokens: int, responses: int) -> dict[str, float]:
        """Takes note of new responses, and returns numbers for the log.

        kl: estimates summed over all their tokens, nats.
        """
        ...

    def state_dict(self) -> dict[str, float]:
        """What is needed to go on as if never stopped."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes back what `state_dict` gave."""
        ...


@dataclass
class FixedKL:
    """A penalty whose weight never changes."""

    coef: float

    def __post_init__(self) -> None:
        _check("coef", self.coef)
        if self.coef < 0:
            raise ValueError(f"the KL controller's coef must be 0 or more, got {self.coef}; 0 is no penalty.")

    def update(self, kl: float, tokens: int, responses: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def state_dict(self) -> dict[str, float]:
        """β."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes back what `state_dict` gave."""
        self.coef = float(state["coef"])


@dataclass
class AdaptiveKL:
    """A penalty whose weight grows while the KL is above a target and falls while it is below (Ziegler et al. 2019).

    Units differ between programs, and targets with them: Ziegler et al., TRL and trlx mean nats a response (their
    target is 6), RL4LMs, verl and OpenRLHF nats a token (RL4LMs' target is 0.1). Say which. A response's KL is the
    sum over its tokens; a token's is the mean over all tokens, so that long responses count for more.

    With n responses an update, β takes about `5 · horizon / n · ln f` updates, at best, to move by a factor of f:
    choose a horizon that lets it get there within the run.
    """

    coef: float  # β to begin with
    target: float  # nats, per `unit`
    horizon: float  # responses after which an error of 20% has moved β by about 20%, in either unit
    unit: str  # "token" or "response"

    def __post_init__(self) -> None:
        for name in ("coef", "target", "horizon"):
            _check(name, getattr(self, name))
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"the KL controller's {name} must be above 0, got {getattr(self, name)}; for a penalty that stays "
                    "as it is, use FixedKL."
                )
        if self.unit not in UNITS:
            raise ValueError(f"unit must be 'token' or 'response', got {self.unit!r}; 6 nats a response is usual.")

    def update(self, kl: float, tokens: int, responses: int) -> dict[str, float]:
        """Moves β once. Returns the KL that it went by and the target, both named by their unit."""
        measured = kl / (tokens if self.unit == "token" else responses)
        self.coef = adapted(self.coef, measured, self.target, self.horizon, responses)
        return {f"controller_kl_per_{self.unit}": measured, f"kl_target_per_{self.unit}": self.target}

    def state_dict(self) -> dict[str, float]:
        """β; target, horizon and unit are settings."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes back what `state_dict` gave."""
        self.coef = float(state["coef"])


def _check(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"the KL controller's {name} must be a finite number, got {value!r}.")
