"""Writes the text that the bundled model is trained on: one-sentence reviews from a small probabilistic grammar.

    python -m rlhf_bayes.toy.generate --count 20

The grammar adds up the gold sentiment of each sentence as it writes. `rlhf_bayes.toy.rewards` computes the same number
from the finished text, by another route.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_bayes.toy.lexicon import (
    ADJECTIVES,
    ADVERBS,
    BAD_ADVERBS,
    ENDINGS,
    GOOD_ADVERBS,
    NEGATION,
    NEUTRAL,
    PEOPLE_ADJECTIVES,
    STRONG_BAD_ADVERBS,
    STRONG_GOOD_ADVERBS,
    TOPICS,
    VERBS,
    Topic,
    squash,
)

GENERAL_ADJECTIVES = tuple(list(ADJECTIVES)[: list(ADJECTIVES).index("gripping")])
MOODS = {1: ("Luckily", "Happily"), -1: ("Sadly", "Unfortunately")}  # they carry no valence of their own
LEADS = ("Honestly", "Overall", "To be fair", "In the end", "Last summer", "On a rainy Sunday", "After a long week",
         "For our anniversary", "To my surprise", "This time")  # fmt: skip
OPINIONS = ("I thought", "I think", "We thought", "My wife thought", "My friends said", "My son felt")
WHO = ("I", "We", "My parents", "My daughter", "My sister and I", "Our guests")
STANCES = {"positive": 0.4, "negative": 0.4, "mixed": 0.2}


@dataclass(frozen=True)
class Phrase:
    """A piece of a sentence and the valence that it adds."""

    text: str
    valence: float


@dataclass(frozen=True)
class Review:
    """A sentence and its gold sentiment in (-1, 1)."""

    text: str
    sentiment: float


def _draw(rng: random.Random, valences: dict[str, float], sign: int, neutral: bool = True) -> Phrase:
    """A phrase of the given sign from a table; one time in ten a neutral one, if the table has any."""
    calm = [text for text, valence in valences.items() if valence == 0]
    signed = [text for text, valence in valences.items() if valence * sign > 0]
    text = rng.choice(calm if neutral and calm and rng.random() < 0.1 else signed)
    return Phrase(text, valences[text])


def _adjective(rng: random.Random, extra: tuple[str, ...], sign: int, neutral: bool = True) -> Phrase:
    """An adjective phrase of the given sign: "truly superb", "a bit noisy", "not very good"."""
    if neutral and rng.random() < 0.05:
        return Phrase(rng.choice(NEUTRAL), 0.0)
    negated = rng.random() < 0.1
    sign = -sign if negated else sign
    words = [word for word in extra if ADJECTIVES[word] * sign > 0]
    if not words or rng.random() < 0.5:
        words = [word for word in GENERAL_ADJECTIVES if ADJECTIVES[word] * sign > 0]
    if negated:  # people do not write "not superb" or "not fine"
        word = rng.choice([word for word in words if abs(ADJECTIVES[word]) in (1.5, 2.0)])
        adverb = rng.choice(("", "", "very"))
        valence = NEGATION * ADVERBS.get(adverb, 1.0) * ADJECTIVES[word]
        return Phrase(" ".join(filter(None, ("not", adverb, word))), valence)
    word = rng.choice(words)
    valence = ADJECTIVES[word]
    if abs(valence) >= 2.5:
        fitting = STRONG_GOOD_ADVERBS if valence > 0 else STRONG_BAD_ADVERBS
    elif abs(valence) <= 1.0:  # nothing is "so okay"
        fitting = {"quite": ADVERBS["quite"]}
    else:
        fitting = (GOOD_ADVERBS if valence > 0 else BAD_ADVERBS) if rng.random() < 0.7 else ADVERBS
    adverb = rng.choice(list(fitting)) if rng.random() < 0.6 else ""
    return Phrase(f"{adverb} {word}".strip(), fitting.get(adverb, 1.0) * valence)


def _about_detail(rng: random.Random, topic: Topic, sign: int, neutral: bool = True) -> Phrase:
    """A clause about a detail: "the fries were a bit greasy"."""
    kind = rng.choices(("part", "plural", "person"), (5, 3, 2))[0]
    nouns = {"part": topic.parts, "plural": topic.plural_parts, "person": topic.people}[kind]
    said = _adjective(rng, PEOPLE_ADJECTIVES if kind == "person" else topic.part_adjectives, sign, neutral)
    return Phrase(f"{rng.choice(nouns)} {'were' if kind == 'plural' else 'was'} {said.text}", said.valence)


def _about_subject(rng: random.Random, topic: Topic, subject: str, sign: int, neutral: bool = True) -> Phrase:
    """A clause about the thing itself: "the hotel felt like a palace", "it was fairly noisy"."""
    if rng.random() < 0.45:
        predicate = _draw(rng, topic.predicates, sign, neutral)
        return Phrase(f"{subject} {predicate.text}", predicate.valence)
    said = _adjective(rng, topic.subject_adjectives, sign, neutral)
    return Phrase(f"{subject} was {said.text}", said.valence)


def write_review(rng: random.Random) -> Review:
    """One review: perhaps a lead, a first clause, and often a second one such as ", and ..." or ", but ..."."""
    topic = rng.choice(TOPICS)
    subject = rng.choice(topic.subjects)
    stance = rng.choices(list(STANCES), list(STANCES.values()))[0]
    sign = {"positive": 1, "negative": -1, "mixed": rng.choice((1, -1))}[stance]
    shape = rng.choices(("subject", "detail", "verb"), (5, 4, 2))[0]
    told = shape != "verb" and rng.random() < 0.25
    if shape == "verb":
        verb = _draw(rng, VERBS, sign)
        first = Phrase(f"{rng.choice(WHO)} {verb.text} {subject}", verb.valence)
    elif shape == "subject":
        first = _about_subject(rng, topic, subject, sign, neutral=not told)
    else:
        first = _about_detail(rng, topic, sign, neutral=not told)
    text = f"{rng.choice(OPINIONS)} {first.text}" if told else first.text
    # the second clause is about something that the first is not about, and says "it" only where that is unambiguous
    again = subject if shape == "detail" else "it"
    link = " but" if stance == "mixed" else rng.choices(("", " and", " because", " ending"), (4, 6, 2, 6))[0]
    second = Phrase("", 0.0)
    if link == " ending":
        second = _draw(rng, ENDINGS, sign)
        text += f", and {second.text}"
    elif link:
        sign, neutral = (-sign, False) if link == " but" else (sign, link != " because")
        if shape == "detail" or rng.random() < 0.3:
            second = _about_subject(rng, topic, again, sign, neutral)
            if second.text.removeprefix(again) in first.text:  # said already
                second = _about_detail(rng, topic, sign, neutral)
        else:
            second = _about_detail(rng, topic, sign, neutral)
        text += f"{link if link == ' because' else ',' + link} {second.text}"
    if rng.random() < 0.35:
        lead = rng.choice(LEADS if stance == "mixed" or rng.random() < 0.5 else MOODS[sign])
        text = f"{lead}, {text if text.startswith('I ') else text[0].lower() + text[1:]}"
    return Review(text[0].upper() + text[1:] + ".", squash(first.valence + second.valence))


def write_reviews(count: int, seed: int = 0) -> Iterator[Review]:
    """`count` reviews; the same seed gives the same reviews."""
    rng = random.Random(seed)
    for _ in range(count):
        yield write_review(rng)


def main() -> None:
    """Write the bundled texts: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="How many reviews to print.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for review in write_reviews(args.count, args.seed):
        print(f"{review.sentiment:+.2f}  {review.text}")


if __name__ == "__main__":
    main()
