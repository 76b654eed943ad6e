"""Trainings on a model whose completions are enumerated: they learn from samples, and are measured exactly."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from training import METHODS
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from rlhf_bayes.numerics import forward_kl, reverse_kl, tv
from rlhf_bayes.testing import EnumerableLM, toy_reward

BATCH = 48
Loss = Callable[[Tensor, Tensor], Tensor]
"""(log π of draws (P, n), with gradient; which completions they are (P, n)) -> loss."""


def new_toy(seed: int = 0) -> EnumerableLM:
    """156 completions of each of 3 prompts; a seed makes another prior."""
    return EnumerableLM(vocab_size=6, max_completion_length=3, seed=seed)


def measured_exactly(toy: EnumerableLM, log_policy: Tensor, step: int) -> dict[str, float]:
    """Exact measures of a policy (P, N), nats, against the posterior of the toy's β: means over prompts."""
    q, prior = log_policy.detach().double().log_softmax(-1), toy.log_prior.double().log_softmax(-1)
    posterior = (prior + toy.rewards.double() / toy.beta).log_softmax(-1)
    found = {
        "kl_to_posterior": reverse_kl(posterior, q),
        "forward_kl": forward_kl(posterior, q),
        "tv": tv(posterior, q),
        "kl_to_prior": reverse_kl(prior, q),
        "entropy": -(q.exp() * q).sum(-1),
        "reward": (q.exp() * toy.rewards.double()).sum(-1),
    }
    return {"step": step, **{name: of.mean().item() for name, of in found.items()}}


class ExactCurve(TrainerCallback):
    """Measures the policy of a trainer exactly at regular steps."""

    def __init__(self, toy: EnumerableLM, every: int):
        self.toy, self.every, self.points = toy, every, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            with torch.no_grad():
                log_policy = self.toy.log_probs(model)
            self.points.append(measured_exactly(self.toy, log_policy, state.global_step))


def train_enumerated(
    method: str, beta: float, seed: int, steps: int, learning_rate: float = 3e-3, points: int = 10, **options: Any
) -> dict[str, Any]:
    """
    Train the toy by a trainer, on samples. Returns the exact curve.

    Args:
        method (`str`): one of `METHODS`.
        beta (`float`): of the training. The curve is measured against the posterior of the toy's own β.
        **options: further fields of the trainer's configuration.
    """
    toy = new_toy()
    curve = ExactCurve(toy, max(1, steps // points))
    curve.points.append(measured_exactly(toy, toy.log_prior, 0))
    trainer_class, config_class, fields = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder,
            seed=seed,
            beta=beta,
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=BATCH,
            max_completion_length=toy.max_completion_length,
            model_init_kwargs={"dtype": "float32"},
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{"num_generations": 4} | fields | options,
        )
        dataset = Dataset.from_dict({"prompt": toy.prompts * BATCH})
        trainer = trainer_class(
            toy.save(folder), toy_reward, config, dataset, processing_class=toy.tokenizer, callbacks=[curve]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {"points": curve.points}


def loop(
    toy: EnumerableLM,
    loss: Loss,
    seed: int,
    steps: int,
    learning_rate: float = 3e-3,
    points: int = 10,
    proposal: Tensor | None = None,
    policy: PreTrainedModel | None = None,
    draws: int = BATCH // 3,
    observe: Callable[[Tensor], dict[str, Any]] | None = None,
    until: Callable[[dict[str, Any]], bool] = lambda point: False,
) -> dict[str, Any]:
    """
    Train the toy on samples by any loss, in a plain loop. Returns the exact curve.

    Args:
        toy (`EnumerableLM`): the toy.
        loss (`Loss`): the loss of a batch.
        proposal (`Tensor` (P, N), *optional*): log-probabilities that completions are drawn from. Default: the policy.
        policy (`PreTrainedModel`, *optional*): the policy; only its parameters that require a gradient are trained.
            Default: a copy of the prior.
        draws (`int`): completions of each prompt in a step.
        observe (`Callable`, *optional*): what else to measure of log π (P, N) at each point.
        until (`Callable`, *optional*): stops training after the first point for which it is true.
    """
    policy = toy.random_policy(noise=0.0) if policy is None else policy
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([x for x in policy.parameters() if x.requires_grad], learning_rate)
    every, curve = max(1, steps // points), []
    for step in range(steps + 1):
        log_policy = toy.log_probs(policy)  # (P, N)
        if step % every == 0 or step == steps:
            curve.append(measured_exactly(toy, log_policy, step) | (observe(log_policy.detach()) if observe else {}))
            if step == steps or until(curve[-1]):
                break
        source = log_policy.detach() if proposal is None else proposal
        drawn = torch.multinomial(source.exp(), draws, replacement=True, generator=generator)  # (P, n)
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        loss(log_policy.gather(1, drawn), drawn).backward()
        optimizer.step()
    return {"points": curve}


def kl_rl_loss(toy: EnumerableLM, beta: float, rewards: Tensor | None = None) -> Loss:
    """The loss whose gradient is that of −E[r] + β·KL(π‖π0), with a leave-one-out baseline (RLOO)."""
    rewards = toy.rewards if rewards is None else rewards

    def loss(log_policy: Tensor, drawn: Tensor) -> Tensor:
        score = rewards.gather(1, drawn) - beta * (log_policy.detach() - toy.log_prior.gather(1, drawn))
        n = score.size(1)
        advantage = (score - score.mean(-1, keepdim=True)) * n / (n - 1)
        return -(advantage * log_policy).mean()

    return loss
