"""What samplers are held against: exact distributions of the toy, and the chi-square test. Not a test module."""

import torch
from scipy.stats import chi2

from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.samplers import Draws, IndependentRows
from rlhf_bayes.testing import toy_reward


def prior_of(toy, model=None):
    return LanguageModel(model or toy.model, toy.tokenizer, toy.max_completion_length, batch_size=5000)


def policy_of(toy, noise=0.05, seed=1):
    """A "trained policy": not the prior, not the posterior."""
    return prior_of(toy, toy.random_policy(noise=noise, seed=seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tilted(toy):
    """The posterior of `toy.log_posterior()`."""
    return prior_of(toy).tilt(toy_reward, toy.beta)


def max_evidence(toy):
    return float(toy.log_likelihood.max())


def few_a(completions, **kwargs):
    """At most one "a": the prior's mass on it is 0.45, 0.31, 0.31."""
    return [str(completion).count("a") <= 1 for completion in completions]


def allowed_by(toy, predicate):
    """(N,) bool."""
    return torch.tensor(predicate(completions=toy.completions, completion_ids=toy.completion_ids))


def conditioned(toy, predicate=few_a):
    """log π* (P, N) and log Z (P,) of the condition, by enumeration."""
    log_density = toy.log_prior.double().masked_fill(~allowed_by(toy, predicate), -torch.inf)
    return log_density.log_softmax(-1), log_density.logsumexp(-1)


def exact_draws(toy, log_prob, n):
    """n draws of the first prompt from log p (N,)."""
    index = torch.multinomial(log_prob.exp(), n, replacement=True, generator=seeded(99)).tolist()
    texts = [toy.completions[i] for i in index]
    ids = [toy.completion_ids[i] for i in index]
    zeros = torch.zeros(n, dtype=torch.long)
    return Draws([toy.prompts[0]] * n, zeros, ids, texts, list(texts), None, "exact", 1, IndependentRows())


def counts_of(toy, draws):
    """(P, N): how often each completion came."""
    column = {tuple(ids): index for index, ids in enumerate(toy.completion_ids)}
    counts = torch.zeros(draws.num_prompts, len(column), dtype=torch.float64)
    for prompt, ids in zip(draws.prompt_index.tolist(), draws.completion_ids, strict=True):
        counts[prompt, column[tuple(ids)]] += 1
    return counts


def chi_square_p(counts, log_prob):
    """P-value of counts (N,) of independent draws under log p (N,). Cells of expectation below 5 are pooled."""
    expected = log_prob.double().exp() * counts.sum()
    assert counts[expected == 0].sum() == 0, "a completion of probability 0 was drawn"
    order = expected.argsort(descending=True)
    expected, counts = expected[order], counts[order]
    large = int((expected >= 5).sum())
    cells = [(float(o), float(e)) for o, e in zip(counts[:large], expected[:large], strict=True)]
    rest = (float(counts[large:].sum()), float(expected[large:].sum()))
    if rest[1] >= 5:
        cells.append(rest)
    elif rest[1] > 0:
        cells[-1] = (cells[-1][0] + rest[0], cells[-1][1] + rest[1])
    assert len(cells) >= 3, "too few cells: draw more"
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    return float(chi2.sf(statistic, len(cells) - 1))


def assert_draws_follow(toy, draws, log_prob):
    """Independent draws of every prompt against log p (P, N), at the level 0.001 together."""
    for prompt, counts in enumerate(counts_of(toy, draws)):
        p = chi_square_p(counts, log_prob[prompt])
        assert p > 0.001 / draws.num_prompts, f"prompt {prompt}: chi-square p = {p:.2g} of {int(counts.sum())} draws"


def assert_within(estimate, standard_error, truth, what, n_errors=4):
    z = (float(estimate) - float(truth)) / float(standard_error)
    assert abs(z) < n_errors, f"{what}: {float(estimate):.4f} for {float(truth):.4f}, off by {z:.1f} standard errors"
