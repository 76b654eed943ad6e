"""Preference data in the layouts that people publish: the tokens that are trained on, against those of the chat or
text that a person would read; and what is refused instead of guessed."""

import json

import pytest
import torch
from datasets import Dataset, load_dataset

from rlhf_bayes import RewardTrainer
from rlhf_bayes.rewards import RewardModel
from rlhf_bayes.rewards.pairs import read_pairs
from rlhf_bayes.testing import EnumerableLM
from rlhf_bayes.trainers.reward.held_out import held_out_rewards

from ..preferring import classifier, quiet, trained

ASKED = {"role": "user", "content": "a b"}
GOOD, BAD = {"role": "assistant", "content": "c"}, {"role": "assistant", "content": "d d"}


@pytest.fixture(scope="module")
def toy():
    """Its template shows who speaks."""
    toy = EnumerableLM(vocab_size=8, max_completion_length=2)
    toy.tokenizer.chat_template = (
        "{% for m in messages %}{{ 'e ' if m['role'] == 'user' else 'f ' }}{{ m['content'] }} {% endfor %}"
    )
    return toy


def share(message):
    return {"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": message["content"]}


CHAT_LAYOUTS = {
    "explicit": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    "implicit": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "text as prompt, whole chats": {"prompt": "a b", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "text as prompt, replies": {"prompt": "a b", "chosen": [GOOD], "rejected": [BAD]},
    "chat as prompt, texts": {"prompt": [ASKED], "chosen": "c", "rejected": "d d"},
    "repeated prompt": {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "from and value": {"prompt": [share(ASKED)], "chosen": [share(GOOD)], "rejected": [share(BAD)]},
    "one message": {"prompt": [share(ASKED)], "chosen": share(GOOD), "rejected": share(BAD)},
    "from and value, whole": {"chosen": [share(ASKED), share(GOOD)], "rejected": [share(ASKED), share(BAD)]},
    "json": {"chosen": json.dumps([ASKED, GOOD]), "rejected": json.dumps([ASKED, BAD])},
    "python": {"chosen": str([ASKED, GOOD]), "rejected": str([ASKED, BAD])},
    "json, text as prompt": {"prompt": "a b", "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
}


def trained_tokens(toy, folder, rows, **options):
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    trainer = trained(RewardTrainer, toy, quiet(folder, ours=True, **options), dataset, train=False)
    return trainer.train_dataset["chosen_ids"][:], trainer.train_dataset["rejected_ids"][:]


@pytest.mark.parametrize("layout", CHAT_LAYOUTS)
def test_chats_of_every_layout_are_read(toy, tmp_path, layout):
    expected = [
        [toy.tokenizer.apply_chat_template([ASKED, reply], tokenize=True, return_dict=True)["input_ids"]] * 2
        for reply in (GOOD, BAD)
    ]
    assert list(trained_tokens(toy, tmp_path, [CHAT_LAYOUTS[layout]] * 2)) == expected


@pytest.mark.parametrize("layout", CHAT_LAYOUTS)
def test_chats_of_every_layout_are_judged_as_they_are_trained(toy, tmp_path, layout):
    model = classifier(toy, tmp_path / "base").eval()
    judged = held_out_rewards(RewardModel(model, toy.tokenizer), Dataset.from_list([CHAT_LAYOUTS[layout]]))
    for side, reply in (("chosen", GOOD), ("rejected", BAD)):
        ids = toy.tokenizer.apply_chat_template([ASKED, reply], tokenize=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits[0, 0]
        torch.testing.assert_close(getattr(judged, side)[0, 0], expected)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "a b c d a", "rejected": "a b c d b"},
        {"prompt": "a b c d", "chosen": " a", "rejected": " b"},
        {"prompt": "a b c d", "chosen": "a b c d a", "rejected": "a b c d b"},
    ],
)
def test_texts_of_every_layout_are_read(toy, tmp_path, row):
    eos = toy.tokenizer.eos_token
    expected = [[toy.tokenizer(text + eos)["input_ids"]] * 2 for text in ("a b c d a", "a b c d b")]
    assert list(trained_tokens(toy, tmp_path, [row] * 2)) == expected


def test_a_short_prompt_may_be_repeated_by_chance(toy, tmp_path):
    rows = [{"prompt": "a ", "chosen": "a b", "rejected": "a d"}, {"prompt": "a ", "chosen": "b", "rejected": "c"}]
    texts = ["a a b", "a b"]
    expected = [toy.tokenizer(text + toy.tokenizer.eos_token)["input_ids"] for text in texts]
    assert trained_tokens(toy, tmp_path, rows)[0] == expected


def test_one_answer_may_say_the_question_again(toy, tmp_path):
    rows = [PLAIN, PLAIN, PLAIN | {"prompt": "a b c ", "rejected": "a b c e"}]
    expected = toy.tokenizer("a b c a b c e" + toy.tokenizer.eos_token)["input_ids"]
    assert trained_tokens(toy, tmp_path, rows)[1][2] == expected


def test_a_csv_file_with_chats_and_votes(toy, tmp_path):
    rows = [
        {"chosen": json.dumps([ASKED, GOOD]), "rejected": json.dumps([ASKED, BAD]), "votes": votes}
        for votes in ("[3, 1, 0]", "[0, 2]", '{"chosen": 1, "rejected": 3}')
    ]
    Dataset.from_list(rows).to_csv(tmp_path / "pairs.csv")
    dataset = load_dataset("csv", data_files=str(tmp_path / "pairs.csv"), split="train", cache_dir=str(tmp_path))
    trainer = trained(RewardTrainer, toy, quiet(tmp_path, ours=True), dataset, train=False)
    assert trainer.train_dataset["pair_prob"][:] == [0.75, 0.0, 0.25]
    expected = toy.tokenizer.apply_chat_template([ASKED, GOOD], tokenize=True, return_dict=True)["input_ids"]
    assert trainer.train_dataset["chosen_ids"][:] == [expected] * 3


PLAIN = {"prompt": "a b c", "chosen": " d", "rejected": " e"}


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([PLAIN, PLAIN | {"prompt": None}], TypeError, "`prompt` must hold texts or lists .*got None in .* row 1"),
        (
            [PLAIN | {"prompt": 3}],
            TypeError,
            "`prompt` must hold texts or lists .*got 3 in .* row 0.*leave the col",
        ),
        (
            [PLAIN, PLAIN | {"chosen": "a b c d", "rejected": "a b c e"}],
            ValueError,
            "must begin with `prompt` in all rows or in none, .*repeats it in `train_dataset` row 1",
        ),
        ([PLAIN | {"chosen": "a b c d"}], ValueError, "must begin with `prompt` in all rows or in none.* row 0"),
        (
            [{"prompt": "c", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}],
            ValueError,
            "`prompt` must be a message that the chats .*got the text 'c' in `train_dataset` row 0",
        ),
        (
            [{"chosen": [share(ASKED) | {"from": "alien"}, share(GOOD)], "rejected": [share(ASKED), share(BAD)]}],
            ValueError,
            "`from` in `chosen` must be one of human, .*got 'alien' in `train_dataset` row 0",
        ),
        (
            [{"chosen": [{"speaker": "user", "text": "a"}], "rejected": [{"speaker": "user", "text": "b"}]}],
            TypeError,
            "`chosen` must hold a text, or a list of messages .*'speaker'.* row 0",
        ),
        ([{"chosen": '[{"role": "user", "cont', "rejected": "b"}], ValueError, "is not valid JSON in .* row 0"),
        ([{"chosen": [], "rejected": [GOOD]}], ValueError, "`chosen` must have at least one message.* row 0"),
        ([{"chosen": "a", "rejected": [GOOD]}], TypeError, "must both be texts or both be chats.* row 0"),
        (
            [{"chosen": "a", "rejected": "b"}, {"chosen": str([GOOD]), "rejected": str([BAD])}],
            TypeError,
            "`chosen` must hold texts in all rows or chats in all rows.* row 1",
        ),
        (
            [{"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED]}],
            ValueError,
            "`rejected` must hold a reply to the prompt, got the prompt alone in `train_dataset` row 0",
        ),
    ],
)
def test_rows_that_could_mean_several_things_are_refused(toy, tmp_path, rows, error, message):
    with pytest.raises(error, match=message):
        trained_tokens(toy, tmp_path, rows)


@pytest.mark.parametrize("layout", ["text as prompt, whole chats", "from and value", "implicit"])
def test_a_stream_is_read_row_by_row(toy, tmp_path, layout):
    stream = Dataset.from_list([CHAT_LAYOUTS[layout]] * 2).to_iterable_dataset()
    trainer = trained(RewardTrainer, toy, quiet(tmp_path, ours=True), stream, train=False)
    expected = toy.tokenizer.apply_chat_template([ASKED, GOOD], tokenize=True, return_dict=True)["input_ids"]
    assert [row["chosen_ids"] for row in trainer.train_dataset] == [expected] * 2


def test_data_in_our_layout_are_left_alone():
    dataset = Dataset.from_list([PLAIN, PLAIN])
    assert read_pairs("train_dataset", dataset) is dataset


def test_deprecated_names_of_token_ids_are_taken_as_in_trl(toy, tmp_path):
    rows = [{"chosen_input_ids": [1, 2], "rejected_input_ids": [2, 1]}] * 2
    with pytest.warns(FutureWarning, match="legacy dataset columns"):
        assert trained_tokens(toy, tmp_path, rows)[0] == [[1, 2]] * 2


def test_other_columns_do_not_say_what_a_row_is(toy, tmp_path):
    # TRL looks at any one of the columns of these names, in the order of a set
    rows = [PLAIN | {"messages": [ASKED, GOOD], "completion": [GOOD]}] * 2
    expected = [toy.tokenizer("a b c d" + toy.tokenizer.eos_token)["input_ids"]] * 2
    assert trained_tokens(toy, tmp_path, rows)[0] == expected
