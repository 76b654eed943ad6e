"""Claim 3 at a small size."""

import json

import pytest
import torch

from rlhf_bayes import LanguageModel, toy

from .conftest import SCRIPTS


@pytest.mark.slow
def test_dissociation(run_claim):
    result, rows = run_claim("dissociation", "--seeds", 1, "--steps", 3)
    start = [float(row["kl_to_posterior"]) for row in rows if row["step"] == "0"]
    assert len(start) == 7
    assert max(start) - min(start) < 1e-5  # all begin at the prior
    ends = {row["run"]: row for row in rows if row["step"] == "3"}
    assert len(ends) == 7
    assert all(float(row["kl_to_prior"]) > 0 for row in ends.values())
    # three steps are too few to reach anything
    reached = [statement for statement in result.statements if "nears the posterior" in statement.text]
    assert reached
    assert all(statement.verdict != "agrees" for statement in reached)


@pytest.mark.slow
def test_another_model_is_trained_and_measured_by_draws(run_claim, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in toy.prompts()[:2]))
    other = ("--model_name_or_path", toy.model_path(), "--dataset_name", prompts)
    small = ("--seeds", 1, "--steps", 1, "--batch", 16, "--draws", 4, "--max_completion_length", 8)
    _, rows = run_claim("dissociation", *other, *small)
    assert len({row["run"] for row in rows}) == 7
    moved = {row["run"]: float(row["kl_to_prior"]) for row in rows if row["step"] == "1"}
    assert len(moved) == 7
    assert all(kl != 0 for kl in moved.values())


def test_the_entropy_of_the_posterior_of_a_large_beta_is_that_of_the_prior(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from estimated import entropy_of_posterior

    model = {"model_name_or_path": None, "dataset_name": None, "max_prompts": 2, "max_completion_length": 8}
    ours = entropy_of_posterior("rlhf_bayes.toy.rewards:sentiment_reward", 1e6, 64, model)
    drawn = LanguageModel(toy.model_path(), max_completion_length=8).sample(
        toy.prompts()[:2], 64, torch.Generator().manual_seed(77)
    )
    assert ours == pytest.approx(-drawn.log_prob.mean().item(), abs=1e-3)
