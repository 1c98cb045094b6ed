"""KL divergence from the reference: estimators, their use as a loss, the controller of beta.

All estimate KL(pi || pi_ref) at single tokens, from log-probabilities of tokens sampled from pi.
"""

from __future__ import annotations

import torch

from core.rollout import Policy, Rollout, completion_outputs

# -- estimators -----------------------------------------------------------------------------------
# In the reward, k1 gives the true gradient of the KL. In the loss, k2 does; the gradient of k1 is 0
# on average, and that of k3 belongs to the reverse KL, so both need the importance ratio
# (`kl_loss`). As a metric, k3 is best: it is unbiased, never negative and has low variance.


def k1(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """log pi/pi_ref: unbiased, of high variance (Schulman 2020, "Approximating KL Divergence")."""
    return logps - ref_logps


def absolute_k1(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """|log pi/pi_ref|: not a KL, but never negative."""
    return (logps - ref_logps).abs()


def k2(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """(log pi/pi_ref)^2 / 2: biased, but its gradient is that of the KL (Schulman 2020)."""
    return (logps - ref_logps) ** 2 / 2


def k3(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r with r = pi_ref/pi: unbiased and never negative (Schulman 2020).

    Its gradient is that of KL(pi_ref || pi).
    """
    log_ratio = ref_logps - logps
    return torch.expm1(log_ratio) - log_ratio


ESTIMATORS = {"kl": k1, "abs": absolute_k1, "mse": k2, "k3": k3}  # by the option kl_penalty


def kl_loss(
    name: str, logps: torch.Tensor, old_logps: torch.Tensor | None, ref_logps: torch.Tensor
) -> torch.Tensor:
    """An estimate whose gradient is that of KL(pi || pi_ref) at each token.

    k2 has this gradient itself. k1 and k3 have it after multiplication by pi/pi_old, which turns
    means over pi_old into means over pi (DeepSeek-AI 2025, "DeepSeek-V3.2", section 3.1). |k1| is
    not an estimate of the KL, and its gradient is not one either. Without `old_logps`, the tokens
    were sampled from pi itself. A token's effect on the KL of later tokens is not included, unlike
    with the KL in the reward.
    """
    if name not in ("kl", "k3"):
        return ESTIMATORS[name](logps, ref_logps)
    if old_logps is None:
        old_logps = logps.detach()
    ratio = torch.exp(logps - old_logps)
    return ESTIMATORS[name](logps, ref_logps) * ratio


def exact_kl(log_probs: torch.Tensor, ref_log_probs: torch.Tensor) -> torch.Tensor:
    """(N,): KL(pi || pi_ref) of whole distributions, given as log-probabilities (N, V)."""
    log_ratios = log_probs - ref_log_probs
    return (log_probs.exp() * log_ratios).sum(-1)


def completion_kl(rollout: Rollout) -> torch.Tensor:
    """(B,): the KL of whole completions, in nats, by k3; 0 without a verdict."""
    return (k3(rollout.old_logps, rollout.ref_logps) * rollout.used).sum(1)


def next_kl_coef(kl_coef: float, kl: float, target: float, share: float) -> float:
    """The next beta: beta (1 + clip(kl / target - 1, -0.2, 0.2) share).

    Ziegler et al. 2019, section 2.2. `share` is the number of completions per step divided by the
    horizon, and at most 1 is used.
    """
    error = kl / target - 1
    clipped_error = min(max(error, -0.2), 0.2)
    change = clipped_error * min(share, 1)
    return kl_coef * (1 + change)


# -- the penalty, by the options of RLConfig -------------------------------------------------------


def kl_in_rewards(policy: Policy, rollout: Rollout) -> torch.Tensor:
    """(B, T): the estimate at each token, to be subtracted from the reward beta times; 0 if
    kl_in=loss."""
    config = policy.config
    if not config.init_kl_coef or config.kl_in != "reward":
        return torch.zeros_like(rollout.used)
    return ESTIMATORS[config.kl_penalty](rollout.old_logps, rollout.ref_logps)


def kl_in_loss(
    policy: Policy, batch: Rollout, logps: torch.Tensor, log_probs: torch.Tensor | None
) -> torch.Tensor:
    """(b, T): the KL at each token, to be added to its loss beta times; 0 if kl_in=reward.

    `logps` (b, T) and, for kl_penalty=full, `log_probs` (N, V) are the policy's, with gradients.
    """
    config = policy.config
    if not config.init_kl_coef or config.kl_in != "loss":
        return torch.zeros_like(logps)
    if config.kl_penalty != "full":
        return kl_loss(config.kl_penalty, logps, batch.old_logps, batch.ref_logps)
    with torch.no_grad():
        reference = completion_outputs(policy, batch, "log_probs", reference=True)
    kl = exact_kl(log_probs, reference.log_probs)  # (N,)
    return torch.zeros_like(logps).index_put((batch.mask,), kl)


def loss_needs_log_probs(config) -> bool:
    """Whether the loss of ppo, a2c or grpo needs full distributions over the vocabulary."""
    exact = config.kl_in == "loss" and config.kl_penalty == "full" and config.init_kl_coef > 0
    return exact or config.entropy_coef > 0
