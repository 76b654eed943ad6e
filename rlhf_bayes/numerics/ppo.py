"""The losses of proximal policy optimisation, per token, and the token rewards that they optimise."""

import torch
from torch import Tensor

from rlhf_bayes.numerics.gae import check_right_padded, gae_of_padded
from rlhf_bayes.numerics.masked import masked_var, zero_padding


def clipped_policy_loss(log_ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """
    Clipped surrogate, as a loss per token: `−min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A)`, `ρ = exp(log_ratio)`.

    Args:
        log_ratio (`torch.Tensor`): log-probability of each token now minus when it was drawn (B, T), in nats. Must be
            finite on padding too (set it to 0): masking the loss afterwards does not keep a nan out of the gradient.
        advantages (`torch.Tensor`): advantages (B, T), constants.
        epsilon_low (`float`): the ratio is clipped below at `1 − epsilon_low`.
        epsilon_high (`float`): the ratio is clipped above at `1 + epsilon_high`.

    Returns:
        `torch.Tensor`: loss per token (B, T).

    Raises:
        ValueError: if `epsilon_low` is outside [0, 1] or `epsilon_high` is negative.

    Source: Schulman et al. 2017, arXiv 1707.06347, equation 7; separate bounds: Yu et al. 2025, arXiv 2503.14476.
    """
    if not 0 <= epsilon_low <= 1:
        raise ValueError(f"`epsilon_low` must be in [0, 1], got {epsilon_low}: a probability ratio is never negative.")
    if not epsilon_high >= 0:
        raise ValueError(
            f"`epsilon_high` must be at least 0, got {epsilon_high}: the ratio is clipped at 1 + epsilon_high."
        )
    ratio = log_ratio.exp()  # (B, T)
    clipped_ratio = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)  # (B, T)
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float | None) -> Tensor:
    """
    Squared error of the values, clipped around the old ones: `½ max((V − R)², (clip(V, V_old ± c) − R)²)`.

    Args:
        values (`torch.Tensor`): values now (B, T).
        old_values (`torch.Tensor`): values when the completions were drawn (B, T).
        returns (`torch.Tensor`): regression targets (B, T).
        value_clip (`float`, *optional*): the distance c, in units of the reward; `None` does not clip.

    Returns:
        `torch.Tensor`: loss per token (B, T).

    Raises:
        ValueError: if `value_clip` is not positive.

    Source: lm-human-preferences, train_policy.py; Huang et al. 2024, arXiv 2403.17031.
    """
    error = (values - returns).square()  # (B, T)
    if value_clip is None:
        return 0.5 * error
    if not value_clip > 0:
        raise ValueError(f"`value_clip` must be positive, got {value_clip}: pass None to leave the values unclipped.")
    clipped_values = torch.clamp(values, old_values - value_clip, old_values + value_clip)  # (B, T)
    return 0.5 * torch.maximum(error, (clipped_values - returns).square())


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """
    Share of the variance of the returns that the values explain: `1 − Var(R − V) / Var(R)`.

    Args:
        values (`torch.Tensor`): values (B, T).
        returns (`torch.Tensor`): returns (B, T).
        mask (`torch.Tensor`): bool (B, T). Padding of `values` and `returns` may hold anything.

    Returns:
        `torch.Tensor`: scalar, at most 1, 0 for a constant critic, negative for a harmful one; nan when every return
            is the same.

    Raises:
        ValueError: if `mask` is not bool, or the shapes differ.
    """
    returns_variance = masked_var(returns, mask, unbiased=False)
    residual_variance = masked_var(returns - values, mask, unbiased=False)
    return torch.where(returns_variance > 0, 1 - residual_variance / returns_variance, torch.nan)


def token_rewards(score: Tensor, token_kl: Tensor, mask: Tensor, beta: float | Tensor) -> Tensor:
    """
    Reward per token: `−β KL_t`, plus the completion's score at its last valid token.

    Summed over tokens, with k1 in `token_kl`, it is `r − β log π/π0`, whose expectation is `J = E[r] − β KL(π‖π0)`.

    Args:
        score (`torch.Tensor`): reward of each completion (B,).
        token_kl (`torch.Tensor`): estimated KL to the prior per token (B, T), in nats; padding may hold anything.
        mask (`torch.Tensor`): bool (B, T), right-padded. A row without valid tokens gets no reward.
        beta (`float` or scalar `torch.Tensor`): units of the reward per nat.

    Returns:
        `torch.Tensor`: rewards (B, T), fp32 or better, 0 on padding.

    Raises:
        ValueError: if the shapes do not fit, or `mask` is not bool or not right-padded.

    Source: Ziegler et al. 2019, arXiv 1909.08593, equation 2.
    """
    if token_kl.dim() != 2 or score.shape != token_kl.shape[:1]:
        raise ValueError(
            f"`score` must be (B,) and `token_kl` (B, T), got {tuple(score.shape)} and {tuple(token_kl.shape)}."
        )
    check_right_padded(mask)
    return _token_rewards(score, zero_padding(token_kl, mask), mask, beta)


def _token_rewards(score: Tensor, token_kl: Tensor, mask: Tensor, beta: float | Tensor) -> Tensor:
    penalties = -beta * token_kl  # (B, T)
    followed = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)  # (B, T)
    # torch.where rather than a product with the mask: a score may be −inf
    rewards = torch.where(mask & ~followed, penalties + score[:, None], penalties)
    # without this, padding would hold −0.0
    return torch.where(mask, rewards, 0.0)


def adapted_beta(beta: float, kl: float, target_kl: float, episodes: int, horizon: int) -> float:
    """
    One step of the proportional controller: `β · (1 + clip(KL / target − 1, −0.2, 0.2) · episodes / horizon)`.

    Args:
        beta (`float`): β now, in units of the reward per nat.
        kl (`float`): KL to the prior of the batch, in nats per sequence.
        target_kl (`float`): the KL to approach, in nats per sequence.
        episodes (`int`): number of completions in the batch.
        horizon (`int`): number of completions over which the largest (clipped) error changes β by 20 %.

    Returns:
        `float`: the next β.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2.
    """
    error = min(max(kl / target_kl - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * episodes / horizon)


def kl_penalised_advantages(
    score: Tensor, log_ratios: Tensor, values: Tensor, mask: Tensor, beta: float | Tensor, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """
    Advantages of KL-penalised reward, for a critic that predicts the return of the whole completion.

        r_t = −β log(π/π0)(x_t), plus the score at the last token       V_t = u_t + β Σ_{i<t} log(π/π0)(x_i)

    followed by GAE with discount 1. The critic's u_t is a forecast of `score − β Σ_i log(π/π0)(x_i)`, the return of
    the whole completion. The log-ratios of the tokens before t are known, and adding them back gives the usual value
    V_t, the reward to go minus the KL to go. At the optimum u_t is β log Z for every prefix, so the advantages have no
    variance there. With λ < 1 the KL of a token enters its advantage through u_{t+1} more than through the return, so
    the critic must be trained well.

    Args:
        score (`torch.Tensor`): reward of each completion (B,).
        log_ratios (`torch.Tensor`): log π − log π0 of each token (B, T), in nats. Padding may hold anything.
        values (`torch.Tensor`): u_t before each token (B, T), in units of the reward.
        mask (`torch.Tensor`): bool (B, T): the tokens that the policy drew. What lies between them, the tokens of an
            environment, is skipped: the token after is the next one.
        beta (`float` or scalar `torch.Tensor`): units of the reward per nat.
        lam (`float` or scalar `torch.Tensor`): λ of GAE.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: advantages (B, T), and targets for u (B, T). The targets are the returns
            themselves for every λ, so that the critic never learns from its own errors. Both are 0 outside the mask.

    Source: Korbak, Perez & Buckley 2022, arXiv 2205.11275, equations 3 and 4; GAE as in [`gae`].
    """
    places = mask.int().argsort(dim=-1, descending=True, stable=True)  # (B, T): those of the mask first, in order
    packed, values = mask.gather(1, places), values.gather(1, places)  # (B, T), right-padded
    log_ratios = zero_padding(log_ratios.gather(1, places), packed)  # (B, T)
    paid = beta * (log_ratios.cumsum(-1) - log_ratios)  # (B, T)
    rewards = _token_rewards(score, log_ratios, packed, beta)  # (B, T)
    advantages, _ = gae_of_padded(rewards, zero_padding(values + paid, packed), lam=lam)
    advantages = torch.zeros_like(advantages).scatter(1, places, advantages)
    return advantages, torch.where(mask, rewards.sum(-1, keepdim=True), 0.0)


def prompt_baseline(returns: Tensor, forecasts: Tensor, num_generations: int) -> Tensor:
    """
    Baseline of each completion: the mean of its siblings and the critic's forecast, weighted by their precision.

        b_i = w · mean_{j ≠ i} G_j + (1 − w) · u,    w = τ² / (τ² + σ² / (n − 1))

    σ² is the variance of the returns G within a prompt, τ² the mean squared error of the critic's forecast u for a
    prompt, both pooled over the batch. With an untrained critic the baseline is RLOO's, with an exact one the
    critic's.

    Args:
        returns (`torch.Tensor`): return of each completion (B,), the n of a prompt next to each other. A completion
            without a return is nan and is left out.
        forecasts (`torch.Tensor`): the critic's value of each prompt (B,), in units of the reward.
        num_generations (`int`): n, which divides B. With 1, the baseline is the forecast.

    Returns:
        `torch.Tensor`: baselines (B,); the forecast where a completion has no sibling.

    Source: the normal posterior mean with an empirical prior, Efron & Morris 1973; leave-one-out as in RLOO, Ahmadian
    et al. 2024, arXiv 2402.14740.
    """
    if num_generations == 1:
        return forecasts
    groups, u = returns.view(-1, num_generations), forecasts.view(-1, num_generations)  # (P, n)
    known = ~groups.isnan()
    count = known.sum(-1, keepdim=True)  # (P, 1)
    total = groups.nansum(-1, keepdim=True)
    usable = known & (count > 1)  # (P, n)
    siblings = (total - groups) / (count - 1)  # (P, n)
    # (G_i − mean of the others)² has variance σ²·(1 + 1/(n − 1)), and (mean of the others − u)² has τ² + σ²/(n − 1)
    spread = torch.where(usable, (groups - siblings).square() * (count - 1) / count, 0.0).sum() / usable.sum()
    noise = spread / (count - 1)  # (P, 1)
    error = torch.where(usable, (siblings - u).square() - noise, 0.0).sum() / usable.sum()
    weight = error.clamp(min=0.0) / (error.clamp(min=0.0) + noise).clamp(min=torch.finfo(noise.dtype).tiny)
    return torch.where(usable, weight * siblings + (1 - weight) * u, u).flatten()
