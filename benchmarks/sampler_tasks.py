"""Posteriors whose E[r] and log Z are known, exactly or closely, and the samplers that `samplers.py` compares."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from scipy.stats import norm
from torch import Tensor, nn

from rlhf_bayes import LanguageModel, Posterior, cli
from rlhf_bayes.lm import score_completions
from rlhf_bayes.lm.language_model import pad_ids
from rlhf_bayes.samplers import (
    SMC,
    BestOfN,
    Draws,
    EnumeratedValue,
    GradientGuidedProposal,
    GuidedProposal,
    ImportanceSampler,
    MetropolisHastings,
    PrefixValue,
    RejectionSampler,
    Sampler,
    Value,
    expectation,
)
from rlhf_bayes.samplers.all_samplers import SAMPLERS
from rlhf_bayes.testing import EnumerableLM, toy_reward

BEST_OF = 8
CANDIDATES = 8  # number of tokens whose value guided decoding computes at each step
PPLM_STEP_SIZE = 0.3
POLICY_STEPS = 40  # Adam steps on the exact gradient: the policy comes closer to the condition, but not all the way


@dataclass(frozen=True)
class Task:
    """A posterior whose E[r] and log Z are known, exactly or closely."""

    name: str
    posterior: Posterior
    beta: float | None
    prompts: list[str]
    rewards_of: Callable[[Draws], Tensor]
    """Makes the rewards (B,) of draws, whose mean is E[r]."""
    reward: Tensor
    """(P,): E[r] of each prompt."""
    log_z: Tensor
    """(P,), nats: log Z of each prompt."""
    known_to: tuple[float, float] = (0.0, 0.0)
    """Standard errors of these two values, root mean square over prompts."""
    values: dict[str, Value] = field(default_factory=dict)
    """Values that guide decoding and SMC, by name."""
    attribute: Callable[[Tensor], Tensor] | None = None
    """The attribute of PPLM: from hidden states (B, H) to nats (B,)."""
    policy: LanguageModel | None = None
    """The policy of GUARD, trained towards a posterior that is a condition."""


def toy_prior(toy: EnumerableLM, model: nn.Module | None = None) -> LanguageModel:
    return LanguageModel(model or toy.model, toy.tokenizer, toy.max_completion_length, batch_size=1024)


def toy_rewards_of(draws: Draws) -> Tensor:
    return torch.tensor(toy_reward(draws.prompts, draws.completions, draws.completion_ids))


def toy_task() -> Task:
    toy = EnumerableLM()
    prior = toy_prior(toy)
    # clipping to the range of the reward changes nothing, and gives rejection sampling its bound
    bounds = float(toy.rewards.min()), float(toy.rewards.max())
    posterior = prior.tilt(toy_reward, toy.beta, reward_clip_range=bounds)
    soft = EnumeratedValue(toy.prompts, toy.completion_ids, toy.log_prior, toy.log_likelihood)
    return Task(
        "toy",
        posterior,
        toy.beta,
        toy.prompts,
        toy_rewards_of,
        reward=(toy.log_posterior().double().exp() * toy.rewards).sum(-1),
        log_z=toy.log_z().double(),
        values={"prefix reward": PrefixValue(posterior.likelihood, toy.tokenizer), "soft value": soft},
        attribute=linear_attribute(posterior, toy.prompts),
    )


def without_a_or_b(completion_ids: Sequence[Sequence[int]], **columns) -> list[bool]:
    return [not {0, 1} & set(ids) for ids in completion_ids]


def condition_task() -> Task:
    """The toy on condition that its first two words are absent, with a policy trained half-way towards it."""
    toy = EnumerableLM()
    allowed = torch.tensor(without_a_or_b(toy.completion_ids))
    evidence = torch.zeros_like(toy.log_prior).masked_fill(~allowed, -torch.inf)
    model = toy.random_policy(noise=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(POLICY_STEPS):
        optimizer.zero_grad()
        toy.forward_kl(model, evidence).mean().backward()
        optimizer.step()
    return Task(
        "toy, a condition",
        toy_prior(toy).condition(without_a_or_b),
        None,
        toy.prompts,
        toy_rewards_of,
        reward=(toy.log_posterior(evidence).double().exp() * toy.rewards).sum(-1),
        log_z=toy.log_z(evidence).double(),
        policy=toy_prior(toy, model),
    )


def model_task(args: argparse.Namespace) -> Task:
    prior = LanguageModel(args.model, max_completion_length=args.max_completion_length, batch_size=512)
    posterior = prior.tilt(cli.load_reward_func(args.reward), args.beta, reward_clip_range=(-1.0, 1.0))
    generator = torch.Generator().manual_seed(10_000)
    draws = ImportanceSampler().sample(posterior, args.prompts, args.reference, generator)

    def rewards_of(draws: Draws) -> Tensor:
        return args.beta * posterior.log_likelihood(draws.prompts, draws.completions, draws.completion_ids)

    found = expectation(draws, rewards_of(draws))
    return Task(
        Path(args.model).name,
        posterior,
        args.beta,
        args.prompts,
        rewards_of,
        reward=found.mean,
        log_z=draws.log_z.log_z,
        known_to=(root_mean_square(found.standard_error), root_mean_square(log_z_error_bar(draws))),
        values={"prefix reward": PrefixValue(posterior.likelihood, prior.tokenizer)},
        attribute=linear_attribute(posterior, args.prompts),
    )


@torch.no_grad()
def linear_attribute(posterior: Posterior, prompts: Sequence[str], n: int = 128) -> Callable[[Tensor], Tensor]:
    """A forecast of a completion's evidence from the hidden state after a prefix, by ridge regression on n draws."""
    prior = posterior.prior
    drawn = prior.sample(prompts, n, torch.Generator().manual_seed(20_000))
    evidence = posterior.log_likelihood(drawn.prompts, drawn.completions, drawn.completion_ids)  # (B,)
    prompt_ids, prompt_mask = pad_ids(prior.prompt_token_ids(drawn.prompts), "left", prior.device)
    completion_ids, mask = pad_ids(drawn.completion_ids, "right", prior.device)
    batch = prompt_ids, prompt_mask, completion_ids, mask
    hidden = score_completions(prior.model, *batch, hidden_only=True, with_values=False).hidden  # (N, H)
    inputs = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1).double()  # (N, H + 1)
    targets = evidence[:, None].expand_as(mask)[mask].double()  # (N,)
    ridge = torch.eye(inputs.size(1), dtype=torch.float64)
    weights = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ targets).float()
    return lambda states: states @ weights[:-1] + weights[-1]


def methods_of(task: Task) -> dict[str, Callable[[int], Sampler]]:
    """Samplers by name; each is made for n completions per prompt."""
    prior = task.posterior.prior
    methods: dict[str, Callable[[int], Sampler]] = {
        "importance": lambda n: ImportanceSampler(),
        "rejection": lambda n: RejectionSampler(max_draws=100_000),
        "Metropolis–Hastings, suffix": lambda n: MetropolisHastings(num_chains=min(n // 8, 16), thin=2),
        "Metropolis–Hastings, independence": lambda n: MetropolisHastings("independence", num_chains=min(n // 8, 16)),
    }
    if task.policy is None:
        methods["quasi-rejection, TV 0.05"] = lambda n: RejectionSampler(max_tv=0.05, max_draws=100_000)
        methods[f"best of {BEST_OF}"] = lambda n: BestOfN(BEST_OF)
    else:
        policy = task.policy
        methods["importance, from a policy"] = lambda n: ImportanceSampler(policy)
        methods["GUARD, from a policy"] = lambda n: RejectionSampler(policy, log_bound=-torch.inf, quasi=True)
    for name, value in task.values.items():
        methods[f"SMC, {name}"] = lambda n, value=value: SMC(value)
        guided = GuidedProposal(prior, value, num_candidates=CANDIDATES)
        methods[f"importance, guided by {name}"] = lambda n, guided=guided: ImportanceSampler(guided)
    compared = {type(make(8)) for make in methods.values()}
    for name, record in SAMPLERS.items():  # those without settings of their own above
        if task.policy is None and record.sampler not in compared:
            methods[name] = lambda n, record=record: record.make(task.posterior, None, n)
    if task.attribute is not None:
        pplm = GradientGuidedProposal(prior, task.attribute, step_size=PPLM_STEP_SIZE)
        methods["importance, PPLM"] = lambda n: ImportanceSampler(pplm)
    return methods


def log_z_error_bar(draws: Draws) -> Tensor:
    """(P,): standard errors of log Z, from its intervals."""
    assert draws.log_z is not None
    return (draws.log_z.high - draws.log_z.low) / 2 / float(norm.ppf((1 + draws.log_z.confidence) / 2))


def root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
