"""Measures of diversity of sets of texts, repetition within and between them, which show a collapsed policy."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

from sacrebleu.metrics.bleu import BLEU, MAX_NGRAM_ORDER
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

Tokens = Sequence[Hashable]

_tokenize = Tokenizer13a()
# Tibetan, Burmese, Thai, Lao, Khmer, kana, bopomofo, Chinese characters and what is written among them
_CHARACTERS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u312f\u31a0-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
    "\U00020000-\U0003ffff]"
)


def words(text: str) -> list[str]:
    """What stands between spaces; in scripts that are written without them, each character."""
    return _CHARACTERS.sub(r" \g<0> ", text).split()


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


def self_bleu(texts: Sequence[str]) -> float:
    r"""
    BLEU of each text with all others as its references, mean over texts, in [0, 1]: 1 where all texts are equal.

        BLEU = BP · (Π_{n ≤ N} p_n)^(1/N),
        p_n = Σ_g min(count_g, largest count_g in a reference) / Σ_g count_g,    g: the text's n-grams

    BP is 1, or e^(1 − r/c) for a text of c tokens shorter than the reference nearest in length, of r. N is 4, or the
    length of a shorter text. The score is sacrebleu's for sentences, its smoothing and its tokeniser 13a included;
    scripts without spaces are split into characters. It rises with the number of texts: compare equal numbers of them.

    Args:
        texts (`Sequence[str]`): at least two.

    Returns:
        `float`: nan for fewer than two texts.

    Source: Zhu et al. 2018, arXiv 1802.01886, section 3; Papineni et al. 2002; Post 2018, arXiv 1804.08771.
    """
    if len(texts) < 2:
        return math.nan
    tokens = [words(_tokenize(text)) for text in texts]
    counts = [Counter(gram for n in range(1, MAX_NGRAM_ORDER + 1) for gram in ngrams(text, n)) for text in tokens]
    # The two largest counts of each n-gram: if the text itself has the largest, its references have the second.
    # sacrebleu would go through all references again for each text.
    largest: defaultdict[tuple, list[int]] = defaultdict(lambda: [0, 0])
    for count in counts:
        for gram, number in count.items():
            largest[gram] = sorted([*largest[gram], number])[-2:]
    lengths = Counter(map(len, tokens))
    scores = [
        _score(count, largest, len(text), _nearest(len(text), lengths))
        for count, text in zip(counts, tokens, strict=True)
    ]
    return sum(scores) / len(texts)


def _score(count: Counter, largest: Mapping[tuple, list[int]], length: int, nearest: int) -> float:
    if length == 0:
        return float(nearest == 0)
    correct, total = [0] * MAX_NGRAM_ORDER, [0] * MAX_NGRAM_ORDER
    for gram, number in count.items():
        second, first = largest[gram]
        total[len(gram) - 1] += number
        correct[len(gram) - 1] += min(number, second if number == first else first)
    score = BLEU.compute_bleu(correct, total, length, nearest, smooth_method="exp", effective_order=True)
    return min(score.score / 100, 1.0)  # rounding may leave it above


def _nearest(length: int, lengths: Counter) -> int:
    others = [other for other, number in lengths.items() if number > (other == length)]
    return min(others, key=lambda other: (abs(other - length), other))
