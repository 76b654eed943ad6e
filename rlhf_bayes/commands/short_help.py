"""The flags that matter of the commands with hundreds of them, in groups: what `--help` shows."""

import shutil
import textwrap
from dataclasses import dataclass

_INDENT = 34
"""Columns before the help of a flag."""


@dataclass(frozen=True)
class Flag:
    """A flag as `--help` shows it."""

    name: str
    """Without the dashes."""
    help: str
    """What it does, in a line."""
    default: str | None = None
    """What a run without flags uses; a test holds it against the parser. None where `help` says it."""


@dataclass(frozen=True)
class ShortHelp:
    """What `--help` shows of a command."""

    purpose: str
    bare: str
    """What a run without flags does."""
    groups: dict[str, tuple[Flag, ...]]
    """Title -> flags."""


_BUNDLED = "Default: the bundled model."
_DATASET = "A name on the hub, a .json, .jsonl, .parquet, .csv or .txt file, or a folder of `save_to_disk`."
_MODEL = (
    Flag("model_name_or_path", f"The prior, where training starts: a folder or a name on the hub. {_BUNDLED}"),
    Flag("use_peft", "Train a LoRA adapter; `--lora_r`, `--lora_alpha`, `--lora_target_modules` shape it.", "False"),
)
_PROMPTS = (
    Flag("dataset_name", f"Prompts. {_DATASET} Default: bundled ones, with the bundled model."),
    Flag("prompt_column", "Column that holds the prompts, texts or chats.", "prompt"),
    Flag("max_prompts", "Train on this many prompts, chosen at random. Default: all."),
)
_TRAINING = (
    Flag("per_device_train_batch_size", "Completions of a micro-batch.", "64"),
    Flag("num_generations", "Completions for each prompt.", "8"),
    Flag("max_completion_length", "Longest completion, in tokens.", "32"),
    Flag("seed", "Seed of everything that is random.", "42"),
)
_OUTPUT = (
    Flag("overwrite_output_dir", "Start anew in a folder that holds another run, whose checkpoints go.", "False"),
    Flag("resume_from_checkpoint", "`auto`: go on from the newest whole checkpoint, or start."),
    Flag("report_to", "Trackers, such as tensorboard, wandb or trackio."),
)
_REPORT = (
    Flag("report_prompts", "Prompts of the evaluation before and after training; 0: none.", "16"),
    Flag("report_samples", "Completions for each of them.", "128"),
)
_LIKELIHOOD = Flag("likelihood", "Evidence in nats in place of these, `module:object` with a `log_likelihood`.")

SHORT_HELP = {
    "ppo": ShortHelp(
        "Trains a policy by PPO with an explicit KL penalty towards π0(x|c)·exp(r(c,x)/β)/Z(c).",
        "a bundled tiny model learns to write kind reviews, in about two minutes on two CPU cores.",
        {
            "What is wanted": (
                Flag("beta", "β: units of reward per nat of evidence. Smaller: further from the prior.", "0.25"),
                Flag(
                    "reward_func", "Reward functions, `module:function`. Default: sentiment, with the bundled model."
                ),
                Flag("reward_model_path", "A reward model or an ensemble; its reward is added."),
                Flag("reward_rule", "How the members of an ensemble combine: mean, pessimistic, …", "mean"),
                _LIKELIHOOD,
            ),
            "Model and prompts": (*_MODEL, *_PROMPTS),
            "Training": (
                Flag("learning_rate", "Step size. Default: adapted to how far steps move the policy."),
                Flag("max_steps", "Optimizer steps.", "300"),
                *_TRAINING,
                Flag("critic", "ridge, shared or separate.", "ridge"),
            ),
            "Output": (
                Flag("output_dir", "Where the model and the report are written.", "runs/ppo_klrl"),
                *_OUTPUT,
                *_REPORT,
            ),
        },
    ),
    "gdc": ShortHelp(
        "Trains a policy so that features of its completions have given means, or that conditions hold.",
        "a bundled tiny model learns to write reviews that contain `but`, in about two minutes on two CPU cores.",
        {
            "What is wanted": (
                Flag("words", "Share of completions with one of some words: `word,word=0.5`; 1: always, 0: never."),
                Flag("features", "Features and their means, `module:function=mean`; 0 or 1: a condition."),
                _LIKELIHOOD,
                Flag("divergence", "What is minimised: forward_kl, js, log_variance, …", "forward_kl"),
            ),
            "Model and prompts": (*_MODEL, *_PROMPTS),
            "Training": (
                Flag("learning_rate", "Step size. Default: adapted to how far steps move the policy."),
                Flag("max_steps", "Optimizer steps.", "300"),
                *_TRAINING,
            ),
            "Output": (
                Flag("output_dir", "Where the model and the report are written.", "runs/gdc_dpg"),
                *_OUTPUT,
                Flag("report_prompts", "Prompts of the evaluation before and after training; 0: none.", "32"),
                Flag("report_samples", "Completions for each of them.", "64"),
            ),
        },
    ),
    "reward": ShortHelp(
        "Trains a reward model, or an ensemble of them, from pairwise preferences.",
        "four heads learn from bundled preferences, in about a minute on one CPU core.",
        {
            "Preferences": (
                Flag("dataset_name", f"Pairs. {_DATASET} Default: bundled ones, with the bundled model."),
                Flag("columns", "Columns with other names: `chosen=better rejected=worse votes=counts`."),
                Flag("max_pairs", "Learn from this many pairs, chosen at random. Default: all."),
                Flag("held_out", "Share of the pairs that is held out, without `--dataset_test_split`.", "0.1"),
                Flag("held_out_by", "Column whose groups are held out whole, for instance `topic`."),
            ),
            "Model": (
                Flag("model_name_or_path", f"Where training starts: a folder or a name on the hub. {_BUNDLED}"),
                Flag("num_members", "Members of an ensemble; 1: a single model.", "4"),
                Flag("ensemble", "What the members are: heads on one trunk, lora adapters, or models.", "heads"),
                Flag("use_peft", "Train LoRA adapters.", "False"),
            ),
            "Training": (
                Flag("learning_rate", "Step size. With a model of your own, TRL's.", "0.0002"),
                Flag("num_train_epochs", "Passes over the pairs.", "2"),
                Flag("per_device_train_batch_size", "Pairs of a micro-batch.", "32"),
                Flag("max_length", "Longest text, in tokens."),
                Flag("seed", "Seed of everything that is random.", "42"),
            ),
            "Zero and scale of the reward": (
                Flag("normalize_on", "prior, chosen, rejected, or none: what has mean 0 and sd 1.", "prior"),
                Flag("prior_name_or_path", "The language model of the policy. Default: the base model."),
            ),
            "Output": (Flag("output_dir", "Where the model and its card are written.", "runs/reward_model"), *_OUTPUT),
        },
    ),
    "sample": ShortHelp(
        "Draws from a posterior without training, compares samplers, and says what other β would give.",
        "the bundled model and its sentiment reward, in about a minute on two CPU cores.",
        {
            "What is wanted": (
                Flag("beta", "β: units of reward per nat of evidence.", "0.25"),
                Flag(
                    "reward_func", "Reward functions, `module:function`. Default: sentiment, with the bundled model."
                ),
                Flag("reward_model_path", "A reward model; its reward is added."),
                Flag("reward_clip_range", "Lowest and highest reward. With a highest one, rejection is exact."),
                Flag("condition", "A predicate that must hold, `module:function`."),
                Flag("likelihood", "Evidence in nats in place of these, `module:object` with a `log_likelihood`."),
            ),
            "Model and prompts": (
                Flag("model_name_or_path", f"The prior: a folder or a name on the hub. {_BUNDLED}"),
                Flag("dataset_name", f"Prompts. {_DATASET}"),
                Flag("prompt_column", "Column that holds the prompts, texts or chats.", "prompt"),
                Flag("prompt", "Prompts in place of a dataset."),
                Flag("max_prompts", "Use this many prompts, chosen at random.", "8"),
                Flag(
                    "max_completion_length", "Longest completion, in tokens. Default: 64; 32 with the bundled model."
                ),
            ),
            "Sampling": (
                Flag(
                    "sampler", "importance, rejection, metropolis_hastings, smc, best_of_n. Default: all but the last."
                ),
                Flag("num_samples", "Completions for each prompt and sampler.", "128"),
                Flag("what_if_beta", "Other β to estimate. Default: from β/8 to 8·β."),
                Flag("proposal", "A trained policy that samplers draw from in place of the prior."),
                Flag("policy", "Trained policies whose distance to the posterior is estimated."),
                Flag("batch_size", "Sequences in a forward pass.", "256"),
                Flag("seed", "Seed of everything that is drawn.", "0"),
            ),
            "Output": (Flag("output_dir", "Where draws and the report are written.", "runs/sample"),),
        },
    ),
}
"""Command -> what `--help` shows."""


def short_help(command: str) -> str:
    """The text of `rlhf-bayes COMMAND --help`."""
    shown, width = SHORT_HELP[command], max(80, shutil.get_terminal_size().columns)
    lines = [f"usage: rlhf-bayes {command} [--config FILE.yaml] [FLAGS]", ""]
    lines += textwrap.wrap(shown.purpose, width) + textwrap.wrap(f"Without flags: {shown.bare}", width)
    for title, flags in shown.groups.items():
        lines += ["", f"{title}:"]
        for flag in flags:
            default = "" if flag.default in (None, "False") else f" Default: {flag.default}."
            wrapped = textwrap.wrap(f"{flag.help}{default}", width - _INDENT)
            lines.append(f"  --{flag.name:<{_INDENT - 4}}{wrapped[0]}")
            lines += [" " * _INDENT + line for line in wrapped[1:]]
    lines += [
        "",
        "--help-all lists all flags. Defaults are those of the bundled model.",
        "Lists: `--flag a b` or `--flag [a,b]`; in the file of --config, `flag: [a, b]`.",
        f"On several devices: accelerate launch -m rlhf_bayes {command} [FLAGS]",
    ]
    return "\n".join(lines)
