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


def _of_texts(label: str, measure: Callable[[Sequence[str]], float], unit: str = "") -> Quantity:
    return Quantity(label, unit, error_logged=False, of_texts=measure, support=SHARE)


def _of_words(label: str, measure: Callable[[list[Tokens]], float], unit: str = "") -> Quantity:
    return _of_texts(label, lambda texts: measure([words(text) for text in texts]), unit)


QUANTITIES: dict[str, Quantity] = {
    "reward": Quantity("reward"),
    "length": Quantity("length", "tokens", places=("page",)),  # reported by samplers only
    "posterior_reward": Quantity("reward of the posterior"),
    "kl_to_prior": Quantity("KL to prior", "nats", support=NOT_NEGATIVE),
    "posterior_kl_to_prior": Quantity("KL of the posterior to prior", "nats", support=NOT_NEGATIVE),
    "elbo": Quantity("ELBO", "nats"),
    "log_z": Quantity("log Z", "nats"),
    "gap": Quantity("gap = KL to posterior", "nats", support=NOT_NEGATIVE),
    "forward_kl": Quantity("KL from posterior", "nats", support=NOT_NEGATIVE),
    "jeffreys": Quantity("sum of both KLs", "nats", support=NOT_NEGATIVE),
    "tv": Quantity("total variation", support=SHARE),
    "forbidden": Quantity("forbidden", "share", error_logged=False, hidden_at_zero=True, support=SHARE),
    "entropy": Quantity("entropy", "nats", support=NOT_NEGATIVE),
    "prior_perplexity": Quantity("perplexity under the prior", error_logged=False, support=(1.0, math.inf)),
    "distinct_1": _of_words("distinct-1", lambda texts: distinct_n(texts, 1)),
    "distinct_2": _of_words("distinct-2", lambda texts: distinct_n(texts, 2)),
    "self_bleu": _of_texts("self-BLEU", self_bleu),
    "repeated_4grams": _of_words("repeated 4-grams", repeated_ngrams, "share"),
    "duplicates": _of_words("duplicates", duplicates, "share"),
}
"""Name -> record, in the order in which they are shown. A quantity with `of_texts` needs nothing but its record."""


def shown_in(place: Place) -> dict[str, Quantity]:
    """The quantities that are shown in a place."""
    return {name: quantity for name, quantity in QUANTITIES.items() if place in quantity.places}


def title_of(name: str) -> str:
    """Label and unit on the page; for an unknown name, for instance of a later version, the name itself."""
    return QUANTITIES[name].title if name in shown_in("page") else name
