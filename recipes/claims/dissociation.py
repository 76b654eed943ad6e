r"""What a method optimises decides whether it collapses, not whether it is reinforcement learning.

Claim (arXiv 2205.11275, sections 2, 3 and 5): RL that maximises a reward collapses the distribution, and
KL-regularised RL does not, because it minimises a divergence from a posterior. So do methods that are not RL, and they
reach the same posterior. Being RL and minimising a divergence are independent: a double dissociation.

Here each of the four combinations is trained on the same number of completions of a model small enough that the
distances to the posterior are exact; with another model they are estimated. Not RL and reward maximising is expert
iteration: fine-tune on the best completion of each prompt in a batch, and repeat. Not RL and divergence minimising are
distributional policy gradients with the forward KL, the log-variance loss, and maximum likelihood on draws of the
posterior, which for another model are weighted draws of the prior.

    python recipes/claims/dissociation.py
    python recipes/claims/dissociation.py --model_name_or_path ../shared/models/stories260K \
        --dataset_name docs/claims/prompts.jsonl --reward rlhf_bayes.toy.rewards:vader_reward --beta 0.25 \
        --max_completion_length 32 --learning_rate 5e-5 --max_grad_norm 0.1 --batch 64 --draws 48 --steps 40 \
        --near 0.75
"""

from typing import Any

from claim import Claim, panels
from enumerated import loop, new_toy, train_enumerated
from estimated import entropy_of_posterior, expert_iteration_of_model
from torch import Tensor
from training import SENTIMENT, draw_curves, first, last, table_rows, train

# name -> (maximises the reward alone, is RL)
KINDS = {
    "PPO, β = 0": (True, True),
    "expert iteration": (True, False),
    "PPO": (False, True),
    "RLOO": (False, True),
    "GDC, forward KL": (False, False),
    "log-variance": (False, False),
    "SFT on draws of π*": (False, False),
}
TRAINERS = {
    "PPO, β = 0": ("ppo", 0.0),
    "PPO": ("ppo", None),
    "RLOO": ("rloo", None),
    "GDC, forward KL": ("gdc-forward", None),
    "log-variance": ("log-variance", None),
    "SFT on draws of π*": ("weighted-sft", None),
}
SHOWN = {
    "kl_to_posterior": "KL(π‖π*), nats",
    "forward_kl": "KL(π*‖π), nats",
    "tv": "total variation",
    "entropy": "entropy, nats",
}


def expert_iteration(seed: int, steps: int) -> dict[str, Any]:
    """Supervised fine-tuning on the best of sixteen completions of the current policy, at each step."""
    toy = new_toy()

    def loss(log_policy: Tensor, drawn: Tensor) -> Tensor:
        best = toy.rewards.gather(1, drawn).argmax(-1, keepdim=True)  # (P, 1)
        return -log_policy.gather(1, best).mean()

    return loop(toy, loss, seed, steps)


def fine_tuning(seed: int, steps: int) -> dict[str, Any]:
    """Maximum likelihood on exact draws of the posterior, as rejection sampling gives them."""
    toy = new_toy()
    return loop(toy, lambda log_policy, drawn: -log_policy.mean(), seed, steps, proposal=toy.log_posterior())


def exact_runs(claim: Claim) -> tuple[dict[str, list[dict[str, Any]]], float]:
    """The runs on the enumerated model, and the entropy of its posterior."""
    toy, steps = new_toy(), claim.args.steps
    others = {"expert iteration": expert_iteration, "SFT on draws of π*": fine_tuning}
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in KINDS:
        for seed in claim.seeds:
            if name in others:
                run = claim.cell(others[name], seed=seed, steps=steps)
            else:
                method, beta = TRAINERS[name]
                beta = toy.beta if beta is None else beta
                run = claim.cell(train_enumerated, method=method, beta=beta, seed=seed, steps=steps)
            runs.setdefault(name, []).append(run)
    return runs, -(toy.log_posterior().exp() * toy.log_posterior()).sum(-1).mean().item()


def runs_of_model(claim: Claim) -> tuple[dict[str, list[dict[str, Any]]], float]:
    """The runs on another model, whose distances are estimated, and the entropy of its posterior."""
    args = claim.args
    common = {"reward": args.reward, "steps": args.steps, "model": claim.model, "points": 2}
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in KINDS:
        for seed in claim.seeds:
            if name == "expert iteration":
                run = claim.cell(expert_iteration_of_model, beta=args.beta, seed=seed, **common)
            else:
                method, beta = TRAINERS[name]
                settings = {"beta": args.beta} if beta is None else {"beta": beta, "target_beta": args.beta}
                run = claim.cell(train, method=method, seed=seed, **settings, **common)
            run["points"] = [{**point, "kl_to_posterior": point["gap"]} for point in run["points"]]
            runs.setdefault(name, []).append(run)
    entropy = claim.cell(entropy_of_posterior, reward=args.reward, beta=args.beta, draws=256, model=claim.model)
    return runs, entropy


def main() -> None:
    claim = Claim(__file__, __doc__, trains=True, reward=SENTIMENT, beta=0.25, near=0.5, seeds=3, steps=120)
    runs, posterior_entropy = exact_runs(claim) if claim.args.model_name_or_path is None else runs_of_model(claim)

    for name, (maximises, _) in KINDS.items():
        entropy = [end / posterior_entropy for end in last(runs[name], "entropy")]
        distances = {
            measure: [
                end / start for end, start in zip(last(runs[name], measure), first(runs[name], measure), strict=True)
            ]
            for measure in ("kl_to_posterior", "forward_kl", "tv")
        }
        if maximises:
            claim.state(f"{name} collapses: entropy over the posterior's", entropy, high=0.5)
            claim.state(f"{name} leaves the posterior: KL(π*‖π) over the prior's", distances["forward_kl"], low=1)
        else:
            claim.state(f"{name} does not collapse: entropy over the posterior's", entropy, low=0.75, high=1.25)
            for measure, values in distances.items():
                text = f"{name} nears the posterior: {SHOWN[measure].split(',')[0]} over the prior's"
                claim.state(text, values, high=claim.args.near)

    def of_kind(*kind: bool) -> list[float]:
        """Total variation at the end, the mean over the methods of a kind, for each seed."""
        chosen = [last(runs[name], "tv") for name, kinds in KINDS.items() if kinds == kind]
        return [sum(values) / len(values) for values in zip(*chosen, strict=True)]

    four = list(zip(*(of_kind(a, b) for a in (True, False) for b in (True, False)), strict=True))
    by_objective = [(a + b - c - d) / 2 for a, b, c, d in four]
    by_rl = [abs(a - b + c - d) / 2 for a, b, c, d in four]
    claim.state("the objective changes the distance to the posterior: total variation", by_objective, low=0)
    shares = [rl / objective for rl, objective in zip(by_rl, by_objective, strict=True)]
    claim.state("being RL changes it less: share of that", shares, high=0.5)

    figure, axes = panels(len(SHOWN))
    for panel, (measure, title) in zip(axes, SHOWN.items(), strict=True):
        draw_curves(panel, runs, measure, title)
        if measure != "tv":
            panel.set_yscale("symlog", linthresh=0.1)
    axes[-1].axhline(posterior_entropy, color="0.2", linestyle="--", label="posterior")
    axes[0].legend(frameon=False, fontsize=7)
    caption = "Distances along trainings on equal numbers of completions: mean and range over seeds."
    claim.write(figure, table_rows(runs), caption)


if __name__ == "__main__":
    main()
