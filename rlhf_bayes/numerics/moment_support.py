"""Checks whether weighted draws can reach given moments, with errors that say what they can reach."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import csr_array, hstack, vstack
from torch import Tensor

# a moment counts as at the end of its range below this share of the way from the end to the middle
EDGE = 1e-6
MAX_ROWS = 20_000

WAY_OUT = (
    "Ask for a moment inside of that range, draw more (`num_samples`), or draw from a policy that was trained towards "
    "it (`proposal`)"
)


def check_each_supported(features: Tensor, live: Tensor, moments: Tensor, names: Sequence[str]) -> None:
    """
    Refuse a moment that no finite λ gives.

    For every λ a moment is a mean over groups of weighted means of their draws, so it lies between their extremes.

    Args:
        features (`torch.Tensor`): (P, n, F), fp64.
        live (`torch.Tensor`): (P, n) bool: draws of positive weight, at least one in each group.
        moments (`torch.Tensor`): (F,), fp64.
        names (`Sequence[str]`): names of the F features.

    Raises:
        `ValueError`: naming the feature, the moment asked for, what the draws reach, and the way out.
    """
    for index, name in enumerate(names):
        _check_one(features[..., index], live, float(moments[index]), name)


def check_together_supported(features: Tensor, live: Tensor, moments: Tensor, names: Sequence[str]) -> None:
    """
    Refuse moments of which each is possible, but not all together.

    Arguments and errors are those of [`check_each_supported`]. A linear program decides, with an unknown for each
    distinct draw, which takes seconds for 20,000 of them. With more draws it is left out, and the message says less.
    """
    # equal draws become one, since their weights add up: with binary features few rows remain for each group
    groups = [features[c][live[c]].unique(dim=0).numpy() for c in range(len(features))]
    small = sum(map(len, groups)) <= MAX_ROWS
    if len(names) > 1 and small and _interior_share(groups, moments.numpy()) <= EDGE:
        _refuse_contradiction(groups, moments.numpy(), names)
    _check_independent(features, live, names)


def _check_one(values: Tensor, live: Tensor, moment: float, name: str) -> None:
    low = float(torch.where(live, values, torch.inf).amin(-1).mean())
    high = float(torch.where(live, values, -torch.inf).amax(-1).mean())
    num_draws = int(live.sum())
    if high - low <= 1e-12 * max(1.0, abs(low), abs(high)):
        raise ValueError(
            f"The feature '{name}' must vary among the draws of a prompt, and its {num_draws} draws have the same "
            f"value for all completions of each prompt, {low:.6g} on average: no λ moves it to {moment:.6g}. Draw "
            "more (`num_samples`), draw from a policy in which it varies (`proposal`), or leave the feature out."
        )
    if low + EDGE * (high - low) < moment < high - EDGE * (high - low):
        return
    edge = low < moment < high or moment in (low, high)
    raise ValueError(
        f"The moment of '{name}' must be inside of what the draws reach, between {low:.6g} and {high:.6g} "
        f"({num_draws} draws, mean over {len(values)} prompts), got {moment:.6g}"
        f"{', on the edge, where λ is infinite' if edge else ''}. {WAY_OUT}."
    )


def _check_independent(features: Tensor, live: Tensor, names: Sequence[str]) -> None:
    rows = torch.cat([features[c][live[c]] - features[c][live[c]].mean(0) for c in range(len(features))])  # (N, F)
    rows = rows / rows.square().mean(0).sqrt()
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    if float(values[0]) > 1e-10:
        return
    dependent = [f"'{name}'" for name, weight in zip(names, vectors[:, 0], strict=True) if abs(float(weight)) > 1e-4]
    raise ValueError(
        f"The features {', '.join(dependent)} must not follow from each other: on the draws a weighted sum of them is "
        "constant, so that λ is not determined. Leave one of them out."
    )


def _constraints(groups: Sequence[np.ndarray]) -> tuple[Any, Any]:
    """Linear maps of the weights u of all rows: mean over groups of weighted features (F, U), group sums (P, U)."""
    features = csr_array(np.concatenate(groups).T / len(groups))
    sizes = [len(rows) for rows in groups]
    owner = np.repeat(np.arange(len(groups)), sizes)
    sums = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(groups), len(owner)))
    return features, sums


def _interior_share(groups: Sequence[np.ndarray], moments: np.ndarray) -> float:
    """
    How far inside their range the moments are: 1 in the middle, 0 at the end, −1 outside.

    It is the largest share s of equal weights among the weights that give the moments. A linear program maximises s so
    that s·equal + u gives the moments, with u ≥ 0 and s + Σu = 1 in each group.
    """
    features, sums = _constraints(groups)
    middle = np.mean([rows.mean(0) for rows in groups], axis=0)
    first = np.concatenate([middle, np.ones(len(groups))])[:, None]
    equations: Any = hstack([csr_array(first), vstack([features, sums])], format="csr")
    objective = np.zeros(equations.shape[1])
    objective[0] = -1
    wanted = np.concatenate([moments, np.ones(len(groups))])
    solution = linprog(objective, A_eq=equations, b_eq=wanted, bounds=(0, None), method="highs")
    return -float(solution.fun) if solution.status == 0 else -1.0


def _range_given(groups: Sequence[np.ndarray], moments: np.ndarray, index: int) -> tuple[float, float] | None:
    """The range of one moment while the others are as given; None where the others alone are impossible."""
    features, sums = _constraints(groups)
    others = [other for other in range(len(moments)) if other != index]
    equations = vstack([features[others], sums], format="csr")
    wanted = np.concatenate([moments[others], np.ones(len(groups))])
    row = features[[index]].toarray()[0]
    ends = [linprog(sign * row, A_eq=equations, b_eq=wanted, bounds=(0, None), method="highs") for sign in (1, -1)]
    if any(end.status != 0 for end in ends):
        return None
    return float(ends[0].fun), -float(ends[1].fun)


def _refuse_contradiction(groups: Sequence[np.ndarray], moments: np.ndarray, names: Sequence[str]) -> None:
    wanted = [f"'{name}' = {moment:.6g}" for name, moment in zip(names, moments, strict=True)]
    rule = "The moments must not contradict each other on the draws"
    for index, name in enumerate(names):
        reach = _range_given(groups, moments, index)
        if reach is not None:
            given = ", ".join(wanted[:index] + wanted[index + 1 :])
            raise ValueError(
                f"{rule}: with {given}, the moment of '{name}' can only be between {reach[0]:.6g} and {reach[1]:.6g} "
                f"(at the ends λ is infinite), got {moments[index]:.6g}. {WAY_OUT}; or give up one of them."
            )
    raise ValueError(
        f"{rule}: each alone is possible, but not {', '.join(wanted)} together, nor all but one of them. Give up some "
        "of them, draw more (`num_samples`), or draw from a policy that was trained towards them (`proposal`)."
    )
