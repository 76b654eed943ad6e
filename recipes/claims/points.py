r"""When a point is what you want: β annealed to 0, small local steps, and diversity in the reward of a group.

Claims of the discussion under the post of arXiv 2205.11275, whose section 2 they discuss: a single best completion is
at times all that is wanted, and then β may go to 0 on purpose; RL without a KL term that takes small local steps stays
close to the prior for a while (Hilton); diversity can be asked for in the reward of a group of samples (Christiano).

Here each is computed on enumerated completions. β is annealed to 0 by exact gradients. Sampled policy gradients
without a KL term take small steps, and their distance to the nearest of the posteriors exp(r/β) over all β is
followed. A policy that maximises the mean reward of ten samples plus a bonus for distinct ones is compared with the
posterior of the same mean reward: how good is the best of ten by a reward that both do not know, the known one plus
noise?

    python recipes/claims/points.py
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from claim import Claim, panels
from enumerated import kl_rl_loss, loop, new_toy
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from rlhf_bayes.numerics import reverse_kl

TEN = 10


def ascend(objective: Callable[[Tensor], Tensor], start: Tensor, steps: int, rate: float = 0.1) -> Tensor:
    """Exact gradient ascent over all distributions; returns normalised log-probabilities."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        (-objective(logits.log_softmax(-1))).backward()
        optimizer.step()
    return logits.detach().log_softmax(-1)


def annealed(steps: int) -> dict[str, list[float]]:
    """β from 0.5 to 0, 100 gradient steps at each: entropy, and KL to the posterior of the current β."""
    toy = new_toy()
    prior, rewards = toy.log_prior.double().log_softmax(-1), toy.rewards.double()
    log_policy, found = prior, {"beta": [], "entropy": [], "distance": [], "mass": []}
    for index in range(steps + 1):
        beta = 0.5 * (1 - index / steps)
        log_policy = ascend(lambda q, b=beta: (q.exp() * (rewards - b * (q - prior))).sum(), log_policy, 100)
        found["beta"].append(beta)
        found["entropy"].append(-(log_policy.exp() * log_policy).sum(-1).mean().item())
        found["mass"].append(log_policy.max(-1).values.exp().mean().item())
        target = (prior + rewards / beta).log_softmax(-1) if beta else log_policy
        found["distance"].append(reverse_kl(target, log_policy).mean().item())
    return found


def nearest(log_policy: Tensor, prior: Tensor, rewards: Tensor) -> float:
    """The least KL(π‖π*) over all β of the posterior, nats, mean over prompts."""

    def distance(log_t: float) -> float:
        return reverse_kl((prior + rewards * math.exp(log_t)).log_softmax(-1), log_policy).mean().item()

    return float(minimize_scalar(distance, bounds=(-6.0, 6.0), method="bounded").fun)


def local_steps(seed: int, steps: int, learning_rate: float) -> list[dict[str, Any]]:
    """Policy gradients without a KL term, on samples: distance to the nearest posterior, and to the prior."""
    toy = new_toy()
    prior, rewards = toy.log_prior.double().log_softmax(-1), toy.rewards.double()
    watch = lambda q: {"nearest": nearest(q.double().log_softmax(-1), prior, rewards)}  # noqa: E731
    return loop(toy, kl_rl_loss(toy, 0.0), seed, steps, learning_rate, points=50, observe=watch)["points"]


def natural_steps(steps: int) -> float:
    """The same with exact natural gradients, log π ← log π + rate·r: largest distance to the nearest posterior."""
    toy = new_toy()
    prior, rewards = toy.log_prior.double().log_softmax(-1), toy.rewards.double()
    log_policy, largest = prior, 0.0
    for _ in range(steps):
        log_policy = (log_policy + 0.05 * rewards).log_softmax(-1)
        largest = max(largest, nearest(log_policy, prior, rewards))
    return largest


def best_of_ten(log_policy: Tensor, scores: Tensor) -> float:
    """E of the largest score among ten draws of a policy (P, N), mean over prompts."""
    order = scores.argsort(-1)
    below = log_policy.exp().gather(1, order).cumsum(-1).clamp(max=1)
    chances = torch.diff(below**TEN, prepend=torch.zeros_like(below[:, :1]))
    return (chances * scores.gather(1, order)).sum(-1).mean().item()


def group(beta: float, noise: float, steps: int, worlds: int) -> dict[str, Any]:
    """A group's reward with a bonus for distinct samples, and the posterior of the same mean reward."""
    toy = new_toy()
    prior, rewards = toy.log_prior.double().log_softmax(-1), toy.rewards.double()
    posterior = (prior + rewards / beta).log_softmax(-1)
    wanted = (posterior.exp() * rewards).sum(-1).mean().item()

    def policy(bonus: float) -> Tensor:
        def objective(q: Tensor) -> Tensor:
            distinct = (1 - (1 - q.exp()) ** TEN).sum(-1) / TEN  # expected share of distinct ones among ten
            return ((q.exp() * rewards).sum(-1) + bonus * distinct).sum()

        return ascend(objective, prior, steps)

    def excess(bonus: float) -> float:
        return (policy(bonus).exp() * rewards).sum(-1).mean().item() - wanted

    diverse = policy(brentq(excess, 0.01, 30.0, xtol=0.02))
    generator = torch.Generator().manual_seed(0)
    scores = [rewards + noise * rewards.std() * torch.randn(rewards.shape, generator=generator) for _ in range(worlds)]
    policies = {"prior": prior, "posterior": posterior, "group": diverse}
    return {
        "best": {name: [best_of_ten(q, score) for score in scores] for name, q in policies.items()},
        "kl": {name: reverse_kl(prior, q).mean().item() for name, q in policies.items()},
    }


def main() -> None:
    claim = Claim(__file__, __doc__, trains=False, seeds=3, steps=300, exact_steps=400, worlds=200)
    seeds = list(claim.seeds)
    cooled = claim.cell(annealed, steps=40)
    local = [claim.cell(local_steps, seed=seed, steps=claim.args.steps, learning_rate=1e-4) for seed in seeds]
    groups = claim.cell(group, beta=0.5, noise=1.0, steps=claim.args.exact_steps, worlds=claim.args.worlds)

    claim.state("β annealed to 0 ends at a point: mass of the likeliest completion", cooled["mass"][-1], low=0.95)
    farthest = max(d for d, beta in zip(cooled["distance"], cooled["beta"], strict=True) if beta >= 0.1)
    text = "on the way it stays at the posterior of its β: largest KL(π‖π*), down to β = 0.1"
    claim.state(text, farthest, high=0.05, unit="nats")
    text = "natural gradients without a KL term stay among the posteriors: largest distance"
    claim.state(text, claim.cell(natural_steps, steps=100), high=1e-6, unit="nats")
    early = [next((p for p in points if p["kl_to_prior"] > 0.2), points[-1]) for points in local]
    text = "small local steps stay near some posterior at first: distance to the nearest over KL(π‖π0), at 0.2 nats"
    claim.state(text, [p["nearest"] / p["kl_to_prior"] for p in early], high=0.5)
    text = "and go on so: largest distance to the nearest posterior"
    claim.state(text, [max(p["nearest"] for p in points) for points in local], high=0.1, unit="nats")
    prior, posterior, diverse = groups["best"].values()
    gains = [(c - b) / (b - a) for a, b, c in zip(prior, posterior, diverse, strict=True)]
    text = (
        "diversity in a group's reward does what the posterior does: best of ten, difference over the posterior's gain"
    )
    claim.state(text, gains, low=-0.2, high=0.2)
    text = "it is further from the prior at the same mean reward: difference in KL"
    claim.state(text, groups["kl"]["group"] - groups["kl"]["posterior"], low=0, unit="nats")

    figure, (cooling, steps, best) = panels(3)
    cooling.plot(cooled["beta"], cooled["entropy"], label="entropy, nats")
    cooling.plot(cooled["beta"], cooled["distance"], label="KL to the posterior of that β")
    cooling.set(xlabel="β", title="β annealed to 0")
    cooling.invert_xaxis()
    for points in local:
        steps.plot([p["kl_to_prior"] for p in points], [p["nearest"] for p in points], ".-", color="C0")
    top = max(points[-1]["kl_to_prior"] for points in local)
    steps.plot([0, top], [0, top], color="0.5", linestyle="--", label="as far as the prior")
    steps.set(xlabel="KL(π‖π0), nats", ylabel="KL to the nearest posterior", title="No KL term, small steps")
    for index, values in enumerate(groups["best"].values()):
        best.plot([index] * len(values), values, ".", color=f"C{index}")
    best.set_xticks(range(3), ["prior", "posterior", "group's reward"])
    best.set(title="Best of ten by a reward with unknown noise")
    for panel in (cooling, steps):
        panel.legend(frameon=False, fontsize=7)
    caption = "β annealed; local steps without a KL term; diversity in a group's reward."
    rows = [
        {"part": "local steps", "seed": s, **{k: p[k] for k in ("step", "kl_to_prior", "nearest")}}
        for s, ps in enumerate(local)
        for p in ps
    ]
    claim.write(figure, rows, caption)


if __name__ == "__main__":
    main()
