"""A Bradley–Terry fit on word counts, the baseline that a reward model must beat."""

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, final

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit
from torch import Tensor

LENGTH = "<number of words>"  # contains spaces and brackets, so no word has this name
_TOKEN = re.compile(r"\w+(?:['’]\w+)?|[^\w\s]")


@final
class BagOfWords:
    r"""
    A linear reward on word counts, fitted to preferences by maximum a posteriori. The fit is convex, so it is unique.

        r(x) = Σ_w θ_w·log(1 + count_w(x)),    min_θ  Σ_i −p_i·log σ(Δ_i) − (1 − p_i)·log σ(−Δ_i) + l2/2·‖θ‖²

    with Δ_i = r(chosen_i) − r(rejected_i). Words are lower-case, punctuation marks are words, and the number of words
    is a feature of its own. The prompt is the same on both sides and cancels, so only completions are read.

    [`BagOfWords.fit`] makes it. It is a reward function in TRL's protocol.

    Args:
        weights (`dict[str, float]`):
            θ of each word, of each pair of neighbouring words (joined by a space), and of `LENGTH`.
    """

    def __init__(self, weights: dict[str, float]):
        self.weights = dict(weights)
        self.__name__ = "bag_of_words"
        self._bigrams = any(" " in term and term != LENGTH for term in self.weights)
        self._index = {term: column for column, term in enumerate(self.weights)}
        self._theta = np.array(list(self.weights.values()), dtype=np.float64)  # (V,)

    @classmethod
    def fit(
        cls,
        chosen: Sequence[Any],
        rejected: Sequence[Any],
        chosen_prob: Sequence[float] | Tensor | None = None,
        *,
        l2: float = 10.0,
        min_count: int = 2,
        max_words: int | None = None,
        bigrams: bool = False,
    ) -> "BagOfWords":
        """
        Fit to N pairs.

        Args:
            chosen, rejected (`Sequence` of `str` or of chat messages):
                N completions each.
            chosen_prob (`Sequence[float]`, *optional*):
                (N,), share of votes for `chosen`. Default: 1 for every pair.
            l2 (`float`, *optional*, defaults to `10.0`):
                Precision of the Gaussian prior on each weight: about that many pairs must support a word before it
                gets its full weight.
            min_count (`int`, *optional*, defaults to `2`):
                A word is used if at least this many different completions contain it.
            max_words (`int`, *optional*):
                Keep only this many words, those in the most completions. 0 keeps none, which leaves the length.
            bigrams (`bool`, *optional*, defaults to `False`):
                Also count pairs of neighbouring words.

        Raises:
            `ValueError`: if there are no pairs, columns have different lengths, a probability is outside [0, 1], or
                `l2` is not positive.
        """
        targets = _check(chosen, rejected, chosen_prob, l2)
        texts = [_text(completion) for completion in [*chosen, *rejected]]
        counts = {text: _count(text, bigrams) for text in dict.fromkeys(texts)}
        held_by = Counter(term for terms in counts.values() for term in terms if term != LENGTH)
        kept = [term for term, number in held_by.most_common(max_words) if number >= min_count]
        index = {term: column for column, term in enumerate([LENGTH, *kept])}
        features = _features([counts[text] for text in texts], index)  # (2N, V)
        theta = _descend(features[: len(chosen)] - features[len(chosen) :], targets, l2)
        return cls(dict(zip(index, theta.tolist(), strict=True)))

    def rewards(self, completions: Sequence[Any]) -> Tensor:
        """Reward of each completion: (B,) fp32, defined up to a constant."""
        counts = [_count(_text(completion), self._bigrams) for completion in completions]
        return torch.from_numpy(_features(counts, self._index) @ self._theta).float()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Reward of each completion, for TRL. `prompts` and `columns` are not read."""
        return self.rewards(completions).tolist()

    def strongest(self, number: int) -> list[tuple[str, float]]:
        """The terms with the largest |θ|, largest first."""
        return sorted(self.weights.items(), key=lambda item: -abs(item[1]))[:number]


def _check(chosen: Sequence, rejected: Sequence, chosen_prob: Any, l2: float) -> np.ndarray:
    if len(chosen) != len(rejected) or not len(chosen):
        raise ValueError(
            "`chosen` and `rejected` must hold one completion per pair, and at least one pair; got "
            f"{len(chosen)} and {len(rejected)}. Pass columns of the same dataset."
        )
    if not l2 > 0:
        raise ValueError(
            f"`l2` must be positive, got {l2}: without a prior, a word that is always on one side has an infinite "
            "weight."
        )
    if chosen_prob is None:
        return np.ones(len(chosen))
    targets = np.asarray(chosen_prob, dtype=np.float64)  # (N,)
    if targets.shape != (len(chosen),):
        raise ValueError(f"`chosen_prob` must hold one number per pair, {len(chosen)}; got the shape {targets.shape}.")
    outside = targets[~((targets >= 0) & (targets <= 1))]  # nan counts as outside
    if outside.size:
        raise ValueError(f"`chosen_prob` must lie in [0, 1], got {outside[0]}. Pass the share of votes for `chosen`.")
    return targets


def _text(completion: str | Sequence[dict]) -> str:
    return completion if isinstance(completion, str) else "\n".join(message["content"] for message in completion)


def _count(text: str, bigrams: bool) -> Counter:
    words = _TOKEN.findall(text.lower())
    counts = Counter(words)
    if bigrams:
        counts.update(map(" ".join, pairwise(words)))
    counts[LENGTH] = len(words)
    return counts


def _features(counts: Sequence[Counter], index: dict[str, int]) -> csr_matrix:
    """log(1 + count): (B, V)."""
    rows, columns, values = [], [], []
    for row, terms in enumerate(counts):
        known = [(index[term], number) for term, number in terms.items() if term in index]
        rows += [row] * len(known)
        columns += [column for column, _ in known]
        values += [number for _, number in known]
    return csr_matrix((np.log1p(np.array(values, dtype=np.float64)), (rows, columns)), (len(counts), len(index)))


def _descend(difference: csr_matrix, targets: np.ndarray, l2: float) -> np.ndarray:
    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        delta = difference @ theta  # (N,)
        loss = targets * np.logaddexp(0, -delta) + (1 - targets) * np.logaddexp(0, delta)
        gradient = difference.T @ (expit(delta) - targets) + l2 * theta
        return loss.sum() + l2 / 2 * theta @ theta, gradient

    options = {"maxiter": 2000, "maxfun": 4000}
    start = np.zeros(difference.get_shape()[1])
    result = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    if not result.success:
        warnings.warn(f"The bag-of-words fit stopped before it converged: {result.message}", stacklevel=3)
    return result.x
