"""Checks of a training from a store: what is of no use there, and whether the store was made by the same prior."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_bayes.lm.pretrained import load_causal_lm
from rlhf_bayes.rewards import load_reward
from rlhf_bayes.store import CompletionStore, Provenance
from rlhf_bayes.store.provenance import prior_hash, reward_identity
from rlhf_bayes.trainers.gdc.gdc_config import GDCConfig
from rlhf_bayes.trainers.rollout.store_writer import names_of, provenance_of_trainer

if TYPE_CHECKING:
    from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer

_NOTHING_IS_DRAWN = "completions are read from the store, and none is drawn"
# field of the configuration -> why it must have its default
_UNUSED = {
    "proposal": "each stored completion is weighted by what drew it",
    "prior_samples": "Z is estimated from all stored completions",
    "prior_probe": f"{_NOTHING_IS_DRAWN}: `rlhf-bayes what-if STORE` says what β asks for",
    "replay_batches": "the store is the replay, and `num_train_epochs` says how often it is read",
    "use_vllm": _NOTHING_IS_DRAWN,
    "use_transformers_continuous_batching": _NOTHING_IS_DRAWN,
    "log_completions": _NOTHING_IS_DRAWN,
    "replay_store": "the store is all that is learnt from",
    "store": f"{_NOTHING_IS_DRAWN}, so there is nothing new to keep",
    "remove_unused_columns": "the columns say which completions of the store a row stands for",
}
_WITH_ACTORS = {
    "prior_samples": "Z is estimated from the completions that were read so far",
    "replay_batches": "`max_staleness` bounds their age, and `num_iterations` says how often each is used",
}


def check_store_training(args: GDCConfig, store: CompletionStore, eval_dataset: Any) -> None:
    """
    Refuse what is of no use where a training learns from a store, and settings that are not those of the store.

    Args:
        args ([`GDCConfig`]): The configuration.
        store ([`CompletionStore`]): The argument `train_dataset`.
        eval_dataset: The argument of the trainer.

    Raises:
        ValueError: the field, the value, and why.
    """
    reasons = _UNUSED if args.actor_weights is None else _UNUSED | _WITH_ACTORS
    for name, reason in reasons.items():
        if not hasattr(args, name):  # not in every release of TRL
            continue
        value, default = getattr(args, name), _default(args, name)
        if value != default:
            raise ValueError(
                f"`{name}` must be {default!r} with a store as `train_dataset`, got {value!r}: {reason}. Leave it out."
            )
    if eval_dataset is not None:
        raise ValueError(
            "`eval_dataset` must be left out with a store as `train_dataset`: an evaluation draws completions, and "
            "needs the prior and the rewards, which are not in memory. Evaluate the trained policy by "
            "`rlhf_bayes.evaluate(policy, posterior, prompts)`."
        )
    if args.actor_weights is not None:
        _check_with_actors(args)
    made = store.provenance
    for name in ("temperature", "max_completion_length"):
        if getattr(args, name) != getattr(made, name):
            raise ValueError(
                f"`{name}` must be that of the store {str(store.path)!r}, {getattr(made, name)}, got "
                f"{getattr(args, name)}: its log-probabilities are those of another prior. Set it, or draw anew."
            )


def _check_with_actors(args: GDCConfig) -> None:
    if args.max_steps < 1:
        raise ValueError(
            f"`max_steps` must be at least 1 with `actor_weights`, got {args.max_steps}: a store that grows has no "
            "length, so that there are no epochs."
        )


def check_made_by(
    trainer: "RolloutTrainer", store: CompletionStore, reward_funcs: Any, ref_model: Any, tokenizers: Any
) -> None:
    """
    Refuse a store that was made by another prior, tokenizer or reward than a training is about.

    Args:
        trainer (`RolloutTrainer`): The trainer, before its first step.
        store ([`CompletionStore`]): The argument `train_dataset`.
        reward_funcs, ref_model, tokenizers: The arguments of the trainer; where they are given, they are compared with
            what made the store, and not kept.

    Raises:
        ValueError: with both values.
    """
    if trainer.sharded:
        raise ValueError(
            "`train_dataset` must be a dataset of prompts where weights are sharded (ZeRO-3, FSDP), got a store: its "
            "prior cannot be compared with the policy, of which no process has all weights. Use DDP or ZeRO-2."
        )
    if isinstance(ref_model, str):
        ref_model = load_causal_lm(ref_model, dtype=trainer._plain_policy.dtype)
    prior = None if ref_model is None else prior_hash(ref_model)
    own: Provenance = provenance_of_trainer(trainer, [], prior)
    own.check_same(store.provenance, "train_dataset", store.path, rewards=False)
    if reward_funcs is None:
        return
    funcs = list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
    tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(funcs)
    funcs = [
        load_reward(func, tokenizer) if isinstance(func, str | Path) else func
        for func, tokenizer in zip(funcs, tokenizers, strict=True)
    ]
    rewards = {name: reward_identity(func) for name, func in zip(names_of(funcs), funcs, strict=True)}
    asked = dataclasses.replace(own, rewards=rewards, features=store.provenance.features)
    asked.check_same(store.provenance, "train_dataset", store.path)


def _default(args: GDCConfig, name: str) -> Any:
    entry = type(args).__dataclass_fields__[name]
    return entry.default
