r"""Maximising a reward alone collapses the distribution; a KL penalty, or a divergence, does not.

Claim (arXiv 2205.11275, section 2, equation 2; figure 1 of the post): the optimum of E[r] is a single completion, so
RL without a KL term (β = 0) gives up fluency and diversity. If the reward is 1 where the completion contains a word,
the policy says the word as often as it can, just in case. That is a property of the objective, not of a bad optimiser.

Here four trainings see the same number of completions: PPO with β = 0, with a small and with a larger β, and GDC on
the condition that the word occurs. They are compared with the posterior itself, draws of the prior that contain the
word. Diversity is measured on equal numbers of completions. Then exact gradients on a model whose completions are
enumerated show the same objective without any exploration.

    python recipes/claims/collapse.py
    python recipes/claims/collapse.py --word play --model_name_or_path ../shared/models/stories260K \
        --dataset_name docs/claims/prompts.jsonl --max_completion_length 32 --learning_rate 1e-4 --batch 64 --steps 60

With `--reward` in place of `--word`, the condition is that a completion's reward is above 0.5.
"""

import math
from typing import Any

import torch
from claim import Claim, panels
from matplotlib.ticker import ScalarFormatter
from training import SATISFIED, draw_curves, last, mentions, prior_of, prompts_of, reward_of, table_rows, train

from rlhf_bayes.diagnostics import distinct_n, self_bleu
from rlhf_bayes.diagnostics.diversity import words
from rlhf_bayes.testing import EnumerableLM

SHOWN = {
    "satisfied": "share of satisfying completions",
    "mentions": "mentions of the word per completion",
    "entropy": "entropy, nats per completion",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU",
    "prior_perplexity": "perplexity under the prior",
}


def conditioned(reward: str, seed: int, model: dict[str, Any]) -> dict[str, float]:
    """The posterior itself: draws of the prior that satisfy, as many a prompt as policies are asked for."""
    prior, n = prior_of(model), model["draws"]
    generator, kept = torch.Generator().manual_seed(10_000 + seed), []
    for prompt in prompts_of(model):
        found: list[tuple[str, float, int]] = []
        drawn = 0
        while len(found) < n and drawn < 200 * n:
            some = prior.sample([prompt], 8 * n, generator)
            columns = {"prompts": some.prompts, "completions": some.texts, "completion_ids": some.completion_ids}
            rewards = reward_of(reward)(**columns)
            rows = zip(some.texts, some.log_prob.tolist(), some.completion_ids, rewards, strict=True)
            found += [(text, log_prob, len(ids)) for text, log_prob, ids, value in rows if value > SATISFIED]
            drawn += len(some)
        if len(found) >= n:
            kept.append((found[:n], len(found) / drawn))
    if not kept:
        raise ValueError(
            f"`--word` must occur in completions of the prior, or `--reward` be above {SATISFIED}, got {reward!r}: "
            "too few completions satisfy."
        )
    texts = [[text for text, _, _ in found] for found, _ in kept]
    nats = [[log_prob for _, log_prob, _ in found] for found, _ in kept]
    lengths = [sum(length for _, _, length in found) for found, _ in kept]
    entropy = [math.log(share) - sum(row) / n for row, (_, share) in zip(nats, kept, strict=True)]
    perplexity = [math.exp(-sum(row) / length) for row, length in zip(nats, lengths, strict=True)]
    by_prompt = {
        "entropy": entropy,
        "distinct_2": [distinct_n([words(text) for text in rows], 2) for rows in texts],
        "self_bleu": [self_bleu(rows) for rows in texts],
        "prior_perplexity": perplexity,
        "satisfied": [1.0] * len(kept),
    }
    if reward.startswith("word:"):
        by_prompt["mentions"] = [sum(mentions(reward[5:], rows)) / n for rows in texts]
    return {name: sum(values) / len(values) for name, values in by_prompt.items()}


def exact_run(beta: float, steps: int) -> dict[str, Any]:
    """Exact gradients of E[r] − β·KL(π‖π0): the mass of the likeliest completion at each step, least over prompts."""
    toy = EnumerableLM(vocab_size=6, max_completion_length=3)
    policy = toy.random_policy(noise=0.0)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    masses = []
    for _ in range(steps):
        log_policy = toy.log_probs(policy)  # (P, N)
        masses.append(log_policy.max(-1).values.exp().min().item())
        objective = (log_policy.exp() * (toy.rewards - beta * (log_policy - toy.log_prior))).sum(-1).mean()
        optimizer.zero_grad()
        (-objective).backward()
        optimizer.step()
    posterior = (toy.log_prior + toy.rewards / beta).softmax(-1).max(-1).values.min().item() if beta else 1.0
    return {"masses": masses, "posterior": posterior}


def main() -> None:
    claim = Claim(
        __file__, __doc__, trains=True, word="quite", reward=None, seeds=5, steps=60, beta=0.1, larger_beta=0.3,
        draws=16, exact_steps=200, exact_beta=0.5,
    )  # fmt: skip
    args = claim.args
    exact = {beta: claim.cell(exact_run, beta=beta, steps=args.exact_steps) for beta in (0.0, args.exact_beta)}
    settings = {
        "PPO, β = 0": ("ppo", 0.0),
        f"PPO, β = {args.beta:g}": ("ppo", args.beta),
        f"PPO, β = {args.larger_beta:g}": ("ppo", args.larger_beta),
        "GDC, on condition": ("gdc-forward", None),
    }
    reward = args.reward or f"word:{args.word}"
    shown = {name: title for name, title in SHOWN.items() if args.reward is None or name != "mentions"}
    variants = {name: {"method": method, "beta": beta} for name, (method, beta) in settings.items()}
    runs = claim.runs(train, variants, reward=reward, steps=args.steps, model=claim.model)
    target = [claim.cell(conditioned, reward=reward, seed=seed, model=claim.model) for seed in claim.seeds]

    alone, penalised, larger, gdc = runs.values()
    claim.state("exactly, β = 0: the most probable completion gets all mass", exact[0.0]["masses"][-1], low=0.95)
    kept = exact[args.exact_beta]["masses"][-1] - exact[args.exact_beta]["posterior"]
    claim.state(f"exactly, β = {args.exact_beta:g}: it gets what the posterior gives it", kept, low=-0.02, high=0.02)
    claim.state("β = 0 satisfies nearly always: share of completions", last(alone, "satisfied"), low=0.9)

    def beyond(of: list[dict[str, Any]], measure: str, log: bool = False) -> list[float]:
        """How far policies are from the posterior: differences, or log-ratios of what may grow by factors."""
        pairs = zip(last(of, measure), target, strict=True)
        return [math.log(end / found[measure]) if log else end - found[measure] for end, found in pairs]

    for text, measure, log, bounds in (
        ("says the word more often than the posterior: log-ratio of mentions", "mentions", True, {"low": 0}),
        ("is less fluent than the posterior: log-ratio of perplexities", "prior_perplexity", True, {"low": 0}),
        ("is less diverse than the posterior: distinct-2", "distinct_2", False, {"high": 0}),
        ("is less diverse than the posterior: self-BLEU", "self_bleu", False, {"low": 0}),
        ("is less diverse than the posterior: entropy, nats", "entropy", False, {"high": 0}),
    ):
        if measure in shown:
            claim.state(f"β = 0 {text}", beyond(alone, measure, log), **bounds)
    for name, of in {f"KL-RL, β = {args.beta:g},": penalised, "GDC": gdc}.items():
        for measure, log in {"mentions": True, "prior_perplexity": True, "distinct_2": False}.items():
            if measure not in shown:
                continue
            pairs = zip(beyond(of, measure, log), beyond(alone, measure, log), strict=True)
            text = f"{name} stays near the posterior: share of what β = 0 departs from it in {SHOWN[measure]}"
            claim.state(text, [own / whole for own, whole in pairs], high=0.5)
    claim.state("a larger β satisfies less often: difference of shares", [
        high - low for high, low in zip(last(penalised, "satisfied"), last(larger, "satisfied"), strict=True)
    ], low=0)  # fmt: skip

    figure, (mass, *others) = panels(1 + len(shown))
    for beta, run in exact.items():
        (line,) = mass.plot(run["masses"], label=f"β = {beta:g}")
        mass.axhline(run["posterior"], color=line.get_color(), linestyle="--", linewidth=1)
    mass.set(title="Exact gradients: mass of the likeliest completion", xlabel="step")
    mass.legend(frameon=False, fontsize=8)
    for axes, (measure, title) in zip(others, shown.items(), strict=True):
        draw_curves(axes, runs, measure, title)
        axes.axhline(
            sum(found[measure] for found in target) / len(target), color="0.2", linestyle="--", label="posterior"
        )
    others[-1].set_yscale("log")
    others[-1].yaxis.set_minor_formatter(ScalarFormatter())
    others[-1].yaxis.set_major_formatter(ScalarFormatter())
    others[0].legend(frameon=False, fontsize=7)
    what = f"Reward above {SATISFIED}" if args.reward else f"Reward 1 where a completion contains “{args.word}”"
    caption = (
        f"{what}. First panel: exact gradients, the dashed line is the "
        "optimum. Others: mean and range over seeds; the dashed line is the posterior on that condition."
    )
    rows = table_rows(runs) + [{"run": "posterior", "seed": seed, **found} for seed, found in enumerate(target)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in columns} for row in rows]
    claim.write(figure, rows, caption, {name: of[0]["texts"][:6] for name, of in runs.items()})


if __name__ == "__main__":
    main()
