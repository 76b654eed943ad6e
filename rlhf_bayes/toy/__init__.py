"""A tiny language model of one-sentence reviews, prompts for it and a reward: all that a first run needs."""

from pathlib import Path


def model_path() -> str:
    """Folder of the bundled model and its tokenizer, for `from_pretrained`; written by `rlhf_bayes.toy.train_lm`."""
    return str(Path(__file__).parent / "model")


def prompts() -> list[str]:
    """Openings of reviews that say nothing good or bad yet."""
    return list(PROMPTS)


PROMPTS = (
    "The movie",
    "I thought the food",
    "The hotel",
    "Honestly, the book",
    "The phone",
    "We thought the museum",
    "The concert was",
    "My parents",
    "To my surprise, the soup",
    "The waiter",
    "After a long week, the yoga class",
    "The plot was",
    "I think the guide",
    "On a rainy Sunday, the zoo",
    "The camera",
    "For our anniversary, we",
    "The restaurant was",
    "Overall, the breakfast",
    "My sister and I",
    "The album",
    "Last summer, the campsite",
    "The assistant",
    "My friends said the sequel",
    "The fries were",
    "In the end, the laptop",
    "I",
    "The view",
    "This time, the garage",
    "My wife thought the novel",
    "The band",
    "To be fair, the coffee",
    "Our guests",
)
