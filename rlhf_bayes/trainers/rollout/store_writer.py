"""Keeps the rollouts of a training in a store."""

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

from rlhf_bayes.lm.adapters import base_causal_lm
from rlhf_bayes.objectives import Rollout
from rlhf_bayes.rewards.scoring import distinct_names
from rlhf_bayes.rewards.validation import callable_name
from rlhf_bayes.store import CompletionStore, Provenance, ScoredCompletion
from rlhf_bayes.store.provenance import prior_hash, reward_identity, template_hash, tokenizer_hash, weights_hash
from rlhf_bayes.store.score_draws import LOG_LIKELIHOOD
from rlhf_bayes.trainers._trl.engines import plain
from rlhf_bayes.trainers.rollout.in_flight import RolloutInFlight

if TYPE_CHECKING:
    from rlhf_bayes.trainers._trl.rollout_trainer import RolloutTrainer


@final
class StoreWriter:
    """
    Writes each rollout of a training to a store, a file for each process.

    A run that is resumed writes a rollout again under the same name, so that no completion is in the store twice.

    Args:
        trainer (`RolloutTrainer`):
            The trainer, before its first step.
        path (`str`):
            The folder of the store.

    Raises:
        ValueError: if the store that is there was made by something else, prompts may have images, or the weights of
            the prior are sharded.
    """

    def __init__(self, trainer: "RolloutTrainer", path: str):
        if trainer.reads_images:
            raise ValueError(f"`store` must be left out with a processor of images, got {path!r}: it holds text only.")
        if trainer.sharded:
            raise ValueError(
                f"`store` must be left out where weights are sharded (ZeRO-3, FSDP), got {path!r}: a hash of the "
                "prior's weights is kept, and no process has them whole. Use DDP or ZeRO-2."
            )
        self.trainer = trainer
        self.names = [] if trainer.evidence is not None else list(trainer.reward_func_names)
        self.store = CompletionStore.create(path, provenance_of_trainer(trainer, self.names))
        self.run, self.count = f"run_{uuid.uuid4().hex[:8]}", 0

    def write(self, rollout: Rollout, inputs: Sequence[dict[str, Any]], in_flight: RolloutInFlight) -> None:
        """
        Write a rollout of this process.

        Args:
            rollout ([`~rlhf_bayes.objectives.Rollout`]): Completions and their log-probs.
            inputs (`Sequence[dict]`): Their rows of the dataset.
            in_flight ([`RolloutInFlight`]): What each reward function returned.
        """
        trainer, step = self.trainer, self.trainer.state.global_step
        # the draws of a policy at one step have the same proposal, unless a snapshot drew
        drawn_by = "prior" if rollout.drawn_from == "prior" else f"{rollout.drawn_from} of {self.run} at step {step}"
        prompt_ids, completion_ids = (
            [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.bool().cpu(), strict=True)]
            for ids, mask in (
                (rollout.prompt_ids, rollout.prompt_mask),
                (rollout.completion_ids, rollout.completion_mask),
            )
        )
        texts = trainer.text_tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        log_prior, log_proposal = rollout.ref_token_log_probs.sum(-1).tolist(), rollout.log_proposal.tolist()
        per_func: Any = in_flight.rewards_per_func
        ended: Any = in_flight.ended
        scores = per_func.tolist()  # (B, F)
        features = {name: values.tolist() for name, values in rollout.features.items()}
        if trainer.evidence is not None:
            features[LOG_LIKELIHOOD] = [row[0] for row in scores]
        rows = [
            ScoredCompletion(
                prompt=row["prompt"],
                prompt_ids=prompt_ids[index],
                completion=texts[index],
                completion_ids=completion_ids[index],
                ended=bool(ended[index]),
                log_prior=log_prior[index],
                log_proposal=log_proposal[index],
                drawn_by=drawn_by,
                rewards=dict(zip(self.names, map(_or_none, scores[index]), strict=False)),
                features={name: _or_none(values[index]) for name, values in features.items()},
                columns={name: value for name, value in row.items() if name != "prompt"},
                step=step,
            )
            for index, row in enumerate(inputs)
        ]
        self.store.append(rows, f"{self.run}-{self.count:08d}-{trainer.accelerator.process_index}")
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """The position, for a checkpoint."""
        return {"run": self.run, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.run, self.count = state["run"], state["count"]


def provenance_of_trainer(
    trainer: "RolloutTrainer", reward_names: Sequence[str], prior: str | None = None
) -> Provenance:
    """
    What the numbers of a training are made by.

    Args:
        trainer (`RolloutTrainer`):
            The trainer, before its first step.
        reward_names (`Sequence[str]`):
            Names of the reward functions; empty for evidence in nats.
        prior (`str`, *optional*):
            The hash of the prior's weights, where it is known.
    """
    args, policy = trainer.args, trainer._plain_policy
    if prior is None and trainer.reference.module is not None:
        prior = weights_hash(plain(trainer.reference.module, trainer.accelerator))
    tokenizer = trainer.text_tokenizer
    functions = zip(reward_names, trainer.reward_funcs, strict=False)
    evidence = {} if trainer.evidence is None else {LOG_LIKELIHOOD: reward_identity(trainer.evidence.likelihood)}
    return Provenance(
        prior=prior_hash(policy) if prior is None else prior,
        tokenizer=tokenizer_hash(tokenizer),
        chat_template=template_hash(tokenizer, getattr(args, "chat_template_kwargs", None)),
        temperature=float(trainer.temperature),
        max_completion_length=trainer.max_completion_length,
        eos_token_ids=sorted(set(trainer._eos_ids)),
        rewards={name: reward_identity(func) for name, func in functions},
        features=evidence,
        name=str(getattr(base_causal_lm(policy).config, "_name_or_path", "")),
    )


def names_of(reward_funcs: Sequence[Any]) -> list[str]:
    """The names under which TRL logs reward functions."""
    return distinct_names(callable_name(func) for func in reward_funcs)


def _or_none(value: float) -> float | None:
    return None if value != value else value
