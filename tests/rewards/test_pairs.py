"""Guessed prompts end at a turn or at a word, and the parts join back."""

import pytest

from rlhf_bayes.rewards.pairs import guessed_prompt, prompt_and_texts

ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The hotel was good.", "The hotel was bad.", "The hotel was"),
        ("The hotel was good.", "The hotel was goofy.", "The hotel was"),
        ("The hotel  was", "The hotel  is", "The hotel "),
        ("Cats sleep ", "Dogs bark", ""),
        ("Cats", "", ""),
        ("The hotel", "The hotel was", "The"),
        ("The hotel", "The hotel", "The"),
        ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: Yesterday", "\n\nHuman: Hi\n\nAssistant:"),
        ("\n\nHuman: Hi\n\nAssistant: I am.", "\n\nHuman: Hi\n\nAssistant: I was.", "\n\nHuman: Hi\n\nAssistant:"),
        ("今天天气好", "今天天气坏", ""),
        ([ASKED, ANSWERED], [ASKED, {"role": "assistant", "content": "No"}], [ASKED]),
        ([ASKED, ANSWERED], [ASKED, ANSWERED], [ASKED]),
        ([ASKED, ANSWERED, ASKED, ANSWERED], [ASKED, ANSWERED, ASKED, ASKED], [ASKED, ANSWERED, ASKED]),
        ([ANSWERED], [ANSWERED], []),
    ],
)
def test_guessed_prompts_end_at_a_turn_or_a_word(chosen, rejected, prompt):
    row = {"chosen": chosen, "rejected": rejected}
    assert guessed_prompt(row) == prompt
    assert prompt_and_texts(row) == ("" if isinstance(chosen, str) else [], chosen, rejected)


def test_a_prompt_of_its_own_is_not_guessed():
    row = {"prompt": "The ho", "chosen": "tel", "rejected": "tel was"}
    assert guessed_prompt(row) == "The ho"
    assert prompt_and_texts(row) == ("The ho", "tel", "tel was")
