"""Bounds on log Z against enumeration: they hold in expectation, and where an effective sample size is fooled."""

import math
from dataclasses import replace

import pytest
import torch

from rlhf_bayes.diagnostics import evaluate, log_z_sandwich
from rlhf_bayes.lm import Completions, LanguageModel
from rlhf_bayes.samplers import Draws, IndependentRows
from rlhf_bayes.testing import toy_reward


def lm(toy, model):
    return LanguageModel(model, toy.tokenizer, toy.max_completion_length, batch_size=512)


def exact_draws(toy, n, seed=0, prompts=None):
    """From the enumerated posterior, as a sampler returns them."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(toy.log_posterior().exp(), n, replacement=True, generator=generator).flatten().tolist()
    rows = len(index)
    drawn = Completions(
        prompts=[prompt for prompt in prompts or toy.prompts for _ in range(n)],
        completion_ids=[toy.completion_ids[column] for column in index],
        texts=[toy.completions[column] for column in index],
        completions=[toy.completions[column] for column in index],
        mask=torch.ones(rows, 1, dtype=torch.bool),
        token_log_probs=torch.zeros(rows, 1),
        ended=torch.ones(rows, dtype=torch.bool),
    )
    return Draws.of(drawn, len(toy.prompts), guarantee="exact", dependence=IndependentRows())


def test_the_bounds_hold_in_expectation_and_tighten(toy):
    # each row is one repeat, of one prompt
    repeats, generator = 4000, torch.Generator().manual_seed(0)
    log_policy = toy.log_probs(toy.random_policy(noise=0.1, seed=4)).detach()[0].double()  # (N,)
    log_w = (toy.log_prior + toy.log_likelihood)[0].double() - log_policy  # (N,)
    truth, widths = toy.log_z()[0].item(), []
    for n in (4, 16, 64):
        index, exact = (
            torch.multinomial(probs.exp().expand(repeats, -1), size, replacement=True, generator=generator)
            for probs, size in ((log_policy, n), (toy.log_posterior()[0].double(), 1))
        )
        sandwich = log_z_sandwich(log_w[index], list(log_w[exact]))
        lower, upper = sandwich.lower, sandwich.upper
        assert lower.mean < truth + 4 * lower.standard_error
        assert upper.mean > truth - 4 * upper.standard_error
        assert lower.mean + 4 * lower.standard_error < upper.mean - 4 * upper.standard_error
        widths.append(upper.mean - lower.mean)
    assert widths[0] > widths[1] > widths[2]


def test_with_one_draw_it_is_the_elbo_and_its_counterpart(toy):
    log_w = torch.tensor([[0.5], [2.0]])
    sandwich = log_z_sandwich(log_w, [torch.tensor([1.0, 3.0]), torch.tensor([4.0])])
    assert sandwich.lower.mean == pytest.approx(1.25)
    assert sandwich.upper.mean == pytest.approx(3.0)  # E_π*[log w] = log Z + KL(π*‖π)


def test_a_part_of_the_posterior_that_is_never_drawn_shows_in_the_upper_bound():
    # half of the posterior has weight e^9 and proposal probability e^-10
    log_w = torch.zeros(1, 50)
    sandwich = log_z_sandwich(log_w, [torch.tensor([0.0, 9.0])])
    assert sandwich.lower.mean == pytest.approx(0.0)
    assert sandwich.upper.mean == pytest.approx(math.log((49 + math.exp(9)) / 50) / 2)


def test_in_an_evaluation(toy):
    policy, prior = lm(toy, toy.random_policy(noise=0.1, seed=4)), lm(toy, toy.model)
    posterior = prior.tilt(toy_reward, toy.beta)
    evaluation = evaluate(
        policy, posterior, toy.prompts, 100, torch.Generator().manual_seed(0), exact_draws=exact_draws(toy, 40)
    )
    assert evaluation.sandwich.lower.mean < evaluation.sandwich.upper.mean
    assert f"log Z between {evaluation.sandwich.lower}" in evaluation.verdict
    assert evaluation.as_dict()["sandwich"]["upper"]["mean"] == evaluation.sandwich.upper.mean
    # each exact draw's weight is that of enumeration
    log_w = (toy.log_prior + toy.log_likelihood) - toy.log_probs(policy.model).detach()
    one = evaluate(policy, posterior, toy.prompts, 2, exact_draws=exact_draws(toy, 1))
    index = [toy.completion_ids.index(ids) for ids in exact_draws(toy, 1).completion_ids]
    seen = one.from_policy.log_weights[:, 1]
    expected = torch.logaddexp(log_w[range(3), index].double(), seen) - math.log(2)
    assert one.sandwich.upper.mean == pytest.approx(expected.mean().item(), abs=1e-4)


def test_refusals(toy):
    prior = lm(toy, toy.model)
    posterior, exact = prior.tilt(toy_reward, toy.beta), exact_draws(toy, 2)
    with pytest.raises(ValueError, match=r"`exact_draws` must come from a sampler that draws exactly, got.*'none'"):
        evaluate(prior, posterior, toy.prompts, 2, exact_draws=replace(exact, guarantee="none"))
    with pytest.raises(ValueError, match="`exact_draws` must be of the prompts that are evaluated"):
        evaluate(prior, posterior, toy.prompts[::-1], 2, exact_draws=exact)
    with pytest.raises(ValueError, match=r"at least one draw for each prompt, got none for prompt 1 \(1 of 2\)"):
        log_z_sandwich(torch.zeros(2, 3), [torch.zeros(1), torch.zeros(0)])
