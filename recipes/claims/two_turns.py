r"""With an environment between the turns, the posterior is over the policy's own tokens only.

Claim of the discussion under the post of arXiv 2205.11275 (Kirk's question): where a tool or a person answers between
two turns, the policy cannot choose those tokens, so KL-regularised RL must leave them out of the KL.

Here a policy writes a token, a tool answers by one, and the policy writes another; all 48 completions are enumerated.
The objective is E[r] − β·E[Σ_own log(π/π0)]: the log-ratio is summed with a mask over the policy's own tokens. Its
optimum is known by backward induction: π*(second | …) ∝ π0·exp(r/β), with the soft value V = β·log E_π0[exp(r/β)], and
π*(first) ∝ π0·exp(E_tool[V]/β), a mean over the tool's answers where the posterior over all tokens has another soft
one. Exact policy gradients are run with the mask, and without it, where the model's own log-probabilities of the
tool's tokens are trained and penalised too. Each seed is another prior, tool and reward.

    python recipes/claims/two_turns.py
"""

import torch
from claim import Claim, panels
from torch import Tensor

from rlhf_bayes.numerics import reverse_kl
from rlhf_bayes.numerics.masked import masked_sum

SHAPES = {"first": (4,), "tool": (4, 3), "second": (4, 3, 4)}


def stacked(logs: dict[str, Tensor]) -> Tensor:
    """The three token log-probabilities of each completion: (4, 3, 4, T)."""
    parts = (logs["first"][:, None, None], logs["tool"][:, :, None], logs["second"])
    return torch.stack([part.expand(4, 3, 4) for part in parts], dim=-1)


def two_turns(masked: bool, seed: int, steps: int, beta: float) -> dict[str, float]:
    """Exact policy gradients; KL from the optimum over own tokens, and how much worse the objective is."""
    generator = torch.Generator().manual_seed(seed)
    prior = {name: torch.randn(shape, generator=generator).double().log_softmax(-1) for name, shape in SHAPES.items()}
    answers = torch.randn(4, 3, generator=generator).double().log_softmax(-1)  # log P(answer | first token)
    rewards = torch.randn(4, 3, 4, generator=generator).double()
    own = torch.tensor([True, not masked, True]).expand(4, 3, 4, 3)  # (4, 3, 4, T)

    logits = {name: log_prob.clone().requires_grad_() for name, log_prob in prior.items()}
    optimizer = torch.optim.Adam(logits.values(), 0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        logs = {name: table.log_softmax(-1) for name, table in logits.items()}
        drawn = stacked({**logs, "tool": answers}).sum(-1).exp().detach()  # the tool draws its own token
        log_policy = masked_sum(stacked(logs), own, dim=-1)
        ratio = (log_policy - masked_sum(stacked(prior), own, dim=-1)).detach()
        optimizer.zero_grad()
        (-(drawn * (rewards - beta * ratio) * log_policy).sum()).backward()
        optimizer.step()
    reached = {name: table.detach().log_softmax(-1) for name, table in logits.items()}

    # backward induction: soft values over own tokens, means over the tool's
    soft = (prior["second"] + rewards / beta).logsumexp(-1)  # (4, 3), nats
    best = {
        "first": (prior["first"] + (answers.exp() * soft).sum(-1)).log_softmax(-1),
        "second": prior["second"] + rewards / beta - soft[..., None],
    }
    kl = reverse_kl(best["first"], reached["first"])
    places = (reached["first"][:, None] + answers).exp()
    kl = kl + (places * reverse_kl(best["second"], reached["second"])).sum()
    # the posterior over all tokens: the tool's answers as they would have to be
    joint = answers + soft
    tilted = joint.log_softmax(-1).exp()
    return {"kl": kl.item(), "tool": 0.5 * (tilted - answers.exp()).abs().sum(-1).mean().item()}


def main() -> None:
    claim = Claim(__file__, __doc__, trains=False, seeds=5, steps=3000, beta=0.5)
    variants = {"with the mask": {"masked": True}, "without it": {"masked": False}}
    runs = claim.runs(two_turns, variants, steps=claim.args.steps, beta=claim.args.beta)
    ends = {name: [run["kl"] for run in of] for name, of in runs.items()}
    text = "with the mask, gradients end at the posterior over own tokens: largest KL"
    claim.state(text, max(ends["with the mask"]), high=1e-4, unit="nats")
    text = "without the mask they end elsewhere: least KL"
    claim.state(text, min(ends["without it"]), low=1e-3, unit="nats")
    text = "a posterior over all tokens would need another tool: least total variation of its answers"
    claim.state(text, min(run["tool"] for run in runs["with the mask"]), low=1e-3)

    figure, (axes,) = panels(1)
    for index, (name, of) in enumerate(ends.items()):
        axes.plot(range(len(of)), [max(kl, 1e-16) for kl in of], "o", color=f"C{index}", label=name)
    axes.set(yscale="log", xlabel="seed: prior, tool and reward", ylabel="KL from the optimum, nats")
    axes.set_xticks(range(len(claim.seeds)))
    axes.legend(frameon=False, fontsize=8)
    rows = [{"mask": name, "seed": seed, **run} for name, of in runs.items() for seed, run in enumerate(of)]
    caption = "Exact policy gradients with a tool's answer between two turns: KL from the optimum over own tokens."
    claim.write(figure, rows, caption)


if __name__ == "__main__":
    main()
