"""The posterior against one that is enumerated, and the ways to say which completion is meant."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.numerics import log_z, log_z_standard_error
from rlhf_bayes.posterior import Posterior, tilt
from rlhf_bayes.testing import EnumerableLM, check_posterior, toy_reward


def prior_of(toy, model=None):
    model = toy.model if model is None else model
    return LanguageModel(model, toy.tokenizer, toy.max_completion_length, temperature=toy.temperature)


def enumerated(toy, method):
    """(P, N) of a posterior's method over every prompt and completion."""
    n = len(toy.completion_ids)
    return torch.stack([method([prompt] * n, toy.completions, toy.completion_ids) for prompt in toy.prompts])


def word_count(completions, **kwargs):
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [float(len(text.split())) for text in texts]


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2"])
def any_toy(request):
    return EnumerableLM(request.param, vocab_size=4, max_completion_length=3, beta=0.3, temperature=0.8, seed=5)


def test_density_and_z_are_those_of_the_enumeration(any_toy):
    posterior = prior_of(any_toy).tilt(toy_reward, any_toy.beta)
    assert posterior.beta == 0.3
    log_likelihood = enumerated(any_toy, posterior.log_likelihood)
    assert_close(log_likelihood, any_toy.rewards / 0.3, rtol=0, atol=1e-5)
    log_density = enumerated(any_toy, posterior.log_density)
    assert_close(log_density.logsumexp(-1), any_toy.log_z(), rtol=0, atol=1e-4)
    log_posterior = log_density - log_density.logsumexp(-1, keepdim=True)
    assert_close(log_posterior, any_toy.log_posterior(), rtol=0, atol=1e-3)


def test_elbo_gap_is_the_kl_to_the_posterior(any_toy):
    posterior = prior_of(any_toy).tilt(toy_reward, any_toy.beta)
    policy = any_toy.random_policy(noise=0.1, seed=3)
    log_prob = enumerated(any_toy, lambda prompts, _, ids: prior_of(any_toy, policy).log_prob(prompts, ids))
    evidence = enumerated(any_toy, posterior.log_density) - log_prob  # (P, N)
    elbo = (log_prob.exp() * evidence).sum(-1)
    expected = any_toy.reverse_kl(policy).detach()
    assert expected.min() > 0.1
    assert_close(any_toy.log_z() - elbo, expected, rtol=0, atol=1e-3)


def test_z_is_the_mean_evidence_of_the_prior(large_toy):
    posterior = prior_of(large_toy).tilt(toy_reward, beta=1.5)
    prompt = large_toy.prompts[2]
    drawn = posterior.prior.sample([prompt], n=1000, generator=torch.Generator().manual_seed(0))
    log_weights = posterior.log_likelihood(drawn.prompts, drawn.completions, drawn.completion_ids)
    expected = large_toy.log_z(large_toy.rewards / 1.5)[2]
    error = float(log_z(log_weights) - expected)
    standard_error = float(log_z_standard_error(log_weights))
    assert standard_error < 0.1
    assert abs(error) < 4 * standard_error, f"off by {error / standard_error:.1f} standard errors"


def test_what_moves_the_optimum_is_in_the_density(toy):
    posterior = tilt(
        prior_of(toy),
        [toy_reward, word_count],
        0.7,
        reward_weights=[2.0, -0.5],
        reward_clip_range=(-1.0, 1.2),
        missing_eos_penalty=0.9,
    )
    words = torch.tensor([len(text.split()) for text in toy.completions])
    cut = torch.tensor([toy.tokenizer.eos_token_id not in ids for ids in toy.completion_ids])
    assert cut.sum() == 27
    expected = ((2.0 * toy.rewards - 0.5 * words).clip(-1.0, 1.2) - 0.9 * cut) / 0.7
    assert_close(enumerated(toy, posterior.log_likelihood), expected, rtol=0, atol=1e-5)
    assert_close(enumerated(toy, posterior.log_density), toy.log_prior + expected, rtol=0, atol=1e-4)


def test_keeps_the_contract(toy):
    check_posterior(prior_of(toy).tilt(toy_reward, 0.5), toy.prompts, enumerable=toy)
    chats = [[{"role": "user", "content": prompt}] for prompt in toy.prompts]
    check_posterior(prior_of(toy).tilt([toy_reward, word_count], 0.5), chats, enumerable=toy)


def test_a_constraint_conditions_the_prior(toy):
    def no_b(completions, **kwargs):
        return [-math.inf if "b" in completion else 0.0 for completion in completions]

    posterior = prior_of(toy).tilt(no_b, 1.0)
    log_density = enumerated(toy, posterior.log_density)
    allowed = torch.tensor(["b" not in text for text in toy.completions])
    assert_close(log_density.exp().sum(-1), toy.log_prior[:, allowed].exp().sum(-1))
    assert (log_density[:, ~allowed] == -math.inf).all()
    check_posterior(posterior, toy.prompts, enumerable=toy)


def test_ids_alone_are_decoded(toy):
    posterior = prior_of(toy).tilt([toy_reward, word_count], 0.5)
    ids = toy.completion_ids
    prompts = [toy.prompts[1]] * len(ids)
    expected = posterior.log_density(prompts, toy.completions, ids)
    assert_close(posterior.log_density(prompts, completion_ids=ids), expected)
    assert_close(posterior.log_density(prompts, completion_ids=[torch.tensor(row) for row in ids]), expected)
    chats = [[{"role": "user", "content": toy.prompts[1]}]] * len(ids)
    assert_close(posterior.log_density(chats, completion_ids=ids), expected)


@pytest.mark.parametrize("chat", [False, True])
def test_text_alone_is_tokenised_and_ended(toy, chat):
    posterior = prior_of(toy).tilt([toy_reward, word_count], 0.5)
    eos = toy.tokenizer.eos_token_id
    # three tokens are `max_completion_length`: the completion was cut, and has no EOS
    texts = ["", "a", "b a", "a b b", "b <eos>"]
    ids = [[eos], [0, eos], [1, 0, eos], [0, 1, 1], [1, eos]]
    prompts = [toy.prompts[2]] * len(ids)
    expected = posterior.log_density(prompts, texts, ids)
    if chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    assert_close(posterior.log_density(prompts, texts), expected)
    assert_close(posterior.log_likelihood(prompts, texts), posterior.log_likelihood(prompts, texts, ids))


def test_columns_reach_the_reward(toy):
    def answered(completions, answer, **kwargs):
        return [float(completion == a) for completion, a in zip(completions, answer, strict=True)]

    posterior = prior_of(toy).tilt(answered, 0.5)
    result = posterior.log_likelihood([toy.prompts[0]] * 2, ["a", "b"], columns={"answer": ["b", "b"]})
    assert result.tolist() == [0.0, 2.0]


class Fixed:
    """A likelihood of the user's own."""

    def __init__(self, *nats):
        self.nats = nats

    def log_likelihood(self, prompts, completions, completion_ids, columns=None):
        return torch.tensor(self.nats, dtype=torch.float64, requires_grad=True)


def test_any_likelihood_makes_a_posterior(toy):
    posterior = Posterior(prior_of(toy), Fixed(-1.0, -math.inf))
    assert posterior.beta is None
    result = posterior.log_likelihood(toy.prompts[:2], ["a", "b"])
    assert result.dtype is torch.float32
    assert not result.requires_grad
    assert result.tolist() == [-1.0, -math.inf]


@pytest.mark.parametrize(
    ("nats", "error", "message"),
    [
        ((0.0, math.nan), ValueError, r"`Fixed\.log_likelihood` must be finite.*got nan in row 1.*completion 'b'"),
        ((math.inf, 0.0), ValueError, "got inf in row 0"),
        ((0.0,), TypeError, r"shape \(2,\), got shape \(1,\)"),
        (((0.0,), (0.0,)), TypeError, r"shape \(2,\), got shape \(2, 1\)"),
    ],
)
def test_evidence_must_be_a_number_of_nats(toy, nats, error, message):
    posterior = Posterior(prior_of(toy), Fixed(*nats))
    with pytest.raises(error, match=message):
        posterior.log_density(toy.prompts[:2], ["a", "b"])


def test_evidence_beyond_fp32_is_refused(toy):
    posterior = prior_of(toy).tilt(lambda completions, **kwargs: [1e38] * len(completions), beta=1e-3)
    with pytest.raises(ValueError, match=r"got inf in row 0.*larger `beta`"):
        posterior.log_likelihood(["a"], ["b"])


def test_no_evidence_names_the_row(toy):
    posterior = prior_of(toy).tilt(lambda completions, **kwargs: [1.0, None], 1.0)
    with pytest.raises(ValueError, match=r"needs evidence.*row 1: prompt 'b a', completion 'b'.*Return 0"):
        posterior.log_density(["a", "b a"], ["a", "b"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("a", ["b"]), TypeError, "`prompts` must be a list.*got 'a'"),
        ((["a"],), ValueError, "`completions` and `completion_ids` must be given, got neither"),
        ((["a"], ["b", "a"]), ValueError, "one entry for each row, got 1, 2 and 2"),
        ((["a"], None, [[0], [1]]), ValueError, "one entry for each row, got 1, 1 and 2"),
        ((["a", "b"], ["b", "a"], [[0]]), ValueError, "one entry for each row, got 2, 2 and 1"),
        ((["a"], [[{"role": "assistant", "content": "b"}]]), TypeError, "form of `prompts`.*row 0"),
        ((["a"], ["b b b b"]), ValueError, "`max_completion_length` = 3 tokens, row 0 has 4: 'b b b b'"),
        ((["a"], ["<eos> b"]), ValueError, "goes on after the EOS"),
        ((["a"], None, [[0]]), ValueError, "it is a prefix"),
        (
            ([[{"role": "user", "content": "a"}]], [[{"role": "assistant", "content": "b"}] * 2]),
            ValueError,
            "one assistant message with a text, row 0",
        ),
    ],
)
def test_completions_that_are_none_are_refused(toy, arguments, error, message):
    with pytest.raises(error, match=message):
        prior_of(toy).tilt(word_count, 1.0).log_density(*arguments)


@pytest.mark.parametrize("beta", [0, -1.0, math.nan])
def test_beta_must_be_positive(toy, beta):
    with pytest.raises(ValueError, match="`beta` must be positive"):
        prior_of(toy).tilt(toy_reward, beta)


def test_parts_that_make_no_posterior(toy):
    with pytest.raises(TypeError, match="`prior` must be a LanguageModel, got LlamaForCausalLM"):
        Posterior(toy.model, Fixed())
    with pytest.raises(TypeError, match=r"`likelihood`.*got function.*prior\.tilt"):
        Posterior(prior_of(toy), toy_reward)
