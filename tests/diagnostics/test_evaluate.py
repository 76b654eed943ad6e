"""`evaluate` on real, tiny models that are enumerated: what is drawn, scored, concluded and refused."""

import dataclasses
import html
import io
import json
import math

import pytest
import torch
from rich.console import Console
from torch.testing import assert_close

from rlhf_bayes.diagnostics import draw, evaluate
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.samplers import RejectionSampler
from rlhf_bayes.testing import toy_reward

BETA = 1.0


def language_model(toy, model, **changes):
    options = {"max_completion_length": toy.max_completion_length, "batch_size": 512}
    return LanguageModel(model, toy.tokenizer, **options | changes)


@pytest.fixture(scope="module")
def setting(large_toy):
    prior = language_model(large_toy, large_toy.model)
    policy = language_model(large_toy, large_toy.random_policy(noise=0.1, seed=4))
    posterior = prior.tilt(toy_reward, BETA)
    return large_toy, policy, evaluate(policy, posterior, large_toy.prompts, 800, torch.Generator().manual_seed(0))


def near(estimate, expected):
    off = (estimate.mean - expected.item()) / estimate.draws_standard_error
    assert abs(off) < 4, f"off by {off:.1f} standard errors"


@pytest.mark.slow
@pytest.mark.parametrize("who", ["prior", "policy"])
def test_both_fits_are_those_of_the_enumeration(setting, who):
    toy, policy, evaluation = setting
    model = toy.model if who == "prior" else policy.model
    fit, evidence = getattr(evaluation, who), toy.rewards / BETA
    log_p = toy.log_probs(model).detach()  # (P, N)
    p, posterior = log_p.exp(), toy.log_posterior(evidence).exp()
    near(fit.reward, (p * toy.rewards).sum(-1).mean())
    near(fit.entropy, -(p * log_p).sum(-1).mean())
    near(fit.elbo, toy.elbo(model, evidence).mean())
    near(fit.log_z, toy.log_z(evidence).mean())
    near(fit.gap, toy.reverse_kl(model, evidence).mean())
    near(fit.forward_kl, toy.forward_kl(model, evidence).mean())
    near(fit.jeffreys, (toy.reverse_kl(model, evidence) + toy.forward_kl(model, evidence)).mean())
    near(fit.tv, toy.tv(model, evidence).mean())
    near(fit.posterior_reward, (posterior * toy.rewards).sum(-1).mean())
    lengths = torch.tensor([len(ids) for ids in toy.completion_ids])
    near(fit.prior_perplexity, ((p * -toy.log_prior).sum(-1) / (p * lengths).sum(-1)).exp().mean())
    if who == "policy":
        near(fit.kl_to_prior, (p * (log_p - toy.log_prior)).sum(-1).mean())
        assert fit.gap.mean > 0.3  # far from the posterior, or nothing was tested
    else:
        assert fit.kl_to_prior.mean == fit.kl_to_prior.draws_standard_error == 0.0
    assert evaluation.log_z.trustworthy
    assert fit.forbidden.mean == 0.0


def test_the_kl_of_tokens_has_less_noise_than_log_ratios(setting):
    _, _, evaluation = setting
    draws = evaluation.from_policy
    assert draws.kl.min() >= 0
    assert draws.kl.var() < (draws.log_prob - draws.log_prior).var()
    assert draws.entropy.var() < draws.log_prob.var()


def test_draws_are_scored_as_the_models_score_them(setting):
    toy, policy, evaluation = setting
    draws, index = evaluation.from_policy, {tuple(ids): row for row, ids in enumerate(toy.completion_ids)}
    columns = torch.tensor([[index[tuple(ids)] for ids in rows[:20]] for rows in draws.completion_ids])  # (P, 20)
    assert_close(draws.log_prob[:, :20], toy.log_probs(policy.model).detach().gather(1, columns), atol=1e-4, rtol=0)
    assert_close(draws.log_prior[:, :20], toy.log_prior.gather(1, columns), atol=1e-4, rtol=0)
    assert_close(draws.log_likelihood[:, :20], toy.rewards.gather(1, columns) / BETA, atol=1e-4, rtol=0)


def test_the_same_seed_gives_the_same_and_draws_of_the_prior_can_be_kept(toy):
    prior, policy = language_model(toy, toy.model), language_model(toy, toy.random_policy())
    posterior = prior.tilt(toy_reward, 0.5)
    first, again = (evaluate(policy, posterior, toy.prompts, 30, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.as_dict() == again.as_dict()
    kept = evaluate(policy, posterior, toy.prompts, 30, torch.Generator().manual_seed(1), from_prior=first.from_prior)
    assert kept.as_dict() == first.as_dict()


def test_a_batch_gives_what_single_prompts_give(toy):
    # sums over tokens of a padded batch against those of each prompt alone
    prior, policy = language_model(toy, toy.model), language_model(toy, toy.random_policy())
    posterior = prior.tilt(toy_reward, 0.5)
    together = draw(policy, posterior, toy.prompts, 5, torch.Generator().manual_seed(1))
    for row, prompt in enumerate(toy.prompts):
        ids = together.completion_ids[row]
        alone = language_model(toy, policy.model, batch_size=1).log_prob([prompt] * 5, ids)
        assert_close(together.log_prob[row], alone, atol=1e-5, rtol=0)
        assert_close(together.log_prob_under(prior)[row], together.log_prior[row], atol=1e-5, rtol=0)


def test_a_proposal_that_is_no_model(toy):
    class Guided:
        """Another model, of which nothing is seen but draws and densities."""

        def __init__(self, model):
            self.sample, self.log_prob = model.sample, model.log_prob

    prior, policy = language_model(toy, toy.model), language_model(toy, toy.random_policy(noise=0.1))
    posterior = prior.tilt(toy_reward, toy.beta)
    guided = evaluate(Guided(policy), posterior, toy.prompts, 200, torch.Generator().manual_seed(0))
    seen = evaluate(policy, posterior, toy.prompts, 200, torch.Generator().manual_seed(0))
    assert guided.policy.gap.mean == pytest.approx(seen.policy.gap.mean, abs=1e-5)
    p = toy.log_probs(policy.model).detach()
    near(guided.policy.kl_to_prior, (p.exp() * (p - toy.log_prior)).sum(-1).mean())


def test_a_condition_has_no_reward_and_forbids(toy):
    prior = language_model(toy, toy.model)
    posterior = prior.condition(lambda completions, **columns: ["a" in text for text in completions])
    evaluation = evaluate(prior, posterior, toy.prompts, 200, torch.Generator().manual_seed(0))
    share = (toy.log_prior.exp() * torch.tensor(["a" in text for text in toy.completions])).sum(-1)  # (P,)
    near(evaluation.policy.forbidden, 1 - share.mean())
    near(evaluation.policy.log_z, share.log().mean())
    near(evaluation.policy.posterior_kl_to_prior, -share.log().mean())
    near(evaluation.policy.tv, (1 - share).mean())
    assert evaluation.policy.reward is evaluation.policy.posterior_reward is None
    assert evaluation.policy.gap.mean == math.inf
    assert "∞ nats" in evaluation.verdict
    assert "are forbidden" in evaluation.verdict


def test_what_cannot_be_told_is_said(toy):
    prior = language_model(toy, toy.model)
    few = evaluate(prior, prior.tilt(toy_reward, 0.5), toy.prompts, 5, torch.Generator().manual_seed(0))
    assert few.verdict.startswith("Cannot tell how far the policy is from the posterior.")
    assert "Draw more completions" in few.verdict
    assert few.policy.reward.trustworthy


def test_table_and_json(setting, tmp_path):
    _, _, evaluation = setting
    console = Console(file=io.StringIO(), width=120)
    console.print(evaluation)
    text = console.file.getvalue()
    for expected in ("prior", "policy", "gap = KL to posterior", "self-BLEU", str(evaluation.policy.gap)):
        assert expected in text
    evaluation.save(tmp_path / "posterior_fit.json")
    read = json.loads((tmp_path / "posterior_fit.json").read_text())
    assert read["policy"]["elbo"]["mean"] == evaluation.policy.elbo.mean
    assert read["policy"]["elbo"]["trustworthy"] is True
    assert read["beta"] == BETA


def test_reward_functions_get_the_columns_of_their_prompt(toy):
    def named_length(completions, lengths, **columns):
        return [float(length) for length in lengths]

    prior = language_model(toy, toy.model)
    posterior = prior.tilt(named_length, 0.5)
    draws = draw(prior, posterior, toy.prompts, 2, columns={"lengths": [1, 2, 5]})
    assert draws.log_likelihood.tolist() == [[2.0, 2.0], [4.0, 4.0], [10.0, 10.0]]
    assert draws.lengths.tolist() == [[len(ids) for ids in rows] for rows in draws.completion_ids]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 1}, "`n` must be an integer of at least 2"),
        ({"n": 0}, "`n` must be an integer of at least 2"),
        ({"prompts": []}, r"`prompts` must be a non-empty list of texts or of chats, got \[\]"),
        ({"prompts": "a b"}, "`prompts` must be a non-empty list of texts or of chats, got 'a b'"),
        ({"columns": {"x": [1]}}, r"`columns\['x'\]` must have one entry a prompt, 3, got 1"),
    ],
)
def test_refusals(toy, changes, message):
    prior = language_model(toy, toy.model)
    with pytest.raises(ValueError, match=message):
        evaluate(prior, prior.tilt(toy_reward, 0.5), **{"prompts": toy.prompts, "n": 2} | changes)


def test_a_bare_model_is_no_policy(toy):
    posterior = language_model(toy, toy.model).tilt(toy_reward, 0.5)
    with pytest.raises(TypeError, match=r"`policy` must have the methods .*, got LlamaForCausalLM"):
        evaluate(toy.model, posterior, toy.prompts, 2)


def test_policies_of_another_support_and_draws_of_other_prompts(toy):
    prior = language_model(toy, toy.model)
    posterior = prior.tilt(toy_reward, 0.5)
    shorter = language_model(toy, toy.model, max_completion_length=2)
    with pytest.raises(ValueError, match=r"`policy` must draw completions of the prior's support.*got \(2,"):
        evaluate(shorter, posterior, toy.prompts, 2)
    with pytest.raises(ValueError, match="`from_prior` must hold draws of the prompts that are evaluated"):
        evaluate(prior, posterior, toy.prompts, 2, from_prior=draw(prior, posterior, toy.prompts[:2], 2))


@pytest.fixture(scope="module")
def verdict_of(large_toy):
    """The verdict on a policy between prior and posterior: 0 is the prior, 1 the posterior, −1 the other way."""
    toy = large_toy
    log_posterior = toy.log_posterior(toy.rewards / BETA)

    class Tilted:
        """Draws from the enumerated prior tilted by a multiple of the evidence."""

        def __init__(self, power):
            self.log_p = (toy.log_prior + power * toy.rewards / BETA).log_softmax(-1)  # (P, N)
            self.model = language_model(toy, toy.model)

        def sample(self, prompts, n, generator):
            rows = [toy.prompts.index(prompt) for prompt in prompts]
            index = torch.multinomial(self.log_p[rows].exp(), n, replacement=True, generator=generator).flatten()
            ids = [toy.completion_ids[column] for column in index.tolist()]
            repeated = [prompt for prompt in prompts for _ in range(n)]
            drawn = self.model.sample(repeated, 1, generator)
            texts = [toy.completions[column] for column in index.tolist()]
            log_prob = self.log_prob(repeated, ids)[:, None]
            return dataclasses.replace(
                drawn, completion_ids=ids, texts=texts, completions=texts, token_log_probs=log_prob,
                mask=torch.ones_like(log_prob, dtype=torch.bool),
            )  # fmt: skip

        def log_prob(self, prompts, completion_ids):
            pairs = zip(prompts, completion_ids, strict=True)
            places = [(toy.prompts.index(prompt), toy.completion_ids.index(list(ids))) for prompt, ids in pairs]
            return torch.stack([self.log_p[place] for place in places])

    assert log_posterior.isfinite().all()
    posterior = language_model(toy, toy.model).tilt(toy_reward, BETA)

    def verdict(power, n=200):
        found = evaluate(Tilted(power), posterior, toy.prompts * 2, n, torch.Generator().manual_seed(0))
        return found.verdict, found

    return verdict


@pytest.mark.parametrize(
    ("power", "said", "not_said"),
    [
        (0.0, "cannot be told from the prior's", "not more training"),
        (0.5, "more training can bring the policy closer", "not more training"),
        (0.8, "% is left. The policy's reward is", "arrived"),
        (1.0, "The policy has arrived, as far as these draws can tell. The policy's reward is", "is left"),
        (1.0, "another posterior is needed (lower β, other reward), not more training", "can bring"),
        (-1.0, "led away from the posterior", "not more training"),
    ],
)
def test_the_verdict_follows_from_the_size_of_the_gap(verdict_of, power, said, not_said):
    verdict, found = verdict_of(power)
    assert said in verdict
    assert not_said not in verdict
    assert str(found.policy.gap) in verdict


def test_without_log_z_the_verdict_has_bounds_and_the_gain(verdict_of):
    verdict, found = verdict_of(0.9, n=8)
    assert not found.log_z.trustworthy
    assert verdict.startswith("Cannot tell how far the policy is from the posterior. KL(policy‖posterior) is at least")
    assert f"the policy is {found.gain} nats closer to the posterior than the prior." in verdict
    assert verdict.count("not trustworthy") == 1
    # the gain is the difference of the gaps, in which log Z cancels
    assert found.gain.mean == pytest.approx(found.prior.gap.mean - found.policy.gap.mean, abs=1e-6)


def test_exact_draws_bound_what_cannot_be_estimated(toy):
    prior, policy = language_model(toy, toy.model), language_model(toy, toy.random_policy(noise=0.1, seed=4))
    generator = torch.Generator().manual_seed(1)
    posterior = prior.tilt(toy_reward, toy.beta)
    exact = RejectionSampler(log_bound=toy.log_likelihood.max().item()).sample(posterior, toy.prompts, 20, generator)
    found = evaluate(policy, posterior, toy.prompts, 12, generator, exact_draws=exact)
    assert not found.log_z.trustworthy
    truth = toy.reverse_kl(policy.model).mean().item()
    assert found.policy.gap.at_least <= truth <= found.policy.gap.at_most
    assert f"at least {found.policy.gap.at_least:.2f} and at most {found.policy.gap.at_most:.2f} nats" in found.verdict
    assert str(found.policy.log_z) == f"{found.policy.log_z.at_least:.2f} to {found.policy.log_z.at_most:.2f}"


def test_as_a_table_of_pandas_and_in_a_notebook(setting):
    _, _, evaluation = setting
    frame = evaluation.to_pandas().set_index(["distribution", "quantity"])
    row = frame.loc[("policy", "gap")]
    assert (row["mean"], row["low"], row["unit"]) == (evaluation.policy.gap.mean, evaluation.policy.gap.low, "nats")
    assert bool(row["trustworthy"])
    assert frame.loc[("prior", "self_bleu"), "mean"] == evaluation.prior.self_bleu.mean
    page = evaluation._repr_html_()
    assert f"<td>{evaluation.policy.gap}</td>" in page
    assert html.escape(evaluation.verdict) in page


def test_its_description_is_short(setting):
    _, _, evaluation = setting
    gaps = f"gap={{'prior': '{evaluation.prior.gap}', 'policy': '{evaluation.policy.gap}'}}"
    assert repr(evaluation) == f"Evaluation(prompts=3, completions_each=800, beta=1, {gaps})"
    assert repr(evaluation.from_policy) == "ScoredDraws(prompts=3, completions_each=800, features=['reward'])"
