"""Writes the model card of a policy, from what its trainer knows."""

from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset

from rlhf_bayes.diagnostics.policy_card import TrainedPolicy, policy_card

if TYPE_CHECKING:
    from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer

_SETTINGS = ("learning_rate", "max_steps", "num_train_epochs", "num_generations", "divergence", "critic", "seed")


def write_card(
    trainer: "RolloutTrainer",
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: list[str] | str | None = None,
) -> None:
    """
    Write `README.md` into the output folder.

    Args:
        trainer (`RolloutTrainer`):
            The trainer of the policy.
        model_name (`str`, *optional*):
            Name to load the model by. Default: that on the hub, or the output folder.
        dataset_name (`str`, *optional*):
            Name of the prompts, for the header that the hub reads.
        tags (`list[str]` or `str`, *optional*):
            Further tags for the hub.
    """
    args = trainer.args
    # transformers passes the last part of the folder, by which nobody but the hub can load it
    known = args.hub_model_id or (model_name if model_name != Path(args.output_dir).name else None)
    rewards = ", ".join(f"`{name}`" for name in trainer.reward_func_names)
    evidence = f"exp(r/β) of the reward {rewards}, β = {trainer.beta:g}"
    if trainer.evidence is not None:
        evidence = f"the likelihood {rewards}"
    data = trainer.train_dataset
    prompt = data[0]["prompt"] if isinstance(data, Dataset) and "prompt" in data.column_names else "The"
    values = {name: getattr(args, name, None) for name in _SETTINGS}
    card = policy_card(
        TrainedPolicy(
            name=known or args.output_dir,
            method=trainer._name,
            evidence=evidence,
            base_model=trainer.model.config._name_or_path or None,
            is_adapter=hasattr(trainer.model, "peft_config"),
            prompt=prompt,
            max_completion_length=trainer.max_completion_length,
            temperature=trainer.temperature,
            dataset=dataset_name,
            settings={name: value for name, value in values.items() if value is not None and value != -1},
            citation=trainer._paper["citation"],
            tags=[*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
        )
    )
    Path(args.output_dir, "README.md").write_text(card, encoding="utf-8")
