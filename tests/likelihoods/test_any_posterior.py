"""Any posterior goes into any trainer or sampler: it works, by value against enumeration, or it is refused by name."""

import math

import pytest
import torch

from rlhf_bayes import GDCConfig, LanguageModel, Posterior, PPOConfig
from rlhf_bayes.diagnostics import evaluate
from rlhf_bayes.likelihoods import (
    ClassifierLikelihood,
    Constraint,
    EnsembleLikelihood,
    MomentLikelihood,
    ProductLikelihood,
    RewardLikelihood,
)
from rlhf_bayes.samplers import all_samplers, expectation
from rlhf_bayes.testing import toy_reward

from ..trainers.training import Recorder, config, logged, trainer

LENGTH_NATS = {1: -2.0, 2: 1.5, 3: -1.0}


def begins_elsewhere(completion_ids, **columns):
    return [ids[0] != 0 for ids in completion_ids]


def has_b(completion_ids, **columns):
    return [float(1 in ids) for ids in completion_ids]


class Members:
    """Two reward models: the toy's reward and its negative half, plus 1 for completions with a "b"."""

    num_members = 2

    def member_rewards(self, prompts, completions):
        # members read texts, so the reward must be a function of the text
        lengths = torch.tensor([float(len(str(completion))) for completion in completions])
        return torch.stack([0.4 * lengths, torch.tensor([float("b" in str(c)) for c in completions])])


class Own:
    """A user's likelihood: nats by the number of tokens; `-inf` for two tokens, if it is to forbid."""

    def __init__(self, finite=False, **said):
        self.nats = LENGTH_NATS | ({} if finite else {2: -math.inf})
        self.__dict__.update(said)

    def log_likelihood(self, prompts, completions, completion_ids, columns=None):
        return torch.tensor([self.nats[len(ids)] for ids in completion_ids])


def table(toy, function):
    """(P, N): nats of each completion, by a function of the prompt, the text and the ids."""
    return torch.tensor(
        [
            [function(prompt, text, ids) for text, ids in zip(toy.completions, toy.completion_ids, strict=True)]
            for prompt in toy.prompts
        ]
    )


def classifier_table(toy, model, tokenizer):
    nats = []
    for prompt in toy.prompts:
        with torch.no_grad():
            logits = [model(**tokenizer(prompt + text, return_tensors="pt")).logits[0] for text in toy.completions]
        nats.append(torch.stack(logits).log_softmax(-1)[:, 1])
    return torch.stack(nats)


KINDS = (
    "reward",
    "condition",
    "moments",
    "classifier",
    "ensemble",
    "product",
    "own that says it forbids",
    "own that does not say",
    "own that is finite",
)
FORBIDS = ("condition", "product", "own that says it forbids", "own that does not say")


@pytest.fixture
def evidence(toy, make_classifier, reader_tokenizer):
    """`evidence(kind)`: the likelihood, and its nats (P, N) by another route."""

    def make(kind):
        rewards = toy.rewards / 0.8
        allowed = table(toy, lambda prompt, text, ids: 0.0 if ids[0] != 0 else -math.inf)
        if kind == "classifier":
            model = make_classifier(2)
            with torch.no_grad():
                model.score.weight *= 4.0  # of a stronger opinion
            return ClassifierLikelihood(model, 1, reader_tokenizer), classifier_table(toy, model, reader_tokenizer)
        by_length = {"finite": LENGTH_NATS, "forbids": LENGTH_NATS | {2: -math.inf}}
        return {
            "reward": (RewardLikelihood(toy_reward, 0.8), rewards),
            "condition": (Constraint(begins_elsewhere), allowed),
            "moments": (
                MomentLikelihood({"has_b": has_b}, {"has_b": -2.5}),
                table(toy, lambda prompt, text, ids: -2.5 * (1 in ids)),
            ),
            "ensemble": (
                EnsembleLikelihood(Members(), 0.5, "min", centers=False),
                table(toy, lambda prompt, text, ids: min(0.4 * len(text), float("b" in text)) / 0.5),
            ),
            "product": (
                ProductLikelihood([RewardLikelihood(toy_reward, 0.8), Constraint(begins_elsewhere)], [0.5, 1.0]),
                0.5 * rewards + allowed,
            ),
            "own that says it forbids": (
                Own(forbids=True),
                table(toy, lambda prompt, text, ids: by_length["forbids"][len(ids)]),
            ),
            "own that does not say": (Own(), table(toy, lambda prompt, text, ids: by_length["forbids"][len(ids)])),
            "own that is finite": (
                Own(finite=True, forbids=False),
                table(toy, lambda prompt, text, ids: by_length["finite"][len(ids)]),
            ),
        }[kind]

    return make


TRAINERS = {
    "ppo": (PPOConfig, {}),
    "forward_kl": (GDCConfig, {"divergence": "forward_kl"}),
    "log_variance": (GDCConfig, {"divergence": "log_variance"}),
}


def exact_gradient(toy, nats, objective, names):
    """The gradient of the exact divergence at the prior, one vector."""
    policy = toy.random_policy(noise=0.0)
    # at π = q the log-variance has the gradient of the reverse KL, where all is allowed
    reverse = objective == "ppo" or (objective == "log_variance" and bool(nats.isfinite().all()))
    divergence = toy.reverse_kl(policy, nats) if reverse else toy.forward_kl(policy, nats)
    parameters = dict(policy.named_parameters())
    gradients = torch.autograd.grad(divergence.mean(), [parameters[name] for name in names])
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("objective", TRAINERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_goes_towards_it_or_refuses_it(toy, tmp_path, evidence, kind, objective):
    likelihood, nats = evidence(kind)
    of, options = TRAINERS[objective]
    sizes = {"per_device_train_batch_size": 768, "num_generations": 256, "learning_rate": 0.0}
    args = config(tmp_path, of, **sizes, beta=of.__dataclass_fields__["beta"].default, **options)
    if objective == "ppo" and kind in FORBIDS:
        # before training where it is said, else when the first forbidden completion comes
        said = kind != "own that does not say"
        message = "`likelihood` must not forbid .* PPO" if said else "of Own must be finite with PPO.* `forbids` to"
        with pytest.raises(ValueError, match=message):
            trainer(toy, args, likelihood=likelihood).train()
        return
    recorder = Recorder()
    run = trainer(toy, args, likelihood=likelihood, callbacks=[recorder])
    run.train()
    (gradients,) = recorder.gradients
    names = [name for name, _ in toy.model.named_parameters()]
    found = torch.cat([gradients[name].flatten() for name in names])
    cosine = torch.nn.functional.cosine_similarity(found, exact_gradient(toy, nats, objective, names), dim=0)
    # where something is forbidden, the log-variance only has to lead to the same place
    assert cosine > (0.5 if objective == "log_variance" and kind in FORBIDS else 0.9)
    prior = toy.log_prior.exp()
    if kind not in FORBIDS:
        # the rollout is the prior's: its ELBO is E_π0[nats]
        mean = (prior * nats).sum(-1, keepdim=True)  # (P, 1)
        error = ((prior * (nats - mean).square()).sum() / 256).sqrt().item() / 3
        assert abs(logged(run, "posterior/elbo")[0] - mean.mean().item()) < 4.5 * error
    log_z = toy.log_z(nats)
    relative = (
        2 * (toy.log_prior + nats).logsumexp(-1) - (toy.log_prior + 2 * nats).logsumexp(-1)
    ).exp()  # 1/E[(w/Z)²]
    error = ((1 / relative - 1).sum() / 256).sqrt().item() / 3
    assert abs(logged(run, "posterior/log_z")[0] - log_z.mean().item()) < 4.5 * error + 0.02


def posterior_of(toy, likelihood):
    return Posterior(LanguageModel(toy.model, toy.tokenizer, toy.max_completion_length, batch_size=2000), likelihood)


@pytest.mark.parametrize("name", ["importance", "rejection", "metropolis_hastings", "smc"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sampler_draws_from_it(toy, evidence, kind, name):
    likelihood, nats = evidence(kind)
    posterior = posterior_of(toy, likelihood)
    sampler = all_samplers.SAMPLERS[name].make(posterior, None, 192)
    draws = sampler.sample(posterior, toy.prompts, 192, torch.Generator().manual_seed(0))
    feature = torch.tensor([float(ids[-1] == 1 or 2 in ids) for ids in toy.completion_ids])  # (N,)
    exact = (toy.log_posterior(nats).exp() * feature).sum(-1)  # (P,)
    by_ids = dict(zip(map(tuple, toy.completion_ids), feature.tolist(), strict=True))
    found = expectation(draws, torch.tensor([by_ids[tuple(ids)] for ids in draws.completion_ids]))
    bias = 0.05 if draws.guarantee == "bounded" else 0.0  # the distance that rejection may leave without a bound
    errors = (found.mean - exact).abs()
    assert (found.standard_error < 0.15).all()
    assert (errors < 4.5 * found.standard_error + bias).all(), f"off by {errors.tolist()} of {exact.tolist()}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_is_judged_by_it(toy, evidence, kind):
    likelihood, nats = evidence(kind)
    posterior = posterior_of(toy, likelihood)
    policy = toy.random_policy(seed=3)
    wrapped = LanguageModel(policy, toy.tokenizer, toy.max_completion_length, batch_size=2000)
    judged = evaluate(wrapped, posterior, toy.prompts, 400, torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = {
            "log_z": toy.log_z(nats).mean().item(),
            "forward_kl": toy.forward_kl(policy, nats).mean().item(),
            "elbo": toy.elbo(policy, nats).mean().item(),
        }
    for name, value in exact.items():
        estimate = getattr(judged.policy, name)
        if name == "elbo" and kind in FORBIDS:
            assert estimate.mean == -math.inf
        else:
            assert 0 < estimate.draws_standard_error < 0.2, name
            assert abs(estimate.mean - value) < 4.5 * estimate.draws_standard_error, name
    assert (judged.policy.forbidden.mean > 0) == (kind in FORBIDS)
