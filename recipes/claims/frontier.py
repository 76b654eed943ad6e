r"""No policy has more reward at its distance from the prior than the posterior: the frontier of reward and KL.

Claim (arXiv 2205.11275, section 3, equations 4 to 7): the posterior maximises E[r] − β·KL(π‖π0), so over β it draws
the curve of the largest reward at each KL. The paper leaves open why reward is about linear in √KL in training (Bai et
al. 2022, arXiv 2204.05862, section 4.3).

Here the posteriors of all β come from draws of the prior alone. Six trainings, with several seeds, and the best of n
are placed below their curve. With K(t) = log E_π0[exp(t·r)], the cumulant generating function, and t = 1/β:

    E_π*[r] = K'(t),    KL(π*‖π0) = t·K'(t) − K(t),    d E_π*[r] / d KL(π*‖π0) = β

so the curve is E[r] = μ + σ·√(2·KL) + (κ/3)·KL + …, κ the third cumulant over σ². It is a straight line in √KL if and
only if K is quadratic, that is for a reward that is Gaussian under the prior: from R' = c·KL'/(2·√KL) and KL' = t·R'
follows √KL = c·t/2, so K'' is constant. A bounded reward must bend below that line.

    python recipes/claims/frontier.py
    python recipes/claims/frontier.py --model_name_or_path ../shared/models/stories260K --dataset_name prompts.jsonl \
        --reward rlhf_bayes.toy.rewards:vader_reward --max_completion_length 32 --learning_rate 5e-5 --steps 200
"""

import math
from typing import Any

import numpy as np
import torch
from claim import Claim, panels
from training import SENTIMENT, prior_of, prompts_of, reward_of, table_rows, train

from rlhf_bayes.numerics import best_of_n_kl, expected_best_of_n
from rlhf_bayes.numerics.verdicts import Measured, measured
from rlhf_bayes.numerics.what_if import what_if

METHODS = ("ppo", "rloo", "gdc-forward", "gdc-js", "gdc-alpha", "log-variance")
BETAS = (8.0, 4.0, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.125)
NS = (2, 4, 8, 16, 32)


def rewards_of_prior(reward: str, draws: int, model: dict[str, Any]) -> list[list[float]]:
    """Rewards of draws of the prior, a row for each prompt."""
    prompts = prompts_of(model)
    drawn = prior_of(model).sample(prompts, draws, torch.Generator().manual_seed(77))
    values = reward_of(reward)(prompts=drawn.prompts, completions=drawn.texts, completion_ids=drawn.completion_ids)
    return torch.tensor(values).view(len(prompts), draws).tolist()


def frontier_of(rewards: torch.Tensor) -> list[tuple[float, float, float, float]]:
    """(β, √KL, reward, standard error of the reward) of the posteriors that the draws can tell."""
    rows = [row for row in what_if(rewards, BETAS) if row.trustworthy]
    return [(row.beta, math.sqrt(max(row.kl_to_prior, 0)), row.reward, row.reward_standard_error) for row in rows]


def main() -> None:
    claim = Claim(
        __file__, __doc__, trains=True, reward=SENTIMENT, beta=0.25, seeds=3, steps=30, prior_draws=512, draws=48
    )
    args = claim.args
    rewards = torch.tensor(
        claim.cell(rewards_of_prior, reward=args.reward, draws=args.prior_draws, model=claim.model),
        dtype=torch.float64,
    )  # (P, n)
    curve = frontier_of(rewards)
    common = {"reward": args.reward, "beta": args.beta, "steps": args.steps, "model": claim.model, "points": 2}
    runs = claim.runs(train, {method: {"method": method} for method in METHODS}, **common)

    # the curve starts at the prior; between its points it is concave in KL, so a chord would be below it
    kl = np.array([0.0, *(d**2 for _, d, _, _ in curve)])
    height = np.array([rewards.mean().item(), *(reward for _, _, reward, _ in curve)])
    errors = np.array(
        [(rewards.std(-1).square().sum() / rewards.size(1)).sqrt().item() / len(rewards), *(e for *_, e in curve)]
    )
    tangents = np.array([0.0, *(beta for beta, *_ in curve)])

    def ceiling(distance: float) -> float:
        """The frontier at a KL, from above: the least of the tangents, whose slopes are the β."""
        return float(np.min(height[1:] + tangents[1:] * (distance - kl[1:])))

    below: dict[str, list[float]] = {}
    for method, of in runs.items():
        ends = [run["points"][-1] for run in of]
        below[method] = [ceiling(end["kl_to_prior"]) - end["reward"] for end in ends]
        number = mean_with(below[method], float(errors.max()))
        claim.state(f"{method} is not above the posteriors: reward below them at its KL", number, low=-0.02)
    best = [
        (
            n,
            float(sum(best_of_n_kl(row, n) for row in rewards) / len(rewards)),
            float(expected_best_of_n(rewards, rewards, [n])),
        )
        for n in NS
    ]
    for n, distance, reward in best:
        if distance <= kl.max():
            number = Measured(ceiling(distance) - reward, float(errors.max()))
            claim.state(f"best of {n} is not above the posteriors: reward below them at its KL", number, low=-0.02)

    # Bai et al.: a straight line in √KL, whose slope the theory knows at 0
    root = np.sqrt(kl)
    sigma = math.sqrt(rewards.var(-1).mean().item())
    first = (height[1] - height[0]) / root[1]
    claim.state(
        "the curve leaves the prior with slope σ·√2: ratio",
        Measured(first / (sigma * math.sqrt(2)), 0.0),
        low=0.9,
        high=1.1,
    )
    near = root <= 1.0
    line = np.polyfit(root[near], height[near], 1)
    misfit = float(np.abs(np.polyval(line, root[near]) - height[near]).max() / np.ptp(height[near]))
    claim.state("reward is linear in √KL up to 1 nat: largest misfit over the range", misfit, high=0.05)
    last_slope = (height[-1] - height[-2]) / (root[-1] - root[-2])
    best_seen = rewards.max().item()
    bound_is_near = best_seen - height[-1] < sigma
    if bound_is_near:
        claim.state("a bounded reward bends below the line: last slope over the first", last_slope / first, high=0.8)
    bend = next(
        (float(x) for x, y in zip(root, height, strict=True) if np.polyval(line, x) - y > 0.05 * np.ptp(height)), None
    )

    figure, (axes,) = panels(1, size=(7.4, 5.0))
    axes.plot(root, height, color="0.15", marker="o", markersize=4, label="posteriors of β: the limit")
    axes.plot(root, np.polyval(line, root), color="0.5", linestyle=":", label="line fitted up to 1 nat")
    axes.plot(
        root,
        height[0] + sigma * math.sqrt(2) * root,
        color="0.7",
        linestyle="--",
        label="Gaussian reward: μ + σ·√(2·KL)",
    )
    axes.plot([math.sqrt(d) for _, d, _ in best], [r for *_, r in best], "x", color="0.4", label="best of n")
    for index, (method, of) in enumerate(runs.items()):
        points = [point for run in of for point in run["points"]]
        axes.plot(
            [math.sqrt(max(p["kl_to_prior"], 0)) for p in points],
            [p["reward"] for p in points],
            ".",
            alpha=0.5,
            color=f"C{index}",
        )
        marks = [run["points"][-1] for run in of]
        axes.plot(
            [math.sqrt(max(p["kl_to_prior"], 0)) for p in marks],
            [p["reward"] for p in marks],
            "D",
            color=f"C{index}",
            label=method,
        )
    axes.set(xlabel="√KL(policy‖prior), √nats", ylabel="reward", ylim=(height[0] - 0.1, None))
    axes.legend(frameon=False, fontsize=7)
    where = (
        f"It is 5% of the range below the line from √KL = {bend:.2f} on." if bend else "It does not leave the line."
    )
    if not bound_is_near:
        where += (
            f" No posterior that the draws can tell is within a standard deviation of the largest reward, "
            f"{best_seen:.2f}, so whether a bound bends the curve cannot be seen: last slope over the first "
            f"{last_slope / first:.2f}."
        )
    caption = f"Reward against √KL. Diamonds are the ends of trainings, dots the points before. The curve: {where}"
    rows = table_rows(runs)
    known = [
        {"run": f"posterior, β = {beta:g}", "kl_to_prior": d**2, "reward": reward} for beta, d, reward, _ in curve
    ]
    known += [{"run": f"best of {n}", "kl_to_prior": distance, "reward": reward} for n, distance, reward in best]
    claim.write(figure, rows + [dict.fromkeys(rows[0]) | row for row in known], caption)


def mean_with(values: list[float], other_error: float) -> Measured:
    """The mean over seeds, with an error that all of them share added."""
    found = measured(values)
    return found._replace(standard_error=math.hypot(found.standard_error, other_error))


if __name__ == "__main__":
    main()
