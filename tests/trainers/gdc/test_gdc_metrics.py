"""What GDCTrainer reports, against enumeration and within its own standard errors."""

import math

import pytest
import torch

from rlhf_bayes.likelihoods import Constraint, MomentLikelihood, ProductLikelihood
from rlhf_bayes.numerics import f_divergence, khat
from rlhf_bayes.objectives.posterior_metrics import satisfaction, target_metrics
from rlhf_bayes.testing import toy_reward

from ..training import config, gdc_config, keep_log_z, largest_change, logged, prompts_of, trainer, weights

BIG = {"per_device_train_batch_size": 1536, "num_generations": 512, "learning_rate": 0.0, "max_steps": 2}
ALPHA = {"divergence": "alpha", "alpha": 0.5}


def no_a(completion_ids, **kwargs):
    return [0 not in ids for ids in completion_ids]


def ends(completion_ids, **kwargs):
    return [float(ids[-1] == 3) for ids in completion_ids]


def exact(toy, policy, log_likelihood=None):
    with torch.no_grad():
        return {
            "forward_kl": toy.forward_kl(policy, log_likelihood).mean().item(),
            "tv": toy.tv(policy, log_likelihood).mean().item(),
            "log_z": toy.log_z(log_likelihood).mean().item(),
            "elbo": toy.elbo(policy, log_likelihood).mean().item(),
            "gap": toy.reverse_kl(policy, log_likelihood).mean().item(),
        }


@pytest.mark.parametrize("proposal", ["policy", "prior"])
def test_divergences_lie_within_their_standard_errors(toy, tmp_path, proposal):
    policy = toy.random_policy(noise=0.02, seed=3)
    truth = exact(toy, policy)
    args = gdc_config(tmp_path, proposal=proposal, **BIG)
    trained = trainer(toy, args, policy, ref_model=toy.random_policy(0.0))
    keep_log_z(trained, toy.log_z())
    trained.train()
    # the prompts are always these three: what differs between them is no noise, so these errors are too long
    for name in ("forward_kl", "tv"):
        values, errors = (logged(trained, f"posterior/{name}{end}") for end in ("", "_standard_error"))
        assert 0 < max(errors) < truth[name]
        for value, error in zip(values, errors, strict=True):
            assert abs(value - truth[name]) < 3 * error, (name, value, truth[name], error)
    assert logged(trained, "posterior/log_z") == pytest.approx([truth["log_z"]] * 2, abs=1e-5)
    # E_π by completions of q, weighed by π/q: the terms' spread by enumeration
    with torch.no_grad():
        log_policy, log_prior = toy.log_probs(policy), toy.log_prior
    log_proposal = log_policy if proposal == "policy" else log_prior
    terms = {"elbo": toy.log_likelihood - (log_policy - log_prior), "kl_to_prior": log_policy - log_prior}
    terms["gap"] = toy.log_z()[:, None] - terms["elbo"]
    truth["kl_to_prior"] = (log_policy.exp() * terms["kl_to_prior"]).sum(-1).mean().item()
    for name, term in terms.items():
        centred = (log_policy - log_proposal).exp() * (term - truth[name])
        se = (log_proposal.exp() * centred**2).sum(-1).mean().sqrt().item() / 1536**0.5
        assert logged(trained, f"posterior/{name}") == pytest.approx([truth[name]] * 2, abs=5 * se), name
        if proposal == "prior" and name != "kl_to_prior":  # and the means of what was drawn are others
            assert abs((log_prior.exp() * term).sum(-1).mean().item() - truth[name]) > 5 * se
    gap, error = (logged(trained, f"posterior/gap{end}")[0] for end in ("", "_standard_error"))
    assert abs(gap - truth["gap"]) < 3 * error
    assert ("posterior/importance_ess" in trained.state.log_history[0]) == (proposal == "policy")


def test_target_metrics_by_enumeration(toy):
    """Every completion once, with its probability under q as its share: here q is uniform over the 40."""
    policy = toy.random_policy(noise=0.05, seed=2)
    log_target, log_policy = toy.log_posterior(), toy.log_probs(policy).detach()
    uniform = torch.full_like(log_policy, -math.log(len(toy.completion_ids)))
    keys = torch.tensor([7, -3, 7_000_000_000])[:, None].expand_as(log_policy)
    metrics = target_metrics(*(x.flatten() for x in (log_target, log_policy, uniform, keys)))
    truth = exact(toy, policy)
    assert metrics["posterior/forward_kl"] == pytest.approx(truth["forward_kl"], rel=1e-4)
    assert metrics["posterior/tv"] == pytest.approx(truth["tv"], rel=1e-4)
    by_prompt = toy.forward_kl(policy).detach()
    assert metrics["posterior/forward_kl_standard_error"] == pytest.approx(by_prompt.std().item() / 3**0.5, rel=1e-3)
    assert metrics["posterior/max_weight"] == pytest.approx((log_target.exp() / 3).max().item(), rel=1e-4)
    assert metrics["posterior/khat"] == pytest.approx(khat((log_target - uniform).flatten()).item())


def test_target_metrics_by_hand():
    log_target = torch.tensor([math.log(2.0), -math.inf, torch.nan])
    metrics = target_metrics(log_target, torch.zeros(3), torch.zeros(3), torch.tensor([1, 1, 1]))
    # g(t) = t·log t − t + 1 at 2 and 0; the third is left out
    terms = [2 * math.log(2) - 1, 1.0]
    assert metrics["posterior/forward_kl"] == pytest.approx(sum(terms) / 2)
    assert metrics["posterior/forward_kl_standard_error"] == pytest.approx(abs(terms[0] - terms[1]) / 2)
    assert metrics["posterior/tv"] == pytest.approx(0.5)
    assert metrics["posterior/max_weight"] == 1.0
    assert "posterior/khat" not in metrics  # two draws say nothing
    assert target_metrics(torch.full((2,), torch.nan), torch.zeros(2), torch.zeros(2), torch.tensor([1, 2])) == {}
    only_forbidden = torch.full((2,), -math.inf)
    assert "posterior/max_weight" not in target_metrics(only_forbidden, *torch.zeros(2, 2), torch.tensor([1, 2]))


def test_satisfaction_by_hand():
    evidence = torch.tensor([0.0, -math.inf, torch.nan, 2.0])
    assert satisfaction(evidence) == pytest.approx(2 / 3)
    assert satisfaction(evidence, torch.tensor([0.5, 2.0, 9.0, 1.0])) == pytest.approx(1.5 / 3.5)
    assert satisfaction(torch.tensor([torch.nan])) == 1.0


def test_names_are_those_of_ppo(toy, tmp_path):
    runs = [trainer(toy, configure(tmp_path)) for configure in (config, gdc_config)]
    for trained in runs:
        trained.train()
    ppo, gdc = (set(trained.state.log_history[0]) for trained in runs)
    for name in ppo:
        assert name in gdc or name.startswith(("ppo/", "clip_ratio/")), name
    new = {"forward_kl", "forward_kl_standard_error", "tv", "tv_standard_error", "max_weight", "skipped_prompts"}
    steps = {"gdc/step_ess", "gdc/skipped_steps", "gdc/ratio_ess", "gdc/beta"}
    assert {"posterior/gap", "posterior/gap_standard_error"} <= ppo
    assert gdc - ppo <= {f"posterior/{name}" for name in (*new, "khat")} | steps
    assert {f"posterior/{name}" for name in new} | steps <= gdc
    assert runs[1].state.log_history[0]["gdc/beta"] == 0.5


@pytest.mark.parametrize("proposal", ["policy", "prior"])
def test_satisfaction_and_moments(toy, tmp_path, proposal):
    """Those of the policy, whatever draws."""
    policy = toy.random_policy(noise=0.02, seed=3)
    likelihood = ProductLikelihood([Constraint(no_a), MomentLikelihood({"ends": ends}, {"ends": -1.0})])
    args = gdc_config(tmp_path, beta=None, proposal=proposal, **BIG)
    trained = trainer(toy, args, policy, likelihood=likelihood, ref_model=toy.random_policy(0.0))
    trained.train()
    p = toy.log_probs(policy).exp().detach()
    ratio = torch.ones_like(p) if proposal == "policy" else p / toy.log_prior.exp()
    for name, feature in (("satisfaction", no_a), ("moments/no_a", no_a), ("moments/ends", ends)):
        values = torch.tensor(feature(toy.completion_ids)).float()
        mean = (p * values).sum(-1).mean().item()
        assert abs(mean - (toy.log_prior.exp() * values).sum(-1).mean()) > 0.02
        se = (p / ratio * (ratio * (values - mean)) ** 2).sum(-1).mean().sqrt().item() / 1536**0.5
        assert logged(trained, f"posterior/{name}") == pytest.approx([mean] * 2, abs=5 * se)
    assert "posterior/elbo" not in trained.state.log_history[0]  # it is −∞


def test_prompts_that_no_completion_satisfies_are_skipped_and_counted(toy, tmp_path):
    def never_for_b(prompts, completion_ids, **kwargs):
        return [prompt != toy.prompts[1] for prompt in prompts]

    trained = trainer(toy, gdc_config(tmp_path, beta=None, max_steps=2), likelihood=Constraint(never_for_b))
    before = weights(trained.model)
    trained.train()
    assert logged(trained, "posterior/skipped_prompts") == pytest.approx([1 / 3] * 2)
    assert logged(trained, "posterior/log_z") == pytest.approx([0.0] * 2)
    # the others are at their posterior, the prior, and stay
    assert largest_change(before, weights(trained.model)) < 1e-5
    nothing = trainer(toy, gdc_config(tmp_path, beta=None), likelihood=Constraint(lambda prompts, **kwargs: [0] * 24))
    nothing.train()
    assert largest_change(before, weights(nothing.model)) == 0
    assert logged(nothing, "posterior/skipped_prompts") == [1.0]
    assert math.isfinite(nothing.state.log_history[0]["loss"])


@pytest.mark.parametrize(
    "options", [{"divergence": name} for name in ("forward_kl", "reverse_kl", "js", "tv", "log_variance")] + [ALPHA]
)
def test_the_loss_of_an_evaluation_is_the_divergence(toy, tmp_path, options):
    policy = toy.random_policy(noise=0.05, seed=2)
    args = gdc_config(tmp_path, per_device_eval_batch_size=1536, num_generations_eval=512, **options)
    trained = trainer(toy, args, policy, ref_model=toy.random_policy(0.0), eval_dataset=prompts_of(toy, 2))
    keep_log_z(trained, toy.log_z())
    before = weights(trained.model)
    metrics = trained.evaluate()
    log_policy, log_target = toy.log_probs(policy).detach(), toy.log_posterior()
    if options["divergence"] == "log_variance":
        difference = log_policy - toy.log_prior - toy.log_likelihood
        centred = difference - (log_policy.exp() * difference).sum(-1, keepdim=True)
        terms = 0.5 * centred**2
        expected = (log_policy.exp() * terms).sum(-1)
    else:
        expected = f_divergence(log_target, log_policy, **options)
        t = (log_target - log_policy).exp()
        # each draw's term has at most the spread of p/π and of its logarithm
        terms = (t - 1).abs() + (log_target - log_policy).abs()
    variance = (log_policy.exp() * terms**2).sum(-1) - (log_policy.exp() * terms).sum(-1) ** 2
    se = (variance.sum() / 1024).sqrt().item() / 3
    assert metrics["eval_loss"] == pytest.approx(expected.mean().item(), abs=5 * se)
    assert 5 * se < 2 * expected.mean()
    assert largest_change(before, weights(trained.model)) == 0


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "log_variance"])
def test_the_loss_of_an_evaluation_does_not_depend_on_its_batches(toy, tmp_path, divergence):
    """Nor on the completions that have no reward."""
    losses = []
    for rows in (24, 8):

        def reward(prompts, completions, completion_ids, **kwargs):
            rewards = toy_reward(prompts, completions, completion_ids)
            return [r if len(ids) < 3 else None for r, ids in zip(rewards, completion_ids, strict=True)]

        args = gdc_config(tmp_path, divergence=divergence, per_device_eval_batch_size=rows)
        policy = toy.random_policy(noise=0.05, seed=2)
        arguments = {"ref_model": toy.random_policy(0.0), "eval_dataset": prompts_of(toy)}
        trained = trainer(toy, args, policy, reward, **arguments)
        keep_log_z(trained, toy.log_z())
        torch.manual_seed(0)
        losses.append(trained.evaluate()["eval_loss"])
        batch = trained.batches[0]
        if divergence != "log_variance" and rows == 24:
            s = batch["log_prior"] + batch["log_likelihood"] - batch["log_z"] - batch["log_policy"]
            s = s[~s.isnan()]
            terms = s.exp() * s - s.exp() + 1 if divergence == "forward_kl" else s.exp() - 1 - s
            assert losses[0] == pytest.approx(terms.mean().item(), rel=1e-4)


def test_one_completion_a_prompt_in_an_evaluation(toy, tmp_path):
    args = gdc_config(tmp_path, divergence="reverse_kl", num_generations_eval=1)
    trained = trainer(toy, args, eval_dataset=prompts_of(toy, 8))
    assert math.isfinite(trained.evaluate()["eval_loss"])


def test_an_evaluation_leaves_everything_as_it_was(toy, tmp_path):
    changes = {"replay_batches": 3, "proposal": "adaptive", "max_steps": 2, "beta_init": 2.0}
    trained = trainer(toy, gdc_config(tmp_path, **changes), eval_dataset=prompts_of(toy, 2))
    trained.train()
    states = []
    for _ in range(2):
        pool = trained.objective.target.normalizers.state_dict()
        states.append(
            (
                pool["pool"],
                len(pool["recent"]),
                pool["power"],
                [rollout.prompt_keys.tolist() for rollout in trained.objective.replay.rollouts],
                trained.objective.replay.generator.get_state().tolist(),
                trained.objective.comparison.sums.tolist(),
                {name: weight.sum().item() for name, weight in trained.proposal.weights.items()},
            )
        )
        trained.evaluate()
    assert states[0] == states[1]
    # and its completions are the policy's own
    evaluated = trained.rollouts[-1]
    assert torch.equal(evaluated.log_proposal, evaluated.token_log_probs.sum(-1))
