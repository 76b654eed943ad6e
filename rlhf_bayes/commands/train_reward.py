"""`rlhf-bayes reward`: trains a reward model, or an ensemble of them, from pairwise preferences.

P(chosen ≻ rejected) = σ(r(c) − r(r)) is the model of Bradley & Terry 1952, with a reward head on the last token as in
Ziegler et al. 2019 (arXiv 1909.08593). Departures: it learns from the votes of several annotators where the data have
them, not only from their majority; the disagreement of an ensemble shows where it is uncertain; and the reward is
normalised on completions of the prior, without which β would have no fixed meaning. Printed metrics are of raw
rewards, since normalisation would change the probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from pandas import DataFrame
from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback
from transformers.integrations import unset_hf_deepspeed_config
from trl import ModelConfig, get_peft_config, get_quantization_config

from rlhf_bayes import LanguageModel, RewardConfig, RewardTrainer, toy
from rlhf_bayes.commands.flags import hold_out, load_preferences, model_init_kwargs, parse_flags, prompts_of_pairs
from rlhf_bayes.commands.flags.output_folder import OutputArguments, clear_output_dir
from rlhf_bayes.commands.flags.stopped import told_what_is_kept
from rlhf_bayes.diagnostics import log_to_trackers, plot_reliability, preference_table
from rlhf_bayes.rewards.loading import load_tokenizer
from rlhf_bayes.rewards.pairs import prompt_and_texts
from rlhf_bayes.trainers.reward.held_out import HeldOutRewards
from rlhf_bayes.trainers.reward.reward_card import RELIABILITY_PLOT

ON_CPU = not torch.cuda.is_available()
DEFAULTS = {
    "output_dir": "runs/reward_model",
    "use_cpu": ON_CPU,
    "bf16": not ON_CPU,
    "lora_task_type": "SEQ_CLS",  # the adapters bring their own heads
}
# defaults of the bundled model; with another model, TRL's defaults apply
TOY_DEFAULTS = {
    "model_name_or_path": toy.model_path(),
    "num_members": 4,
    "learning_rate": 2e-4,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "max_completion_length": 32,
    "bf16": False,
    "gradient_checkpointing": False,
}


@dataclass
class Arguments(OutputArguments):
    """Flags for the data; `RewardConfig` has those of training, `ModelConfig` those of the model to start from."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Preferences: a name on the hub, a .json, .jsonl, .parquet or .csv file (.gz too), or a "
                  "folder of `save_to_disk`. Default: the bundled ones, with the bundled model only."},
    )  # fmt: skip
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to learn from."})
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: pairs held out of the training split."}
    )
    held_out: float = field(
        default=0.1, metadata={"help": "Share of the pairs to hold out if there is no test split."}
    )
    held_out_by: str | None = field(
        default=None,
        metadata={
            "help": "Column, for instance `topic`: all pairs with the same value are held out "
            "together. Default: single pairs."
        },
    )
    columns: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of columns that are called otherwise: `chosen=better rejected=worse votes=counts`."},
    )
    drop_columns: list[str] = field(
        default_factory=list, metadata={"help": "Columns to ignore, such as votes, to learn from the label alone."}
    )
    max_pairs: int | None = field(
        default=None, metadata={"help": "Learn from this many pairs, chosen at random. Default: all."}
    )
    normalize_on: str = field(
        default="prior",
        metadata={"help": "The completions on which the reward gets mean 0 and standard deviation 1: 'prior', draws "
                  "from a language model; 'chosen', 'rejected' or another column of completions; or 'none'."},
    )  # fmt: skip
    normalize_samples: int = field(default=1024, metadata={"help": "Completions to normalise on."})
    prior_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Language model to draw them from, the prior of your policy. Default: the base model."},
    )
    max_completion_length: int = field(default=64, metadata={"help": "Longest of these completions, in tokens."})


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[Arguments, RewardConfig, ModelConfig]:
    """The flags, checked as far as they can be before anything is loaded. Default: those of the process."""
    own_model, parsed = parse_flags(
        (Arguments, RewardConfig, ModelConfig), DEFAULTS, TOY_DEFAULTS, arguments, "rlhf-bayes reward"
    )
    args, training_args, model_args = parsed
    if own_model and args.dataset_name is None:
        raise ValueError("`--dataset_name` must be given with `--model_name_or_path`, got none: it holds the pairs.")
    if args.normalize_samples < 2:
        raise ValueError(f"`normalize_samples` must be at least 2, got {args.normalize_samples}. Use `normalize_on`.")
    return args, training_args, model_args


def load_data(args: Arguments, seed: int) -> tuple[Dataset, Dataset]:
    """Pairs to train on, and pairs to evaluate on."""
    name = args.dataset_name or str(toy.preferences_path("train"))
    options = {"config": args.dataset_config, "columns": args.columns, "drop_columns": args.drop_columns}
    train = load_preferences(name, args.dataset_train_split, max_pairs=args.max_pairs, seed=seed, **options)
    if args.held_out_by and (args.dataset_name is None or args.dataset_test_split):
        raise ValueError("`--held_out_by` must be left out where there is a split to judge on. Remove one of them.")
    if args.dataset_name is None:
        return train, load_preferences(str(toy.preferences_path("test")), **options)
    if args.dataset_test_split is not None:
        return train, load_preferences(name, args.dataset_test_split, **options)
    return hold_out(train, args.held_out, args.held_out_by, seed)


def prior_tokenizer(path: str, training_args: RewardConfig) -> PreTrainedTokenizerBase:
    """The prior's tokenizer, with the chat template of the training where it has none of its own."""
    tokenizer, template = load_tokenizer(path, path), training_args.chat_template_path
    if template is not None and getattr(tokenizer, "chat_template", None) is None:
        is_file = Path(template).is_file()
        tokenizer.chat_template = (
            Path(template).read_text(encoding="utf-8") if is_file else load_tokenizer(template, template).chat_template
        )
    return tokenizer


def reference(
    args: Arguments, training_args: RewardConfig, path: str, data: Dataset, prompts: list
) -> tuple[list, list, str]:
    """
    Prompts and completions on which the reward is normalised, and a description of them.

    Args:
        args ([`Arguments`]): the flags.
        training_args ([`~rlhf_bayes.RewardConfig`]): the settings of the training.
        path (`str`): the language model that draws the completions.
        data (`Dataset`): the pairs, whose completions may be used instead.
        prompts (`list`): the prompts that are drawn for.
    """
    if args.normalize_on != "prior":
        chosen = data.shuffle(seed=training_args.seed).select(range(min(args.normalize_samples, len(data))))
        pairs = [(prompt_and_texts(row)[0], row[args.normalize_on]) for row in chosen]
        return *map(list, zip(*pairs, strict=True)), f"the column `{args.normalize_on}` of its data"
    tokenizer = prior_tokenizer(path, training_args)
    prior = LanguageModel(path, tokenizer, max_completion_length=args.max_completion_length)
    prior.model.to(training_args.device)
    generator = torch.Generator().manual_seed(training_args.seed)
    draws = prior.sample(prompts, n=-(-args.normalize_samples // len(prompts)), generator=generator)
    return draws.prompts, draws.completions, f"{len(draws):,} completions of `{Path(path).name}`"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments after `rlhf-bayes reward`, train and report."""
    args, training_args, model_args = parse_arguments(arguments)

    # data come before the model, so that wrong names are found at once
    train, test = load_data(args, training_args.seed)
    if args.normalize_on not in ("prior", "none", *train.column_names):
        raise ValueError(
            f"`normalize_on` must be 'prior', 'none' or a column of {train.column_names}, got {args.normalize_on!r}."
        )
    prior_path = args.prior_name_or_path or model_args.model_name_or_path
    prompts = []
    if args.normalize_on == "prior":
        tokenizer = prior_tokenizer(prior_path, training_args)
        prompts = prompts_of_pairs(train, args.normalize_samples, prior_path, args.max_completion_length, tokenizer)

    # model
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    trainer = RewardTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.remove_callback(PrinterCallback)

    # train
    if args.overwrite_output_dir and training_args.should_save:
        clear_output_dir(training_args.output_dir)
    with told_what_is_kept(trainer):
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()  # saved at once, so that an error below loses no training
    with told_what_is_kept(trainer, trained=True):
        normalize_and_report(trainer, args, prior_path, train, prompts)


def normalize_and_report(
    trainer: RewardTrainer, args: Arguments, prior_path: str, train: Dataset, prompts: list
) -> None:
    """
    Give the trained reward its zero and scale, save it, and print how it does on held-out pairs.

    Args:
        trainer ([`~rlhf_bayes.RewardTrainer`]): a trainer that has saved its model.
        args, prior_path, prompts: as in [`reference`], where `prior_path` is its `path`.
        train (`Dataset`): the pairs that it was trained on.
    """
    training_args = trainer.args
    trainer.evaluate()
    if args.normalize_on != "none":
        unset_hf_deepspeed_config()  # under ZeRO-3 the prior would be loaded in shards
        try:
            trainer.normalize(*reference(args, training_args, prior_path, train, prompts))
        except Exception as error:
            error.add_note(
                f"The trained model is in {training_args.output_dir}, with raw rewards. `load_reward(folder)`, "
                "`normalize` and `save_pretrained` normalise it without another training."
            )
            raise
        trainer.save_model()

    # report
    if trainer.is_world_process_zero():
        report(trainer)
        trainer.create_model_card(dataset_name=args.dataset_name or "the bundled toy preferences")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # a process that exits before its process group is closed may abort


def report(trainer: RewardTrainer) -> None:
    """Print metrics on the held-out pairs, and plot the calibration."""
    console, folder = Console(), Path(trainer.args.output_dir)
    pairs = HeldOutRewards(**trainer.evaluation_pairs)
    title = f"{pairs.chosen.shape[1]:,} pairs held out (raw rewards)"
    console.print(preference_table({"Δ = 0": pairs.without_a_model.metrics, "this model": pairs.metrics}, title))
    for annotator, rate in trainer.annotator_error_rates.items():
        console.print(f"{annotator} errs in {rate:.1%} of the votes, as learnt.")
    plot = folder / RELIABILITY_PLOT
    plot_reliability(pairs.bins, plot, num_pairs=pairs.chosen.shape[1])
    table = DataFrame([{"model": "this model", **pairs.metrics}])
    log_to_trackers(trainer, tables={"eval_report/held_out": table}, figures={"eval_report/calibration": plot})
    console.print(f"Reward model in {folder} with its card README.md, calibration in {plot}.")
