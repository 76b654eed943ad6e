r"""A reward that was learnt is over-optimised; how far, depends on how an ensemble of rewards is pooled.

Claim (arXiv 2205.11275, section 4, and the discussion of the post): the posterior is only as good as its reward, so
inference that goes too far from the prior draws what the proxy likes and people do not. Gao, Schulman & Hilton 2022
(arXiv 2210.10760, equation 1) give the gold reward of RL as R(d) = R_0 + d·(α − β·log d) with d = √KL.

Here the gold reward is the sentiment behind the bundled preferences, or `--reward` with another model. Proxies are
Bradley–Terry fits on word counts to a few noisy comparisons; an ensemble is several, each on a bootstrap of the same
comparisons. PPO with a small β maximises one proxy, the mean of an ensemble, its pessimistic and its marginal pool.
Each seed has its own comparisons.
The law is fitted to the gold reward only, and only where it turned down: the proxy is maximised itself, and where no
downturn was seen, none is extrapolated.

    python recipes/claims/overoptimization.py
    python recipes/claims/overoptimization.py --model_name_or_path ../shared/models/stories260K \
        --dataset_name docs/claims/prompts.jsonl --reward rlhf_bayes.toy.rewards:vader_reward \
        --max_completion_length 32 --learning_rate 1e-4 --max_grad_norm 0.1 --batch 64 --pairs 200 --steps 60
"""

import functools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from claim import Claim, panels
from training import REWARDS, SENTIMENT, draw_curves, last, prior_of, prompts_of, reward_of, table_rows, train

from rlhf_bayes import toy
from rlhf_bayes.diagnostics.bag_of_words import BagOfWords
from rlhf_bayes.numerics.overoptimization import fit_reward_law
from rlhf_bayes.numerics.pooling import pool_centered

RULES = {"one proxy": "one", "mean": "mean", "pessimistic": "pessimistic", "marginal": "marginal"}
MEMBERS, SCALE = 5, 0.2  # the scale at which members disagree, in standard deviations of the reward, for two pools


def comparisons(seed: int, pairs: int, gold: str, model: dict[str, Any]) -> list[tuple[str, str]]:
    """
    (chosen, rejected) of some comparisons, those of a seed.

    For the bundled model those of the careless annotator of its preferences; for another, pairs of completions of the
    same prompt, which are judged by the gold reward in its standard deviations: P(a ≻ b) = σ(r_a − r_b).
    """
    generator = np.random.default_rng(seed)
    if model["model_name_or_path"] is None:
        rows = toy.preferences()
        chosen = [rows[int(index)] for index in generator.choice(len(rows), pairs, replace=False)]
        votes = [row["annotator_votes"][row["annotators"].index("careless")] for row in chosen]
        return [(row["chosen"], row["rejected"]) if vote == "chosen" else (row["rejected"], row["chosen"])
                for row, vote in zip(chosen, votes, strict=True) if vote != "tie"]  # fmt: skip
    prompts = prompts_of(model)
    each = 2 * math.ceil(pairs / len(prompts))
    drawn = prior_of(model).sample(prompts, each, torch.Generator().manual_seed(900 + seed))
    columns = {"prompts": drawn.prompts, "completions": drawn.texts, "completion_ids": drawn.completion_ids}
    rewards = np.array(reward_of(gold)(**columns))
    evidence = (rewards[0::2] - rewards[1::2]) / rewards.std()
    wins = generator.random(len(evidence)) < 1 / (1 + np.exp(-evidence))
    both = zip(drawn.texts[0::2], drawn.texts[1::2], wins, strict=True)
    return [(a, b) if win else (b, a) for a, b, win in both][:pairs]


@functools.cache
def members_of(settings: str) -> tuple[list[BagOfWords], torch.Tensor, float]:
    """Members, each fitted to a bootstrap; the mean of each under the prior (K, 1); and the spread of their mean."""
    seed, pairs, gold, model = json.loads(settings)
    sides, generator, members = comparisons(seed, pairs, gold, model), np.random.default_rng(seed + 1), []
    for _ in range(MEMBERS):
        some = [sides[int(index)] for index in generator.integers(len(sides), size=len(sides))]
        members.append(BagOfWords.fit([a for a, _ in some], [b for _, b in some], l2=0.3, min_count=1))
    prompts = toy.prompts() if model["model_name_or_path"] is None else prompts_of(model)
    texts = prior_of(model).sample(prompts, 16, torch.Generator().manual_seed(5)).texts
    rewards = torch.stack([member.rewards(texts) for member in members])  # (K, B)
    return members, rewards.mean(-1, keepdim=True), rewards.mean(0).std().item()


def proxy(name: str) -> Callable[..., list[float]]:
    """The proxy `RULE:[seed, pairs, gold, model]`, in standard deviations of the members' mean under the prior."""
    rule, _, settings = name.partition(":")
    members, centers, spread = members_of(settings)

    def reward(completions: list[str], **columns: Any) -> list[float]:
        values = torch.stack([member.rewards(completions) for member in members])  # (K, B)
        if rule == "one":
            return ((values[0] - centers[0]) / spread).tolist()
        scale = None if rule == "mean" else SCALE
        return pool_centered(values / spread, centers / spread, rule, scale).tolist()

    reward.__name__ = f"proxy_{rule}"
    reward.gold = reward_of(json.loads(settings)[2])  # type: ignore[attr-defined]
    return reward


REWARDS["proxy"] = proxy


def main() -> None:
    claim = Claim(__file__, __doc__, trains=True, reward=SENTIMENT, seeds=3, steps=45, pairs=60, beta=0.02, draws=16)
    args = claim.args
    settings = {seed: json.dumps([seed, args.pairs, args.reward, claim.model]) for seed in claim.seeds}
    runs = {
        name: [
            claim.cell(train, method="ppo", reward=f"proxy:{rule}:{settings[seed]}", beta=args.beta, seed=seed,
                       steps=args.steps, model=claim.model, points=5)
            for seed in claim.seeds
        ]
        for name, rule in RULES.items()
    }  # fmt: skip

    third = len(runs["one proxy"][0]["points"]) // 3
    for name, of in runs.items():
        proxies, golds = (
            [run["points"][-1][key] - run["points"][third][key] for run in of] for key in ("reward", "gold")
        )
        claim.state(f"{name}: the proxy still rises in the last two thirds", proxies, low=0, unit="sd of the proxy")
        if name == "one proxy":
            claim.state(f"{name}: the gold reward falls in the last two thirds", golds, high=0)
    one, mean, pessimistic, marginal = (last(of, "gold") for of in runs.values())
    for text, better, worse in (
        ("the mean of an ensemble ends with more gold reward than one proxy", mean, one),
        ("the pessimistic pool ends with more gold reward than one proxy", pessimistic, one),
        (
            "the pessimistic pool ends with more gold reward than the marginal one, which is optimistic",
            pessimistic,
            marginal,
        ),
    ):
        claim.state(text, [a - b for a, b in zip(better, worse, strict=True)], low=0)

    laws = []
    figure, (by_kl, gold, proxies) = panels(3)
    for index, (name, of) in enumerate(runs.items()):
        for seed, run in enumerate(of):
            d = [math.sqrt(max(point["kl_to_prior"], 0)) for point in run["points"]]
            golds = [point["gold"] for point in run["points"]]
            by_kl.plot(d, golds, ".", color=f"C{index}", label=name if seed == 0 else None)
            # a downturn that is larger than the noise of 128 draws of a reward in (−1, 1)
            law = fit_reward_law(d, golds, "rl", golds[0]) if max(golds) - golds[-1] > 0.1 else None
            if law is not None:
                laws.append(
                    {"run": name, "seed": seed, "alpha": law.alpha, "beta": law.beta, "residual": law.residual}
                )
                grid = np.linspace(0, max(d), 60)
                by_kl.plot(grid, [law(float(x)) for x in grid], color=f"C{index}", alpha=0.5, linewidth=1)
    if laws:
        # the share of runs where the law explains the turn: its residual beside the noise of a point
        claim.state(
            "the law of Gao et al. fits the runs that turn down: residual", [law["residual"] for law in laws], high=0.1
        )
    by_kl.set(xlabel="√KL(policy‖prior), √nats", ylabel="gold reward", title=f"Gold reward, {len(laws)} laws fitted")
    by_kl.legend(frameon=False, fontsize=7)
    draw_curves(gold, runs, "gold", "gold reward")
    draw_curves(proxies, runs, "reward", "proxy, sd under the prior")
    words = "; ".join(f"{law['run']}: α {law['alpha']:.2f}, β {law['beta']:.2f}" for law in laws)
    caption = f"Gold reward and proxies over training. Fitted laws: {words or 'none, no run turned down'}."
    rows = table_rows(runs)
    rows += [
        dict.fromkeys(rows[0])
        | {"run": f"law of {law['run']}", "seed": law["seed"], "reward": law["alpha"], "gold": law["beta"]}
        for law in laws
    ]
    claim.write(figure, rows, caption, {name: of[0]["texts"][:5] for name, of in runs.items()})


if __name__ == "__main__":
    main()
