"""Advantages of distributional policy gradients: importance ratio times (pseudo-reward minus baseline)."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_bayes.numerics.f_divergence import divergence_of, pseudo_rewards
from rlhf_bayes.numerics.groups import leave_one_out_baseline

BASELINES = ("leave_one_out", "constant", "none")
"""Names of the baselines of `dpg_advantages`."""


def default_baseline(divergence: str, alpha: float | None, num_completions: int) -> str:
    """
    The baseline with the least noise for a divergence, as its record says.

    Args:
        divergence (`str`): one of `DIVERGENCES`.
        alpha (`float`, *optional*): α of a family, such as `"alpha"`.
        num_completions (`int`): completions per prompt. A single one has no siblings, and gets `"constant"`.

    Raises:
        ValueError: if the divergence is unknown, or `alpha` does not fit it.
    """
    record = divergence_of(divergence, alpha)
    return record.baseline if num_completions > 1 else "constant"


def dpg_baselines(
    log_target: Tensor,
    log_policy: Tensor,
    log_proposal: Tensor,
    groups: Tensor,
    divergence: str,
    alpha: float | None = None,
    baseline: str = "constant",
) -> Tensor:
    r"""
    Baseline b of the pseudo-reward of each completion, for [`dpg_advantages`].

    Which one has the least noise depends on the divergence. With 4 draws of the prior on a toy, the constant has less
    noise than leave-one-out for the forward KL, α and JS, and more for TV and the reverse KL. The mean reward of the
    latter, −KL(π‖p) − 1, is far from its constant before training (`benchmarks/gradient_variance.py`).

    Args:
        log_target, log_policy, log_proposal (`torch.Tensor`): (B,), nats, as in [`dpg_advantages`]. The policy may be
            any one, for instance the one that drew the completions.
        groups (`torch.Tensor`): integers (B,), equal for completions of the same prompt.
        divergence (`str`): one of `DIVERGENCES`.
        alpha (`float`, *optional*): α in [0, 1], for `"alpha"` alone.
        baseline (`str`, defaults to `"constant"`): `"leave_one_out"` is [`leave_one_out_baseline`]; `"constant"` is
            −f′(1), the reward of every completion where π = p. For the forward KL it is the exact mean at any π; for
            `"js"`, `"tv"` and `"alpha"` it is 0. `"none"` is 0.

    Returns:
        `torch.Tensor`: (B,) fp64, constant.

    Raises:
        ValueError: as [`pseudo_rewards`]; if the baseline is unknown, or a leave-one-out baseline has no group of two.

    Source: Korbak et al. 2022, arXiv 2206.00761; the constant: ours.
    """
    if baseline not in BASELINES:
        raise ValueError(f"`baseline` must be one of {', '.join(BASELINES)}, got {baseline!r}.")
    log_target, log_policy, log_proposal = (x.detach().double() for x in (log_target, log_policy, log_proposal))
    at_equality = float(pseudo_rewards(log_policy.new_zeros(()), divergence, alpha))
    if baseline != "leave_one_out":
        return torch.full_like(log_policy, at_equality if baseline == "constant" else 0.0)
    if groups.numel() and int(groups.unique(return_counts=True)[1].max()) < 2:
        raise ValueError(
            '`baseline` "leave_one_out" needs at least two completions of a prompt, got one each. Raise '
            '`num_generations`, or use "constant".'
        )
    rewards = pseudo_rewards(log_target - log_policy, divergence, alpha)  # (B,)
    return leave_one_out_baseline(rewards, groups, log_policy - log_proposal, at_equality)


class DPGAdvantages(NamedTuple):
    """The results of [`dpg_advantages`]."""

    advantages: Tensor
    """(B,) fp32, constant; 0 for completions left out."""
    clipped: Tensor
    """(B,) fp32: importance ratio times the amount by which `max_pseudo_reward` lowered the pseudo-reward."""


def dpg_advantages(
    log_target: Tensor,
    log_policy: Tensor,
    log_proposal: Tensor,
    baselines: Tensor,
    divergence: str,
    alpha: float | None = None,
    max_pseudo_reward: float | None = None,
) -> DPGAdvantages:
    r"""
    Advantages of completions drawn from q, whose policy gradient descends D_f(π‖p) without bias.

        A_i = w_i·(R_i − b_i),    w = π/q,    R = −f′(π/p),    ∇ D_f(π‖p) = −E_q[A·∇log π]

    for the loss `−mean(A·log π)` with A constant. With the constant baseline of the forward KL, b = E_π[p/π] = 1, A is
    `p/q − π/q`: the weights P/q of distributional policy gradients minus Z·π/q, divided by Z.

    Args:
        log_target (`torch.Tensor`): log p = log π0 + log_likelihood − log Z of each completion (B,), in nats; `-inf`
            for a forbidden one, nan for one to be left out.
        log_policy (`torch.Tensor`): log π (B,), as the policy is now.
        log_proposal (`torch.Tensor`): log q (B,), as it was when the completion was drawn.
        baselines (`torch.Tensor`): b (B,), from [`dpg_baselines`].
        divergence (`str`): one of `DIVERGENCES`.
        alpha (`float`, *optional*): α in [0, 1], for `"alpha"` alone.
        max_pseudo_reward (`float`, *optional*): upper bound of R. Where it takes effect, it moves the optimum.

    Returns:
        [`DPGAdvantages`]

    Raises:
        ValueError: as [`pseudo_rewards`]; if log π or log q is not finite.

    Source: Khalifa et al. 2021, arXiv 2012.11635; Go et al. 2023, arXiv 2302.08215;
    baselines: Korbak et al. 2022, arXiv 2206.00761; the clip: Kruszewski et al. 2025, arXiv 2512.05962.
    """
    # fp64, since far from the policy p/π may overflow fp32 while π/q underflows, though their product is moderate
    log_target, log_policy, log_proposal = (x.detach().double() for x in (log_target, log_policy, log_proposal))
    for name, log_prob in (("log_policy", log_policy), ("log_proposal", log_proposal)):
        if log_prob.shape != log_target.shape or not log_prob.isfinite().all():
            raise ValueError(
                f"`{name}` must be finite and of the shape of `log_target`, {tuple(log_target.shape)}, got shape "
                f"{tuple(log_prob.shape)} with {int((~log_prob.isfinite()).sum())} that are not finite: a completion "
                "that was drawn has a positive probability."
            )
    ratio = (log_policy - log_proposal).exp()  # (B,)
    rewards = pseudo_rewards(log_target - log_policy, divergence, alpha)  # (B,)
    kept = rewards if max_pseudo_reward is None else rewards.clamp(max=max_pseudo_reward)
    left_out = rewards.isnan()
    return DPGAdvantages(
        torch.where(left_out, 0.0, ratio * (kept - baselines)).float(),
        torch.where(left_out, 0.0, ratio * (rewards - kept)).float(),
    )
