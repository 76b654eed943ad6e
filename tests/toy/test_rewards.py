import math
import sys

import pytest

from rlhf_bayes.toy import rewards
from rlhf_bayes.toy.rewards import sentiment, sentiment_reward, vader_reward


@pytest.mark.parametrize(
    ("text", "valence"),
    [
        ("", 0.0),
        ("It lasted two hours.", 0.0),
        (" was good.", 1.5),
        (" was VERY good.", 1.25 * 1.5),
        (" was not good.", -0.5 * 1.5),
        (" was not very good.", -0.5 * 1.25 * 1.5),
        (" were a bit noisy.", 0.5 * -1.5),
        ("not bad", 1.0),
        ("bit noisy", -1.5),
        ("so good", 1.25 * 1.5),
        # a phrase before the word inside it
        (" would not recommend it to anyone, and I would not recommend it to anyone.", -2.0),
        (" was boring, but the guide was lovely.", 0.0),
    ],
)
def test_valences_add_up(text, valence):
    assert sentiment(text) == pytest.approx(math.tanh(valence / 3))


def test_reward_takes_texts_chats_and_columns():
    texts = [" was terrible.", " was superb."]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    expected = pytest.approx([-math.tanh(1), math.tanh(1)])
    assert sentiment_reward(completions=texts, prompts=["a", "b"], completion_ids=[[1], [2]], label=[0, 1]) == expected
    assert sentiment_reward(completions=chats) == expected


def test_vader_reward():
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed (extra `recipes`)")
    bad, good = vader_reward(
        completions=["It was a horrible, sad day.", "They smiled and played happily."], other=[1, 2]
    )
    assert -1 <= bad < -0.5
    assert 0.5 < good <= 1


def test_vader_reward_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    rewards._vader_analyzer.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'rlhf_bayes\[recipes\]'"):
        vader_reward(completions=["fine"])
