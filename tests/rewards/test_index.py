"""The file beside the weights: what it keeps, and what it refuses."""

import json

import pytest

from rlhf_bayes.rewards import Normalization, RewardIndex


@pytest.mark.parametrize(
    "index",
    [
        RewardIndex(),
        RewardIndex("single", ["default"], append_eos=True),
        RewardIndex("heads", ["a", "b"], normalization=Normalization((1.0, 2.0), (0.5, -0.5), "prior's draws")),
        RewardIndex("lora", ["default", "member_1"], append_eos=True),
    ],
)
def test_saved_and_loaded(index, tmp_path):
    index.save(tmp_path / "new")
    assert RewardIndex.load(tmp_path / "new") == index
    fields = json.loads((tmp_path / "new" / "reward_model.json").read_text())
    assert list(fields) == ["kind", "members", "append_eos", "normalization"]


def test_no_file_is_no_index(tmp_path):
    assert RewardIndex.load(tmp_path) is None


def test_a_repository_is_looked_up_as_a_model_is(tmp_path, monkeypatch):
    RewardIndex("heads", ["a", "b"]).save(tmp_path)
    asked = []

    def cached_file(*arguments, **options):
        asked.append(arguments)
        return str(tmp_path / "reward_model.json")

    monkeypatch.setattr("rlhf_bayes.rewards.index.cached_file", cached_file)
    assert RewardIndex.load("org/model").num_members == 2
    assert asked == [("org/model", "reward_model.json")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "boosted"}, "one of single, heads, lora, models, got 'boosted'"),
        ({"kind": "heads"}, r"name each member once, got \[\]"),
        ({"kind": "heads", "members": ["a", "a"]}, "name each member once"),
        ({"members": ["a", "b"]}, "heads, lora or models when there are 2 members"),
        (
            {"kind": "heads", "members": ["a", "b"], "normalization": {"gain": [1], "bias": [0], "reference": ""}},
            "a gain for each of the 2 members, got 1",
        ),
        ({"normalization": {"gain": [-1], "bias": [0], "reference": ""}}, "must be positive"),
        ({"normalization": {"gain": [1]}}, "bias"),
        ({"temperature": 2}, "temperature"),
        ([1], "kind, members, append_eos and normalization"),
        ("not json", "kind, members, append_eos and normalization"),
    ],
)
def test_what_is_no_index_is_refused_with_its_path(fields, message, tmp_path):
    text = fields if isinstance(fields, str) else json.dumps(fields)
    (tmp_path / "reward_model.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        RewardIndex.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
