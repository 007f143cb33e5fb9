"""The Kullback–Leibler penalty that ties a policy to its reference: pure functions.

The whole reward of a token is split in two (DESIGN §2): the environment pays the part that depends on
state and action alone, the learner subtracts the part that depends on its own policy.
"""

from __future__ import annotations

from torch import Tensor


def environment_reward(score: Tensor, ended: Tensor, reference_log_prob: Tensor, kl_coef: float) -> Tensor:
    """What the environment pays: `1[t = T] · score + β · log π_ref(a_t | s_t)`.

    score, reference_log_prob: float [...]; ended: bool [...], true at t = T. The score is read only there.
    """
    return score.where(ended, 0.0) + kl_coef * reference_log_prob


def shaped_reward(reward: Tensor, log_prob: Tensor, kl_coef: float) -> Tensor:
    """What the learner optimises: the environment's reward minus `β · log π(a_t | s_t)`.

    Summed over a response it is `score − β · KL`, KL by the k1 estimator (Schulman 2020,
    http://joschu.net/blog/kl-approx.html). reward, log_prob: float [...].
    """
    return reward - kl_coef * log_prob
