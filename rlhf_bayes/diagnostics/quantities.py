"""The quantities that are reported for a distribution, one record each: label, unit, and where it is shown."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_bayes.diagnostics.diversity import Tokens, distinct_n, duplicates, repeated_ngrams, self_bleu, words
from rlhf_bayes.diagnostics.over_prompts import ANYTHING, NOT_NEGATIVE, SHARE

Place = Literal["terminal", "page", "callback"]
"""[`~rlhf_bayes.diagnostics.fit_table`], the HTML report, and the metrics of
[`~rlhf_bayes.diagnostics.PosteriorCallback`]."""


@dataclass(frozen=True)
class Quantity:
    """A number of a [`~rlhf_bayes.diagnostics.PosteriorFit`] that is reported; its name is the field's."""

    label: str
    """The name in words, without the unit."""
    meaning: str
    """How to read it, in a sentence without a full stop, for the page and for the docs."""
    unit: str = ""
    """The unit, such as "nats"; empty for a plain number."""
    places: tuple[Place, ...] = ("terminal", "page", "callback")
    """The places where it is shown."""
    error_logged: bool = True
    """Whether the callback logs its standard error too."""
    hidden_at_zero: bool = False
    """Whether the terminal's table leaves it out if it is 0 for all distributions."""
    of_texts: Callable[[Sequence[str]], float] | None = None
    """Completions of a prompt -> the number for that prompt, where texts are all that it needs."""
    support: tuple[float, float] = ANYTHING
    """The least and the largest value that it can have."""

    @property
    def is_share(self) -> bool:
        """Whether it is a share of completions, whose interval is that of a proportion."""
        return self.unit == "share"

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


def _of_texts(label: str, meaning: str, measure: Callable[[Sequence[str]], float], unit: str = "") -> Quantity:
    return Quantity(label, meaning, unit, error_logged=False, of_texts=measure, support=SHARE)


def _of_words(label: str, meaning: str, measure: Callable[[list[Tokens]], float], unit: str = "") -> Quantity:
    return _of_texts(label, meaning, lambda texts: measure([words(text) for text in texts]), unit)


QUANTITIES: dict[str, Quantity] = {
    "reward": Quantity("reward", "the mean reward of completions, E[r]"),
    "length": Quantity("length", "the mean number of tokens, EOS included", "tokens", places=("page",)),
    "posterior_reward": Quantity(
        "reward of the posterior", "E[r] under π*: what is wanted, to set beside the reward that is reached"
    ),
    "kl_to_prior": Quantity(
        "KL to prior", "KL(π‖π0): how far the policy went from the prior", "nats", support=NOT_NEGATIVE
    ),
    "posterior_kl_to_prior": Quantity(
        "KL of the posterior to prior",
        "KL(π*‖π0): how far the posterior is from the prior",
        "nats",
        support=NOT_NEGATIVE,
    ),
    "elbo": Quantity("ELBO", "E[r]/β − KL(π‖π0): what training maximises; at most log Z", "nats"),
    "log_z": Quantity(
        "log Z", "log of E[exp(r/β)] under the prior: the best possible ELBO, from draws of prior and policy", "nats"
    ),
    "gap": Quantity(
        "gap = KL to posterior",
        "log Z − ELBO = KL(π‖π*): 0 at the posterior, infinite where the policy draws what is forbidden",
        "nats",
        support=NOT_NEGATIVE,
    ),
    "forward_kl": Quantity(
        "KL from posterior",
        "KL(π*‖π): large where the policy misses what the posterior wants",
        "nats",
        support=NOT_NEGATIVE,
    ),
    "jeffreys": Quantity(
        "sum of both KLs", "KL(π‖π*) + KL(π*‖π), in which log Z cancels", "nats", support=NOT_NEGATIVE
    ),
    "tv": Quantity(
        "total variation", "½ Σ|π − π*|: the share of the mass that is in the wrong place, from 0 to 1", support=SHARE
    ),
    "forbidden": Quantity(
        "forbidden",
        "completions that the evidence forbids",
        "share",
        error_logged=False,
        hidden_at_zero=True,
        support=SHARE,
    ),
    "entropy": Quantity(
        "entropy", "of a completion: compare with the prior's and the posterior's", "nats", support=NOT_NEGATIVE
    ),
    "prior_perplexity": Quantity(
        "perplexity under the prior",
        "exp of the nats per token that the prior needs for the completions; far above the prior's own: no language",
        error_logged=False,
        support=(1.0, math.inf),
    ),
    "distinct_1": _of_words(
        "distinct-1",
        "different words, as a share of all words of a prompt's completions",
        lambda texts: distinct_n(texts, 1),
    ),
    "distinct_2": _of_words(
        "distinct-2", "different pairs of words, as a share of all pairs", lambda texts: distinct_n(texts, 2)
    ),
    "self_bleu": _of_texts(
        "self-BLEU", "how much a completion repeats the others of its prompt: 0 nothing, 1 all", self_bleu
    ),
    "repeated_4grams": _of_words(
        "repeated 4-grams",
        "sequences of four words that occur earlier in the same completion",
        repeated_ngrams,
        "share",
    ),
    "duplicates": _of_words("duplicates", "completions that equal an earlier one of the prompt", duplicates, "share"),
}
"""Name -> record, in the order in which they are shown. A quantity with `of_texts` needs nothing but its record."""


def shown_in(place: Place) -> dict[str, Quantity]:
    """The quantities that are shown in a place."""
    return {name: quantity for name, quantity in QUANTITIES.items() if place in quantity.places}


def meaning_of(name: str) -> str:
    """How to read a quantity; empty for an unknown name."""
    return QUANTITIES[name].meaning if name in QUANTITIES else ""


def title_of(name: str) -> str:
    """Label and unit on the page; for an unknown name, for instance of a later version, the name itself."""
    return QUANTITIES[name].title if name in shown_in("page") else name
