"""Estimates from scored draws: how far policy and prior are from the posterior, each with its uncertainty."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor

from rlhf_bayes.diagnostics.quantities import QUANTITIES
from rlhf_bayes.diagnostics.scored_draws import ScoredDraws
from rlhf_bayes.numerics import importance_ess, khat, khat_threshold
from rlhf_bayes.numerics import log_z as importance_log_z
from rlhf_bayes.numerics.jackknife import NUM_GROUPS, jackknife
from rlhf_bayes.numerics.log_weights import MIN_IMPORTANCE_ESS
from rlhf_bayes.numerics.mixture import log_fitted_mixture

NOT_TRUSTWORTHY = "not trustworthy"
CONFIDENCE = 0.95
MIN_DRAWS = 25  # with fewer draws, k̂ cannot be fitted to the tail


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, with two kinds of doubt. `trustworthy` is false where no number here means anything."""

    mean: float
    standard_error: float
    """Standard error for prompts like these: from the variance between prompts, which contains that of the draws. With
    one prompt it is the error of its draws alone."""
    low: float
    """Lower end of the 95% confidence interval, from Student's t with one degree of freedom fewer than prompts."""
    high: float
    """Upper end of the interval."""
    draws_standard_error: float
    """Standard error for these very prompts, which falls with more completions; nan where it is not known."""
    trustworthy: bool = True

    def __str__(self) -> str:
        if not self.trustworthy:
            return NOT_TRUSTWORTHY
        if math.isinf(self.mean):
            return "∞" if self.mean > 0 else "−∞"
        digits = 2 if not self.standard_error < 0.01 else 3
        return f"{self.mean:.{digits}f} ± {self.standard_error:.{digits}f}"


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
    """
    Pareto shape of the weights of all prompts together, each divided by its prompt's Z; to first order, the mean of
    log Z over prompts is the mean of these weights. It is infinite where too few weights are distinct to fit it. (With
    a k̂ for each of 16 prompts, some would exceed the threshold by chance, even if no weight has a heavy tail.)
    """
    num_draws: int
    """Draws for each prompt, from prior and policy together."""

    @classmethod
    def of(cls, log_weights: Tensor, log_z: Tensor, standard_error: Tensor) -> "LogZEstimate":
        """From log-weights (P, N), and the log Z and standard errors that they gave."""
        relative = log_weights - log_weights.logsumexp(-1, keepdim=True)  # nan where every weight is 0
        relative = relative.nan_to_num(nan=-torch.inf, neginf=-torch.inf).flatten()
        shape = math.inf if _ties(relative) else float(khat(relative))
        return cls(log_z, standard_error, importance_ess(log_weights), shape, log_weights.size(1))

    @property
    def enough_draws(self) -> Tensor:
        """(P,) bool: whether there are at least 25 draws with an effective sample size of at least 10."""
        return (self.importance_ess >= MIN_IMPORTANCE_ESS) & (self.num_draws >= MIN_DRAWS)

    @property
    def trustworthy(self) -> bool:
        """
        Whether the mean over prompts can be trusted: each prompt has enough draws, and k̂ is below its threshold.

        Where k̂ is infinite, too many weights are equal to fit the tail, and only the sample sizes decide.
        """
        return bool(self.enough_draws.all()) and (self.khat < self._threshold or self.khat == math.inf)

    @property
    def _threshold(self) -> float:
        return khat_threshold(self.num_draws * len(self.log_z))

    def __str__(self) -> str:
        good, prompts = int(self.enough_draws.sum()), len(self.log_z)
        tail = f"k-hat {self.khat:.2f}" if math.isfinite(self.khat) else "no k-hat, for weights that tie,"
        text = (
            f"log Z of {prompts} prompts from {self.num_draws} draws each is "
            f"{'' if self.trustworthy else 'not '}trustworthy: importance ESS {self.importance_ess.min():.0f} to "
            f"{self.importance_ess.max():.0f} ({good} prompts with 10 or more of at least "
            f"{MIN_DRAWS} draws), {tail} (trusted below {self._threshold:.2f})."
        )
        if (self.log_z == -torch.inf).any():
            none = int((self.log_z == -torch.inf).sum())
            text += f" For {none} prompts, no draw is possible under the posterior: its support was not found."
        if not self.trustworthy:
            text += (
                " Draw more completions a prompt, or pass a policy that is closer to the posterior, or weaken the "
                "evidence (raise β)."
            )
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

    The jackknife within each prompt removes the bias and gives the variance. Intervals for means over prompts come
    from the variance between prompts, as if the prompts were a random sample.

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
    normaliser = LogZEstimate.of(pool.log_weights(), log_z, variance.sqrt())
    fits = [
        _fit(columns, name, draws, beta, normaliser.trustworthy)
        for name, draws in (("prior", from_prior), ("policy", from_policy))
    ]
    return fits[0], fits[1], normaliser


@dataclass(frozen=True)
class _Pool:
    """Draws of prior and policy: evidence, log-densities, KLs, entropies, −log π0 and lengths, (P, n) fp64 each."""

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
            }
            return {name: column.double() for name, column in columns.items()}

        return cls(part(from_prior, prior_draws_under_policy), part(from_policy, from_policy.log_prob))

    @property
    def sizes(self) -> list[int]:
        return [part["evidence"].size(1) for part in (self.prior, self.policy)]

    def log_weights(self) -> Tensor:
        """The log of the unnormalised posterior over the mixture at the pooled draws: (P, N)."""
        pooled, log_mixture = self._pooled([self.prior, self.policy])
        return pooled["log_prior"] + pooled["evidence"] - log_mixture

    def statistics(self, kept: list[Tensor]) -> dict[str, Tensor]:
        """All statistics, (P,) each, from the draws at the given positions."""
        parts = [
            {name: column[:, rows] for name, column in part.items()}
            for part, rows in zip((self.prior, self.policy), kept, strict=True)
        ]
        pooled, log_mixture = self._pooled(parts)
        evidence, log_prior = pooled["evidence"], pooled["log_prior"]
        log_weights = log_prior + evidence - log_mixture  # (P, N)
        normaliser = importance_log_z(log_weights)
        weights = log_weights.softmax(-1)  # nan where all weights are 0
        expected_evidence = torch.where(weights > 0, weights * evidence, 0.0).sum(-1)
        found = {
            "log_z": normaliser,
            "posterior_evidence": expected_evidence,
            "posterior_kl_to_prior": expected_evidence - normaliser,
        }
        for name, part in zip(("prior", "policy"), parts, strict=True):
            log_own = pooled[f"log_{name}"]
            log_ratio = log_prior + evidence - log_own  # (P, N): unnormalised posterior over q
            elbo = (part["evidence"] - part[f"log_{name}"] + part["log_prior"]).mean(-1)
            forward = torch.where(weights > 0, weights * log_ratio, 0.0).sum(-1) - normaliser
            own_weights = (log_own - log_mixture).exp() / log_mixture.size(-1)
            found |= {
                f"{name}/evidence": part["evidence"].mean(-1),
                f"{name}/kl_to_prior": part["kl"].mean(-1),
                f"{name}/elbo": elbo,
                f"{name}/gap": normaliser - elbo,
                f"{name}/forward_kl": forward,
                f"{name}/jeffreys": normaliser - elbo + forward,
                f"{name}/tv": 0.5 * (weights - own_weights).abs().sum(-1),
                f"{name}/forbidden": (part["evidence"] == -torch.inf).double().mean(-1),
                f"{name}/entropy": part["entropy"].mean(-1),
                f"{name}/prior_perplexity": (-part["log_prior"].sum(-1) / part["length"].sum(-1)).exp(),
            }
        return found

    @staticmethod
    def _pooled(parts: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
        pooled = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}  # (P, N)
        share = parts[0]["evidence"].size(1) / pooled["evidence"].size(1)
        return pooled, log_fitted_mixture(pooled["log_prior"], pooled["log_policy"], share)


def _fit(
    columns: Mapping[str, tuple[Tensor, Tensor]], name: str, draws: ScoredDraws, beta: float | None, trusted: bool
) -> PosteriorFit:
    def of(quantity: str, scale: float = 1.0, trustworthy: bool = True) -> Estimate:
        means, variances = columns[quantity]
        return over_prompts(scale * means, scale**2 * variances, trustworthy)

    def of_texts(measure: Callable[[Sequence[str]], float]) -> Estimate:
        values = [measure(texts) for texts in draws.texts]
        return over_prompts(torch.tensor(values, dtype=torch.float64))

    return PosteriorFit(
        reward=None if beta is None else of(f"{name}/evidence", beta),
        kl_to_prior=of(f"{name}/kl_to_prior"),
        elbo=of(f"{name}/elbo"),
        log_z=of("log_z", trustworthy=trusted),
        # with a forbidden draw the gap is infinite, whether or not log Z can be trusted
        gap=of(f"{name}/gap", trustworthy=trusted or bool((columns[f"{name}/elbo"][0] == -torch.inf).any())),
        forward_kl=of(f"{name}/forward_kl", trustworthy=trusted),
        jeffreys=of(f"{name}/jeffreys", trustworthy=trusted),
        tv=of(f"{name}/tv", trustworthy=trusted),
        forbidden=of(f"{name}/forbidden"),
        posterior_reward=None if beta is None else of("posterior_evidence", beta, trusted),
        posterior_kl_to_prior=of("posterior_kl_to_prior", trustworthy=trusted),
        entropy=of(f"{name}/entropy"),
        prior_perplexity=of(f"{name}/prior_perplexity"),
        text_measures={
            name: of_texts(quantity.of_texts) for name, quantity in QUANTITIES.items() if quantity.of_texts is not None
        },
        num_draws=draws.log_prob.size(1),
    )


def _ties(log_weights: Tensor) -> bool:
    """Whether the largest weights (N,) have few distinct values, as with short completions or a discrete reward."""
    # the shape of a Pareto distribution fitted to tied weights depends only on the gaps between them
    tail = log_weights.topk(min(len(log_weights), math.ceil(3 * math.sqrt(len(log_weights))))).values
    return len(tail.mul(1e4).round().unique()) < len(tail) / 2


def over_prompts(values: Tensor, variances: Tensor | None = None, trustworthy: bool = True) -> Estimate:
    """
    The mean over prompts of one number per prompt, with an interval clustered by prompt.

    Args:
        values (`Tensor` (P,)):
            Estimates for each prompt.
        variances (`Tensor` (P,), *optional*):
            The variance of each estimate over its draws.
        trustworthy (`bool`):
            Whether the mean can be trusted.
    """
    prompts, mean = len(values), values.mean().item()
    draws_error = math.nan if variances is None else math.sqrt(variances.sum().item()) / prompts
    error = (values.std() / math.sqrt(prompts)).item() if prompts > 1 else draws_error
    # with one prompt the error is the jackknife's, whose degrees of freedom come from its groups
    half = float(student.ppf((1 + CONFIDENCE) / 2, (prompts if prompts > 1 else NUM_GROUPS) - 1)) * error
    return Estimate(mean, error, mean - half, mean + half, draws_error, trustworthy)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
