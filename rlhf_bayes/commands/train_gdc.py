"""`rlhf-bayes gdc`: distributional control, which gives features of completions the means that are asked for.

The target is π0(x|c)·exp(λ·φ(c,x))/Z(c), the distribution with these means that is closest to the prior in KL. A
binary feature that must always or never hold is a condition, so other completions are forbidden. Khalifa, Elsahar &
Dymetman 2021 (arXiv 2012.11635), sections 2.1 to 2.3. Departures: λ is found by the convex dual, where they use
gradient steps on a squared error; each prompt has its own Z (Korbak et al. 2022, 2112.00791), pooled over all
rollouts, and there is a baseline; `--divergence` chooses the f-divergence (Go et al. 2023, 2302.08215); completions
are drawn from the current policy unless `--proposal` is given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from rich.console import Console
from trl import ModelConfig, get_peft_config, get_quantization_config

from rlhf_bayes import GDCConfig, GDCTrainer, LanguageModel, Posterior, toy
from rlhf_bayes.commands import flags
from rlhf_bayes.diagnostics import control_table, log_evaluation, plot_control
from rlhf_bayes.likelihoods import MomentLikelihood

ON_CPU = not torch.cuda.is_available()
DEFAULTS = {"output_dir": "runs/gdc_dpg", "use_cpu": ON_CPU, "bf16": not ON_CPU, "logging_steps": 5}
# the means are over all prompts, so a report on fewer prompts would show other means
DEFAULTS |= {"report_prompts": 32, "report_samples": 64}
# defaults of the bundled model; with another model, those of the configuration apply
TOY_DEFAULTS = {
    "model_name_or_path": toy.model_path(),
    "max_steps": 300,
    "num_iterations": 2,
    "per_device_train_batch_size": 64,
    "num_generations": 8,
    "max_completion_length": 32,
    "bf16": False,
    "gradient_checkpointing": False,
}
TOY_WORDS = ["but=1", "not=0.5"]


@dataclass
class Arguments(flags.PromptArguments):
    """Flags for the prompts and the target; `GDCConfig` has those of training, `ModelConfig` those of the model."""

    features: list[str] = field(
        default_factory=list,
        metadata={"action": "extend", "help": "Features and the means they must have, `module:function=moment`; the "
                  "functions have the protocol of reward functions. 0 or 1 for a binary feature is a condition."},
    )  # fmt: skip
    words: list[str] = field(
        default_factory=list,
        metadata={"action": "extend", "help": "The share of completions that must contain one of some words, "
                  "`word,word=share` or `name:word,word=share`. 1: always, 0: never. Default: `but=1` and `not=0.5`, "
                  "with the bundled model only."},
    )  # fmt: skip
    fit_prompts: int = field(default=32, metadata={"help": "The means are over this many prompts, the first ones."})
    fit_samples: int = field(default=256, metadata={"help": "Completions that the prior draws for each, to find λ."})


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[Arguments, GDCConfig, ModelConfig]:
    """The flags, checked as far as they can be before anything is loaded. Default: those of the process."""
    own_model, parsed = flags.parse_flags(
        (Arguments, GDCConfig, ModelConfig), DEFAULTS, TOY_DEFAULTS, arguments, "rlhf-bayes gdc"
    )
    args, training_args, model_args = parsed
    args.check(own_model)
    if not args.features and not args.words and args.likelihood is None:
        if own_model:
            raise ValueError(
                "`--features module:function=moment`, `--words word,word=moment` or `--likelihood module:object` must "
                "be given with `--model_name_or_path`, got none."
            )
        args.words = TOY_WORDS
    return args, training_args, model_args


def evidence_of(
    prior: LanguageModel, constraints: dict, dataset: Dataset, args: Arguments, seed: int
) -> MomentLikelihood:
    """
    The evidence λ·φ, with the λ that gives the features their means. Conditions alone need no draws.

    Args:
        prior ([`~rlhf_bayes.LanguageModel`]): π0, which draws the completions that λ is found from.
        constraints (`dict`): name -> (feature, mean), from [`parse_features`].
        dataset (`Dataset`): the prompts; the means are over the first ones.
        args ([`Arguments`]): the flags.
        seed (`int`): seed of the draws.
    """
    if all(moment in (0, 1) for _, moment in constraints.values()):
        functions = {name: function for name, (function, _) in constraints.items()}
        return MomentLikelihood(
            functions, {name: math.inf if moment else -math.inf for name, (_, moment) in constraints.items()}
        )
    chosen = dataset.select(range(min(args.fit_prompts, len(dataset))))
    posterior = prior.constrain(
        constraints,
        list(chosen["prompt"]),
        num_samples=args.fit_samples,
        generator=torch.Generator().manual_seed(seed),
        columns={name: chosen[name] for name in chosen.column_names if name != "prompt"},
    )
    return posterior.likelihood


def fitted_evidence(
    constraints: dict, dataset: Dataset, args: Arguments, training_args: GDCConfig, model_path: str
) -> MomentLikelihood:
    """
    The evidence of the features and their means, the same in all processes; what was fitted is printed.

    Args:
        constraints, dataset, args: as in [`evidence_of`].
        training_args ([`~rlhf_bayes.GDCConfig`]): the settings of the training.
        model_path (`str`): the folder or name of the prior.
    """
    prior = flags.load_language_model(model_path, training_args)
    likelihood = evidence_of(prior, constraints, dataset, args, training_args.seed)
    # λ differs in its last digits between devices; all processes must train towards the same target
    (likelihood.lambdas,) = broadcast_object_list([likelihood.lambdas])
    if likelihood.summary is not None and training_args.process_index == 0:
        title = "The distribution with these means that is closest to the prior"
        Console().print(likelihood.summary.table(title=title))
    return likelihood


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments after `rlhf-bayes gdc`, train and report."""
    args, training_args, model_args = parse_arguments(arguments)

    # data and evidence come before the model, so that wrong names are found at once
    likelihood = args.load_likelihood("features", "words", "fit_prompts", "fit_samples")
    constraints = {} if likelihood is not None else flags.parse_features(args.features, args.words)
    dataset = args.load(training_args.seed)

    # posterior
    training_args.model_init_kwargs = flags.model_init_kwargs(model_args, training_args)
    if likelihood is None:
        likelihood = fitted_evidence(constraints, dataset, args, training_args, model_args.model_name_or_path)

    # model
    trainer = GDCTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        likelihood=likelihood,
        train_dataset=dataset,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )

    # train, save and report
    def report() -> None:
        if constraints:
            print_report(trainer, args, model_args.model_name_or_path, likelihood, constraints, dataset)
        else:
            flags.likelihood_report(trainer, args, model_args.model_name_or_path, likelihood, dataset)

    flags.train_and_report(trainer, report if args.report_prompts > 0 else None, args.overwrite_output_dir)


def print_report(
    trainer: GDCTrainer,
    args: Arguments,
    model_path: str,
    likelihood: MomentLikelihood,
    constraints: dict,
    dataset: Dataset,
) -> None:
    """
    Print prior and trained policy side by side.

    Args:
        trainer ([`~rlhf_bayes.GDCTrainer`]): a trainer that has saved its model.
        args, constraints, dataset, model_path: as in [`fitted_evidence`].
        likelihood ([`~rlhf_bayes.likelihoods.MomentLikelihood`]): the evidence that it was trained on.
    """
    console, wanted = Console(), {name: moment for name, (_, moment) in constraints.items()}
    evaluation = flags.evaluate_saved(trainer, args, model_path, lambda prior: Posterior(prior, likelihood), dataset)
    flags.save_evaluation(evaluation, trainer, args, model_path, reward_names=[], moments=wanted)
    flags.print_samples(evaluation, console)
    console.print(control_table(evaluation, wanted, title="Distance to what was asked for"))
    if evaluation.policy.forbidden.mean == 0:  # otherwise KL(π‖π*) is infinite
        console.print(evaluation.verdict)
    if evaluation.log_z.trustworthy or evaluation.policy.forbidden.mean > 0:  # otherwise the verdict has said it
        console.print(str(evaluation.log_z))
    curves = Path(trainer.args.output_dir) / "curves.png"
    plot_control(trainer.state.log_history, wanted, evaluation.policy.posterior_kl_to_prior, curves)
    log_evaluation(trainer, evaluation, {"curves": curves})
    console.print(f"Model in {trainer.args.output_dir}, curves in {curves}.")
    console.print(f"A page on all of it: rlhf-bayes report {trainer.args.output_dir}", highlight=False)
