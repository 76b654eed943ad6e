r"""KL-regularised RL is variational inference, and so are methods that are not RL.

Claim (arXiv 2205.11275, section 3, equations 3 to 7; section 5, equations 11 to 17): the objective of KL-regularised
RL is J = E[r] − β·KL(π‖π0) = β·(log Z − KL(π‖π*)), an ELBO, so its maximum is the posterior π* = π0·exp(r/β)/Z.
Supervised fine-tuning minimises D_KL(π*_MLE, π), and distributional policy gradients minimise a divergence from π*;
with the reverse KL they are KL-regularised RL.

Here all completions of a small language model are enumerated, so nothing is estimated. PPO trains it, and both sides
of the equation are computed after each step. Then each objective is optimised by exact gradients over all
distributions on the completions. Three objectives that are used in its place are optimised too: the k3 estimator of
the KL as a part of the reward, k3 as a term of the loss (GRPO), and log-ratios divided by the length (FlowRL, arXiv
2509.15207). The paper says nothing of them; whether they have the same optimum is measured.

    python recipes/claims/equivalences.py
"""

import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from claim import Claim, panels
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from rlhf_bayes import PPOConfig, PPOTrainer
from rlhf_bayes.numerics import forward_kl, reverse_kl, tv
from rlhf_bayes.numerics.f_divergence import divergence_cases, divergence_of, pseudo_rewards
from rlhf_bayes.testing import EnumerableLM, toy_reward

SFT = "SFT on 10,000 draws"
DRAWS = 10_000
OTHERS = ("k3 in the reward", "k3 in the loss (GRPO)", "divided by length (FlowRL)")


def new_toy() -> EnumerableLM:
    return EnumerableLM(vocab_size=6, max_completion_length=3)  # 156 completions of each of 3 prompts


class BothSides(TrainerCallback):
    """Both sides of the equation after each step, by enumeration in fp64."""

    def __init__(self, toy: EnumerableLM):
        self.toy, self.left, self.right, self.elbo = toy, [], [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        toy = self.toy
        with torch.no_grad():
            log_policy = toy.log_probs(model).double().log_softmax(-1)  # (P, N)
        log_prior = toy.log_prior.double().log_softmax(-1)
        log_density = log_prior + toy.rewards.double() / toy.beta
        log_z = log_density.logsumexp(-1)  # (P,)
        reward = (log_policy.exp() * toy.rewards.double()).sum(-1)
        objective = reward - toy.beta * (log_policy.exp() * (log_policy - log_prior)).sum(-1)
        self.left.append(objective.mean().item())
        right = toy.beta * (log_z - reverse_kl(log_density - log_z[:, None], log_policy))
        self.right.append(right.mean().item())
        self.elbo.append((objective / toy.beta).mean().item())


def ppo_run(seed: int, steps: int) -> dict[str, Any]:
    """PPO on samples; both sides of the equation at each step."""
    toy = new_toy()
    sides = BothSides(toy)
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder, seed=seed, beta=toy.beta, max_steps=steps, learning_rate=3e-3, num_generations=4,
            per_device_train_batch_size=48, max_completion_length=toy.max_completion_length, use_cpu=True, bf16=False,
            gradient_checkpointing=False, logging_strategy="no", save_strategy="no", report_to="none",
            disable_tqdm=True, model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        dataset = Dataset.from_dict({"prompt": toy.prompts * 16})
        trainer = PPOTrainer(
            toy.save(folder), toy_reward, config, dataset, processing_class=toy.tokenizer, callbacks=[sides]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {"left": sides.left, "right": sides.right, "elbo": sides.elbo, "log_z": toy.log_z().mean().item()}


def objectives(toy: EnumerableLM, seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> a loss of normalised log π (P, N), fp64. Each is written out as in its paper."""
    prior = toy.log_prior.double().log_softmax(-1)
    rewards, beta = toy.rewards.double(), toy.beta
    posterior = (prior + rewards / beta).log_softmax(-1)
    lengths = torch.tensor([len(ids) for ids in toy.completion_ids]).double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(posterior.exp(), DRAWS, replacement=True, generator=generator)  # (P, draws)

    def variance(difference: Tensor) -> Tensor:  # under the prior
        mean = (prior.exp() * difference).sum(-1, keepdim=True)
        return (prior.exp() * (difference - mean).square()).sum(-1).mean()

    def k3(q: Tensor) -> Tensor:
        return (prior - q).exp() - 1 - (prior - q)

    found = {
        "KL-RL": lambda q: -(q.exp() * (rewards - beta * (q - prior))).sum(-1).mean(),
        "log-variance": lambda q: variance(q - prior - rewards / beta),
        SFT: lambda q: -q.gather(1, drawn).mean(),
        # what is a part of the reward has no gradient of its own
        "k3 in the reward": lambda q: -(q.exp() * (rewards - beta * k3(q).detach())).sum(-1).mean(),
        # the gradient of k3 at completions drawn from π is that of KL(π0‖π)
        "k3 in the loss (GRPO)": lambda q: (beta * forward_kl(prior, q) - (q.exp() * rewards).sum(-1)).mean(),
        "divided by length (FlowRL)": lambda q: variance((q - prior) / lengths - rewards / beta),
    }
    for name, alpha in divergence_cases():
        record = divergence_of(name, alpha)
        found[f"f-DPG, {name}"] = lambda q, record=record: record.exact(posterior, q).mean()
    return found


def optimum(objective: str, seed: int, steps: int) -> dict[str, float]:
    """Exact gradient descent from the prior, over all distributions; how far from the posterior it ends."""
    toy = new_toy()
    loss, prior = objectives(toy, seed)[objective], toy.log_prior.double().log_softmax(-1)
    posterior = (prior + toy.rewards.double() / toy.beta).log_softmax(-1)
    logits = prior.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], 0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        optimizer.zero_grad()
        loss(logits.log_softmax(-1)).backward()
        optimizer.step()
    q = logits.detach().log_softmax(-1)
    reward = (q.exp() * toy.rewards.double()).sum(-1).mean().item()
    entropy = -(q.exp() * q).sum(-1).mean().item()
    distances = {"KL(π‖π*)": reverse_kl(posterior, q), "KL(π*‖π)": forward_kl(posterior, q), "TV": tv(posterior, q)}
    return {name: of.max().item() for name, of in distances.items()} | {"reward": reward, "entropy": entropy}


def same_gradient(seed: int) -> dict[str, float]:
    """The gradient of f-DPG with the reverse KL beside that of J, at a random policy: cosine, and ratio of lengths."""
    toy = new_toy()
    policy = toy.random_policy(noise=0.1, seed=seed + 1)
    log_policy = toy.log_probs(policy)  # (P, N)
    weight = log_policy.detach().exp() * pseudo_rewards(toy.log_posterior() - log_policy.detach(), "reverse_kl")
    ascent = torch.autograd.grad((weight * log_policy).sum(-1).mean(), list(policy.parameters()))
    ours = torch.cat([gradient.flatten() for gradient in ascent]).double()
    rl = torch.cat([gradient.flatten() for gradient in toy.objective_gradient(policy).values()]).double()
    cosine = torch.nn.functional.cosine_similarity(ours, rl, dim=0).item()
    return {"cosine": cosine, "ratio": (rl.norm() / ours.norm()).item(), "beta": toy.beta}


def main() -> None:
    claim = Claim(__file__, __doc__, trains=False, seeds=3, steps=120, exact_steps=3000)
    runs = [claim.cell(ppo_run, seed=seed, steps=claim.args.steps) for seed in claim.seeds]
    ends = {
        name: claim.cell(optimum, objective=name, seed=0, steps=claim.args.exact_steps)
        for name in objectives(new_toy(), 0)
    }
    gradients = [claim.cell(same_gradient, seed=seed) for seed in claim.seeds]

    gap = max(abs(left - right) for run in runs for left, right in zip(run["left"], run["right"], strict=True))
    claim.state("J = β·(log Z − KL(π‖π*)) at each step of PPO: largest difference", gap, high=1e-6)
    left = [(run["log_z"] - run["elbo"][-1]) / (run["log_z"] - run["elbo"][0]) for run in runs]
    claim.state("PPO raises the ELBO to log Z: share of the first gap that is left", left, high=0.25)
    for name, end in ends.items():
        if name.startswith(("KL-RL", "f-DPG", "log-variance")):
            claim.state(f"the optimum of {name} is π*: total variation", end["TV"], high=1e-4)
    # the frequencies of n draws from a distribution on N values are at most this far from it, on average
    expected = 0.5 * math.sqrt(2 * len(new_toy().completions) / (math.pi * DRAWS))
    claim.state("SFT on draws of π* is as close to it as their number allows", ends[SFT]["TV"], high=expected)
    cosine = min(gradient["cosine"] for gradient in gradients)
    claim.state("f-DPG with the reverse KL has the direction of ∇J: 1 − lowest cosine", 1 - cosine, high=1e-6)
    ratio = max(abs(gradient["ratio"] / gradient["beta"] - 1) for gradient in gradients)
    claim.state("∇J is β times the gradient of f-DPG: largest relative difference in length", ratio, high=1e-5)
    for name in OTHERS:
        text = f"not in the paper: {name} has another optimum than π*: total variation"
        claim.state(text, ends[name]["TV"], low=1e-3)

    figure, (rising, bars) = panels(2)
    for seed, run in enumerate(runs):
        rising.plot(run["elbo"], color="C0", alpha=0.7, label="ELBO = J/β, PPO" if seed == 0 else None)
    rising.axhline(runs[0]["log_z"], color="0.2", linestyle="--", label="log Z")
    rising.set(xlabel="optimizer step", ylabel="nats", title="The gap is KL(π‖π*)")
    rising.legend(frameon=False)
    bars.barh(
        list(ends),
        [max(end["TV"], 1e-17) for end in ends.values()],
        color=["C3" if name in OTHERS else "C0" for name in ends],
    )
    bars.set(xscale="log", xlabel="TV(optimum, π*)", title="Optimum of each objective")
    bars.tick_params(axis="y", labelsize=7)
    bars.invert_yaxis()
    caption = (
        "Left: exact ELBO along runs of PPO. Right: total variation distance between the posterior and what exact "
        "gradients on each objective end at; red: objectives that are used in place of KL-regularised RL."
    )
    claim.write(figure, [{"objective": name, **end} for name, end in ends.items()], caption)


if __name__ == "__main__":
    main()
