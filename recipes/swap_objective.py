r"""One TRL script, five objectives: the same model, prompts, reward and flags towards the same posterior.

It is a script for TRL's RLOO. PPO and distributional policy gradients with three divergences take its place by
changing the two class names in OBJECTIVES, as in the README. All of them train towards π0·exp(r/β)/Z, so they can be
compared by one number: the remaining distance, in nats.

    accelerate launch recipes/swap_objective.py --objective rloo
    accelerate launch recipes/swap_objective.py --objective ppo
    accelerate launch recipes/swap_objective.py --objective gdc-forward

Any causal LM, prompts and reward, as in recipes/ppo_klrl.py; flags are those of RLOOConfig, and of PPOConfig or
GDCConfig for the objectives that have more:

    accelerate launch recipes/swap_objective.py --objective gdc-alpha --alpha 0.3 --num_iterations 4 \
        --model_name_or_path Qwen/Qwen2.5-0.5B --use_peft --learning_rate 1e-5 --beta 0.05 --dataset_name \
        stanfordnlp/imdb --prompt_column text --max_prompts 2000 --reward_func rlhf_bayes.toy.rewards:vader_reward
"""

from dataclasses import dataclass, field

import torch
from trl import ModelConfig, RLOOConfig, RLOOTrainer, TrlParser, get_peft_config

from rlhf_bayes import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer, cli, toy
from rlhf_bayes.commands.quiet import quiet_libraries
from rlhf_bayes.toy.rewards import sentiment_reward

OBJECTIVES = {
    "rloo": (RLOOTrainer, RLOOConfig, {}),
    "ppo": (PPOTrainer, PPOConfig, {}),
    "gdc-forward": (GDCTrainer, GDCConfig, {"divergence": "forward_kl"}),
    "gdc-js": (GDCTrainer, GDCConfig, {"divergence": "js"}),
    "gdc-alpha": (GDCTrainer, GDCConfig, {"divergence": "alpha", "alpha": 0.5}),
    "gdc-log-variance": (GDCTrainer, GDCConfig, {"divergence": "log_variance"}),
}
ON_CPU = not torch.cuda.is_available()
DEFAULTS = {"use_cpu": ON_CPU, "bf16": not ON_CPU, "logging_steps": 1}
# defaults of the bundled model; with another model, TRL's defaults apply
TOY_DEFAULTS = {
    "model_name_or_path": toy.model_path(),
    "beta": 0.25,
    "learning_rate": 3e-4,
    "max_steps": 300,
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "max_completion_length": 32,
    "bf16": False,
    "gradient_checkpointing": False,
    # with dropout the reference would be another distribution than the prior; our trainers refuse it
    "disable_dropout": True,
}


@dataclass
class Arguments(cli.PromptArguments):
    """What to train on; the objective's config says how, and `ModelConfig` which model."""

    objective: str = field(default="rloo", metadata={"choices": list(OBJECTIVES), "help": "What is minimised."})
    reward_func: list[str] | None = field(
        default=None,
        metadata={"action": "extend", "help": "Reward functions, `module:function`. Several are added up. Default: "
                  "sentiment, with the bundled model only."},
    )  # fmt: skip


def main() -> None:
    quiet_libraries()
    # parsed once beforehand, since the flags depend on the objective
    (first_look, *_) = TrlParser(Arguments, add_help=False, allow_abbrev=False).parse_args_and_config(
        return_remaining_strings=True
    )
    trainer_class, config_class, options = OBJECTIVES[first_look.objective]
    defaults = DEFAULTS | {"output_dir": f"runs/swap_objective/{first_look.objective}"} | options
    own_model, parsed = cli.parse_flags((Arguments, config_class, ModelConfig), defaults, TOY_DEFAULTS)
    args, training_args, model_args = parsed
    args.check(own_model)
    if own_model and not args.reward_func and args.likelihood is None:
        raise ValueError(
            "`--reward_func module:function` or `--likelihood module:object` must be given with "
            "`--model_name_or_path`, got neither."
        )
    if args.likelihood is not None and trainer_class is RLOOTrainer:
        raise ValueError(
            f"`--likelihood` must be left out with `--objective {args.objective}`, got {args.likelihood!r}: TRL's "
            f"trainer takes rewards only. Choose one of {', '.join(name for name in OBJECTIVES if name != 'rloo')}."
        )

    # data and evidence come before the model, so that wrong names are found at once
    likelihood = args.load_likelihood("reward_func")
    dataset = args.load(training_args.seed)
    reward_funcs = [cli.load_reward_func(name) for name in args.reward_func or []] or [sentiment_reward]
    evidence = {"reward_funcs": reward_funcs} if likelihood is None else {"likelihood": likelihood}

    # from here on, the script is the same for all objectives
    training_args.model_init_kwargs = cli.model_init_kwargs(model_args, training_args)
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        **evidence,
        args=training_args,
        train_dataset=dataset,
        peft_config=get_peft_config(model_args),
    )

    # train, save and report
    def report() -> None:
        cli.evidence_report(trainer, args, model_args.model_name_or_path, dataset, reward_funcs, likelihood)

    cli.train_and_report(trainer, report if args.report_prompts > 0 else None, args.overwrite_output_dir)


if __name__ == "__main__":
    main()
