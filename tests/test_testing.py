import itertools
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.testing import EnumerableLM, check_posterior, toy_reward

FAMILIES = ["llama", "gpt2", "qwen2"]


def score_one(model, prompt_ids, ids):
    """The chain rule, one completion and one forward a token."""
    log_prob = 0.0
    for step, token in enumerate(ids):
        logits = model(input_ids=torch.tensor([[*prompt_ids, *ids[:step]]])).logits[0, -1]
        log_prob = log_prob + logits.log_softmax(-1)[token]
    return log_prob


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_support_is_every_completion_once(pad_is_eos):
    toy = EnumerableLM(vocab_size=4, max_completion_length=3, pad_is_eos=pad_is_eos)
    eos = toy.tokenizer.eos_token_id
    expected = {
        sequence[: sequence.index(eos) + 1] if eos in sequence else sequence
        for sequence in itertools.product(range(4), repeat=3)
    }
    assert {tuple(ids) for ids in toy.completion_ids} == expected
    assert len(toy.completion_ids) == len(expected) == 1 + 3 + 9 + 27


def test_default_size_and_distance(large_toy):
    assert len(large_toy.completion_ids) == 1 + 8 + 64 + 512 + 4096
    prior = large_toy.log_prior.exp()
    distance = (prior * (large_toy.log_prior - large_toy.log_posterior())).sum(-1)
    assert 1.3 < distance.mean() < 1.7
    # far from uniform, and different for each prompt
    assert (prior * (large_toy.log_prior + math.log(4681))).sum(-1).min() > 1
    assert (large_toy.log_z()[:, None] - large_toy.log_z()).abs().fill_diagonal_(1).min() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_log_probs_are_the_chain_rule(family, pad_is_eos):
    toy = EnumerableLM(family, vocab_size=4, max_completion_length=3, pad_is_eos=pad_is_eos, seed=3)
    with torch.no_grad():
        for row, prompt in enumerate(toy.prompts):
            prompt_ids = toy.tokenizer(prompt)["input_ids"]
            expected = torch.stack([score_one(toy.model, prompt_ids, ids) for ids in toy.completion_ids])
            assert_close(toy.log_prior[row], expected, rtol=1e-4, atol=1e-4)
    assert_close(toy.log_prior.exp().sum(-1), torch.ones(3))


@pytest.mark.parametrize(("vocab_size", "length"), [(3, 1), (3, 5), (5, 2), (9, 2)])
def test_other_sizes_are_normalised(vocab_size, length):
    toy = EnumerableLM(vocab_size=vocab_size, max_completion_length=length)
    assert_close(toy.log_prior.exp().sum(-1), torch.ones(3))
    assert_close(toy.log_posterior().exp().sum(-1), torch.ones(3))


def test_temperature_divides_the_logits():
    cold = EnumerableLM(vocab_size=3, max_completion_length=1, temperature=0.5)
    warm = EnumerableLM(vocab_size=3, max_completion_length=1)
    assert cold.completion_ids == warm.completion_ids
    # one token: a temperature of a half squares the probabilities
    assert_close(cold.log_prior, (2 * warm.log_prior).log_softmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_survives_saving(family, tmp_path):
    toy = EnumerableLM(family, vocab_size=5, max_completion_length=3)
    folder = toy.save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert_close(toy.log_probs(model).detach(), toy.log_prior, rtol=0, atol=1e-6)
    assert tokenizer.padding_side == "left"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (3, 4)
    texts = tokenizer.batch_decode(toy.completion_ids)
    assert len(set(texts)) == len(texts)
    assert tokenizer(texts)["input_ids"] == toy.completion_ids
    assert model.generation_config.eos_token_id == 4


def test_chat_prompts_are_the_same_words(toy):
    chats = [[{"role": "user", "content": prompt}] for prompt in toy.prompts]
    encoded = toy.tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded == toy.tokenizer(toy.prompts)["input_ids"]
    assert len({len(ids) for ids in encoded}) == 3
    assert_close(toy.log_probs(prompts=chats).detach(), toy.log_prior)


def test_identities_of_the_elbo(toy):
    policy = toy.random_policy(seed=3)
    log_policy = toy.log_probs(policy).detach()
    p = log_policy.exp()
    elbo = (p * toy.rewards).sum(-1) / 0.5 - (p * (log_policy - toy.log_prior)).sum(-1)
    assert_close(toy.elbo(policy).detach(), elbo)
    assert_close(toy.log_z() - elbo, toy.reverse_kl(policy).detach(), rtol=1e-4, atol=1e-5)
    log_posterior = toy.log_posterior()
    assert_close(toy.forward_kl(policy).detach(), (log_posterior.exp() * (log_posterior - log_policy)).sum(-1))
    assert_close(toy.tv(policy).detach(), (log_posterior.exp() - p).abs().sum(-1) / 2)
    assert (toy.js(policy) < math.log(2)).all()


def test_every_completion_has_the_same_evidence_at_the_posterior(toy):
    evidence = toy.log_posterior() - toy.log_prior - toy.rewards / 0.5
    assert_close(evidence, -toy.log_z()[:, None].expand_as(evidence), rtol=1e-4, atol=1e-4)


def test_forbidden_completions(toy):
    ended = torch.tensor([ids[-1] == toy.tokenizer.eos_token_id for ids in toy.completion_ids])
    log_likelihood = torch.where(ended, 0.0, -torch.inf).expand_as(toy.log_prior)
    assert_close(toy.log_z(log_likelihood).exp(), toy.log_prior.exp()[:, ended].sum(-1))
    policy = toy.random_policy()
    assert (toy.reverse_kl(policy, log_likelihood) == torch.inf).all()
    assert toy.forward_kl(policy, log_likelihood).isfinite().all()


def test_objective_gradient_is_the_score_function_identity(toy):
    policy = toy.random_policy(seed=2)
    log_policy = toy.log_probs(policy)
    advantage = (toy.rewards - 0.5 * (log_policy - toy.log_prior)).detach()
    # ∇J = E_π[(r − β log π/π0)·∇log π]
    surrogate = (log_policy.detach().exp() * advantage * log_policy).sum(-1).mean()
    gradients = toy.objective_gradient(policy)
    for name, parameter in policy.named_parameters():
        expected = torch.autograd.grad(surrogate, parameter, retain_graph=True)[0]
        assert_close(gradients[name], expected, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_objective_gradient_vanishes_at_the_posterior(toy):
    policy = toy.random_policy(seed=2)
    log_likelihood = toy.log_probs(policy).detach() - toy.log_prior + torch.tensor([[0.3], [-2.0], [1.0]])
    at_posterior = max(gradient.abs().max() for gradient in toy.objective_gradient(policy, log_likelihood).values())
    elsewhere = max(gradient.abs().max() for gradient in toy.objective_gradient(policy).values())
    assert at_posterior < 1e-5 < 1e-2 < elsewhere


def test_truths_do_not_follow_the_model(fresh_toy):
    before, gap = fresh_toy.log_prior.clone(), fresh_toy.reverse_kl(fresh_toy.model).detach()
    LanguageModel(fresh_toy.model, fresh_toy.tokenizer, max_completion_length=3)
    with torch.no_grad():
        for parameter in fresh_toy.model.parameters():
            parameter.mul_(0.5)
    assert_close(fresh_toy.log_prior, before, rtol=0, atol=0)
    copy = fresh_toy.random_policy(noise=0.0)
    assert_close(fresh_toy.log_probs(copy).detach(), before)
    assert_close(fresh_toy.reverse_kl(copy).detach(), gap)
    assert (fresh_toy.reverse_kl(fresh_toy.model) - gap).abs().min() > 1e-2


def test_construction_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    toy = EnumerableLM(vocab_size=3, max_completion_length=1, seed=9)
    policy = toy.random_policy()
    assert_close(torch.rand(3), expected)
    same = EnumerableLM(vocab_size=3, max_completion_length=1, seed=9)
    assert_close(same.log_prior, toy.log_prior)
    assert_close(same.log_probs(same.random_policy()), toy.log_probs(policy))


def test_training_mode_is_restored(toy):
    policy = toy.random_policy().train()
    toy.log_probs(policy)
    assert policy.training


def test_refusals():
    with pytest.raises(ValueError, match="`vocab_size` must be between 3 and 9, got 10"):
        EnumerableLM(vocab_size=10)
    with pytest.raises(ValueError, match="`max_completion_length` must be between 1 and 5, got 6"):
        EnumerableLM(max_completion_length=6)
    with pytest.raises(ValueError, match="`beta` must be positive and finite, got 0"):
        EnumerableLM(beta=0)
    with pytest.raises(ValueError, match="`family` must be"):
        EnumerableLM("mamba")
    with pytest.raises(ValueError, match=r"`log_likelihood` must be \(P, N\) = \(3, 7\), got \(7,\)"):
        EnumerableLM(vocab_size=3, max_completion_length=2).log_z(torch.zeros(7))


# A posterior written by hand, and ways to break the contract


class Tilted:
    """A correct posterior; subclasses break one rule each."""

    def __init__(self, prior):
        self.prior = prior

    def log_likelihood(self, prompts, completions, completion_ids=None, columns=None):
        return torch.tensor(toy_reward(prompts, completions, completion_ids)) / 0.5

    def log_density(self, prompts, completions, completion_ids=None, columns=None):
        log_prior = self.prior.log_prob(prompts, completion_ids)
        return log_prior + self.log_likelihood(prompts, completions, completion_ids, columns)


class WithColumns(Tilted):
    def log_likelihood(self, prompts, completions, completion_ids=None, columns=None):
        return super().log_likelihood(prompts, completions, completion_ids) * torch.tensor(columns["weight"])


class Forbidding(Tilted):
    def log_likelihood(self, prompts, completions, completion_ids=None, columns=None):
        values = super().log_likelihood(prompts, completions, completion_ids)
        return torch.where(torch.tensor([ids[0] == 0 for ids in completion_ids]), -torch.inf, values)


class SaysThatItForbids(Forbidding):
    forbids = True


class DeniesThatItForbids(Forbidding):
    forbids = False


class ForgetsThePrior(Tilted):
    def log_density(self, prompts, completions, completion_ids=None, columns=None):
        return self.log_likelihood(prompts, completions, completion_ids)


class Column(Tilted):
    def log_likelihood(self, *args):
        return super().log_likelihood(*args)[:, None]


class Float64(Tilted):
    def log_likelihood(self, *args):
        return super().log_likelihood(*args).double()


class AsList(Tilted):
    def log_likelihood(self, *args):
        return super().log_likelihood(*args).tolist()


class NotANumber(Tilted):
    def log_likelihood(self, *args):
        return super().log_likelihood(*args).index_fill(0, torch.tensor([2]), torch.nan)


class PlusInfinity(Tilted):
    def log_likelihood(self, *args):
        return super().log_likelihood(*args).index_fill(0, torch.tensor([2]), torch.inf)


class Drifting(Tilted):
    calls = 0

    def log_density(self, *args):
        self.calls += 1
        return super().log_density(*args) + 0.1 * (self.calls - 1)


class Whitened(Tilted):
    def log_likelihood(self, *args):
        values = super().log_likelihood(*args)
        return values - values.mean()


class ByPosition(Tilted):
    def log_likelihood(self, *args):
        values = super().log_likelihood(*args)
        return values + torch.arange(len(values))


class ForbidsAll(Tilted):
    def log_likelihood(self, *args):
        return torch.full_like(super().log_likelihood(*args), -torch.inf)


@pytest.fixture(scope="module")
def prior(toy):
    return LanguageModel(toy.random_policy(noise=0.0), toy.tokenizer, max_completion_length=3)


@pytest.mark.parametrize("kind", [Tilted, Forbidding, SaysThatItForbids])
def test_a_correct_posterior_passes(kind, prior, toy):
    check_posterior(kind(prior), toy.prompts, enumerable=toy)


def test_chat_prompts_pass(prior, toy):
    chats = [[{"role": "user", "content": prompt}] for prompt in toy.prompts]
    check_posterior(Tilted(prior), chats, enumerable=toy)


def test_columns_reach_the_reward(prior, toy):
    check_posterior(WithColumns(prior), toy.prompts, columns={"weight": [0.5, 1.0, 2.0]}, enumerable=toy)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (ForgetsThePrior, "must be the prior's log-prob plus"),
        (Column, r"must have shape \(B,\) = \(12,\), one a row, got \(12, 1\)"),
        (Float64, r"must be fp32, got torch\.float64"),
        (AsList, "must return a tensor, got list"),
        (NotANumber, "must not be nan"),
        (PlusInfinity, r"must not be \+inf"),
        (Whitened, "must not depend on the others of its batch"),
        (ByPosition, "must not depend on the order of the rows"),
        (Drifting, "must be deterministic"),
        (DeniesThatItForbids, "`forbids` must be True, not False"),
    ],
)
def test_a_broken_rule_is_named(kind, rule, prior, toy):
    with pytest.raises(AssertionError, match=rule):
        check_posterior(kind(prior), toy.prompts)


def test_a_rare_forbidden_completion_is_found_by_enumeration(prior, toy):
    class ForbidsOne(Tilted):
        forbids = False

        def log_likelihood(self, prompts, completions, completion_ids=None, columns=None):
            values = super().log_likelihood(prompts, completions, completion_ids)
            return torch.where(torch.tensor([ids == [2, 2, 2] for ids in completion_ids]), -torch.inf, values)

    check_posterior(ForbidsOne(prior), toy.prompts)
    with pytest.raises(AssertionError, match="`forbids` must be True"):
        check_posterior(ForbidsOne(prior), toy.prompts, enumerable=toy)


def test_z_must_be_positive(prior, toy):
    check_posterior(ForbidsAll(prior), toy.prompts)
    with pytest.raises(AssertionError, match="Z must be positive"):
        check_posterior(ForbidsAll(prior), toy.prompts, enumerable=toy)


def test_a_tilted_language_model_keeps_the_contract(prior, toy):
    check_posterior(prior.tilt(toy_reward, beta=0.5), toy.prompts, enumerable=toy)


def test_another_prior_than_the_enumerable_one_is_noticed(toy):
    other = LanguageModel(toy.random_policy(), toy.tokenizer, max_completion_length=3)
    with pytest.raises(AssertionError, match="on every completion of 'a'"):
        check_posterior(Tilted(other), toy.prompts, enumerable=toy)
