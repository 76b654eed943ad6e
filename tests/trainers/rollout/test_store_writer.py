"""Each rollout of a trainer is kept as it was drawn and scored, once, and can be learnt from."""

import dataclasses
import json

import pytest
import torch
from datasets import Dataset

from rlhf_bayes import GDCConfig, PPOConfig
from rlhf_bayes.likelihoods import Constraint
from rlhf_bayes.store import CompletionStore, provenance_of, scored_completions
from rlhf_bayes.store.score_draws import raw_scores
from rlhf_bayes.testing import toy_reward

from ...store.stored import language_model, provenance, starts_with_a
from ..training import config, gdc_config, trainer


def half(completions, **kwargs):
    """None for every other completion."""
    return [None if row % 2 else 0.5 for row in range(len(completions))]


def columns_of(toy, rows):
    """The prompts' and completions' places in the tables of the toy."""
    number = {tuple(ids): index for index, ids in enumerate(toy.completion_ids)}
    prompts = torch.tensor([toy.prompts.index(prompt) for prompt in rows["prompt"]])
    return prompts, torch.tensor([number[tuple(ids)] for ids in rows["completion_ids"]])


@pytest.mark.parametrize("kind", [PPOConfig, GDCConfig])
def test_rollouts_are_kept_with_raw_rewards(toy, tmp_path, kind):
    options = {"store": str(tmp_path / "store"), "max_steps": 2, "reward_weights": [2.0, 1.0]}
    options["reward_clip_range"] = (-0.1, 0.1)
    trained = trainer(toy, config(tmp_path, kind, **options), reward_funcs=[toy_reward, half])
    trained.train()
    store = CompletionStore(tmp_path / "store")
    rows = store.read()
    assert len(rows) == 48
    assert sorted(set(rows["step"])) == [0, 1]
    assert len(set(rows["drawn_by"])) == 2
    where = columns_of(toy, rows)
    torch.testing.assert_close(torch.tensor(rows["log_prior"]).float(), toy.log_prior[where], rtol=1e-4, atol=1e-4)
    assert torch.allclose(torch.tensor(rows["reward/toy_reward"]).float(), toy.rewards[where], atol=1e-5)
    assert set(rows["reward/half"]) == {None, 0.5}
    log_proposal = torch.cat([rollout.log_proposal for rollout in trained.rollouts]).double()
    assert rows["log_proposal"] == log_proposal.tolist()
    assert rows["ended"] == [ids[-1] == toy.tokenizer.eos_token_id for ids in rows["completion_ids"]]
    assert rows["completion"] == [toy.completions[index] for index in where[1].tolist()]
    assert [ids == toy.tokenizer(p)["input_ids"] for ids, p in zip(rows["prompt_ids"], rows["prompt"], strict=True)]
    asked = {"toy_reward": toy_reward, "half": half}
    assert dataclasses.replace(store.provenance, name="") == dataclasses.replace(provenance(toy, **asked), name="")


def test_what_a_trainer_keeps_it_can_learn_from(toy, tmp_path):
    """Draws of three policies, and then another β from them."""
    writes = gdc_config(tmp_path, store=str(tmp_path / "store"), max_steps=3)
    trainer(toy, writes).train()
    reads = gdc_config(tmp_path, beta=1.5, divergence="log_variance", max_steps=2, logging_steps=1)
    trained = trainer(toy, reads, None, toy_reward, train_dataset=CompletionStore(tmp_path / "store"))
    trained.train()
    assert trained.state.global_step == 2
    assert trained.stored.draws.num_own == 3


def test_columns_and_evidence_in_nats_are_kept(toy, tmp_path):
    data = Dataset.from_dict({"prompt": toy.prompts, "topic": ["x", "y", "z"]})
    args = gdc_config(tmp_path, beta=None, store=str(tmp_path / "store"))
    trainer(toy, args, likelihood=Constraint(starts_with_a), train_dataset=data).train()
    rows = CompletionStore(tmp_path / "store").read()
    assert [json.loads(text)["topic"] for text in rows["columns"]] == [
        "xyz"[toy.prompts.index(prompt)] for prompt in rows["prompt"]
    ]
    hits = [float(ids[0] == 0) for ids in rows["completion_ids"]]
    assert rows["feature/starts_with_a"] == hits
    assert rows["feature/log_likelihood"] == [0.0 if hit else -float("inf") for hit in hits]


def test_a_resumed_run_keeps_nothing_twice(toy, tmp_path):
    def make(folder):
        changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "store": str(tmp_path / "store")}
        return trainer(toy, gdc_config(folder, **changes))

    make(tmp_path / "run").train()
    before = CompletionStore(tmp_path / "store").read().to_list()
    make(tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert CompletionStore(tmp_path / "store").read().to_list() == before


def test_a_store_of_another_reward_is_refused_before_training(toy, tmp_path):
    trainer(toy, gdc_config(tmp_path, store=str(tmp_path / "store")))
    with pytest.raises(ValueError, match="`store` must be a store made with the same `rewards`, half"):
        trainer(toy, gdc_config(tmp_path, store=str(tmp_path / "store")), reward_funcs=half)


def test_scripts_keep_draws_of_a_language_model(toy, tmp_path):
    """The same record as a trainer's, so both may write to one store."""
    prior = language_model(toy)
    posterior = prior.tilt(toy_reward, beta=0.5).condition(starts_with_a)
    store = CompletionStore.create(tmp_path / "store", provenance_of(prior, posterior.likelihood))
    drawn = prior.sample(toy.prompts, 5, torch.Generator().manual_seed(0))
    store.append(scored_completions(drawn, prior, posterior.likelihood))
    rows = store.read()
    where = columns_of(toy, rows)
    torch.testing.assert_close(torch.tensor(rows["log_prior"]).float(), toy.log_prior[where], rtol=1e-4, atol=1e-4)
    assert rows["log_proposal"] == rows["log_prior"]
    assert torch.allclose(torch.tensor(rows["reward/toy_reward"]).float(), toy.rewards[where], atol=1e-5)
    assert rows["feature/starts_with_a"] == [float(ids[0] == 0) for ids in rows["completion_ids"]]
    rewards, features = raw_scores(prior.tilt(toy_reward, beta=9.0).likelihood, [], [], [])
    assert (rewards, features) == ({"toy_reward": []}, {})
    own = provenance_of(prior, prior.tilt(toy_reward, beta=9.0).likelihood)
    trainer(toy, gdc_config(tmp_path, store=str(tmp_path / "both")))
    assert CompletionStore.create(tmp_path / "both", own).provenance.rewards == own.rewards
