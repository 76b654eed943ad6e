"""Rows of a store are weighted by what drew them: estimates are those of the enumeration, within their errors."""

import dataclasses

import pytest
import torch

from rlhf_bayes.store import CompletionStore
from rlhf_bayes.store.stored_draws import StoredDraws

from .stored import all_once, drawn, provenance, starts_with_a


@pytest.fixture(scope="module")
def policy(toy):
    """log q of a policy far from the prior: (P, N)."""
    with torch.no_grad():
        return toy.log_probs(toy.random_policy(noise=0.1, seed=5))


def share_of_a(draws, log_proposal):
    """Estimates of the prior's probability of a first token a, (P,), with their standard errors."""
    hits = torch.tensor(draws.rows["feature/starts_with_a"]) * (draws.log_prior - log_proposal).exp()
    of_prompts = [hits[draws.prompt_index == prompt] for prompt in range(len(draws.prompts))]
    return (
        torch.stack([rows.mean() for rows in of_prompts]),
        torch.stack([rows.std() / len(rows) ** 0.5 for rows in of_prompts]),
    )


def exact_share(toy):
    hits = torch.tensor(starts_with_a(None, None, toy.completion_ids))
    return (toy.log_prior.exp() * hits).sum(-1)


def test_draws_of_another_policy(toy, policy, tmp_path):
    store = CompletionStore.create(tmp_path / "store", provenance(toy))
    store.append(drawn(toy, policy, 1000, "policy", seed=1))
    draws = StoredDraws.of(store)
    shares, errors = share_of_a(draws, draws.log_proposal)
    assert ((shares - exact_share(toy)).abs() < 4.5 * errors).all()
    unweighted, errors = share_of_a(draws, draws.log_prior)
    assert ((unweighted - exact_share(toy)).abs() > 6 * errors).any()
    assert draws.weighting == "each completion by what drew it: one proposal for each prompt"


def with_densities(toy, rows, log_probs):
    number = {tuple(ids): index for index, ids in enumerate(toy.completion_ids)}
    return [
        dataclasses.replace(
            row,
            log_densities={
                "policy": log_probs[toy.prompts.index(row.prompt), number[tuple(row.completion_ids)]].item()
            },
        )
        for row in rows
    ]


def test_two_proposals_are_mixed_where_both_densities_are_known(toy, policy, tmp_path):
    """log q is that of the pooled draws, n_k/N·q_k, computed here from the two tables."""
    store = CompletionStore.create(tmp_path / "store", provenance(toy))
    store.append(with_densities(toy, drawn(toy, toy.log_prior, 100, "prior"), policy))
    store.append(drawn(toy, policy, 300, "policy", seed=1))
    draws = StoredDraws.of(store)
    mixture = (0.25 * toy.log_prior.exp() + 0.75 * policy.exp()).log()
    number = {tuple(ids): index for index, ids in enumerate(toy.completion_ids)}
    columns = torch.tensor([number[tuple(ids)] for ids in draws.rows["completion_ids"]])
    expected = mixture[draws.prompt_index, columns].double()
    torch.testing.assert_close(draws.log_proposal, expected, rtol=1e-5, atol=1e-5)
    assert draws.weighting == "by the mixture of all that drew, for 3 prompts"
    shares, errors = share_of_a(draws, draws.log_proposal)
    assert ((shares - exact_share(toy)).abs() < 4.5 * errors).all()


def test_without_a_density_each_row_has_its_own_and_that_is_said(toy, tmp_path):
    with torch.no_grad():  # nearer to the prior, since a rare draw of each row's own weight may be heavy
        policy = toy.log_probs(toy.random_policy(noise=0.05, seed=5))
    store = CompletionStore.create(tmp_path / "store", provenance(toy))
    store.append(drawn(toy, toy.log_prior, 100, "prior"))
    store.append(drawn(toy, policy, 300, "policy", seed=1))
    draws = StoredDraws.of(store)
    assert draws.log_proposal.tolist() == draws.rows["log_proposal"]
    assert draws.weighting == "each completion by what drew it, for 3 prompts with several proposals"
    shares, errors = share_of_a(draws, draws.log_proposal)
    assert ((shares - exact_share(toy)).abs() < 4.5 * errors).all()


def test_rewards_are_combined_when_they_are_read(toy, tmp_path):
    draws = StoredDraws.of(all_once(toy, tmp_path / "store"))
    found = draws.rewards(["toy_reward"], [2.0], (-0.5, 1.0), 0.25)
    ended = torch.tensor([ids[-1] == toy.tokenizer.eos_token_id for ids in toy.completion_ids])
    expected = (2.0 * toy.rewards).clamp(-0.5, 1.0) - torch.where(ended, 0.0, 0.25)
    torch.testing.assert_close(found.view(3, -1), expected)
    with pytest.raises(ValueError, match="one weight for each"):
        draws.rewards(["toy_reward"], [1.0, 2.0])


def test_prompts_with_other_columns_are_other_prompts(toy, tmp_path):
    store = CompletionStore.create(tmp_path / "store", provenance(toy))
    for topic in ("x", "y"):
        store.append(drawn(toy, toy.log_prior, 2, "prior", columns={"topic": topic}))
    draws = StoredDraws.of(store)
    assert len(draws.prompts) == 6
    assert [columns["topic"] for columns in draws.columns] == ["x"] * 3 + ["y"] * 3
