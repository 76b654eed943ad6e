"""What became of the arguments of TRL's former PPO trainer, for error messages and for `docs/migration.md`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class Successor:
    """What took the place of an argument."""

    name: str | None
    """The argument of today; None where there is none."""
    help: str
    """What to do, in one sentence."""
    same_value: bool = False
    """Whether the value can be passed on as it is."""

    @property
    def text(self) -> str:
        """The name and what to do, for a table or an error."""
        return self.help if self.name is None else f"`{self.name}`: {self.help}"


_SIZES = "Leave it out; sizes follow from `per_device_train_batch_size`, `gradient_accumulation_steps` and processes."

OLD_FIELDS: Mapping[str, Successor] = {
    "kl_coef": Successor("beta", "the same number. It is β of the posterior, and is fixed.", same_value=True),
    "cliprange": Successor("epsilon", "the same number.", same_value=True),
    "num_ppo_epochs": Successor("num_iterations", "the same number; each is an optimizer step.", same_value=True),
    "response_length": Successor("max_completion_length", "the same number of tokens.", same_value=True),
    "total_episodes": Successor(
        "max_steps",
        "`num_iterations` × `total_episodes` / completions of a rollout, which are `per_device_train_batch_size` × "
        "`gradient_accumulation_steps` × processes.",
    ),
    "num_mini_batches": Successor(
        "steps_per_generation",
        "`num_mini_batches` × `gradient_accumulation_steps`; each mini-batch is an optimizer step, which it was not "
        "before. Leave it out for 1.",
    ),
    "mini_batch_size": Successor(None, _SIZES),
    "batch_size": Successor(None, _SIZES),
    "micro_batch_size": Successor(None, _SIZES),
    "local_batch_size": Successor(None, _SIZES),
    "local_mini_batch_size": Successor(None, _SIZES),
    "num_total_batches": Successor("max_steps", "the number of optimizer steps."),
    "local_rollout_forward_batch_size": Successor(
        None,
        "Leave it out; `per_device_train_batch_size` completions are scored at a time.",
    ),
    "num_sample_generations": Successor("log_completions", "True; samples are then logged every `logging_steps`."),
    "stop_token": Successor(None, "Leave it out; a completion ends with the tokenizer's EOS, which is part of it."),
    "stop_token_id": Successor(None, "Leave it out; set the tokenizer's `eos_token`, which ends a completion."),
    "whiten_rewards": Successor(
        None,
        "Leave it out; whitened rewards have another posterior as optimum. `normalize_advantages` whitens advantages.",
    ),
    "gamma": Successor(None, "Leave it out; it is 1, since another discount would move the optimum."),
    "sft_model_path": Successor("model", "an argument of the trainer: the path, or the model."),
    "reward_model_path": Successor("reward_funcs", "an argument of the trainer: the path, the model, or functions."),
    "model_adapter_name": Successor(None, "Leave it out; pass a PeftModel whose adapter is named `default`."),
    "ref_adapter_name": Successor("ref_model", "an argument of the trainer; by default the model as it was passed."),
    "exp_name": Successor("run_name", "the same text.", same_value=True),
    "dataset_num_proc": Successor(None, "Leave it out; the trainer tokenises prompts as it draws."),
    "world_size": Successor(None, "Leave it out; `accelerate launch --num_processes` sets it."),
    "init_kl_coef": Successor("beta", "the same number.", same_value=True),
    "ppo_epochs": Successor("num_iterations", "the same number.", same_value=True),
    "adap_kl_ctrl": Successor("target_kl", "nats per sequence, for a β that adapts; None for a fixed one."),
    "target": Successor("target_kl", "nats per sequence.", same_value=True),
    "horizon": Successor("kl_horizon", "the same number of completions.", same_value=True),
    "init_value_model": Successor("value_model", "an argument of the trainer, with `critic='separate'`."),
}
"""Fields of the former `PPOConfig`, the last of them of its predecessor up to TRL 0.11."""

OLD_ARGUMENTS: Mapping[str, Successor] = {
    "reward_model": Successor("reward_funcs", "the same model, its path, or functions.", same_value=True),
    "data_collator": Successor(None, "Leave it out; the trainer tokenises and pads prompts itself."),
    "policy": Successor("model", "the same.", same_value=True),
    "ref_policy": Successor("ref_model", "the same, or left out: a copy of the initial policy.", same_value=True),
    "config": Successor("args", "a `PPOConfig`."),
    "tokenizer": Successor("processing_class", "the same.", same_value=True),
    "dataset": Successor("train_dataset", "the same, with a column `prompt` of texts or chats."),
    "num_shared_layers": Successor(None, "Leave it out; the prior is the base without adapters, or a copy."),
}
"""Arguments of the former trainer, likewise."""

OLD_METHODS: Mapping[str, Successor] = {
    "generate_completions": Successor(
        None, "Set `log_completions=True`, or draw and compare with `rlhf_bayes.diagnostics.evaluate`."
    ),
    "step": Successor(None, "Call `train()`; for a loop of your own see `examples/plain_loop.py`."),
}
"""Methods of the former trainer."""

OTHER_DEFAULTS: Mapping[str, tuple[Any, str]] = {
    "temperature": (0.7, "of the policy and of the prior: it belongs to the posterior"),
    "lam": (
        0.95,
        "λ is chosen by how much the critic explains, up to 1, where the gradient is unbiased however bad it is",
    ),
    "cliprange_value": (0.2, "the scale of the reward is not known"),
    "num_iterations": (4, "`num_ppo_epochs` there"),
    "max_completion_length": (53, "`response_length` there"),
    "learning_rate": (3e-6, "adapted to how far optimizer steps move the policy; TRL's RLOO has 1e-6"),
    "normalize_advantages": (True, "there always"),
    "num_generations": (1, "completions of a prompt; their siblings correct the critic"),
    "critic": ("separate", "it is fitted in closed form: no second model, and no learning rate"),
}
"""Field of today -> its default there, and a remark. To train as before, set those of there."""


def names_successors(old: Mapping[str, Successor], kind: str) -> Callable[[Class], Class]:
    """
    Class decorator: a constructor that is given an argument of TRL's former PPO says what took its place.

    Args:
        old (`Mapping[str, Successor]`):
            The former arguments.
        kind (`str`):
            What the argument is, for the error: "field" or "argument".
    """

    def decorate(cls: Class) -> Class:
        plain = cls.__init__

        @functools.wraps(plain)
        def __init__(self, *args, **kwargs):
            found = [name for name in kwargs if name in old]
            if found:
                raise TypeError(said_of(found, old, f"is no {kind} of {cls.__name__}"))
            plain(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[misc]
        return cls

    return decorate


def said_of(names: Sequence[str], old: Mapping[str, Successor], what: str) -> str:
    """
    An error message for former names.

    Args:
        names (`Sequence[str]`):
            The names that were given.
        old (`Mapping[str, Successor]`):
            Where they are explained.
        what (`str`):
            What is wrong with each of them.
    """
    lines = [f"`{name}` {what}, but of TRL's former PPO. {_sentence(old[name])}" for name in names]
    return " ".join([*lines, "All of them: docs/migration.md."])


def check_old_flags(arguments: Sequence[str]) -> None:
    """
    Refuse the flags of TRL's former PPO script, with what took their place.

    Args:
        arguments (`Sequence[str]`):
            Of the command line.

    Raises:
        ValueError: if there are some.
    """
    flags = [word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")]
    found = [flag for flag in dict.fromkeys(flags) if flag in OLD_FIELDS and flag not in _FLAGS_OF_THE_RECIPES]
    if found:
        raise ValueError(said_of([f"--{flag}" for flag in found], _as_flags(found), "is no flag"))


_FLAGS_OF_THE_RECIPES = ("reward_model_path",)


def _as_flags(names: Sequence[str]) -> dict[str, Successor]:
    return {f"--{name}": OLD_FIELDS[name] for name in names}


def _sentence(successor: Successor) -> str:
    return successor.help if successor.name is None else f"Now it is `{successor.name}`: {successor.help}"
