"""Features and their means as flags."""

import pytest

from rlhf_bayes.commands.flags import contains_words, parse_features


def test_words_are_whole_and_case_does_not_matter():
    mentions = contains_words(["cat", "big dog", "o'clock", "e.g."])
    texts = ["The Cat sat.", "scattered", "cats", "a big dog!", "a dog, big", "ten o'clock", "", "e.g. this", "eggs"]
    assert mentions(texts) == [1, 0, 0, 1, 0, 1, 0, 1, 0]
    chat = [{"role": "assistant", "content": "A cat."}]
    assert mentions(prompts=["p", "p"], completions=[chat, chat[:0]], completion_ids=[[1], [2]]) == [1, 0]


def test_entries_give_names_functions_and_moments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "features_of_test.py").write_text(
        "def length(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    constraints = parse_features(
        ["features_of_test:length=12.5"], ["happy, glad=1", "animal:cat,dog=0.5", "equal: = =0"]
    )
    assert {name: moment for name, (_, moment) in constraints.items()} == {
        "length": 12.5, "happy": 1.0, "animal": 0.5, "equal": 0.0
    }  # fmt: skip
    values = {name: function(completions=["a dog", "glad ="]) for name, (function, _) in constraints.items()}
    assert values == {"length": [5.0, 6.0], "happy": [0.0, 1.0], "animal": [1.0, 0.0], "equal": [0.0, 1.0]}
    assert parse_features() == {}


@pytest.mark.parametrize(
    ("features", "words", "message"),
    [
        ([], ["happy"], "`words` must have the form `word,word=moment`, got 'happy'"),
        ([], ["happy=often"], "`words` must have the form"),
        ([], ["happy=nan"], "`words` must have the form"),
        ([], ["=0.5"], "`words` must have the form"),
        ([], ["happy,,glad=1"], "separated by single commas, got 'happy,,glad=1'"),
        ([], ["happy=1.5"], "a moment from 0 to 1, .* got 1.5"),
        ([], ["happy=1", "happy,glad=0.5"], "names that differ, got 'happy' twice. Write `name:word,word=moment`"),
        (["my_feature=1"], [], "`features` must have the form `module:function`, got 'my_feature'"),
        (["module:function"], [], "`features` must have the form `module:function=moment`"),
        (["no_such_module:f=1"], [], "`features` must name a module that can be imported"),
    ],
)
def test_entries_that_are_refused(features, words, message):
    with pytest.raises(ValueError, match=message):
        parse_features(features, words)
