"""Loads functions, models and rewards that flags name."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl import RLOOConfig

from rlhf_bayes.likelihoods import Likelihood
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.lm.pretrained import load_causal_lm, whole_weights
from rlhf_bayes.numerics import pool
from rlhf_bayes.numerics.pooling import uses_beta
from rlhf_bayes.rewards import PooledReward, RewardEnsemble, RewardModel, load_reward, prompt_centers


def load_reward_func(name: str) -> Callable[..., Any]:
    """The reward function that `module:function` names: see [`load_function`]."""
    return load_function(name, "reward_func")


def load_function(name: str, flag: str) -> Callable[..., Any]:
    """
    The function that `module:function` names. The module may be in the current folder.

    Args:
        name (`str`):
            The name, `module:function`.
        flag (`str`):
            The flag that gave the name, for error messages.

    Raises:
        ValueError: if the name has another form, the module cannot be imported, or has no such function.
    """
    function, refusal = _named(name, flag, "function", "rewards:my_reward")
    if not callable(function):
        raise refusal
    return function


def load_likelihood(name: str) -> Likelihood:
    """
    The likelihood that `module:object` names. The module may be in the current folder.

    Args:
        name (`str`):
            Of an object with a method `log_likelihood`; or of a class or a function that makes one without arguments.

    Raises:
        ValueError: if the name has another form, the module cannot be imported, or the object is no likelihood.
    """
    found, refusal = _named(name, "likelihood", "object", "evidence:my_likelihood")
    if isinstance(found, Likelihood) and not isinstance(found, type):
        return found
    if not callable(found):
        raise refusal
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ValueError(
            f"`likelihood` must name a likelihood, or what makes one without arguments, got {name!r}: {error}. Make "
            "the likelihood in the module, or give the arguments defaults. A reward function belongs to "
            "`--reward_func`."
        ) from error
    made = found()
    if isinstance(made, type) or not isinstance(made, Likelihood):
        raise ValueError(
            f"`likelihood` must name an object with a method `log_likelihood`, or what makes one, got {name!r}, which "
            f"made a {type(made).__name__}. Return, for instance, `ProductLikelihood([...])`."
        )
    return made


def _named(name: str, flag: str, kind: str, example: str) -> tuple[Any, ValueError]:
    """What `module:object` names, None where there is nothing; and the error for one that is of the wrong kind."""
    module_name, colon, object_name = name.partition(":")
    if not (module_name and colon and object_name):
        raise ValueError(
            f"`{flag}` must have the form `module:{kind}`, got {name!r}. For a module "
            f"`{example.partition(':')[0]}.py` in the current folder: `--{flag} {example}`."
        )
    if os.getcwd() not in sys.path:  # `accelerate launch` adds the script's folder, not the current one
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"`{flag}` must name a module that can be imported, got {name!r}: {error}. Modules are looked for "
            f"among the installed packages and in {os.getcwd()}."
        ) from error
    fitting = [
        public
        for public, value in vars(module).items()
        if not public.startswith("_") and (callable(value) or (kind == "object" and hasattr(value, "log_likelihood")))
    ]
    close = difflib.get_close_matches(object_name, fitting, n=1)
    refusal = ValueError(
        f"`{flag}` must name {'a function' if kind == 'function' else 'a likelihood'} of {module_name!r}, got "
        f"{object_name!r}. " + (f"Is {close[0]!r} meant?" if close else f"It has {fitting}.")
    )
    return getattr(module, object_name, None), refusal


def load_language_model(
    path: str, args: RLOOConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> LanguageModel:
    """
    The language model in a folder or a repository of the hub, which draws the completions that a trainer would draw.

    Args:
        path (`str`):
            The folder or name of a model or an adapter.
        args ([`~trl.RLOOConfig`]):
            Its `model_init_kwargs`, device, `max_completion_length`, `temperature` and `chat_template_kwargs` are
            used.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. Default: the one saved beside the model.
    """
    with whole_weights():
        model = load_causal_lm(path, **(args.model_init_kwargs or {}))
    return LanguageModel(
        model.to(args.device),
        tokenizer,
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        chat_template_kwargs=args.chat_template_kwargs,
    )


def load_pooled_reward(
    path: str,
    rule: str,
    prior: LanguageModel,
    prompts: Sequence[Any],
    beta: float | None = None,
    penalty: float | None = None,
    num_samples: int = 64,
    seed: int = 0,
) -> RewardModel | RewardEnsemble | PooledReward:
    """
    The reward in a folder; the members of an ensemble are pooled by a rule, on a common zero for each prompt.

    Args:
        path (`str`):
            The folder of a reward model or an ensemble. All rules but `"mean"` need an ensemble.
        rule (`str`):
            See [`~rlhf_bayes.numerics.pool`].
        prior ([`~rlhf_bayes.LanguageModel`]):
            Each member is centered on the prior's completions. The mean does not use it.
        prompts (`Sequence` of `str` or of chats):
            All prompts whose completions will be scored.
        beta (`float`, *optional*):
            β of the posterior. Rules without a β do not use it, nor does `"mean_minus_variance"` with a `penalty`.
        penalty (`float`, *optional*):
            Weight of the variance, for `"mean_minus_variance"`.
        num_samples (`int`, *optional*, defaults to `64`):
            Completions that the prior draws for each prompt.
        seed (`int`, *optional*, defaults to `0`):
            Seed of these draws.

    Raises:
        ValueError: if the rule is unknown, does not use a parameter that is given, or needs an ensemble.
    """
    beta = beta if uses_beta(rule, penalty) else None
    pool(torch.zeros(1, 1), rule, beta, penalty)  # refuses what the rule cannot use, before anything is loaded
    reward = load_reward(path, device=prior.device)
    if rule == "mean":
        return reward
    if not isinstance(reward, RewardEnsemble):
        raise ValueError(
            f"`reward_rule` must be 'mean' for a single reward model, which {path!r} is, got {rule!r}. Train an "
            "ensemble: `reward_models/train.py --num_members 4`."
        )
    centers = prompt_centers(reward, prior, prompts, num_samples, torch.Generator().manual_seed(seed))
    return reward.pooled(rule, beta, penalty, centers)
