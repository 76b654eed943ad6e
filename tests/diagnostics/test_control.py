"""Moments and divergences from draws, against a policy and a posterior that are enumerated."""

import io
import math

import pytest
import torch
from rich.console import Console

from rlhf_bayes.diagnostics import Estimate, control_fits, control_table, draw, plot_control
from rlhf_bayes.likelihoods import MomentLikelihood
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.posterior import Posterior

LAMBDA = 1.3


def even(completion_ids, **columns):
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def not_long(completion_ids, **columns):
    return [float(len(ids) < 4 or ids[0] != 3) for ids in completion_ids]


def language_model(toy, model):
    return LanguageModel(model, toy.tokenizer, toy.max_completion_length, batch_size=512)


def setting(toy, features, lambdas, seed=0, n=800):
    """The posterior's log-density (P, N) by enumeration, the policy, and draws of prior and policy."""
    prior = language_model(toy, toy.model)
    policy = language_model(toy, toy.random_policy(noise=0.1, seed=4))
    posterior = Posterior(prior, MomentLikelihood(features, lambdas))
    columns = [
        posterior.likelihood.log_likelihood([prompt] * len(toy.completions), toy.completions, toy.completion_ids)
        for prompt in toy.prompts
    ]
    generator = torch.Generator().manual_seed(seed)
    draws = [draw(source, policy, posterior, toy.prompts, n, generator) for source in (prior, policy)]
    return toy.log_posterior(torch.stack(columns)), policy, draws


def near(estimate: Estimate, expected: float):
    off = (estimate.mean - expected) / max(estimate.standard_error, 1e-6)
    assert abs(off) < 4, f"{estimate} for {expected:.4f}: off by {off:.1f} standard errors"


@pytest.mark.parametrize("forbidding", [False, True])
def test_fits_are_those_of_the_enumeration(large_toy, forbidding):
    features, lambdas = {"even": even}, {"even": LAMBDA}
    if forbidding:
        features, lambdas = features | {"not_long": not_long}, lambdas | {"not_long": math.inf}
    log_p, policy, draws = setting(large_toy, features, lambdas)
    log_pi = large_toy.log_probs(policy.model).detach()  # (P, N)
    fits = control_fits(*draws)
    assert list(fits) == ["prior", "policy", *(["guarded"] if forbidding else []), "posterior"]

    p, allowed = log_p.exp(), log_p > -math.inf
    log_guarded = torch.where(allowed, log_pi, -math.inf).log_softmax(-1)
    values = torch.tensor(even(completion_ids=large_toy.completion_ids))  # (N,)
    densities = {"prior": large_toy.log_prior, "policy": log_pi, "guarded": log_guarded}
    for fit, log_q in ((fits[name], densities[name]) for name in list(fits)[:-1]):
        q = log_q.exp()
        near(fit.forward_kl, torch.where(allowed, p * (log_p - log_q), 0.0).sum(-1).mean().item())
        near(fit.tv, (p - q).abs().sum(-1).mean().item() / 2)
        near(fit.moments["even"], (q * values).sum(-1).mean().item())
        near(fit.satisfaction, q[allowed].sum().item() / len(q))
        near(fit.kl_to_prior, torch.where(q > 0, q * (log_q - large_toy.log_prior), 0.0).sum(-1).mean().item())
        near(fit.entropy, -torch.where(q > 0, q * log_q, 0.0).sum(-1).mean().item())
        if q[~allowed].sum() > 0:
            assert fit.reverse_kl is None
        else:
            near(fit.reverse_kl, torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1).mean().item())
    target = fits["posterior"]
    near(target.moments["even"], (p * values).sum(-1).mean().item())
    near(target.kl_to_prior, torch.where(allowed, p * (log_p - large_toy.log_prior), 0.0).sum(-1).mean().item())
    near(target.entropy, -torch.where(allowed, p * log_p, 0.0).sum(-1).mean().item())
    assert fits["policy"].forward_kl.mean > 0.3
    if forbidding:
        log_share = fits["guarded"].forward_kl.mean - fits["policy"].forward_kl.mean
        exact = torch.where(allowed, log_pi.exp(), 0.0).sum(-1).log().mean().item()
        assert log_share == pytest.approx(exact, abs=0.03)


def test_standard_errors_are_those_of_repetitions(toy):
    estimates = []
    for seed in range(40):
        *_, draws = setting(toy, {"even": even}, {"even": LAMBDA}, seed=seed, n=60)
        fits = control_fits(*draws)
        fit, target = fits["policy"], fits["posterior"]
        estimates.append([fit.forward_kl, fit.tv, target.moments["even"], target.kl_to_prior, target.entropy])
    spread = torch.tensor([[estimate.mean for estimate in row] for row in estimates]).std(0)
    said = torch.tensor([[estimate.standard_error for estimate in row] for row in estimates]).mean(0)
    # prior's and policy's draws are as many each, not independent draws of their mixture: never more spread than said
    assert (spread / said < 1.3).all(), (spread / said).tolist()
    assert (spread / said > 0.4).all(), (spread / said).tolist()


def test_what_rests_on_few_draws_is_not_told(toy):
    *_, draws = setting(toy, {"even": even}, {"even": LAMBDA}, n=4)
    fits = control_fits(*draws)
    assert str(fits["policy"].forward_kl) == "not trustworthy"
    assert "±" in str(fits["policy"].moments["even"])


def test_nothing_allowed_was_drawn(toy):
    def never(completions, **columns):
        return [0.0] * len(completions)

    *_, draws = setting(toy, {"even": never}, {"even": LAMBDA}, n=40)
    forbidden = [torch.full_like(part.log_likelihood, -math.inf) for part in draws]
    for part, column in zip(draws, forbidden, strict=True):
        object.__setattr__(part, "log_likelihood", column)
    fits = control_fits(*draws)
    assert str(fits["policy"].forward_kl) == str(fits["posterior"].kl_to_prior) == "not trustworthy"
    assert fits["policy"].satisfaction.mean == 0


@pytest.mark.parametrize("forbidding", [False, True])
def test_table_and_curves(toy, tmp_path, forbidding):
    features, lambdas = {"even": even, "short": not_long}, {"even": LAMBDA, "short": 0.5}
    if forbidding:
        features, lambdas = {"even": even}, {"even": math.inf}
    *_, draws = setting(toy, features, lambdas, n=200)
    fits, wanted = control_fits(*draws), dict.fromkeys(features, 0.5)
    console = Console(file=io.StringIO(), width=120)
    console.print(control_table(fits, wanted))
    text = console.file.getvalue()
    assert "even, 0.5 wanted" in text
    assert ("∞" in text) == ("not forbidden" in text) == forbidding
    names = ("moments/even", "forward_kl", "forward_kl_standard_error", "tv", "kl_to_prior")
    history = [{"step": step} | {f"posterior/{name}": 0.1 * step for name in names} for step in (1, 2, 3)]
    for number, kl in enumerate((Estimate(1.0, 0.1), Estimate(1.0, 0.1, trustworthy=False))):
        plot_control([*history, {"train_loss": 1.0}], wanted, kl, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
