"""What claims need of a model that is not enumerated, besides the trainers: expert iteration, and H(π*)."""

from typing import Any

import torch
from training import Curve, model_of, posterior_of, prior_of, prompts_of, reward_of

from rlhf_bayes import LanguageModel
from rlhf_bayes.lm import score_completions
from rlhf_bayes.lm.language_model import pad_ids


def expert_iteration_of_model(
    reward: str, beta: float, seed: int, steps: int, points: int, model: dict[str, Any]
) -> dict[str, Any]:
    """Fine-tuning on the best completion of each prompt in a batch of the current policy's, at each step."""
    curve = Curve(model, posterior_of(model, reward, beta), reward, max(1, steps // points), seed)
    policy = LanguageModel(model_of(model), max_completion_length=model["max_completion_length"])
    each, generator = model["batch"] // len(curve.prompts), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.model.parameters(), model["learning_rate"])
    curve.measure(policy.model, 0)
    for step in range(steps):
        drawn = policy.sample(curve.prompts, each, generator)
        columns = {"prompts": drawn.prompts, "completions": drawn.texts, "completion_ids": drawn.completion_ids}
        best = torch.tensor(reward_of(reward)(**columns)).view(-1, each).argmax(-1)  # (P,)
        rows = (best + each * torch.arange(len(best))).tolist()
        prompt_ids = policy.prompt_token_ids(curve.prompts)
        prompt, completion = (
            pad_ids(ids, side, policy.device)
            for ids, side in ((prompt_ids, "left"), ([drawn.completion_ids[row] for row in rows], "right"))
        )
        optimizer.param_groups[0]["lr"] = model["learning_rate"] * (1 - step / steps)
        optimizer.zero_grad()
        (-score_completions(policy.model, *prompt, *completion).log_probs.sum(-1).mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), model["max_grad_norm"])
        optimizer.step()
        if (step + 1) % curve.every == 0 or step + 1 == steps:
            curve.measure(policy.model, step + 1)
    return {"points": curve.points, "texts": [rows[0] for rows in curve.texts]}


def entropy_of_posterior(reward: str, beta: float, draws: int, model: dict[str, Any]) -> float:
    """H(π*) = log Z − E_π*[log π0 + r/β] from weighted draws of the prior, nats, the mean over prompts."""
    prompts = prompts_of(model)
    drawn = prior_of(model).sample(prompts, draws, torch.Generator().manual_seed(77))
    columns = {"prompts": drawn.prompts, "completions": drawn.texts, "completion_ids": drawn.completion_ids}
    evidence = torch.tensor(reward_of(reward)(**columns)).double().view(len(prompts), draws) / beta
    log_prior = drawn.log_prob.double().cpu().view(len(prompts), draws)
    log_z = evidence.logsumexp(-1) - torch.tensor(float(draws)).log()
    return (log_z - (evidence.softmax(-1) * (log_prior + evidence)).sum(-1)).mean().item()
