r"""A posterior can be prototyped before anything is trained: draws of the prior predict what training reaches.

Claim (arXiv 2205.11275, section 4): since modelling and inference are separate, a posterior can be sampled by
decoding, to see whether it is wanted, before it is distilled into a policy.

Here β is chosen from draws of the prior alone: the largest one whose posterior satisfies the wish, a reward above a
threshold, in a given share of completions. Importance sampling, rejection sampling and SMC predict the reward, the KL
to the prior and the satisfied share at that β. Then PPO and the log-variance loss are trained towards it, with several
seeds, and what they reach is set beside what was predicted. The reward must lie within ±`--bound`, which bounds the
weights.

    python recipes/claims/prototype.py
    python recipes/claims/prototype.py --model_name_or_path ../shared/models/stories260K --dataset_name prompts.jsonl \
        --reward rlhf_bayes.toy.rewards:vader_reward --max_completion_length 32 --learning_rate 5e-5 --steps 200
"""

import math
from typing import Any

import torch
from claim import Claim, panels
from matplotlib.ticker import NullLocator
from training import SATISFIED, SENTIMENT, last, prior_of, prompts_of, reward_of, train

from rlhf_bayes.numerics.verdicts import Measured, measured
from rlhf_bayes.numerics.what_if import what_if
from rlhf_bayes.samplers import SMC, PrefixValue, RejectionSampler, expectation

BETAS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.125)
METHODS = ("ppo", "log-variance")
QUANTITIES = {"reward": "reward", "satisfied": "satisfied share", "kl_to_prior": "KL to the prior, nats"}


def by_importance(reward: str, draws: int, model: dict[str, Any]) -> list[dict[str, Any]]:
    """The posterior of each β from one set of draws of the prior, with standard errors; only what can be trusted."""
    prompts = prompts_of(model)
    drawn = prior_of(model).sample(prompts, draws, torch.Generator().manual_seed(77))
    values = reward_of(reward)(prompts=drawn.prompts, completions=drawn.texts, completion_ids=drawn.completion_ids)
    rewards = torch.tensor(values, dtype=torch.float64).view(len(prompts), draws)
    rows = []
    for row in what_if(rewards, BETAS):
        weights = (rewards / row.beta).softmax(-1)  # (P, n)
        satisfied = (weights * (rewards > SATISFIED)).sum(-1, keepdim=True)
        error = (weights * ((rewards > SATISFIED).double() - satisfied)).square().sum().sqrt() / len(prompts)
        found = {
            name: [getattr(row, name), getattr(row, f"{name}_standard_error")] for name in ("reward", "kl_to_prior")
        }
        found["satisfied"] = [satisfied.mean().item(), error.item()]
        rows.append({"beta": row.beta, "trustworthy": row.trustworthy, **found})
    return rows


def by_sampler(
    sampler: str, reward: str, beta: float, draws: int, bound: float, model: dict[str, Any]
) -> dict[str, Any]:
    """Reward and satisfied share under the posterior by another sampler, with standard errors."""
    posterior = prior_of(model).tilt(reward_of(reward), beta, reward_clip_range=(-bound, bound))
    prior = posterior.prior
    samplers = {"rejection": RejectionSampler(), "SMC": SMC(PrefixValue(posterior.likelihood, prior.tokenizer))}
    drawn = samplers[sampler].sample(posterior, prompts_of(model), draws, torch.Generator().manual_seed(78))
    values = reward_of(reward)(prompts=drawn.prompts, completions=drawn.texts, completion_ids=drawn.completion_ids)
    found = {}
    for name, numbers in {"reward": values, "satisfied": [float(value > SATISFIED) for value in values]}.items():
        mean, error = expectation(drawn, numbers)
        found[name] = [mean.mean().item(), error.square().sum().sqrt().item() / len(mean)]
    return found


def main() -> None:
    claim = Claim(
        __file__, __doc__, trains=True, reward=SENTIMENT,  wish=0.7, seeds=5, steps=30, prior_draws=512,
        sampler_draws=64, tolerance=0.1, bound=1.0, draws=48,
    )  # fmt: skip
    args = claim.args
    predictions = claim.cell(by_importance, reward=args.reward, draws=args.prior_draws, model=claim.model)
    able = [row for row in predictions if row["trustworthy"] and row["satisfied"][0] >= args.wish]
    if not able:
        raise ValueError(
            f"`--wish` must be a share that a posterior reaches, got {args.wish}: none that draws can tell does."
        )
    chosen = able[0]  # the largest β
    beta = chosen["beta"]
    claim.console.print(f"  chosen: β = {beta:g}, predicted satisfied share {chosen['satisfied'][0]:.2f}")
    checks = {
        name: claim.cell(
            by_sampler, sampler=name, reward=args.reward, beta=beta, draws=args.sampler_draws,
            bound=args.bound, model=claim.model,
        )
        for name in ("rejection", "SMC")
    }  # fmt: skip
    common = {"reward": args.reward, "beta": beta, "steps": args.steps, "model": claim.model, "points": 2}
    runs = claim.runs(train, {method: {"method": method} for method in METHODS}, **common)

    def difference(other: list[float] | Measured, quantity: str) -> Measured:
        """What another way gives, minus what was predicted."""
        mean, error = chosen[quantity]
        found = other if isinstance(other, Measured) else measured(other)
        return found._replace(mean=found.mean - mean, standard_error=math.hypot(found.standard_error, error))

    for name, found in checks.items():
        for quantity, (mean, error) in found.items():
            text = f"{name} predicts the same {QUANTITIES[quantity]} as importance sampling: difference"
            claim.state(text, difference(Measured(mean, error), quantity), low=-args.tolerance, high=args.tolerance)
    for method, of in runs.items():
        for quantity in ("reward", "satisfied"):
            text = f"{method} reaches the predicted {QUANTITIES[quantity]}: reached minus predicted"
            claim.state(text, difference(last(of, quantity), quantity), low=-args.tolerance, high=args.tolerance)
        text = f"{method} needs the predicted KL to the prior: reached minus predicted, over the prediction"
        number = difference(last(of, "kl_to_prior"), "kl_to_prior")
        whole = chosen["kl_to_prior"][0]
        number = number._replace(mean=number.mean / whole, standard_error=number.standard_error / whole)
        claim.state(text, number, low=-0.25, high=0.25)

    ways = {
        "importance": chosen,
        **checks,
        **{method: {q: [*measured(last(of, q))[:2]] for q in QUANTITIES} for method, of in runs.items()},
    }
    rows = [
        {"by": way, "beta": beta}
        | {
            name: value
            for q in QUANTITIES
            for name, value in zip((q, f"{q} error"), found.get(q, (None, None)), strict=True)
        }
        for way, found in ways.items()
    ]
    figure, axes = panels(3)
    trusted = [row for row in predictions if row["trustworthy"]]
    for panel, (quantity, title) in zip(axes, QUANTITIES.items(), strict=True):
        means, errors = zip(*(row[quantity] for row in trusted), strict=True)
        panel.errorbar(
            [row["beta"] for row in trusted],
            means,
            errors,
            color="0.2",
            marker="o",
            markersize=3,
            label="predicted from the prior",
        )
        for index, (way, found) in enumerate(list(ways.items())[1:]):
            if quantity in found:
                panel.errorbar(
                    [beta * (1 + 0.04 * (index - 1.5))],
                    *([number] for number in found[quantity]),
                    fmt="D",
                    color=f"C{index}",
                    label=way,
                )
        panel.set(xscale="log", xlabel="β", title=title)
        panel.set_xticks([row["beta"] for row in trusted], [f"{row['beta']:g}" for row in trusted], fontsize=8)
        panel.xaxis.set_minor_locator(NullLocator())
    axes[0].legend(frameon=False, fontsize=7)  # KL has no marks of the samplers
    caption = "Line: posteriors of all β, predicted from draws of the prior. Marks: other samplers, and trainings."
    claim.write(figure, rows, caption, {method: of[0]["texts"][:5] for method, of in runs.items()})


if __name__ == "__main__":
    main()
