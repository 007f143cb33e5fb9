"""The KL penalty that ties a policy to its reference: rewards, estimators of the KL, and controllers of the weight β.

A token's full reward is `score_t − β (log π(a_t | s_t) − log π_ref(a_t | s_t))`. It is split in two, because the
reward of a Markov decision process may depend only on state and action, and `step(action)` does not know the policy.
The environment pays `score_t + β log π_ref` (`environment_reward`); the policy's part is left to the learner, which
optimizes `penalized_reward`. All functions here are pure; only the two controllers at the end hold state, their β.

Estimators (Schulman 2020, http://joschu.net/blog/kl-approx.html) of KL(π‖π_ref) from one token sampled by π, with
d = log π − log π_ref. The mean of k1 and of k3 is the KL; the mean of k2 is not. k2 and k3 are never negative. Where
action masks or top-k keep π from tokens that π_ref may choose, the mean of k3 is below the KL by the probability that
π_ref gives these tokens.

An unbiased estimate does not imply an unbiased gradient. If the estimate is part of the reward, a constant in the
policy gradient:

- k1 gives the gradient of KL(π‖π_ref). It is the only one that does, and therefore the default;
- k3 gives, in each state, that gradient minus the gradient of KL(π_ref‖π); near the reference the two almost cancel.
  k2 gives yet another gradient;
- the exact KL of a state does not depend on the token chosen there, so it moves no probability in that state: it
  only makes states with a large KL worth avoiding.

If the estimate is a term of the loss, differentiated through log π, it is the other way round: the mean gradient of k1
is zero, that of k2 is the gradient of KL(π‖π_ref), that of k3 is the gradient of KL(π_ref‖π), and the exact KL gives
its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # bound of log-ratios before they are exponentiated; e^20 = 5e8, and float32 overflows at 88


def not_finite(what: str, value: Tensor, place: str) -> ValueError:
    """The error for a number of a model, such as `the reference's log-probability`, that is infinite or NaN."""
    return ValueError(
        f"{what} is {float(value)} at {place}: the model's logits overflow or are masked there. Use dtype='float32' or "
        "'bfloat16' if it is 'float16'; otherwise look at the model's weights."
    )


class FiniteCheck:
    """Notes numbers that must be finite, and looks at them when asked: to note one does not wait for the device."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def note(self, what: str, values: Tensor, rows: Tensor, token: Tensor) -> None:
        """Check values [B] where `rows` (bool [B]) is true; what, token (int64 [B]): their name and place in errors."""
        self.notes.append((what, values, rows & ~values.isfinite(), token))

    def failed(self) -> Tensor:
        """Whether a number was not finite, bool [1]."""
        return torch.stack([bad for _, _, bad, _ in self.notes]).any()[None]

    def error(self, rows: Sequence[int]) -> ValueError:
        """The error for the first number that was not finite; rows: how to call the B rows."""
        what, values, bad, token = next(note for note in self.notes if bool(note[2].any()))
        row = int(bad.nonzero()[0])
        return not_finite(what, values[row], f"row {rows[row]}, token {int(token[row])}")


def check_finite_steps(values: Tensor, what: str) -> None:
    """Raise ValueError that names the first row and token of values [B, R] that are not finite."""
    finite = values.isfinite()
    if not bool(finite.all()):
        row, token = (~finite).nonzero()[0].tolist()
        raise not_finite(what, values[row, token], f"row {row}, token {token} of the response")


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
    """The log-ratio d: its mean is the KL; its variance is the largest of the three.

    Arguments and result: float [...].
    """
    return log_prob - reference_log_prob


def k2(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """½ d²: never negative, low variance, and a bias of third order in d. Float [...]."""
    return 0.5 * (log_prob - reference_log_prob).square()


def k3(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """exp(−d) − 1 + d: its mean is the KL, never negative, but huge where π_ref is far above π. Float [...].

    A d below −20 counts as −20 and has no gradient: there the estimate is e^20, and the exponential would overflow.
    """
    difference = (log_prob - reference_log_prob).clamp(min=-MAX_LOG_RATIO)
    return torch.expm1(-difference) + difference


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
EXACT = "exact"  # the name of `exact_kl` in settings; it needs whole distributions, the estimators one sampled token


def exact_kl(logits: Tensor, reference_logits: Tensor, temperature: float) -> Tensor:
    """KL(π‖π_ref), summed over the vocabulary, in nats.

    logits, reference_logits: [..., V], -inf at tokens that cannot be chosen; both are divided by the temperature.
    Returns float32 [...], infinite where π may choose a token that π_ref cannot.
    """
    log_prob = (logits.float() / temperature).log_softmax(-1)
    reference_log_prob = (reference_logits.float() / temperature).log_softmax(-1)
    # 0 · log 0 counts as 0. Masking before the product keeps inf − inf out of the value and of the gradient.
    difference = (log_prob - reference_log_prob).masked_fill(log_prob == -torch.inf, 0.0)
    return (log_prob.exp() * difference).sum(-1)


UNITS = ("token", "response")


def adapted(coef: float, kl: float, target: float, horizon: float, responses: int) -> float:
    """β after one measurement of the KL (Ziegler et al. 2019): `β (1 + e · n / horizon)`.

    e = KL/target − 1, clipped to ±0.2; kl and target are nats in the same unit. n is the number of responses measured,
    clipped to `horizon`, so that one update moves β by at most a fifth. Raises ValueError if the KL is NaN.
    """
    if math.isnan(kl):
        raise ValueError("the measured KL is NaN, so β cannot follow it; check the log-probabilities.")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * min(responses / horizon, 1.0))


class Controller(Protocol):
    """Sets the penalty's weight β during a run."""

    coef: float  # the current β

    def update(self, kl: float, tokens: int, responses: int) -> dict[str, float]:
        """Adjust β after new responses. Returns metrics to log.

        kl: the KL estimates, summed over all tokens of all these responses, in nats; tokens, responses: their number.
        """
        ...

    def state_dict(self) -> dict[str, float]:
        """The state that a checkpoint keeps."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state returned by `state_dict`."""
        ...


@dataclass
class FixedKL:
    """A constant β."""

    coef: float

    def __post_init__(self) -> None:
        _check("coef", self.coef)
        if self.coef < 0:
            raise ValueError(f"the KL controller's coef must be 0 or more, got {self.coef}; 0 means no penalty.")

    def update(self, kl: float, tokens: int, responses: int) -> dict[str, float]:
        """Keep β. Returns no metrics."""
        return {}

    def state_dict(self) -> dict[str, float]:
        """The coefficient."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state returned by `state_dict`."""
        self.coef = float(state["coef"])


@dataclass
class AdaptiveKL:
    """A β that grows while the KL is above a target and shrinks while it is below (Ziegler et al. 2019).

    Libraries measure the KL in different units, and their targets differ accordingly: Ziegler et al., TRL and trlx use
    nats per response (target 6); RL4LMs, verl and OpenRLHF use nats per token (RL4LMs' target is 0.1). The KL per
    response is a sum over its tokens. The KL per token is a mean over all tokens, so long responses weigh more.

    With n responses per update, moving β by a factor of f takes at least about `5 · horizon / n · ln f` updates:
    choose a horizon that lets β reach its level within the run.
    """

    coef: float  # the initial, then the current β
    target: float  # nats, per `unit`
    horizon: float  # responses after which an error of 20% has moved β by about 20%, in either unit
    unit: str  # "token" or "response"

    def __post_init__(self) -> None:
        for name in ("coef", "target", "horizon"):
            _check(name, getattr(self, name))
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"the KL controller's {name} must be above 0, got {getattr(self, name)}; for a constant "
                    "penalty, use FixedKL."
                )
        if self.unit not in UNITS:
            raise ValueError(f"unit must be 'token' or 'response', got {self.unit!r}; 6 nats per response is common.")

    def update(self, kl: float, tokens: int, responses: int) -> dict[str, float]:
        """Move β once. Returns the measured KL and the target; the unit is part of their names."""
        measured = kl / (tokens if self.unit == "token" else responses)
        self.coef = adapted(self.coef, measured, self.target, self.horizon, responses)
        return {f"controller_kl_per_{self.unit}": measured, f"kl_target_per_{self.unit}": self.target}

    def state_dict(self) -> dict[str, float]:
        """The coefficient; target, horizon and unit are settings."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state returned by `state_dict`."""
        self.coef = float(state["coef"])


def _check(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"the KL controller's {name} must be a finite number, got {value!r}.")
