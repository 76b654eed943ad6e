"""Measures of diversity of sets of texts, repetition within and between them, which show a collapsed policy."""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

Tokens = Sequence[Hashable]


def ngrams(tokens: Tokens, n: int) -> list[tuple]:
    """The n-grams of one text, in order."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def distinct_n(texts: Sequence[Tokens], n: int) -> float:
    """
    Distinct n-grams over all n-grams of a set of texts, in [0, 1]; 0 where there are none.

    It falls with the number of texts and their length, so compare sets of equal size.

    Args:
        texts (`Sequence` of token sequences): words or token ids of each text.
        n (`int`): tokens in an n-gram.

    Source: Li et al. 2016, arXiv 1510.03055, section 5.
    """
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / max(len(found), 1)


def repeated_ngrams(texts: Sequence[Tokens], n: int = 4) -> float:
    """
    Share of a text's n-grams that occur earlier in it, mean over the texts with n-grams, in [0, 1] ("seq-rep-n").

    Args:
        texts (`Sequence` of token sequences): words or token ids of each text.
        n (`int`, defaults to `4`): tokens in an n-gram.

    Source: Welleck et al. 2020, arXiv 1908.04319, section 6.1.
    """
    shares = [1 - len(set(grams)) / len(grams) for grams in (ngrams(text, n) for text in texts) if grams]
    return sum(shares) / max(len(shares), 1)


def duplicates(texts: Sequence[Tokens]) -> float:
    """Share of texts that equal an earlier one, in [0, 1)."""
    return 1 - len({tuple(text) for text in texts}) / max(len(texts), 1)


def self_bleu(texts: Sequence[Tokens], max_n: int = 4) -> float:
    r"""
    BLEU of each text with all others as its references, mean over texts, in [0, 1]: 1 where all texts are equal.

        BLEU = BP · (Π_{n ≤ max_n} p_n)^(1/max_n),
        p_n = Σ_g min(count_g, largest count_g in a reference) / Σ_g count_g,    g: the text's n-grams

    BP is 1, or e^(1 − r/c) for a text of c tokens that is shorter than the reference nearest in length, of r tokens. A
    precision without a match counts as 0.1 matches (smoothing method 1 of Chen & Cherry 2014); n-grams longer than the
    text count as one n-gram that does not match. A text that shares no token has BLEU 0. The measure rises with the
    number of texts, so compare sets of equal size.

    Args:
        texts (`Sequence` of token sequences): words or token ids of each text, at least two.
        max_n (`int`, defaults to `4`): tokens in the longest n-gram.

    Returns:
        `float`: nan for fewer than two texts.

    Source: Zhu et al. 2018, arXiv 1802.01886, section 3; Papineni et al. 2002.
    """
    if len(texts) < 2:
        return math.nan
    log_precisions = [0.0] * len(texts)
    for n in range(1, max_n + 1):
        counts = [Counter(ngrams(text, n)) for text in texts]
        # the two largest counts of each n-gram: if the text itself has the largest, its references have the second
        largest: defaultdict[tuple, list[int]] = defaultdict(lambda: [0, 0])
        for count in counts:
            for gram, number in count.items():
                largest[gram] = sorted([*largest[gram], number])[-2:]
        for row, count in enumerate(counts):
            matches = sum(
                min(number, largest[gram][0] if number == largest[gram][1] else largest[gram][1])
                for gram, number in count.items()
            )
            if matches == 0 and n == 1:
                log_precisions[row] = -math.inf
            log_precisions[row] += math.log((matches or 0.1) / max(sum(count.values()), 1)) / max_n
    lengths = Counter(map(len, texts))
    scores = [
        math.exp(log_precision) * _brevity_penalty(len(text), lengths)
        for text, log_precision in zip(texts, log_precisions, strict=True)
        if len(text)
    ]
    return sum(scores) / len(texts)


def _brevity_penalty(length: int, lengths: Counter) -> float:
    others = [other for other, number in lengths.items() if number > (other == length)]
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return 1.0 if length > nearest else math.exp(1 - nearest / length)
