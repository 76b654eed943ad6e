"""Estimates from scored draws: how far policy and prior are from the posterior, each with its uncertainty."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_bayes.diagnostics.over_prompts import ANYTHING, CONFIDENCE, Estimate, over_prompts, quantile
from rlhf_bayes.diagnostics.quantities import QUANTITIES, Quantity
from rlhf_bayes.diagnostics.scored_draws import ScoredDraws
from rlhf_bayes.numerics import importance_ess, khat_threshold
from rlhf_bayes.numerics import log_z as importance_log_z
from rlhf_bayes.numerics.jackknife import jackknife
from rlhf_bayes.numerics.log_weights import (
    MIN_DRAWS,
    MIN_IMPORTANCE_ESS,
    pooled_khat,
    weighted_mean,
    weights_suffice,
)
from rlhf_bayes.numerics.mixture import log_fitted_mixture


@dataclass(frozen=True)
class LogZEstimate:
    """log Z of P prompts, with diagnostics of whether it can be trusted."""

    log_z: Tensor
    """(P,) fp64, nats."""
    standard_error: Tensor
    """(P,), nats, over the draws."""
    importance_ess: Tensor
    """(P,): effective sample size of the weights."""
    khat: float
    """Pareto shape of the weights, see [`~rlhf_bayes.numerics.log_weights.pooled_khat`]; infinite for weights that
    tie."""
    num_draws: int
    """Draws for each prompt, from prior and policy together."""
    has_beta: bool = True
    """Whether the evidence is a reward, which a larger β would weaken."""

    @classmethod
    def of(cls, log_weights: Tensor, log_z: Tensor, standard_error: Tensor, has_beta: bool = True) -> "LogZEstimate":
        """
        From weights, and what they gave.

        Args:
            log_weights (`Tensor` (P, N)):
                Log-weights, nats.
            log_z, standard_error (`Tensor` (P,)):
                log Z and its standard error.
            has_beta (`bool`):
                Whether the evidence is a reward.
        """
        shape, n = pooled_khat(log_weights), log_weights.size(1)
        return cls(log_z, standard_error, importance_ess(log_weights), shape, n, has_beta)

    @property
    def enough_draws(self) -> Tensor:
        """(P,) bool: whether there are at least 25 draws with an effective sample size of at least 10."""
        return (self.importance_ess >= MIN_IMPORTANCE_ESS) & (self.num_draws >= MIN_DRAWS)

    @property
    def trustworthy(self) -> bool:
        """Whether the mean over these prompts can be trusted: each has enough draws, and k̂ is below its threshold."""
        return weights_suffice(self.importance_ess, self.khat, self.num_draws)

    @property
    def _threshold(self) -> float:
        return khat_threshold(self.num_draws * len(self.log_z))

    def __str__(self) -> str:
        good, prompts = int(self.enough_draws.sum()), len(self.log_z)
        tail = f"k-hat {self.khat:.2f}" if math.isfinite(self.khat) else "no k-hat, for weights that tie,"
        of = f"{prompts} prompts" if prompts > 1 else "one prompt"
        verdict = "trustworthy" if prompts > 1 else "known for this prompt, and says nothing of others"
        if not self.trustworthy:
            verdict = "not trustworthy"
        text = (
            f"log Z of {of} from {self.num_draws} draws each is {verdict}: importance ESS "
            f"{self.importance_ess.min():.0f} to {self.importance_ess.max():.0f} ({good} prompts with 10 or more of "
            f"at least {MIN_DRAWS} draws), {tail} (trusted below {self._threshold:.2f})."
        )
        if (self.log_z == -torch.inf).any():
            none = int((self.log_z == -torch.inf).sum())
            text += f" For {none} prompts, no draw is possible under the posterior: its support was not found."
        if not self.trustworthy:
            text += " Draw more completions a prompt, or pass a policy that is closer to the posterior"
            text += ", or weaken the evidence (raise β)." if self.has_beta else "."
        return text


@dataclass(frozen=True)
class PosteriorFit:
    """
    A distribution q, the policy or the prior, against a posterior.

    Numbers are means over prompts, in nats per sequence where no other unit is named. What needs a normaliser is None
    where there is no posterior (β = 0); `reward` is None where the evidence has no β.
    """

    reward: Estimate | None
    """E_q[r], in the reward's own units."""
    kl_to_prior: Estimate
    """KL(q‖π0), from the exact KL at each token."""
    elbo: Estimate | None
    """E_q[ℓ] − KL(q‖π0) ≤ log Z."""
    log_z: Estimate | None
    """log Z: the best possible ELBO."""
    gap: Estimate | None
    """KL(q‖π*) = log Z − ELBO, the reverse KL: large where q draws what the posterior does not."""
    forward_kl: Estimate | None
    """KL(π*‖q), the forward KL: large where q misses what the posterior draws."""
    jeffreys: Estimate | None
    """KL(q‖π*) + KL(π*‖q), in which log Z cancels."""
    tv: Estimate | None
    """Total variation distance of q and π*, in [0, 1]."""
    forbidden: Estimate
    """Share of draws that the evidence forbids; above 0, the gap is infinite."""
    posterior_reward: Estimate | None
    """E_π*[r]: the reward of a policy that has reached the posterior."""
    posterior_kl_to_prior: Estimate | None
    """KL(π*‖π0): how far that policy is from the prior."""
    entropy: Estimate
    """Entropy of q."""
    prior_perplexity: Estimate
    """exp of the mean −log π0 per token of q's completions: high where the prior would seldom draw them."""
    text_measures: dict[str, Estimate] = field(hash=False)
    """Signs of collapse, read off the words of a prompt's completions: those of
    [`~rlhf_bayes.diagnostics.quantities.QUANTITIES`] with `of_texts`. Each is an attribute too, as `fit.self_bleu`."""
    num_draws: int
    """Completions of q for each prompt. The diversity of two fits can be compared only if these are equal."""

    def __getattr__(self, name: str) -> Estimate:
        # called for names that are no field; copy and pickle ask before there are fields
        if name != "text_measures" and name in self.text_measures:
            return self.text_measures[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def without_posterior(self) -> "PosteriorFit":
        """A copy without the numbers that need a posterior, for β = 0."""
        names = ("elbo", "log_z", "gap", "forward_kl", "jeffreys", "tv", "posterior_reward", "posterior_kl_to_prior")
        return replace(self, **dict.fromkeys(names))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, one dictionary per estimate; None for what is unknown or not finite."""
        found = asdict(self)
        # flat, as files have it
        found |= found.pop("text_measures") | {"num_draws": found.pop("num_draws")}
        return {
            name: {key: _plain(number) for key, number in value.items()} if isinstance(value, dict) else value
            for name, value in found.items()
        }


def posterior_fits(
    from_prior: ScoredDraws, from_policy: ScoredDraws, prior_draws_under_policy: Tensor, beta: float | None
) -> tuple[PosteriorFit, PosteriorFit, LogZEstimate]:
    r"""
    Estimate prior and policy against the posterior, from draws of both.

    Each of the 2n pooled draws of a prompt has the weight v_i ∝ π*(x_i) / (ω·π0(x_i) + (1 − ω)·π(x_i)), see
    [`~rlhf_bayes.numerics.log_fitted_mixture`]. With ℓ = log_likelihood, and π0 or π as q:

        log Ẑ = log mean w,    ELBO = E_q[ℓ − log(q/π0)],    KL(q‖π*) = log Z − ELBO
        KL(π*‖q) = Σ_i v_i·(ℓ − log(q/π0))(x_i) − log Z,    TV = ½ Σ_i |v_i − q(x_i)/(N·mixture(x_i))|

    Draws of an engine are weighted by q over its own density in all of these.

    The jackknife within each prompt removes the bias and gives the variance. Intervals for means over prompts come
    from the variance between prompts, as if the prompts were a random sample.

    Where log Z cannot be trusted, it is bounded from below: E[log Ẑ] ≤ log Z for a Ẑ without bias, here the balance
    heuristic. So are the gap, and E_π*[r] ≥ β·log Z. Each bound is lowered by its own error, to 95% confidence.

    Args:
        from_prior (`ScoredDraws`):
            Draws of the prior.
        from_policy (`ScoredDraws`):
            Draws of the policy, for the same prompts.
        prior_draws_under_policy (`Tensor` (P, n)):
            log π of the prior's draws, nats.
        beta (`float`, *optional*):
            Units of reward per nat, which turn evidence into reward; None where the evidence is no reward.

    Returns:
        The prior's [`PosteriorFit`], the policy's, and log Z of each prompt.

    Raises:
        ValueError: if there are fewer than two draws for each prompt.

    Source: Korbak, Perez & Buckley 2022, arXiv 2205.11275, equations 5 to 7; the KL as in Amini, Vieira & Cotterell
    2025, arXiv 2504.10637. The ELBO uses the log-ratio of the drawn tokens, with which it has no variance at the
    optimum.
    """
    pool = _Pool.of(from_prior, from_policy, prior_draws_under_policy)
    names: list[str] = []

    def statistics(kept: list[Tensor]) -> Tensor:
        found = pool.statistics(kept)
        names[:] = found
        return torch.stack(list(found.values()))  # (Q, P)

    means, variances = jackknife(statistics, pool.sizes)
    columns = {name: (means[row], variances[row]) for row, name in enumerate(names)}
    log_z, variance = columns["log_z"]
    normaliser = LogZEstimate.of(pool.log_weights(), log_z, variance.sqrt(), beta is not None)
    # without the jackknife's correction of the bias, since the sign of the bias is what makes it a bound
    plain = pool.statistics([torch.arange(size) for size in pool.sizes])
    bounds = {name: _lower(plain[name], columns[name][1]) for name in names if name.endswith("_bound")}
    fits = [
        _fit(columns, bounds, name, draws, beta, normaliser.trustworthy)
        for name, draws in (("prior", from_prior), ("policy", from_policy))
    ]
    return fits[0], fits[1], normaliser


@dataclass(frozen=True)
class _Pool:
    """
    Draws of prior and policy: evidence, log-densities, KLs, entropies and lengths, (P, n) fp64 each.

    Where an engine drew, `log_correction` is the log-density of what it stands for less its own; elsewhere 0.
    """

    prior: dict[str, Tensor]
    policy: dict[str, Tensor]

    @classmethod
    def of(cls, from_prior: ScoredDraws, from_policy: ScoredDraws, prior_draws_under_policy: Tensor) -> "_Pool":
        def part(draws: ScoredDraws, log_policy: Tensor) -> dict[str, Tensor]:
            columns = {
                "evidence": draws.log_likelihood,
                "log_prior": draws.log_prior,
                "log_policy": log_policy,
                "kl": draws.kl,
                "entropy": draws.entropy,
                "length": draws.lengths,
                "log_correction": draws.log_correction,
            }
            return {name: column.double() for name, column in columns.items()}

        return cls(part(from_prior, prior_draws_under_policy), part(from_policy, from_policy.log_prob))

    @property
    def sizes(self) -> list[int]:
        return [part["evidence"].size(1) for part in (self.prior, self.policy)]

    def log_weights(self) -> Tensor:
        """The log of the unnormalised posterior over the mixture at the pooled draws: (P, N)."""
        pooled, log_mixture = self._pooled([self.prior, self.policy])
        return pooled["log_prior"] + pooled["evidence"] - log_mixture + pooled["log_correction"]

    def statistics(self, kept: list[Tensor]) -> dict[str, Tensor]:
        """All statistics, (P,) each, from the draws at the given positions."""
        parts = [
            {name: column[:, rows] for name, column in part.items()}
            for part, rows in zip((self.prior, self.policy), kept, strict=True)
        ]
        pooled, log_mixture = self._pooled(parts)
        evidence, log_prior, correction = pooled["evidence"], pooled["log_prior"], pooled["log_correction"]
        log_weights = log_prior + evidence - log_mixture + correction  # (P, N)
        normaliser = importance_log_z(log_weights)
        weights = log_weights.softmax(-1)  # nan where all weights are 0
        expected_evidence = torch.where(weights > 0, weights * evidence, 0.0).sum(-1)
        bound = importance_log_z(log_prior + evidence - self._log_balance(pooled) + correction)
        found = {
            "log_z": normaliser,
            "log_z_bound": bound,
            "posterior_evidence": expected_evidence,
            "posterior_kl_to_prior": expected_evidence - normaliser,
        }
        for name, part in zip(("prior", "policy"), parts, strict=True):
            log_own = pooled[f"log_{name}"]
            log_ratio = log_prior + evidence - log_own  # (P, N): unnormalised posterior over q
            of_part = {column: weighted_mean(values, part["log_correction"]) for column, values in part.items()}
            elbo = weighted_mean(part["evidence"] - part[f"log_{name}"] + part["log_prior"], part["log_correction"])
            forward = torch.where(weights > 0, weights * log_ratio, 0.0).sum(-1) - normaliser
            own_weights = (log_own - log_mixture + correction).exp() / log_mixture.size(-1)
            found |= {
                f"{name}/evidence": of_part["evidence"],
                f"{name}/kl_to_prior": of_part["kl"],
                f"{name}/elbo": elbo,
                f"{name}/gap": normaliser - elbo,
                f"{name}/gap_bound": bound - elbo,
                f"{name}/forward_kl": forward,
                f"{name}/jeffreys": normaliser - elbo + forward,
                f"{name}/tv": 0.5 * (weights - own_weights).abs().sum(-1),
                f"{name}/forbidden": weighted_mean((part["evidence"] == -torch.inf).double(), part["log_correction"]),
                f"{name}/entropy": of_part["entropy"],
                f"{name}/prior_perplexity": (-of_part["log_prior"] / of_part["length"]).exp(),
            }
        return found

    @staticmethod
    def _pooled(parts: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
        pooled = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}  # (P, N)
        share = parts[0]["evidence"].size(1) / pooled["evidence"].size(1)
        return pooled, log_fitted_mixture(pooled["log_prior"], pooled["log_policy"], share)

    def _log_balance(self, pooled: Mapping[str, Tensor]) -> Tensor:
        """log of the mixture in the proportion in which both were drawn: (P, N). It makes Ẑ unbiased."""
        prior, policy = self.sizes
        parts = [
            pooled[name] + math.log(size / (prior + policy))
            for name, size in (("log_prior", prior), ("log_policy", policy))
        ]
        return torch.logaddexp(*parts)


def _lower(values: Tensor, variances: Tensor) -> float | None:  # (P,), (P,)
    """The lower end of a one-sided interval of the mean over these prompts; None where it is not finite."""
    low = (values.mean() - quantile(1, 2 * CONFIDENCE - 1) * variances.sum().sqrt() / len(values)).item()
    return low if math.isfinite(low) else None


def _fit(
    columns: Mapping[str, tuple[Tensor, Tensor]],
    bounds: Mapping[str, float | None],
    name: str,
    draws: ScoredDraws,
    beta: float | None,
    trusted: bool,
) -> PosteriorFit:
    num_draws = draws.log_prob.size(1)
    log_z_bound, gap_bound = bounds["log_z_bound"], bounds[f"{name}/gap_bound"]
    if gap_bound is not None:
        gap_bound = max(gap_bound, 0.0)

    def of(quantity: str, scale: float = 1.0, trustworthy: bool = True, at_least: float | None = None) -> Estimate:
        means, variances = columns[quantity]
        record = QUANTITIES.get(quantity.rpartition("/")[2])
        support = ANYTHING if record is None else record.support
        share_of = num_draws if record is not None and record.is_share else None
        found = over_prompts(scale * means, scale**2 * variances, trustworthy, support, share_of)
        return found if trustworthy else replace(found, at_least=at_least)

    def of_texts(record: Quantity, measure: Callable[[Sequence[str]], float]) -> Estimate:
        values = torch.tensor([measure(texts) for texts in draws.texts], dtype=torch.float64)
        return over_prompts(values, support=record.support, share_of=num_draws if record.is_share else None)

    return PosteriorFit(
        reward=None if beta is None else of(f"{name}/evidence", beta),
        kl_to_prior=of(f"{name}/kl_to_prior"),
        elbo=of(f"{name}/elbo"),
        log_z=of("log_z", 1.0, trusted, log_z_bound),
        # with a forbidden draw the gap is infinite, whether or not log Z can be trusted
        gap=of(f"{name}/gap", 1.0, trusted or bool((columns[f"{name}/elbo"][0] == -torch.inf).any()), gap_bound),
        forward_kl=of(f"{name}/forward_kl", trustworthy=trusted),
        jeffreys=of(f"{name}/jeffreys", 1.0, trusted, gap_bound),
        tv=of(f"{name}/tv", trustworthy=trusted),
        forbidden=of(f"{name}/forbidden"),
        posterior_reward=None
        if beta is None
        else of("posterior_evidence", beta, trusted, None if log_z_bound is None else beta * log_z_bound),
        posterior_kl_to_prior=of("posterior_kl_to_prior", trustworthy=trusted),
        entropy=of(f"{name}/entropy"),
        prior_perplexity=of(f"{name}/prior_perplexity"),
        text_measures={
            name: of_texts(quantity, quantity.of_texts)
            for name, quantity in QUANTITIES.items()
            if quantity.of_texts is not None
        },
        num_draws=num_draws,
    )


def plain_numbers(estimate: Estimate) -> dict[str, Any]:
    """The fields of an estimate for JSON: None where a number is not finite."""
    return {key: _plain(value) for key, value in asdict(estimate).items()}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
