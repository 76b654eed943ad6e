"""The contract that every posterior must keep, a user's own too."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_bayes.likelihoods import known_forbids
from rlhf_bayes.lm.completions import Completion, Prompt
from rlhf_bayes.testing.enumerable import EnumerableLM

if TYPE_CHECKING:
    from rlhf_bayes.posterior import Posterior

_Batch = tuple[list[Prompt], list[Completion], list[list[int]], dict[str, list[Any]]]


def check_posterior(
    posterior: "Posterior",
    prompts: Sequence[Prompt],
    columns: Mapping[str, Sequence[Any]] | None = None,
    n: int = 4,
    enumerable: EnumerableLM | None = None,
    seed: int = 0,
    atol: float = 1e-3,
) -> None:
    """
    Check, on completions drawn from the prior, that a posterior keeps the contract that trainers and samplers rely on.

        log_density = log π0 + log_likelihood

    - shape (B,), fp32, no nan, no `+inf`; `-inf` is legal, unless the posterior says that it never comes
      (`forbids=False`),
    - the same numbers when called twice, in another order, or one completion at a time (no whitening over a batch),
    - with an enumerable prior: 0 < Z < ∞ for each prompt, over all completions.

    Args:
        posterior (`Posterior`): the posterior to check, or an object with `prior`, `log_likelihood` and `log_density`.
        prompts (`Sequence` of `str` or chat messages): P prompts.
        columns (`Mapping[str, Sequence]`, *optional*): further dataset columns, P values each, for the rewards.
        n (`int`, defaults to `4`): completions drawn for each prompt.
        enumerable (`EnumerableLM`, *optional*): the toy whose weights `posterior.prior` holds.
        seed (`int`, defaults to `0`): of the draw.
        atol (`float`, defaults to `1e-3`): nats by which results of batches of different shapes may differ.

    Raises:
        AssertionError: naming the rule that is broken.
    """
    drawn = posterior.prior.sample(list(prompts), n=n, generator=torch.Generator().manual_seed(seed))
    repeated = {name: [value for value in values for _ in range(n)] for name, values in (columns or {}).items()}
    batch = (list(drawn.prompts), list(drawn.completions), list(drawn.completion_ids), repeated)
    log_likelihood = _checked_log_likelihood(posterior, batch)
    log_density = _ask(posterior.log_density, batch)
    _require_log_values("log_density", log_density, len(drawn))
    log_prior = posterior.prior.log_prob(batch[0], batch[2])
    rule = "`log_density` must be the prior's log-prob plus `log_likelihood`"
    _require_close(rule, log_prior + log_likelihood, log_density, atol)
    _require_close("`log_density` must be deterministic", log_density, _ask(posterior.log_density, batch), atol)
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed)).tolist()
    _require_close(
        "`log_density` must not depend on the order of the rows",
        log_density[order],
        _ask(posterior.log_density, _rows(batch, order)),
        atol,
    )
    singles = [_ask(posterior.log_density, _rows(batch, [row])) for row in range(len(drawn))]
    _require_close(
        "a completion's `log_density` must not depend on the others of its batch (no whitening over the batch)",
        torch.cat(singles),
        log_density,
        atol,
    )
    if enumerable is not None:
        _check_by_enumeration(posterior, prompts, columns or {}, enumerable, atol)


def _ask(method: Any, batch: _Batch) -> Tensor:
    prompts, completions, completion_ids, columns = batch
    return method(prompts, completions, completion_ids, columns or None)


def _rows(batch: _Batch, rows: list[int]) -> _Batch:
    prompts, completions, completion_ids, columns = batch

    def pick(values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in rows]

    return pick(prompts), pick(completions), pick(completion_ids), {name: pick(v) for name, v in columns.items()}


def _checked_log_likelihood(posterior: "Posterior", batch: _Batch) -> Tensor:
    log_likelihood = _ask(posterior.log_likelihood, batch)
    _require_log_values("log_likelihood", log_likelihood, len(batch[0]))
    _require(
        known_forbids(posterior) is not False or not (log_likelihood == -torch.inf).any(),
        "`forbids` must be True, not False, where `log_likelihood` can be -inf: an objective that is infinite for a "
        f"forbidden completion would start to train. Got {log_likelihood.tolist()}",
    )
    return log_likelihood


def _require_log_values(name: str, values: Any, n_rows: int) -> None:
    _require(isinstance(values, Tensor), f"`{name}` must return a tensor, got {type(values).__name__}")
    _require(
        values.shape == (n_rows,), f"`{name}` must have shape (B,) = ({n_rows},), one a row, got {tuple(values.shape)}"
    )
    _require(values.dtype == torch.float32, f"`{name}` must be fp32, got {values.dtype}")
    _require(not values.isnan().any(), f"`{name}` must not be nan, got {values.tolist()}")
    _require(
        not (values == torch.inf).any(),
        f"`{name}` must not be +inf, got {values.tolist()}: one such completion would be the whole posterior",
    )


def _require_close(rule: str, expected: Tensor, actual: Tensor, atol: float) -> None:
    _require(expected.shape == actual.shape, f"{rule}: shapes {tuple(expected.shape)} and {tuple(actual.shape)}")
    # compared by == too: −inf equals itself, but the difference −inf − (−inf) is nan
    close = (expected == actual) | ((expected - actual).abs() <= atol)  # (B,)
    row = int(close.int().argmin())
    _require(bool(close.all()), f"{rule}: row {row} is {float(actual[row]):.6g}, not {float(expected[row]):.6g}")


def _check_by_enumeration(
    posterior: "Posterior",
    prompts: Sequence[Prompt],
    columns: Mapping[str, Sequence[Any]],
    toy: EnumerableLM,
    atol: float,
) -> None:
    log_prior = toy.log_probs(toy.random_policy(noise=0.0), prompts).detach()  # (P, N)
    for row, prompt in enumerate(prompts):
        n = len(toy.completion_ids)
        texts = toy.completions
        completions = texts if isinstance(prompt, str) else [[{"role": "assistant", "content": t}] for t in texts]
        repeated = {name: [values[row]] * n for name, values in columns.items()}
        batch = ([prompt] * n, list(completions), toy.completion_ids, repeated)
        log_likelihood = _checked_log_likelihood(posterior, batch)
        log_density = _ask(posterior.log_density, batch)
        expected = log_prior[row].to(log_likelihood.device) + log_likelihood
        rule = f"`log_density` must be log π0 + `log_likelihood` on every completion of {prompt!r}"
        _require_close(rule, expected, log_density, atol)
        log_z = float(log_density.logsumexp(-1))
        _require(log_z > -math.inf, f"Z must be positive for every prompt: {prompt!r} has every completion forbidden")
        _require(log_z < math.inf, f"Z must be finite for every prompt: log Z is {log_z} for {prompt!r}")


def _require(rule_holds: bool | Tensor, message: str) -> None:
    if not rule_holds:
        raise AssertionError(message)
