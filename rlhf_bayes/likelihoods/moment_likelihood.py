"""Features with given means as evidence: an exponential family."""

import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from rlhf_bayes.likelihoods.likelihood import Evidence, EvidenceLikelihood, Likelihood, checked_log_likelihood
from rlhf_bayes.likelihoods.moment_summary import FeatureMoment, MomentSummary
from rlhf_bayes.lm.support import check_same_support
from rlhf_bayes.numerics import MomentFit, fit_moments, log_z
from rlhf_bayes.rewards import RewardFunc, RewardScorer

if TYPE_CHECKING:
    from rlhf_bayes.lm import Completions, LanguageModel


@final
class MomentLikelihood(EvidenceLikelihood):
    r"""
    Evidence of an exponential family:

        log_likelihood(c, x)  =  λ·φ(c, x)  =  Σ_f λ_f · φ_f(c, x)

    With the λ that `fit` finds, π0(x | c) · exp(λ·φ) / Z(c) is the distribution closest to the prior, in the mean KL
    over the prompts, of all those in which the features have the given means over the prompts' completions.

    λ_f may be +∞ or −∞. Then the feature must be binary, and completions in which it is not 1, or not 0, are
    forbidden.

    Args:
        features (`Mapping[str, Callable | torch.nn.Module | str]`):
            name -> φ_f, a reward function of TRL's protocol, a sequence-classification model, or the path to one.
        lambdas (`Mapping[str, float]`):
            name -> λ_f, nats per unit of the feature.
        feature_bounds (`Mapping[str, tuple[float, float]]`, *optional*):
            name -> (low, high), the range of a feature: (0, 1) if it is binary. A value outside is refused.
        summary (`MomentSummary`, *optional*):
            The uncertainty of λ.
        device (`torch.device`, *optional*):
            Where to put models that are loaded from a path.

    Attributes:
        bound (`float` or `None`): Σ_f max(λ_f·low_f, λ_f·high_f), nats, if the bounds of all features are known.
        forbids (`bool`): whether some λ_f is infinite.

    Raises:
        `TypeError` or `ValueError`: if there is no feature, names do not agree, λ is NaN, or bounds are not a range.

    Source: Khalifa, Elsahar & Dymetman 2021, arXiv 2012.11635, section 2.1.
    """

    def __init__(
        self,
        features: Mapping[str, RewardFunc],
        lambdas: Mapping[str, float],
        feature_bounds: Mapping[str, tuple[float, float]] | None = None,
        summary: MomentSummary | None = None,
        device: torch.device | str | None = None,
    ):
        if not features:
            raise ValueError("`features` must hold at least one feature, got none. Without evidence, take the prior.")
        if features.keys() != lambdas.keys():
            raise ValueError(
                f"`lambdas` must have the names of `features`, {list(features)}, got {list(lambdas)}. Give one λ each."
            )
        self.names = list(features)
        self.summary = summary
        self._set(lambdas, feature_bounds or {})
        self._scorer = RewardScorer(list(features.values()), device=device)

    def _facts(self) -> dict[str, Any]:
        return {"lambdas": self.lambdas}

    def _set(self, lambdas: Mapping[str, float], feature_bounds: Mapping[str, tuple[float, float]]) -> None:
        self.lambdas = {name: _checked_number(lambdas[name], f"`lambdas['{name}']`") for name in self.names}
        unknown = [name for name in feature_bounds if name not in self.lambdas]
        if unknown:
            raise ValueError(f"`feature_bounds` must have names of features, {self.names}, got '{unknown[0]}'.")
        for name, bounds in feature_bounds.items():
            if len(bounds) != 2 or not bounds[0] < bounds[1]:
                raise ValueError(
                    f"`feature_bounds['{name}']` must be two numbers, low < high, got {bounds!r}. Use an infinity for "
                    "an end that is not known."
                )
        self.feature_bounds = {name: (float(low), float(high)) for name, (low, high) in feature_bounds.items()}

    @property
    def bound(self) -> float | None:
        """Upper bound on λ·φ, in nats, or `None` where a feature's bounds are not known."""
        total = 0.0
        for name, lam in self.lambdas.items():
            if lam == 0 or math.isinf(lam):
                continue
            low, high = self.feature_bounds.get(name, (-math.inf, math.inf))
            total += max(lam * low, lam * high)
        return total if total < math.inf else None

    @property
    def forbids(self) -> bool | None:
        """Whether some λ is infinite, so that its feature is a condition."""
        return any(map(math.isinf, self.lambdas.values()))

    def features(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence] | None = None,
    ) -> Tensor:
        """
        φ of each completion: (B, F), fp32, in the order of `names`.

        Arguments are those of [`Likelihood.log_likelihood`].

        Raises:
            `TypeError` or `ValueError`: if a feature does not return one finite number for each completion. What a
                feature raises itself gets a note.
        """
        values = self._scorer(prompts, completions, completion_ids, columns)  # (B, F)
        missing = values.isnan().nonzero().tolist()
        if missing:
            row, index = missing[0]
            raise ValueError(
                f"The feature '{self.names[index]}' must be a number for each completion, got None in row {row}: "
                f"prompt {prompts[row]!r}, completion {completions[row]!r}. Return 0 where it is absent."
            )
        return values

    def evidence(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence] | None = None,
    ) -> Evidence:
        """
        λ·φ of each completion, (B,), fp32, nats, `-inf` where a condition is not met; and φ by name.

        Arguments are those of [`Likelihood.log_likelihood`].

        Raises:
            `ValueError`: as in `features`; if a value is outside of `feature_bounds`, or neither 0 nor 1 where λ is
                infinite.
        """
        values = self.features(prompts, completions, completion_ids, columns).double()  # (B, F)
        total = torch.zeros(len(values), dtype=torch.float64)
        forbidden = torch.zeros(len(values), dtype=torch.bool)
        for index, (name, lam) in enumerate(self.lambdas.items()):
            column = values[:, index]  # (B,)
            if math.isinf(lam):
                self._check(name, (column == 0) | (column == 1), column, "0 or 1, since λ is infinite")
                forbidden |= column != float(lam > 0)
                continue
            if name in self.feature_bounds:
                low, high = self.feature_bounds[name]
                rule = f"between {low:g} and {high:g}, as `feature_bounds` says or the draws of the fit suggested"
                self._check(name, (column >= low) & (column <= high), column, rule)
            total += lam * column
        by_name = {name: values[:, index].float() for index, name in enumerate(self.names)}
        return Evidence(torch.where(forbidden, -torch.inf, total).float(), by_name)

    def _check(self, name: str, holds: Tensor, column: Tensor, rule: str) -> None:
        if holds.all():
            return
        row = int(holds.int().argmin())
        raise ValueError(
            f"The feature '{name}' must be {rule}, got {column[row].item():.6g} in row {row}. Make the feature "
            f"binary, or give its true range: `feature_bounds={{'{name}': (low, high)}}`."
        )

    def _fit_to(
        self, features: Tensor, log_weights: Tensor, wanted: Mapping[str, float], prompts: Sequence[Any]
    ) -> None:
        """Set λ and the summary from features (P, n, F) of draws with log-weights (P, n), fp64."""
        moments = torch.tensor(list(wanted.values()), dtype=torch.float64)  # (F,)
        binary = ((features == 0) | (features == 1)).flatten(0, 1).all(0)  # (F,)
        # a count that never exceeds 1 on the draws is not binary if its known bounds are wider
        binary &= torch.tensor([self.feature_bounds.get(name, (0.0, 1.0)) == (0.0, 1.0) for name in self.names])
        forced = binary & ((moments == 0) | (moments == 1))
        met = log_weights.masked_fill((features != moments)[..., forced].any(-1), -torch.inf)  # (P, n)
        _check_met(met, features, moments, forced, self.names, prompts)
        free = [name for name, is_forced in zip(wanted, forced.tolist(), strict=True) if not is_forced]
        result = fit_moments(features[..., ~forced], moments[~forced], met, free)
        prior_moments = (log_weights.softmax(-1)[..., None] * features).sum(1).mean(0)  # (F,), without conditions
        self.summary = _summary(result, wanted, free, prior_moments.tolist(), met.size(1))
        known = {name: (0.0, 1.0) for name, is_binary in zip(wanted, binary.tolist(), strict=True) if is_binary}
        self._set({name: feature.lam for name, feature in self.summary.features.items()}, known | self.feature_bounds)

    @classmethod
    def fit(
        cls,
        prior: "LanguageModel",
        constraints: Mapping[str, tuple[RewardFunc, float]],
        prompts: Sequence[Any],
        num_samples: int = 256,
        generator: torch.Generator | None = None,
        proposal: "LanguageModel | None" = None,
        columns: Mapping[str, Sequence] | None = None,
        feature_bounds: Mapping[str, tuple[float, float]] | None = None,
        evidence: Likelihood | None = None,
    ) -> "MomentLikelihood":
        r"""
        The evidence with which features have given means, by the convex dual on draws; features are evaluated once.

            (1/P) Σ_c E_π*(·|c)[φ]  =  μ̄,        π*(x | c)  =  π0(x | c) · exp(λ·φ(c, x)) / Z(c)

        **One λ for all prompts**, each with its own Z: "half of the stories" is half of the stories of all prompts
        together, more for one prompt and fewer for another, at the least mean KL. For half of the stories of *each*
        prompt, fit each prompt by itself.

        A binary feature at moment 1 or 0 becomes a condition: λ = ±∞, and the other moments are conditional on it.

        Args:
            prior (`LanguageModel`):
                π0.
            constraints (`Mapping[str, tuple]`):
                name -> (feature, moment): a reward function of TRL's protocol (or a model, or its path), and the mean
                that it must have. The summary uses these names. A feature that is 0 or 1 on every draw is taken to be
                binary.
            prompts (`Sequence` of `str` or of chats):
                P prompts. Their choice is part of the target.
            num_samples (`int`, *optional*, defaults to `256`):
                Completions for each prompt, at least 2. The bias of λ is of the order of 1/num_samples, for any P.
            generator (`torch.Generator`, *optional*):
                Makes the draws reproducible.
            proposal (`LanguageModel`, *optional*):
                The distribution to draw from, with weights π0/q. A policy trained towards these moments reaches
                completions that the prior hardly draws. It needs the prior's tokenizer and `max_completion_length`.
                Default: the prior.
            columns (`Mapping[str, Sequence]`, *optional*):
                Columns of the dataset that features ask for, P entries each.
            feature_bounds (`Mapping[str, tuple[float, float]]`, *optional*):
                name -> (low, high). Default: (0, 1) for binary features, unknown for the others. With another range a
                feature is not treated as binary, whatever its values on the draws.
            evidence (`Likelihood`, *optional*):
                Further evidence: the moments are those of π0·exp(evidence + λ·φ), the distribution closest to the
                posterior of that evidence. In the summary that posterior takes the place of the prior.

        Raises:
            `TypeError` or `ValueError`: if the proposal has another support, a feature does not return numbers, no
                draw of a prompt meets a condition, or the draws do not reach the moments, which may also contradict
                each other.

        Source: Khalifa, Elsahar & Dymetman 2021, arXiv 2012.11635, section 2.2; [`~rlhf_bayes.numerics.fit_moments`].
        """
        wanted = _checked_moments(constraints)
        functions = {name: constraint[0] for name, constraint in constraints.items()}
        likelihood = cls(functions, dict.fromkeys(functions, 0.0), feature_bounds, device=prior.device)
        drawn, log_weights = _draw(prior, proposal, prompts, num_samples, generator)
        rows = _repeated(columns or {}, len(prompts), num_samples)
        drawn_rows = (drawn.prompts, drawn.completions, drawn.completion_ids, rows)
        features = likelihood.features(*drawn_rows)  # (P·n, F)
        if evidence is not None:
            nats = checked_log_likelihood(evidence, *drawn_rows)  # (P·n,)
            log_weights = _under_evidence(log_weights + nats.double().cpu().view_as(log_weights), prompts)
        likelihood._fit_to(features.double().view(*log_weights.shape, -1), log_weights, wanted, prompts)
        summary = likelihood.summary
        if summary is not None and not summary.trustworthy.all():
            warnings.warn(
                f"λ rests on few draws: {summary} Draw more (`num_samples`), or draw from a policy trained "
                "towards these moments (`proposal`).",
                stacklevel=4,  # the warning names the line that calls `constrain`
            )
        return likelihood


def _repeated(columns: Mapping[str, Sequence], num_prompts: int, num_samples: int) -> dict[str, list]:
    """Columns with the entry of each prompt repeated for its completions, which are next to each other."""
    for name, values in columns.items():
        if isinstance(values, str) or len(values) != num_prompts:
            raise ValueError(
                f"`columns['{name}']` must have one entry for each of the {num_prompts} prompts, got "
                f"{repr(values) if isinstance(values, str) else len(values)}."
            )
    return {name: [value for value in values for _ in range(num_samples)] for name, values in columns.items()}


def _draw(
    prior: "LanguageModel",
    proposal: "LanguageModel | None",
    prompts: Sequence[Any],
    num_samples: int,
    generator: torch.Generator | None,
) -> tuple["Completions", Tensor]:
    """Draw P · n completions; returns them with log π0/q of each: (P, n), fp64, on the CPU."""
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 2:
        raise ValueError(f"`num_samples` must be an integer of at least 2, completions a prompt, got {num_samples!r}.")
    if proposal is None:
        drawn = prior.sample(prompts, num_samples, generator)
        log_ratio = drawn.log_prob - drawn.log_proposal  # 0 unless an engine drew
        return drawn, log_ratio.double().cpu().view(-1, num_samples)
    check_same_support("proposal", proposal, prior)
    drawn = proposal.sample(prompts, num_samples, generator)
    log_ratio = prior.log_prob(drawn.prompts, drawn.completion_ids).to(drawn.log_prob.device) - drawn.log_proposal
    return drawn, log_ratio.double().cpu().view(-1, num_samples)


def _under_evidence(log_weights: Tensor, prompts: Sequence[Any]) -> Tensor:
    """Log-weights (P, n) with the posterior of the evidence in the place of the prior, normalised per prompt."""
    log_zs = log_z(log_weights, dim=-1)[:, None]  # (P, 1)
    forbidden = (log_zs == -torch.inf).flatten().nonzero().flatten().tolist()
    if forbidden:
        raise ValueError(
            f"`evidence` must allow some draw of each prompt, and forbids all {log_weights.size(1)} of "
            f"{prompts[forbidden[0]]!r} ({len(forbidden)} of {len(prompts)} prompts). Draw more (`num_samples`), or "
            "from a policy trained towards it (`proposal`)."
        )
    return log_weights - log_zs


def _check_met(
    met: Tensor,
    features: Tensor,
    moments: Tensor,
    forced: Tensor,
    names: Sequence[str],
    prompts: Sequence[Any],
) -> None:
    """Refuse conditions that no draw of a prompt meets."""
    unmet = (met == -torch.inf).all(-1).nonzero().flatten().tolist()
    if not unmet:
        return
    row, conditions = unmet[0], [index for index in range(len(names)) if forced[index]]
    alone = [f"'{names[index]}' = {moments[index]:g}" for index in conditions]
    hits = [int((features[row, :, index] == moments[index]).sum()) for index in conditions]
    each = ", ".join(f"{condition} by {count}" for condition, count in zip(alone, hits, strict=True))
    where = f"prompt {prompts[row]!r} ({len(unmet)} of {len(prompts)} prompts)"
    if len(conditions) > 1 and min(hits) > 0:
        raise ValueError(
            f"The conditions must not contradict each other: of the {met.size(1)} draws, {each}, but all of them are "
            f"met by none of {where}. Give up one, or draw more (`num_samples`)."
        )
    raise ValueError(
        f"A binary feature at moment 0 or 1 is a condition, which some draw of each prompt must meet: {each} of the "
        f"{met.size(1)} draws of {where}. Draw more (`num_samples`), draw from a policy trained towards it "
        "(`proposal`), leave the prompt out, or use `condition`, which needs no draws."
    )


def _summary(
    result: MomentFit, wanted: Mapping[str, float], free: Sequence[str], prior_moments: Sequence[float], n: int
) -> MomentSummary:
    features = {}
    for (name, moment), before in zip(wanted.items(), prior_moments, strict=True):
        if name not in free:
            lam = math.inf if moment == 1 else -math.inf
            features[name] = FeatureMoment(lam, 0.0, moment, moment, 0.0, before)
            continue
        index = list(free).index(name)
        fitted = (result.lambdas, result.standard_errors, result.moments, result.moment_standard_errors)
        lam, error, reached, reached_error = (float(column[index]) for column in fitted)
        features[name] = FeatureMoment(lam, error, moment, reached, reached_error, before)
    return MomentSummary(
        features=features,
        log_z=result.mean_log_z,
        log_z_standard_error=result.log_z_standard_error,
        kl=result.kl,
        kl_standard_error=result.kl_standard_error,
        importance_ess=result.importance_ess,
        khat=result.khat,
        num_samples=n,
    )


def _checked_moments(constraints: Any) -> dict[str, float]:
    """name -> moment, from checked constraints."""
    if not isinstance(constraints, Mapping) or not constraints:
        raise TypeError(
            f"`constraints` must map names to (feature, moment), got {constraints!r}. Pass, for instance, "
            "`{'animal': (mentions_animal, 0.5)}`."
        )
    moments = {}
    for name, constraint in constraints.items():
        if not isinstance(name, str) or not isinstance(constraint, (tuple, list)) or len(constraint) != 2:
            raise TypeError(
                f"`constraints` must map names to (feature, moment), got {name!r}: {constraint!r}. Pass, for "
                "instance, `{'animal': (mentions_animal, 0.5)}`."
            )
        moments[name] = _checked_number(constraint[1], f"The moment of '{name}'")
        if math.isinf(moments[name]):
            raise ValueError(
                f"The moment of '{name}' must be finite, got {constraint[1]}. Pass a mean of the feature."
            )
    return moments


def _checked_number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} must be a number, got {value!r} of type {type(value).__name__}. Pass a float.")
    if math.isnan(value):
        raise ValueError(f"{what} must be a number, got nan. Pass a float.")
    return float(value)
