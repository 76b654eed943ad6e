"""Draws in other tools: the same rows, in chains and with weights, and a clear error without ArviZ."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_bayes.samplers import ImportanceSampler, MetropolisHastings
from rlhf_bayes.samplers.exports import arviz_groups
from rlhf_bayes.testing import toy_reward

from .enumerated import prior_of, seeded, tilted


@pytest.fixture(scope="module")
def weighted(toy):
    return ImportanceSampler().sample(tilted(toy), toy.prompts, 6, seeded())


@pytest.fixture(scope="module")
def chains(toy):
    return MetropolisHastings(num_chains=2, burn_in=2).sample(tilted(toy), toy.prompts, 6, seeded())


def test_a_row_each_in_pandas_and_datasets(toy, weighted):
    frame = weighted.to_pandas()
    assert frame["weight"].groupby(frame["prompt_index"]).sum().tolist() == pytest.approx([1, 1, 1])
    assert frame["completion_ids"].tolist() == weighted.completion_ids
    assert frame.attrs["guarantee"] == "consistent"
    row = frame.iloc[7]
    assert (row["prompt"], row["step"], row["chain"]) == (toy.prompts[1], 1, 0)
    assert row["log_weight"] == pytest.approx(
        toy_reward([row["prompt"]], [row["text"]], [row["completion_ids"]])[0] / toy.beta, abs=1e-5
    )
    dataset = weighted.to_dataset()
    assert dataset.column_names == list(frame.columns)
    assert dataset["text"] == frame["text"].tolist()


def test_chats_keep_their_messages(toy):
    chat = [{"role": "user", "content": toy.prompts[0]}]
    draws = ImportanceSampler().sample(tilted(toy), [chat], 3, seeded())
    assert draws.to_dataset()[2]["completion"] == [{"role": "assistant", "content": draws.texts[2]}]


def test_states_know_their_chain(chains):
    assert chains.chain.tolist() == [0, 1] * 9
    assert chains.step.tolist() == [0, 0, 1, 1, 2, 2] * 3
    assert "log_weight" not in chains.to_pandas()
    lengths = arviz_groups(chains)["posterior"]["length"]
    assert lengths.shape == (2, 3, 3)  # chain, draw, prompt
    for chain, draw, prompt in np.ndindex(2, 3, 3):
        assert lengths[chain, draw, prompt] == len(chains.completion_ids[prompt * 6 + draw * 2 + chain])


def test_weights_and_values_are_shaped_alike(toy, weighted):
    groups = arviz_groups(weighted, {"reward": toy.beta * weighted.log_weights})
    assert groups["sample_stats"]["weight"].sum(1).ravel().tolist() == pytest.approx([1, 1, 1])
    reward, log_weight = groups["posterior"]["reward"], groups["sample_stats"]["log_weight"]
    assert reward.shape == (1, 6, 3)
    assert reward == pytest.approx(toy.beta * log_weight)
    assert groups["constant_data"]["prompt_text"].tolist() == toy.prompts


def test_arviz_sees_chains_draws_and_prompts(chains):
    pytest.importorskip("arviz", reason="ArviZ is not installed (extra `arviz`)")
    data = chains.to_arviz({"number": torch.arange(18.0)})
    assert dict(data["posterior"].sizes) == {"chain": 2, "draw": 3, "prompt": 3}
    assert data["posterior"]["number"].sel(chain=1, draw=2, prompt=1).item() == 6 + 2 * 2 + 1
    assert data["sample_stats"]["weight"].shape == (2, 3, 3)


@pytest.mark.parametrize("before_1", [True, False])
def test_both_ways_to_call_arviz(chains, monkeypatch, before_1):
    called = []
    names = {"InferenceData": object} if before_1 else {}
    arviz = SimpleNamespace(from_dict=lambda *args, **options: called.append((args, options)), **names)
    monkeypatch.setitem(sys.modules, "arviz", arviz)
    chains.to_arviz()
    ((args, options),) = called
    groups = options if before_1 else args[0]
    assert groups["posterior"]["length"].shape == (2, 3, 3)
    assert options["dims"] == {"length": ["prompt"], "weight": ["prompt"], "prompt_text": ["prompt"]}


def test_without_arviz_the_error_names_the_extra(chains, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install 'rlhf_bayes\[arviz\]'"):
        chains.to_arviz()


def test_what_has_no_such_dimensions_is_refused(toy, weighted):
    uneven = MetropolisHastings(num_chains=2, burn_in=0).sample(tilted(toy), toy.prompts, 3, seeded())
    with pytest.raises(ValueError, match=r"got \[3, 3, 3\] rows in 2 chains each"):
        arviz_groups(uneven)
    with pytest.raises(ValueError, match=r"`values` must have one number a row, 18, got shape \(2,\)"):
        arviz_groups(weighted, {"reward": [1.0, 2.0]})


def test_the_description_is_short(toy, weighted):
    text = repr(weighted)
    assert text.startswith("Draws(rows=18, prompts=3, guarantee='consistent', weighted=True, log_z=[")
    assert len(text) < 300
    page = ImportanceSampler().sample(prior_of(toy).tilt(toy_reward, 1.0), ["a", "a b"], 4)._repr_html_()
    assert "<th>completion</th>" in page
    assert "3 more rows" in page
