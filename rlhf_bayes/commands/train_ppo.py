"""`rlhf-bayes ppo`: PPO with an explicit KL penalty to the prior, towards the posterior of a reward.

It trains a language model towards π0(x|c)·exp(r(c,x)/β)/Z(c).

The objective is that of Korbak, Perez & Buckley 2022 (arXiv 2205.11275, equations 3 and 4). Departures from the PPO
of Ziegler et al. 2019: β is fixed unless `--target_kl` is given, because it defines the posterior; the critic is
fitted in closed form after each rollout; the result is evaluated by its distance to the posterior, log Z − ELBO, nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from trl import ModelConfig, get_peft_config, get_quantization_config

from rlhf_bayes import PPOConfig, PPOTrainer, toy
from rlhf_bayes.commands import flags
from rlhf_bayes.numerics import POOLING_RULES
from rlhf_bayes.numerics.pooling import rules_help, uses_beta
from rlhf_bayes.toy.rewards import sentiment_reward

ON_CPU = not torch.cuda.is_available()
DEFAULTS = {"output_dir": "runs/ppo_klrl", "use_cpu": ON_CPU, "bf16": not ON_CPU, "logging_steps": 1}
# defaults of the bundled model; with another model, those of the configuration apply
TOY_DEFAULTS = {
    "model_name_or_path": toy.model_path(),
    "beta": 0.25,
    "max_steps": 300,
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "max_completion_length": 32,
    "bf16": False,
    "gradient_checkpointing": False,
}


@dataclass
class Arguments(flags.PromptArguments):
    """Flags for the prompts and the reward; `PPOConfig` has those of training, `ModelConfig` those of the model."""

    reward_func: list[str] | None = field(
        default=None,
        metadata={"action": "extend", "help": "Reward functions, `module:function`. Several are summed; see "
                  "`--reward_weights`. Default: sentiment, with the bundled model only."},
    )  # fmt: skip
    reward_model_path: str | None = field(
        default=None, metadata={"help": "A reward model or an ensemble; its reward is added to the functions'."}
    )
    reward_rule: str = field(
        default="mean",
        metadata={"choices": list(POOLING_RULES), "help": "How the members of an ensemble combine. All rules but the "
                  f"mean center them first on completions of the prior. {rules_help()}"},
    )  # fmt: skip
    reward_penalty: float | None = field(
        default=None, metadata={"help": "Weight of the variance, for mean_minus_variance. Default: 1/(2 beta)."}
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[Arguments, PPOConfig, ModelConfig]:
    """The flags, checked as far as they can be before anything is loaded. Default: those of the process."""
    own_model, parsed = flags.parse_flags(
        (Arguments, PPOConfig, ModelConfig), DEFAULTS, TOY_DEFAULTS, arguments, "rlhf-bayes ppo"
    )
    args, training_args, model_args = parsed
    args.check(own_model)
    if own_model and not args.reward_func and args.reward_model_path is None and args.likelihood is None:
        raise ValueError(
            "`--reward_func module:function`, `--reward_model_path` or `--likelihood module:object` must be given "
            "with `--model_name_or_path`, got none."
        )
    if training_args.target_kl and uses_beta(args.reward_rule, args.reward_penalty):
        raise ValueError(f"`--target_kl` must be left out with `--reward_rule {args.reward_rule}`: it moves β.")
    if args.reward_model_path is None and (args.reward_rule != "mean" or args.reward_penalty is not None):
        raise ValueError("`--reward_model_path` must be given with `--reward_rule` or `--reward_penalty`, got none.")
    return args, training_args, model_args


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments after `rlhf-bayes ppo`, train and report."""
    args, training_args, model_args = parse_arguments(arguments)

    # data and evidence come before the model, so that wrong names are found at once
    likelihood = args.load_likelihood("reward_func", "reward_model_path", "reward_rule", "reward_penalty")
    dataset = args.load(training_args.seed)
    reward_funcs = [flags.load_reward_func(name) for name in args.reward_func or []]
    if args.reward_model_path is not None:
        reward_funcs.append(args.reward_model_path)
    reward_funcs = reward_funcs or [sentiment_reward]

    # model
    training_args.model_init_kwargs = flags.model_init_kwargs(model_args, training_args)
    if args.reward_rule != "mean" or args.reward_penalty is not None:
        prior = flags.load_language_model(model_args.model_name_or_path, training_args)
        # the reward model is the last one; as a path it would be the mean of its members
        reward_funcs[-1] = flags.load_pooled_reward(
            args.reward_model_path, args.reward_rule, prior, dataset["prompt"], training_args.beta, args.reward_penalty
        )
    trainer = PPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs if likelihood is None else None,
        likelihood=likelihood,
        args=training_args,
        train_dataset=dataset,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )

    # train, save and report
    def report() -> None:
        flags.evidence_report(trainer, args, model_args.model_name_or_path, dataset, reward_funcs, likelihood)

    flags.train_and_report(trainer, report if args.report_prompts > 0 else None, args.overwrite_output_dir)
