r"""A posterior for each prompt needs a normaliser for each prompt.

Claim (Korbak, Elsahar, Kruszewski & Dymetman 2022, arXiv 2112.00791, sections 2 and 3, which section 5 of arXiv
2205.11275 builds on): where prompts have very different Z(c), distributional policy gradients with one Z for all
prompts weigh each prompt by Z(c), so those with a small Z are hardly learnt; with a Z for each prompt all are.

Here the rewards of three prompts differ by a constant each, which changes Z but no posterior. The loss with one Z is
Σ_c (Z(c)/Z̄)·KL(π*‖π), in place of Σ_c KL(π*‖π). Its optimum is found by exact gradients, once over all
distributions, and once in a small family, one tilt that all prompts share. Then a neural policy is trained on samples
with either, by the same loop, with the exact Z, so that nothing else differs.

    python recipes/claims/conditional.py
"""

from typing import Any

import torch
from claim import Claim, panels
from enumerated import loop, new_toy
from torch import Tensor

from rlhf_bayes.numerics import forward_kl

OFFSETS = (-4.0, 0.0, 4.0)  # nats added to the evidence of each prompt
KINDS = ("one Z for all", "a Z for each prompt")


def weights_of(kind: str, log_z: Tensor) -> Tensor:
    """Z(c) over the Z that the method divides by: (P,)."""
    log_z = log_z + torch.tensor(OFFSETS).double()
    return (log_z - log_z.logsumexp(0)).exp() * len(log_z) if kind == KINDS[0] else torch.ones(len(log_z)).double()


def exact_optimum(kind: str, shared: bool, steps: int) -> list[float]:
    """KL(π*‖π) of each prompt at the optimum, over all distributions or over one tilt that prompts share."""
    toy = new_toy()
    prior, target = toy.log_prior.double().log_softmax(-1), toy.log_posterior().double().log_softmax(-1)
    weights = weights_of(kind, toy.log_z().double())
    tilt = torch.zeros(1 if shared else len(prior), prior.size(1), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([tilt], 0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        optimizer.zero_grad()
        (weights * forward_kl(target, (prior + tilt).log_softmax(-1))).sum().backward()
        optimizer.step()
    return forward_kl(target, (prior + tilt.detach()).log_softmax(-1)).tolist()


def training(kind: str, seed: int, steps: int) -> dict[str, Any]:
    """Distributional policy gradients with the forward KL on samples; KL(π*‖π) of each prompt at the end."""
    toy = new_toy()
    target, weights = toy.log_posterior(), weights_of(kind, toy.log_z().double()).float()
    policy = toy.random_policy(noise=0.0)

    def loss(log_policy: Tensor, drawn: Tensor) -> Tensor:
        ratio = weights[:, None] * (target.gather(1, drawn) - log_policy.detach()).exp()  # P/(Z·π), (P, n)
        n = ratio.size(1)
        baseline = (ratio.sum(-1, keepdim=True) - ratio) / (n - 1)
        return -((ratio - baseline) * log_policy).mean()

    loop(toy, loss, seed, steps, points=1, policy=policy)
    with torch.no_grad():
        return {"end": forward_kl(target, toy.log_probs(policy).log_softmax(-1)).tolist()}


def main() -> None:
    claim = Claim(__file__, __doc__, trains=False, seeds=5, steps=200, exact_steps=3000)
    toy = new_toy()
    log_z = (toy.log_z() + torch.tensor(OFFSETS)).tolist()
    before = forward_kl(toy.log_posterior(), toy.log_prior.log_softmax(-1)).tolist()
    order = sorted(range(len(log_z)), key=log_z.__getitem__)
    lowest = order[0]
    exact = {
        (kind, shared): claim.cell(exact_optimum, kind=kind, shared=shared, steps=claim.args.exact_steps)
        for kind in KINDS
        for shared in (False, True)
    }
    trained = {
        kind: [claim.cell(training, kind=kind, seed=seed, steps=claim.args.steps)["end"] for seed in claim.seeds]
        for kind in KINDS
    }

    for kind in KINDS:
        text = f"exactly, {kind}: over all distributions the optimum is the posterior: largest KL(π*‖π)"
        claim.state(text, max(exact[kind, False]), high=1e-4, unit="nats")
    one, each = (exact[kind, True] for kind in KINDS)
    text = "exactly, in a small family one Z leaves the prompt with the lowest Z further away"
    claim.state(text, one[lowest] - each[lowest], low=0, unit="nats")
    text = "… and is worse on the mean over prompts"
    claim.state(text, sum(one) / len(one) - sum(each) / len(each), low=0, unit="nats")
    one_run, each_run = (trained[kind] for kind in KINDS)
    shares = {kind: [run[lowest] / before[lowest] for run in trained[kind]] for kind in KINDS}
    claim.state(
        "trained with one Z, the prompt with the lowest Z is not learnt: KL(π*‖π) over the prior's",
        shares[KINDS[0]],
        low=0.5,
    )
    claim.state("trained with a Z for each prompt, it is", shares[KINDS[1]], high=0.5)
    differences = [(sum(a) - sum(b)) / len(a) for a, b in zip(one_run, each_run, strict=True)]
    claim.state("one Z is worse on the mean over prompts after training", differences, low=0, unit="nats")

    rows = []
    for kind in KINDS:
        for index in order:
            values = {f"seed {seed}": run[index] for seed, run in enumerate(trained[kind])}
            known = {
                "before": before[index],
                "all": exact[kind, False][index],
                "small family": exact[kind, True][index],
            }
            rows.append({"normaliser": kind, "log Z": log_z[index], **known, **values})
    figure, axes = panels(2)
    for offset, kind in zip((-0.2, 0.2), KINDS, strict=True):
        places = [place + offset for place in range(len(order))]
        axes[0].bar(places, [exact[kind, True][index] for index in order], width=0.35, label=kind)
        runs = [[run[index] for run in trained[kind]] for index in order]
        axes[1].bar(places, [sum(values) / len(values) for values in runs], width=0.35, label=kind)
        for place, values in zip(places, runs, strict=True):
            axes[1].plot([place] * len(values), values, ".", color="0.2")
    for panel, title in zip(axes, ("Optimum in a small family", "After training on samples"), strict=True):
        panel.plot(
            range(len(order)), [before[index] for index in order], "_", color="0.2", markersize=30, label="prior"
        )
        panel.set_xticks(range(len(order)), [f"log Z = {log_z[index]:.1f}" for index in order])
        panel.set(title=title, ylabel="KL(π*‖π), nats")
    axes[0].legend(frameon=False, fontsize=8, markerscale=0.5)
    caption = "KL from the posterior of each prompt, with one normaliser for all prompts and with one for each."
    claim.write(figure, rows, caption)


if __name__ == "__main__":
    main()
