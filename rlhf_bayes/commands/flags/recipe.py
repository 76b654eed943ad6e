"""What the recipes have in common: flags, prompts, a training run, and an evaluation before and after it."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config
from trl import ModelConfig, RLOOConfig, TrlParser

from rlhf_bayes import toy
from rlhf_bayes.commands.flags.data import load_prompts
from rlhf_bayes.commands.flags.flag_parser import FlagParser
from rlhf_bayes.commands.flags.named import load_language_model, load_likelihood
from rlhf_bayes.commands.flags.output_folder import OutputArguments, check_output_dir, clear_output_dir
from rlhf_bayes.commands.flags.stopped import told_what_is_kept
from rlhf_bayes.diagnostics import (
    Evaluation,
    PosteriorProgress,
    evaluate,
    fit_table,
    log_evaluation,
    plot_history,
    samples_table,
)
from rlhf_bayes.likelihoods import Likelihood, ProductLikelihood
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.posterior import Posterior
from rlhf_bayes.report import betas_around, what_if_of, write_sampling
from rlhf_bayes.trainers.ppo.old_names import check_old_flags


@dataclass
class PromptArguments(OutputArguments):
    """Flags for the prompts to train on, for evidence in nats, and for the report on the first prompts."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Prompts: a name on the hub, a .json, .jsonl, .parquet, .csv or .txt file (.gz too), or a "
                  "folder of `save_to_disk`. Default: openings of reviews, with the bundled model only."},
    )  # fmt: skip
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split that holds the prompts."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column that holds the prompts: texts or chats."})
    max_prompts: int | None = field(
        default=None, metadata={"help": "Train on this many prompts, chosen at random. Default: all."}
    )
    likelihood: str | None = field(
        default=None,
        metadata={"help": "Evidence in nats, `module:object`: an object with a method `log_likelihood`, or a function "
                  "without arguments that returns one. It takes the place of the flags that say what is wanted."},
    )  # fmt: skip
    report_prompts: int = field(default=16, metadata={"help": "Number of prompts in the report; 0: no report."})
    report_samples: int = field(default=128, metadata={"help": "Completions for each prompt in the report."})

    def check(self, own_model: bool) -> None:
        """
        Refuse the bundled prompts for another model.

        Raises:
            ValueError: if a model of the user's own is named without prompts.
        """
        if own_model and self.dataset_name is None:
            raise ValueError(
                "`--dataset_name` must be given with `--model_name_or_path`, got none: it holds the prompts."
            )

    def load_likelihood(self, *others: str) -> Likelihood | None:
        """
        The likelihood that is named, if one is: see [`~rlhf_bayes.commands.flags.load_likelihood`].

        Args:
            *others (`str`):
                Flags of this script that say what is wanted in another way.

        Raises:
            ValueError: if one of them is given too.
        """
        if self.likelihood is None:
            return None
        for name in others:
            value, of_class = getattr(self, name), type(self).__dataclass_fields__[name]
            if value and value != of_class.default:
                raise ValueError(
                    f"`--{name}` must be left out with `--likelihood`, got {value!r}: a likelihood is the whole "
                    "evidence. Multiply what it is made of in your module: `ProductLikelihood([...])`."
                )
        return load_likelihood(self.likelihood)

    def load(self, seed: int) -> Dataset:
        """The prompts, in the column `prompt`: see [`load_prompts`]."""
        if self.dataset_name is None:
            return Dataset.from_dict({"prompt": toy.prompts()})
        return load_prompts(
            self.dataset_name, self.prompt_column, self.max_prompts, self.dataset_train_split, self.dataset_config,
            seed,
        )  # fmt: skip


@dataclass
class _LikelihoodFlag:
    likelihood: str | None = None


def parse_flags(
    classes: Sequence[type],
    defaults: Mapping[str, Any],
    toy_defaults: Mapping[str, Any],
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
) -> tuple[bool, tuple]:
    """
    The dataclasses of a script filled from its flags and `--config`, and whether the flags name a model.

    Args:
        classes (`Sequence[type]`):
            Dataclasses, [`~trl.ModelConfig`] among them.
        defaults (`Mapping[str, Any]`):
            Defaults that differ from those of the dataclasses.
        toy_defaults (`Mapping[str, Any]`):
            Further defaults for the bundled model, which is used where no `model_name_or_path` is named.
        arguments (`Sequence[str]`, *optional*):
            The words after the command. Default: those of the process.
        prog (`str`, *optional*):
            Name of the command, for messages. Default: that of the script.

    Raises:
        ValueError: if the output folder holds another run, or values do not fit.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    check_old_flags(words)
    # parsed once beforehand, since the bundled model has defaults of its own
    first_look = TrlParser((ModelConfig, _LikelihoodFlag), add_help=False, allow_abbrev=False)
    model_args, flag, *_ = first_look.parse_args_and_config(words, return_remaining_strings=True)
    own_model = model_args.model_name_or_path is not None
    if flag.likelihood is not None:  # the default β is that of the bundled reward
        toy_defaults = {name: value for name, value in toy_defaults.items() if name != "beta"}
    if any("prior_probe" in of.__dataclass_fields__ for of in classes):
        defaults = {"prior_probe": 32, **defaults}
    parser = FlagParser(tuple(classes), prog=prog)
    parser.set_defaults_with_config(**({**defaults} if own_model else {**defaults, **toy_defaults}))
    parsed = parser.parse_args_and_config(words)
    overwrite = any(getattr(part, "overwrite_output_dir", False) for part in parsed)
    for part in parsed:
        if isinstance(part, TrainingArguments):
            check_output_dir(part.output_dir, overwrite, part.resume_from_checkpoint)
            if part.run_name is None and "trackio" in part.report_to:
                # a run is closed when its training ends, and by its name the evaluation finds it again
                part.run_name = f"{Path(part.output_dir).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return own_model, parsed


def model_init_kwargs(model_args: ModelConfig, training_args: TrainingArguments) -> dict[str, Any]:
    """Arguments of `from_pretrained`: the model's flags, overridden by the training's `model_init_kwargs`."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(getattr(training_args, "model_init_kwargs", None) or {}),
    }


def train_and_report(trainer: Trainer, report: Callable[[], None] | None, overwrite: bool = False) -> None:
    """
    Train, or resume from `resume_from_checkpoint`, save the model, and report on the main process.

    Args:
        trainer (`Trainer`):
            The trainer.
        report (`Callable`, *optional*):
            What reports on the trained model. Default: nothing.
        overwrite (`bool`):
            Whether to delete another run in the output folder first.
    """
    if overwrite and trainer.args.should_save:
        clear_output_dir(trainer.args.output_dir)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(PosteriorProgress())
    with told_what_is_kept(trainer):
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.save_model()
    with told_what_is_kept(trainer, trained=True):
        trainer.save_state()  # the report reads the log, which is otherwise saved with a checkpoint only
        if report is not None and trainer.is_world_process_zero():
            report()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # a process that exits before its process group is closed may abort


def evaluate_saved(
    trainer: Trainer,
    args: PromptArguments,
    model_path: str,
    posterior_of: Callable[[LanguageModel], Posterior],
    dataset: Dataset,
) -> Evaluation:
    """
    Evaluate the prior and the saved policy against the posterior, on the first prompts.

    Args:
        trainer (`Trainer`):
            A trainer that has saved its model in its `output_dir`.
        args ([`PromptArguments`]):
            The number of prompts and of completions.
        model_path (`str`):
            The folder or name of the prior.
        posterior_of (`Callable`):
            Makes the posterior from the prior.
        dataset (`Dataset`):
            Prompts, and the columns that reward functions ask for.
    """
    training_args: RLOOConfig = trainer.args
    # under ZeRO-3 transformers would load models in shards and wait for the other processes, which do not come here
    unset_hf_deepspeed_config()
    prior, policy = (
        load_language_model(path, training_args, trainer.processing_class)
        for path in (model_path, training_args.output_dir)
    )
    chosen = dataset.select(range(min(args.report_prompts, len(dataset))))
    return evaluate(
        policy,
        posterior_of(prior),
        list(chosen["prompt"]),
        args.report_samples,
        torch.Generator().manual_seed(training_args.seed),
        {name: chosen[name] for name in chosen.column_names if name != "prompt"},
        show_progress=True,
    )


def save_evaluation(
    evaluation: Evaluation,
    trainer: Trainer,
    args: PromptArguments,
    model_path: str,
    reward_scale: float | None = None,
    **known: Any,
) -> None:
    """
    Write what `rlhf-bayes report` shows of a run into the folder of its model, from the draws of its evaluation.

    These are completions before and after training and the distances to the posterior; where the evidence is a reward,
    also the best of n and the posteriors of other β.

    Args:
        evaluation ([`Evaluation`]):
            The evaluation of the trained policy.
        trainer, args, model_path:
            As in [`evaluate_saved`].
        reward_scale (`float`, *optional*):
            Units of reward per nat of evidence, where the evidence is a reward.
        known (`Any`):
            Further entries of `sampling.json`: see [`~rlhf_bayes.report.write_sampling`].
    """
    settings = {name: value for name, value in asdict(args).items() if value not in (None, [])}
    sampling = {"beta": evaluation.beta, "settings": {"model_name_or_path": model_path, **settings}, **known}
    if reward_scale is not None:
        betas = betas_around(evaluation.beta) if evaluation.beta else []
        sampling |= what_if_of(reward_scale * evaluation.from_prior.log_likelihood, betas)
    after, before = (draws.rows(reward_scale) for draws in (evaluation.from_policy, evaluation.from_prior))
    write_sampling(trainer.args.output_dir, after, sampling, evaluation.as_dict(), before)


def print_samples(evaluation: Evaluation, console: Console) -> None:
    """Print completions of the first prompts, before and after training."""
    draws = {"prior (before)": evaluation.from_prior, "policy (after)": evaluation.from_policy}
    console.print(samples_table(evaluation.from_policy.prompts[:4], draws, title="Samples"))


def evidence_report(
    trainer: Trainer,
    args: PromptArguments,
    model_path: str,
    dataset: Dataset,
    reward_funcs: list,
    likelihood: Likelihood | None,
) -> None:
    """
    [`likelihood_report`] where the policy was trained on a likelihood, else [`reward_report`].

    Args:
        trainer, args, model_path, dataset:
            As in [`evaluate_saved`].
        reward_funcs (`list`):
            The reward functions, which do not count beside a likelihood.
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`], *optional*):
            The likelihood that the policy was trained on.
    """
    if likelihood is None:
        reward_report(trainer, args, model_path, reward_funcs, dataset)
    else:
        likelihood_report(trainer, args, model_path, likelihood, dataset)


def reward_report(
    trainer: Trainer, args: PromptArguments, model_path: str, reward_funcs: list, dataset: Dataset
) -> None:
    """
    Print prior and trained policy side by side, with their distance to the posterior of rewards, and plot the curves.

    Args:
        trainer, args, model_path, dataset:
            As in [`evaluate_saved`].
        reward_funcs (`list`):
            The reward functions that the policy was trained on.
    """
    training_args, beta = trainer.args, trainer.beta

    def posterior_of(prior: LanguageModel) -> Posterior:
        return prior.tilt(
            reward_funcs,
            beta or 1.0,  # at β = 0 there is no posterior, and the evidence serves as the reward only
            reward_weights=training_args.reward_weights,
            reward_clip_range=training_args.reward_clip_range,
            missing_eos_penalty=getattr(training_args, "missing_eos_penalty", None),
        )

    evaluation = evaluate_saved(trainer, args, model_path, posterior_of, dataset)
    title = f"Distance to the posterior π0·exp(r/β)/Z, β = {beta:g}"
    if not beta:
        title = "β = 0: no posterior"
        prior, policy = evaluation.prior.without_posterior(), evaluation.policy.without_posterior()
        evaluation = replace(evaluation, beta=None, prior=prior, policy=policy)
    save_evaluation(evaluation, trainer, args, model_path, beta or 1.0, reward_names=trainer.reward_func_names)
    _print_report(evaluation, trainer, title)


def likelihood_report(
    trainer: Trainer, args: PromptArguments, model_path: str, likelihood: Likelihood, dataset: Dataset
) -> None:
    """
    Print prior and trained policy side by side, with their distance to the posterior of a likelihood.

    The curves are plotted as well. All numbers are in nats, also where the likelihood was made from a reward: in the
    training β is 1.

    Args:
        trainer, args, model_path, dataset:
            As in [`evaluate_saved`].
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`]):
            The evidence that the policy was trained on.
    """
    nats = ProductLikelihood([likelihood])  # the same evidence, without the β of a reward
    evaluation = evaluate_saved(trainer, args, model_path, lambda prior: Posterior(prior, nats), dataset)
    save_evaluation(evaluation, trainer, args, model_path, reward_names=[])
    _print_report(evaluation, trainer, "Distance to the posterior π0·exp(log-likelihood)/Z")


def _print_report(evaluation: Evaluation, trainer: Trainer, title: str) -> None:
    console, output_dir = Console(), trainer.args.output_dir
    print_samples(evaluation, console)
    fits = {"prior (before)": evaluation.prior, "policy (after)": evaluation.policy}
    console.print(fit_table(fits, title=title))
    if evaluation.policy.log_z is not None:
        console.print(evaluation.verdict)
        if evaluation.log_z.trustworthy:  # otherwise the verdict has said why not
            console.print(str(evaluation.log_z))
    curves = Path(output_dir) / "curves.png"
    plot_history(trainer.state.log_history, evaluation.policy, curves)
    log_evaluation(trainer, evaluation, {"curves": curves})
    console.print(f"Model in {output_dir}, curves in {curves}.")
    console.print(f"A page on all of it: rlhf-bayes report {output_dir}", highlight=False)
