"""Sentiment rewards in TRL's protocol: they read only the completions and accept any columns of the dataset."""

import functools
import re

from rlhf_bayes.rewards import takes_prefixes
from rlhf_bayes.toy.lexicon import (
    ADVERBS,
    BAD_ADVERBS,
    GOOD_ADVERBS,
    NEGATION,
    STRONG_BAD_ADVERBS,
    STRONG_GOOD_ADVERBS,
    VALENCES,
    squash,
)

_PHRASES = {tuple(phrase.lower().split()): valence for phrase, valence in VALENCES.items()}
_LONGEST = max(len(phrase) for phrase in _PHRASES)
_ADVERBS = ADVERBS | GOOD_ADVERBS | BAD_ADVERBS | STRONG_GOOD_ADVERBS | STRONG_BAD_ADVERBS
_FACTORS = {tuple(adverb.split()): factor for adverb, factor in _ADVERBS.items()}


def sentiment(text: str) -> float:
    """
    Sentiment of a text in (-1, 1): tanh(total valence / 3), over the words and phrases of the toy lexicon.

    A phrase counts instead of the words inside it. An adverb in front of a word scales its valence ("a bit noisy"),
    and "not" in front of both reverses the sign at half the weight ("not very good").
    """
    words = re.findall(r"[a-z']+", text.lower())
    total, start = 0.0, 0
    while start < len(words):
        for length in range(min(_LONGEST, len(words) - start), 0, -1):
            valence = _PHRASES.get(tuple(words[start : start + length]))
            if valence is not None:
                total += valence * (_factor_before(words, start) if length == 1 else 1.0)
                start += length
                break
        else:
            start += 1
    return squash(total)


def _factor_before(words: list[str], position: int) -> float:
    """The factor by which the adverb and the "not" in front of `position` multiply a word's valence."""
    factor = 1.0
    for length in (2, 1):
        before = tuple(words[position - length : position]) if position >= length else ()
        if before in _FACTORS:
            factor, position = _FACTORS[before], position - length
            break
    return factor * NEGATION if position > 0 and words[position - 1] == "not" else factor


def _text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, which TRL passes as a string or, for chat prompts, as a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


@takes_prefixes
def sentiment_reward(completions: list[str] | list[list[dict[str, str]]], **columns: object) -> list[float]:
    """Sentiment of each completion in (-1, 1) by the toy lexicon; the prompt does not count."""
    return [sentiment(_text(completion)) for completion in completions]


@takes_prefixes
def vader_reward(completions: list[str] | list[list[dict[str, str]]], **columns: object) -> list[float]:
    """
    VADER's compound score of each completion in (-1, 1) (Hutto & Gilbert 2014), for any English text.

    Raises:
        ImportError: when `vaderSentiment` is not installed.
    """
    analyzer = _vader_analyzer()
    return [analyzer.polarity_scores(_text(completion))["compound"] for completion in completions]


@functools.cache
def _vader_analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            "`vader_reward` needs the package `vaderSentiment`, which is not installed. "
            "Run `pip install 'rlhf_bayes[recipes]'`, or use `rlhf_bayes.toy.rewards:sentiment_reward`."
        ) from error
    return SentimentIntensityAnalyzer()
