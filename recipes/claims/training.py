"""Training runs of claims: rewards, prior and prompts by their settings, and the curve of a run."""

import functools
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from rlhf_bayes import GDCConfig, GDCTrainer, LanguageModel, Posterior, PPOConfig, PPOTrainer, cli, toy
from rlhf_bayes.diagnostics import Evaluation, evaluate
from rlhf_bayes.likelihoods import Constraint
from rlhf_bayes.rewards import load_reward

METHODS = {
    "ppo": (PPOTrainer, PPOConfig, {}),
    "rloo": (RLOOTrainer, RLOOConfig, {"disable_dropout": True}),
    "gdc-forward": (GDCTrainer, GDCConfig, {"divergence": "forward_kl"}),
    "gdc-js": (GDCTrainer, GDCConfig, {"divergence": "js"}),
    "gdc-alpha": (GDCTrainer, GDCConfig, {"divergence": "alpha", "alpha": 0.5}),
    "log-variance": (GDCTrainer, GDCConfig, {"divergence": "log_variance"}),
    # maximum likelihood on draws of the prior that are weighted like draws of the posterior
    "weighted-sft": (GDCTrainer, GDCConfig, {"divergence": "forward_kl", "proposal": "prior"}),
}
SATISFIED = 0.5  # a completion of more reward is satisfying
SENTIMENT = "rlhf_bayes.toy.rewards:sentiment_reward"
MEASURES = ("kl_to_prior", "entropy", "prior_perplexity", "distinct_1", "distinct_2", "self_bleu", "duplicates",
            "gap", "forward_kl", "tv", "reward", "log_z", "posterior_reward", "posterior_kl_to_prior")  # fmt: skip


def contains(word: str) -> Callable[..., list[float]]:
    """The reward function that is 1 where a completion contains a word, else 0."""

    def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        return [float(count > 0) for count in mentions(word, completions)]

    reward.__name__ = f"contains_{word}"
    return reward


def mentions(word: str, texts: Sequence[Any]) -> list[int]:
    """How often each text contains a word."""
    return [len(re.findall(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)) for text in texts]


REWARDS: dict[str, Callable[[str], Callable[..., list[float]]]] = {"word": contains}
"""Kind -> what makes a reward function from the rest of its name, after the colon. A script may add its own kind."""


@functools.cache
def reward_of(name: str) -> Callable[..., list[float]]:
    """
    The reward function of a name: `KIND:REST` for a kind in `REWARDS`, a reward model's folder, or `module:function`.

    A proxy of a known reward has that one as its attribute `gold`, and curves then have both.
    """
    kind, _, rest = name.partition(":")
    if kind in REWARDS:
        return REWARDS[kind](rest)
    return load_reward(name) if Path(name).is_dir() else cli.load_reward_func(name)


def model_of(model: dict[str, Any]) -> str:
    """The path of the prior."""
    return model["model_name_or_path"] or toy.model_path()


@functools.cache
def _prior(path: str, max_completion_length: int) -> LanguageModel:
    return LanguageModel(path, max_completion_length=max_completion_length)


def prior_of(model: dict[str, Any]) -> LanguageModel:
    """The prior."""
    return _prior(model_of(model), model["max_completion_length"])


def prompts_of(model: dict[str, Any]) -> list[Any]:
    """The prompts."""
    if model["dataset_name"] is None:
        return toy.prompts()[: model["max_prompts"]]
    return list(cli.load_prompts(model["dataset_name"], model["prompt_column"], model["max_prompts"])["prompt"])


def posterior_of(model: dict[str, Any], reward: str, beta: float | None) -> Posterior:
    """π0·exp(r/β)/Z; without β, the prior on condition that a completion is satisfying."""
    prior = prior_of(model)
    if beta is None:

        def satisfies(**columns: Any) -> list[bool]:
            return [value > SATISFIED for value in reward_of(reward)(**columns)]

        return Posterior(prior, Constraint(satisfies))
    return prior.tilt(reward_of(reward), beta)


def numbers_of(evaluation: Evaluation) -> dict[str, float | None]:
    """The measures of a policy; None for what cannot be trusted."""
    fit = evaluation.policy
    estimates = {name: getattr(fit, name) for name in MEASURES}
    return {name: None if found is None or not found.trustworthy else found.mean for name, found in estimates.items()}


class Curve(TrainerCallback):
    """Measures a policy at regular steps of its training, with draws of its own, which do not influence training."""

    def __init__(self, model: dict[str, Any], posterior: Posterior, reward: str, every: int, seed: int):
        self.model, self.posterior, self.reward, self.every = model, posterior, reward, every
        self.prompts, self.seed = prompts_of(model), seed
        self.points: list[dict[str, Any]] = []
        self.texts: list[list[str]] = []
        self.from_prior = None

    def measure(self, policy: Any, step: int) -> None:
        """Add a point."""
        was_training, prior = policy.training, self.posterior.prior
        lm = LanguageModel(policy, prior.tokenizer, prior.max_completion_length)
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        found = evaluate(lm, self.posterior, self.prompts, self.model["draws"], generator, from_prior=self.from_prior)
        policy.train(was_training)
        self.from_prior, self.texts = found.from_prior, found.from_policy.texts
        texts = [text for rows in self.texts for text in rows]
        reward = reward_of(self.reward)
        columns = {
            "prompts": [prompt for prompt in self.prompts for _ in range(self.model["draws"])],
            "completions": texts,
            "completion_ids": [ids for rows in found.from_policy.completion_ids for ids in rows],
        }
        rewards = reward(**columns)
        point = {"step": step, **numbers_of(found), "reward": sum(rewards) / len(rewards)}
        point["satisfied"] = sum(reward > SATISFIED for reward in rewards) / len(rewards)
        if hasattr(reward, "gold"):
            point["gold"] = sum(reward.gold(**columns)) / len(rewards)
        if self.reward.startswith("word:"):
            point["mentions"] = sum(mentions(self.reward[5:], texts)) / len(texts)
        self.points.append(point)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(model, state.global_step)


def train(
    method: str,
    reward: str,
    beta: float | None,
    seed: int,
    steps: int,
    model: dict[str, Any],
    points: int = 4,
    target_beta: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """
    Train once. Returns the curve, and completions at the end.

    Args:
        method (`str`): one of `METHODS`.
        reward (`str`): see `reward_of`.
        beta (`float`, *optional*): of the posterior that is trained towards; None: the condition that completions are
            satisfying; 0: no KL penalty.
        target_beta (`float`, *optional*): of the posterior that the policy is measured against. Default: `beta`, and
            the condition where that is 0 or None.
        **options: further fields of the trainer's configuration.
    """
    trainer_class, config_class, fields = METHODS[method]
    posterior = posterior_of(model, reward, target_beta or beta or None)
    curve = Curve(model, posterior, reward, max(1, steps // points), seed)
    evidence: dict[str, Any] = {"reward_funcs": reward_of(reward)}
    if beta is None:
        evidence = {"likelihood": posterior_of(model, reward, None).likelihood}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model_of(model),
            **evidence,
            args=config_class(
                output_dir=folder,
                seed=seed,
                max_steps=steps,
                learning_rate=model["learning_rate"],
                max_grad_norm=model["max_grad_norm"],
                max_completion_length=model["max_completion_length"],
                per_device_train_batch_size=model["batch"],
                use_cpu=not torch.cuda.is_available(),
                model_init_kwargs={"dtype": "float32"},
                bf16=False,
                gradient_checkpointing=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **({} if beta is None else {"beta": beta}),
                **{"num_generations": 8} | fields | options,
            ),
            train_dataset=Dataset.from_dict({"prompt": curve.prompts}),
            callbacks=[curve],
        )
        trainer.remove_callback(PrinterCallback)
        curve.measure(trainer.accelerator.unwrap_model(trainer.model), 0)
        trainer.train()
    return {"points": curve.points, "texts": [rows[0] for rows in curve.texts]}


def first(runs: Sequence[dict[str, Any]], measure: str) -> list[float]:
    """A measure at the start of each run; nan for what could not be trusted."""
    return _measured(runs, measure, 0)


def last(runs: Sequence[dict[str, Any]], measure: str) -> list[float]:
    """A measure at the end of each run; nan for what could not be trusted."""
    return _measured(runs, measure, -1)


def _measured(runs: Sequence[dict[str, Any]], measure: str, index: int) -> list[float]:
    found = [run["points"][index][measure] for run in runs]
    return [math.nan if value is None else value for value in found]


def draw_curves(axes: Any, runs: dict[str, Sequence[dict[str, Any]]], measure: str, title: str) -> None:
    """Draw a measure over training: the mean over the seeds of each setting, and their range."""
    for index, (name, of) in enumerate(runs.items()):
        steps = [point["step"] for point in of[0]["points"]]
        values = [[math.nan if point[measure] is None else point[measure] for point in run["points"]] for run in of]
        means, lows, highs = zip(*((sum(x) / len(x), min(x), max(x)) for x in zip(*values, strict=True)), strict=True)
        axes.plot(steps, means, color=f"C{index}", marker=".", label=name)
        axes.fill_between(steps, lows, highs, color=f"C{index}", alpha=0.15, linewidth=0)
    axes.set(title=title, xlabel="optimizer step")


def table_rows(runs: dict[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each point of each run."""
    return [
        {"run": name, "seed": seed, **point}
        for name, of in runs.items()
        for seed, run in enumerate(of)
        for point in run["points"]
    ]
