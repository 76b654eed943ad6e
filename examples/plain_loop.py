"""
Trains a policy towards a posterior in a loop of plain torch and transformers: no Trainer, no trl.

    python examples/plain_loop.py ppo
    python examples/plain_loop.py forward_kl
    python examples/plain_loop.py log_variance --steps 100

An objective needs four things from a loop: a rollout (completions with log-probs under policy and prior, and rewards),
the policy's scores of the batch that it makes from the rollout, an optimizer step, and a `World` that reports the
progress of training. The model here is small enough to enumerate all its completions, so the distance to the posterior
is exact. For a model of your own, replace `EnumerableLM` by a model and a tokenizer from transformers, and
`toy_reward` by your reward.
"""

import argparse

import torch

from rlhf_bayes import LanguageModel
from rlhf_bayes.lm import Critic, score_completions
from rlhf_bayes.lm.language_model import pad_ids
from rlhf_bayes.numerics import DIVERGENCES
from rlhf_bayes.objectives import (
    FDivergenceObjective,
    LogVarianceObjective,
    Objective,
    OneProcess,
    PosteriorTarget,
    PPOObjective,
    ReplayBuffer,
    Rollout,
    World,
)
from rlhf_bayes.testing import EnumerableLM, toy_reward


def make_objective(name: str, world: World, beta: float) -> Objective:
    """PPO; the log-variance loss on the last 4 rollouts; or the f-divergence with this name."""
    if name == "ppo":
        return PPOObjective(world, beta=beta)
    target = PosteriorTarget(world, beta=beta)  # it keeps log Z of each prompt, from all completions so far
    if name == "log_variance":
        return LogVarianceObjective(world, target, ReplayBuffer(4, "uniform", seed=0))
    return FDivergenceObjective(world, target, ReplayBuffer(1, "uniform", seed=0), divergence=name)


def draw_rollout(policy: LanguageModel, prior: LanguageModel, prompts: list[str], n: int) -> Rollout:
    """n completions of each prompt, scored under policy and prior, with their rewards."""
    drawn = policy.sample(prompts, n)
    prompt_ids, prompt_mask = pad_ids(policy.prompt_token_ids(drawn.prompts), "left", policy.device)  # (B, P)
    completion_ids, completion_mask = pad_ids(drawn.completion_ids, "right", policy.device)  # (B, T)
    sequences = (prompt_ids, prompt_mask, completion_ids, completion_mask)
    with torch.no_grad():
        scores, ref_scores = (score_completions(lm.model, *sequences) for lm in (policy, prior))
    return Rollout(
        *sequences,
        prompt_keys=torch.tensor([prompts.index(prompt) for prompt in drawn.prompts]),  # (B,)
        token_log_probs=scores.log_probs,  # (B, T), nats
        ref_token_log_probs=ref_scores.log_probs,
        token_entropy=scores.entropy,
        values=scores.values,  # None where the model has no critic
        log_proposal=scores.log_probs.sum(-1),  # (B,): the policy drew
        rewards=torch.tensor(toy_reward(drawn.prompts, drawn.completions, drawn.completion_ids)),  # (B,)
        num_generations=n,
    )


def train(name: str, steps: int = 200, learning_rate: float = 1e-3, seed: int = 0) -> tuple[float, float]:
    """Train the toy by an objective. Returns exact KL(π‖π*), nats, the mean over prompts, before and after."""
    torch.manual_seed(seed)
    toy = EnumerableLM(vocab_size=5, max_completion_length=3)
    model = toy.random_policy(noise=0.0)  # the policy starts as a copy of the prior
    policy, prior = (LanguageModel(lm, toy.tokenizer, toy.max_completion_length) for lm in (model, toy.model))
    if name == "ppo":
        model.add_module("critic", Critic(model.config.hidden_size))  # a value head on the policy's hidden states
    world = OneProcess(
        log_probs=lambda batch: score_completions(model, *batch.sequences).log_probs.sum(-1), max_steps=steps
    )
    objective = make_objective(name, world, toy.beta)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    distances = [toy.reverse_kl(model).mean().item()]
    for world.step in range(steps):
        batch = objective.batch(draw_rollout(policy, prior, toy.prompts, n=16))
        step = objective.step([batch], [batch])
        if step.skipped:  # none of the completions has any weight under the posterior
            continue
        optimizer.zero_grad()
        count = sum(objective.count(batch) for batch in step.batches)
        for batch in step.batches:
            loss, sums = objective.loss(score_completions(model, *batch.sequences), batch)
            (loss / count).backward()
        objective.report({metric: total.item() for metric, total in sums.items()})
        optimizer.step()
        if (world.step + 1) % max(1, steps // 5) == 0:
            distances.append(toy.reverse_kl(model).mean().item())
            elbo, log_z = (world.metrics[f"posterior/{metric}"][-1] for metric in ("elbo", "log_z"))
            print(f"step {world.step + 1:4d}  ELBO {elbo:6.3f}  log Z {log_z:6.3f}  KL(π‖π*) {distances[-1]:.4f}")
    return distances[0], distances[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains a toy policy towards its posterior, without a Trainer.")
    parser.add_argument("objective", choices=["ppo", "log_variance", *DIVERGENCES])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps, of 48 completions each")
    arguments = parser.parse_args()
    before, after = train(arguments.objective, arguments.steps)
    print(f"KL(policy || posterior): {before:.4f} nats before, {after:.4f} after {arguments.steps} steps")
