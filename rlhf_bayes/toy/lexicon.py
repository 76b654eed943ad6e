"""The words of the toy reviews with their valence, for the grammar that writes and the reward that scores."""

import math
from dataclasses import dataclass

# Valences run from -3 (worst) to 3 (best). The longest match wins, so a phrase may contain an adjective.
ADJECTIVES = {
    "wonderful": 3.0, "excellent": 3.0, "fantastic": 3.0, "superb": 3.0, "amazing": 3.0, "brilliant": 3.0,
    "perfect": 3.0,
    "great": 2.0, "lovely": 2.0, "delightful": 2.0, "impressive": 2.0, "charming": 2.0, "good": 1.5, "nice": 1.5,
    "enjoyable": 1.5, "pleasant": 1.5, "solid": 1.0, "decent": 1.0, "fine": 0.5, "okay": 0.5,
    "terrible": -3.0, "awful": -3.0, "horrible": -3.0, "dreadful": -3.0, "appalling": -3.0, "disgraceful": -3.0,
    "bad": -2.0, "poor": -2.0, "disappointing": -2.0, "annoying": -2.0, "unpleasant": -2.0, "dull": -1.5, "weak": -1.5,
    "sloppy": -1.5, "forgettable": -1.5, "mediocre": -1.0, "overpriced": -1.0, "strange": -0.5, "average": -0.5,
    # of films and books
    "gripping": 2.0, "moving": 2.0, "clever": 1.5, "funny": 1.5, "witty": 1.5, "thoughtful": 1.5, "original": 1.5,
    "boring": -2.0, "tedious": -2.0, "predictable": -1.5, "confusing": -1.5, "silly": -1.0, "repetitive": -1.5,
    # of food
    "delicious": 2.5, "tasty": 2.0, "fresh": 1.5, "flavorful": 1.5, "bland": -1.5, "greasy": -1.5, "stale": -2.0,
    "soggy": -2.0,
    # of rooms and places
    "spotless": 2.0, "cozy": 1.5, "comfortable": 1.5, "quiet": 1.0, "spacious": 1.5, "beautiful": 2.5,
    "fascinating": 2.0,
    "relaxing": 1.5, "noisy": -1.5, "dirty": -2.0, "cramped": -1.5, "shabby": -1.5, "filthy": -2.5, "crowded": -1.0,
    "gloomy": -1.0,
    # of machines
    "reliable": 2.0, "fast": 1.5, "handy": 1.5, "elegant": 1.5, "useless": -2.5, "flimsy": -1.5, "slow": -1.5,
    "clumsy": -1.5,
    # of music
    "lively": 1.5, "catchy": 1.5, "energetic": 1.5, "lifeless": -2.0, "flat": -1.0, "messy": -1.5,
    # of people
    "friendly": 2.0, "helpful": 2.0, "kind": 2.0, "patient": 1.5, "rude": -2.5, "careless": -1.5, "unhelpful": -2.0,
    "impatient": -1.5,
}  # fmt: skip
NEUTRAL = (
    "about what I expected",
    "different from the last one",
    "hard to compare with others",
    "exactly as described",
)

# Factors of adverbs: before any word, before good ones, before bad ones, and before the strongest good and bad ones.
ADVERBS = {"very": 1.25, "so": 1.25, "quite": 1.0}
GOOD_ADVERBS = {"really": 1.25, "truly": 1.25, "refreshingly": 1.25}
BAD_ADVERBS = {"a bit": 0.5, "rather": 0.75, "painfully": 1.25}
STRONG_GOOD_ADVERBS = {"absolutely": 1.25, "truly": 1.25}
STRONG_BAD_ADVERBS = {"simply": 1.0, "utterly": 1.25}
NEGATION = -0.5  # "not good" is half as bad as "good" is good

VERBS = {"loved": 2.5, "adored": 2.5, "enjoyed": 2.0, "liked": 1.5, "hated": -2.5, "disliked": -2.0}

ENDINGS = {
    "it was worth every penny": 2.0, "I would recommend it to anyone": 2.0, "I smiled all the way home": 2.0,
    "I have told all my friends about it": 1.5, "it made my whole week": 2.5,
    "I already look forward to the next time": 2.0,
    "it was better than I had hoped": 1.5, "my whole family agreed": 0.0, "it was my first time": 0.0,
    "we talked about it on the way home": 0.0, "my brother thought the same": 0.0, "it took about two hours": 0.0,
    "it was a waste of money": -2.0, "I would not recommend it to anyone": -2.0, "I want my money back": -2.5,
    "I will not make that mistake again": -2.0, "it ruined my whole evening": -2.5,
    "I have warned all my friends": -2.0,
    "it was worse than I had feared": -1.5,
}  # fmt: skip


@dataclass(frozen=True)
class Topic:
    """
    What one kind of review is about.

    Args:
        subjects: noun phrases in the singular, the thing reviewed.
        subject_adjectives: adjectives that fit the subjects, beside the general ones.
        parts: noun phrases in the singular, details of the thing; `plural_parts` take "were".
        part_adjectives: adjectives that fit the details, beside the general ones.
        people: noun phrases for persons in the review, in the singular.
        predicates: verb phrases that follow a subject, with their valence.
    """

    subjects: tuple[str, ...]
    subject_adjectives: tuple[str, ...]
    parts: tuple[str, ...]
    part_adjectives: tuple[str, ...]
    plural_parts: tuple[str, ...]
    people: tuple[str, ...]
    predicates: dict[str, float]


TOPICS = (
    Topic(
        ("the movie", "this film", "the new comedy", "the documentary", "the sequel", "the thriller"),
        ("gripping", "moving", "clever", "funny", "original", "boring", "tedious", "predictable", "confusing",
         "silly"),
        ("the plot", "the acting", "the soundtrack", "the ending", "the dialogue", "the camera work"),
        ("clever", "moving", "original", "witty", "boring", "predictable", "confusing", "silly"),
        ("the jokes", "the special effects", "the costumes"),
        ("the director", "the lead actor"),
        {"kept me on the edge of my seat": 2.0, "made me laugh out loud": 2.0,
         "held my attention from start to finish": 1.5,
         "made me cry happy tears": 2.0, "put me to sleep": -2.0, "dragged on forever": -2.0,
         "made no sense at all": -2.0,
         "gave me a headache": -1.5, "lasted two hours": 0.0},
    ),
    Topic(
        ("the book", "this novel", "the biography", "the audiobook", "the short story", "the crime novel"),
        ("gripping", "moving", "witty", "thoughtful", "original", "boring", "tedious", "predictable", "confusing",
         "repetitive"),
        ("the writing", "the opening chapter", "the story", "the translation", "the final twist"),
        ("clever", "moving", "witty", "thoughtful", "boring", "tedious", "confusing", "repetitive"),
        ("the characters", "the illustrations", "the descriptions"),
        ("the author", "the narrator"),
        {"kept me up all night": 2.0, "was impossible to put down": 2.0, "taught me a great deal": 1.5,
         "made me laugh on every page": 2.0, "put me to sleep": -2.0, "went nowhere": -2.0,
         "was full of mistakes": -1.5,
         "lost me after the first chapter": -1.5, "took me a week to finish": 0.0},
    ),
    Topic(
        ("the restaurant", "this little cafe", "the pizza place", "the diner", "the bakery", "the noodle bar"),
        ("cozy", "noisy", "crowded", "spotless", "dirty", "cramped", "beautiful", "shabby"),
        ("the food", "the soup", "the coffee", "the dessert", "the steak", "the salad"),
        ("delicious", "tasty", "fresh", "flavorful", "bland", "greasy", "stale", "soggy"),
        ("the fries", "the pancakes", "the vegetables"),
        ("the waiter", "the cook"),
        {"served the best meal of the year": 2.5, "felt like a second home": 2.0, "won me over at once": 2.0,
         "gave us a free dessert": 1.5, "made us wait for an hour": -2.0, "got our order wrong": -1.5,
         "served us cold food": -2.0, "left me hungry": -1.5, "opened in May": 0.0},
    ),
    Topic(
        ("the hotel", "our room", "the guest house", "the resort", "the campsite", "the apartment"),
        ("cozy", "comfortable", "quiet", "spacious", "spotless", "beautiful", "noisy", "dirty", "cramped", "shabby",
         "filthy"),
        ("the bed", "the breakfast", "the view", "the pool", "the shower", "the garden"),
        ("spotless", "beautiful", "comfortable", "dirty", "filthy", "shabby"),
        ("the towels", "the pillows", "the hallways"),
        ("the receptionist", "the owner"),
        {"felt like a palace": 2.5, "made our holiday special": 2.0, "had everything we needed": 1.5,
         "gave us a room with a view": 1.5, "smelled of old socks": -2.0, "charged us twice": -2.0,
         "kept us awake all night": -2.0, "lost our booking": -2.0, "stood near the station": 0.0},
    ),
    Topic(
        ("the phone", "this laptop", "the camera", "the vacuum cleaner", "the headset", "the coffee machine"),
        ("reliable", "fast", "handy", "elegant", "useless", "flimsy", "slow", "clumsy", "noisy", "quiet"),
        ("the battery", "the screen", "the design", "the manual", "the packaging", "the sound"),
        ("reliable", "elegant", "handy", "flimsy", "useless", "clumsy"),
        ("the buttons", "the instructions", "the colors"),
        ("the seller", "the technician"),
        {"worked right out of the box": 1.5, "made my life easier": 2.0, "did more than I hoped for": 2.0,
         "still works like new": 1.5, "broke after a week": -2.5, "stopped working on the first day": -2.5,
         "arrived with a scratch": -1.5, "never worked properly": -2.0, "came in a blue box": 0.0},
    ),
    Topic(
        ("the concert", "the album", "the band", "the show", "the festival", "the musical"),
        ("lively", "energetic", "catchy", "moving", "original", "lifeless", "flat", "messy", "boring", "predictable"),
        ("the sound", "the lighting", "the opening song", "the crowd", "the stage"),
        ("lively", "beautiful", "original", "lifeless", "messy", "flat"),
        ("the lyrics", "the melodies", "the seats"),
        ("the singer", "the drummer"),
        {"had everyone dancing": 2.0, "gave me goosebumps": 2.0, "filled the room with joy": 2.5,
         "got better with every song": 1.5, "hurt my ears": -2.0, "started two hours late": -1.5,
         "sent half the crowd home": -2.0, "sounded out of tune": -1.5, "ended at midnight": 0.0},
    ),
    Topic(
        ("the museum", "the boat tour", "the zoo", "the city tour", "the castle", "the train ride"),
        ("fascinating", "beautiful", "relaxing", "enjoyable", "crowded", "gloomy", "boring", "noisy", "confusing",
         "shabby"),
        ("the view", "the gift shop", "the garden", "the route", "the picnic area"),
        ("beautiful", "fascinating", "relaxing", "crowded", "gloomy", "messy"),
        ("the exhibits", "the gardens", "the stories"),
        ("the guide", "the driver"),
        {"was the highlight of our trip": 2.5, "made the children happy": 2.0, "taught us so much": 1.5,
         "took our breath away": 2.5, "bored the children": -2.0, "felt like a tourist trap": -2.0,
         "wasted half a day": -2.0, "was closed without warning": -1.5, "began at noon": 0.0},
    ),
    Topic(
        ("the gym", "the barber shop", "the yoga class", "the book shop", "the clinic", "the garage"),
        ("spotless", "cozy", "quiet", "spacious", "relaxing", "dirty", "noisy", "crowded", "cramped", "gloomy"),
        ("the service", "the waiting room", "the price", "the music", "the booking system"),
        ("quiet", "reliable", "relaxing", "slow", "useless", "messy"),
        ("the chairs", "the opening hours", "the machines"),
        ("the manager", "the assistant", "the instructor"),
        {"treated me like family": 2.0, "solved my problem in minutes": 2.0, "went out of its way to help": 2.0,
         "offered me free coffee": 1.5, "ignored me for an hour": -2.0, "made everything worse": -2.5,
         "forgot my appointment": -2.0, "overcharged me": -2.0, "moved to a new street": 0.0},
    ),
)  # fmt: skip

PEOPLE_ADJECTIVES = ("friendly", "helpful", "kind", "patient", "rude", "careless", "unhelpful", "impatient")

VALENCES: dict[str, float] = {
    **ADJECTIVES,
    **VERBS,
    **ENDINGS,
    **{phrase: valence for topic in TOPICS for phrase, valence in topic.predicates.items()},
}


def squash(total_valence: float) -> float:
    """Sentiment in (-1, 1) of a sentence whose words add up to `total_valence`: tanh(total / 3)."""
    return math.tanh(total_valence / 3.0)
