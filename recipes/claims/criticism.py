r"""A policy that draws bad samples has the wrong posterior, or has not reached it: the diagnostics tell which.

Claim (arXiv 2205.11275, section 4): to say what one wants, the posterior, and to get at it, inference, are separate
problems, and they fail separately. From its samples alone a bad policy does not show which of the two has failed.

Here policies draw about the same share of bad completions for four reasons. The posterior is wrong: its β is too
large, or its reward does not see some of what is bad. Or inference is not finished: training stopped early, or the
family is too small, since only the weights of the norms are trained. A rule names the cause from what a run without
enumeration knows: KL(π‖π*) of the policy and of the prior, estimated from draws, and whether the ELBO still rises. It
sees neither the true reward nor the posteriors of the other cases. Each seed is another prior. Chance: one in three.

    python recipes/claims/criticism.py
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from claim import Claim, panels
from enumerated import kl_rl_loss, loop, new_toy
from scipy.optimize import brentq
from torch import Tensor

from rlhf_bayes import LanguageModel
from rlhf_bayes.diagnostics import evaluate
from rlhf_bayes.numerics.verdicts import Measured, measured
from rlhf_bayes.testing import EnumerableLM

CAUSES = {
    "β too large": "wrong posterior",
    "reward misses something": "wrong posterior",
    "stopped early": "stopped early",
    "family too small": "family too small",
}
NAMES = ("wrong posterior", "stopped early", "family too small")
REACHED = 0.2  # a policy whose KL(π‖π*) is at most this share of the prior's has reached its posterior
RISING = 0.1  # an ELBO that gained at least this share of what is left, in the last fifth of the training, still rises


def bad_share(log_prob: Tensor, bad: Tensor) -> float:
    """The share of bad completions, mean over prompts."""
    return (log_prob.double().exp() * bad).sum(-1).mean().item()


def case_of(toy: EnumerableLM, cause: str, seed: int) -> tuple[Tensor, float, Tensor, float]:
    """Rewards (P, N) and β to train on; which completions are bad; and the share of bad that all cases aim at."""
    prior, rewards, beta = toy.log_prior.double(), toy.rewards.double(), 0.25
    order = rewards.argsort(-1)
    mass = prior.exp().gather(1, order).cumsum(-1)
    bad = torch.zeros_like(rewards).scatter(1, order, (mass < 0.5).double())  # the worse half of what the prior draws

    def share(rewards: Tensor, beta: float) -> float:
        return bad_share((prior + rewards / beta).log_softmax(-1), bad)

    least = share(rewards, beta)
    wanted = least + 0.4 * (bad_share(prior, bad) - least)
    if cause == "β too large":
        beta = brentq(lambda b: share(rewards, b) - wanted, beta, 20.0)
    if cause == "reward misses something":
        blind = (torch.rand(rewards.shape, generator=torch.Generator().manual_seed(seed)) < 0.5).double() * bad
        best = (prior.exp() * rewards).sum(-1, keepdim=True)

        def missing(level: float) -> Tensor:  # bad completions that it does not see look better than they are
            return rewards + blind * (best + level - rewards)

        rewards = missing(brentq(lambda level: share(missing(level), beta) - wanted, -3.0, 6.0))
    return rewards.float(), beta, bad, wanted


def train_case(cause: str, seed: int, steps: int, draws: int) -> dict[str, Any]:
    """Train for one cause. Returns what the rule may see, and the true share of bad completions."""
    toy = new_toy(100 + seed)
    rewards, beta, bad, wanted = case_of(toy, cause, seed)
    policy = toy.random_policy(noise=0.0)
    if cause == "family too small":
        for name, parameter in policy.named_parameters():
            parameter.requires_grad = "norm" in name
    stop: Callable[[dict[str, Any]], bool] = lambda point: cause == "stopped early" and point["bad"] <= wanted  # noqa: E731
    generator = torch.Generator().manual_seed(seed)

    def observe(log_policy: Tensor) -> dict[str, Any]:
        drawn = torch.multinomial(log_policy.exp(), draws, replacement=True, generator=generator)
        ratio = log_policy.gather(1, drawn) - toy.log_prior.gather(1, drawn)
        evidence = rewards.gather(1, drawn) / beta
        return {"bad": bad_share(log_policy, bad), "elbo": (evidence - ratio).mean().item()}

    points = loop(
        toy,
        kl_rl_loss(toy, beta, rewards),
        seed,
        steps,
        points=50,
        policy=policy,
        draws=64,
        observe=observe,
        until=stop,
    )["points"]

    table = {
        (prompt, tuple(ids)): rewards[row, column].item()
        for row, prompt in enumerate(toy.prompts)
        for column, ids in enumerate(toy.completion_ids)
    }
    prior = LanguageModel(toy.model, toy.tokenizer, toy.max_completion_length)
    posterior = prior.tilt(
        lambda prompts, completion_ids, **_: [
            table[prompt, tuple(ids)] for prompt, ids in zip(prompts, completion_ids, strict=True)
        ],
        beta,
    )
    trained = LanguageModel(policy, toy.tokenizer, toy.max_completion_length)
    found = evaluate(trained, posterior, toy.prompts, draws, torch.Generator().manual_seed(seed))
    late = [point["elbo"] for point in points[-max(len(points) // 5, 2) :]]
    half = max(len(late) // 2, 1)
    gain = sum(late[-half:]) / half - sum(late[:half]) / half
    gap = found.policy.gap
    return {
        "share of the gap": gap.mean / found.prior.gap.mean if gap.trustworthy else None,
        "late gain over what is left": gain / max(gap.mean, 1e-9),
        "bad": points[-1]["bad"],
        "step": points[-1]["step"],
    }


def name_cause(run: dict[str, Any]) -> str | None:
    """The rule. It sees estimates of one run, nothing else."""
    if run["share of the gap"] is None:
        return None
    if run["share of the gap"] <= REACHED:
        return "wrong posterior"
    return "stopped early" if run["late gain over what is left"] >= RISING else "family too small"


def main() -> None:
    claim = Claim(__file__, __doc__, trains=False, seeds=4, steps=300, draws=400)
    runs = claim.runs(
        train_case, {cause: {"cause": cause} for cause in CAUSES}, steps=claim.args.steps, draws=claim.args.draws
    )

    named = {cause: [name_cause(run) for run in of] for cause, of in runs.items()}
    right = [name == CAUSES[cause] for cause, names in named.items() for name in names]
    share = (sum(right) + 2) / (len(right) + 4)  # Agresti & Coull 1998: an error that is not 0 where all are right
    error = math.sqrt(share * (1 - share) / (len(right) + 4))
    claim.state(
        f"the rule names the cause, {sum(right)} of {len(right)} (with two of each added): share",
        Measured(share, error),
        low=0.5,
    )
    for cause, of in runs.items():
        text = f"samples do not tell: with “{cause}”, bad completions over those of all cases"
        everywhere = sum(run["bad"] for runs_of in runs.values() for run in runs_of) / len(right)
        claim.state(text, [run["bad"] / everywhere for run in of], low=0.5, high=1.5)
    for cause, kind in CAUSES.items():
        gaps = [run["share of the gap"] for run in runs[cause] if run["share of the gap"] is not None]
        bounds = {"high": REACHED} if kind == "wrong posterior" else {"low": REACHED}
        what = "reached its posterior" if kind == "wrong posterior" else "is not at its posterior"
        claim.state(
            f"with “{cause}” the policy {what}: KL(π‖π*) over the prior's", measured(gaps or [math.nan]), **bounds
        )

    figure, (confusion, places) = panels(2)
    counts = [[names.count(name) for name in NAMES] for names in named.values()]
    confusion.imshow(counts, cmap="Blues", vmin=0)
    for row, line in enumerate(counts):
        for column, count in enumerate(line):
            color = "white" if count > max(line) / 2 else "black"  # dark cells hold the larger counts
            confusion.text(column, row, str(count), ha="center", va="center", color=color)
    confusion.set_xticks(range(len(NAMES)), [name.replace(" ", "\n", 1) for name in NAMES], fontsize=7)
    confusion.set_yticks(range(len(CAUSES)), CAUSES, fontsize=7)
    confusion.grid(visible=False)
    confusion.set(title="Cause, and what the rule named")
    for index, (cause, of) in enumerate(runs.items()):
        seen = [run for run in of if run["share of the gap"] is not None]
        places.plot(
            [run["bad"] for run in seen],
            [run["share of the gap"] for run in seen],
            "o",
            color=f"C{index}",
            label=cause,
        )
    places.axhline(REACHED, color="0.5", linestyle="--", linewidth=1)
    places.set(xlabel="true share of bad completions", ylabel="KL(π‖π*) over the prior's", ylim=(0, None))
    places.legend(frameon=False, fontsize=7)
    rows = [
        {"cause": cause, "seed": seed, "named": name, **run}
        for cause, of in runs.items()
        for seed, (run, name) in enumerate(zip(of, named[cause], strict=True))
    ]
    caption = (
        "Left: how often each cause was named. Right: bad completions alone do not tell the cause; the distance does."
    )
    claim.write(figure, rows, caption)


if __name__ == "__main__":
    main()
