"""The parsers of the commands with few flags. They import nothing of weight, so that `--help` is quick."""

from collections.abc import Callable

from rlhf_bayes.commands.suggestions import SuggestingParser


def report() -> SuggestingParser:
    """Flags of `rlhf-bayes report`."""
    parser = SuggestingParser(
        prog="rlhf-bayes report",
        description="Reads output folders of trainers and of `rlhf-bayes sample`, and writes a page for a browser.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output folder of a run")
    parser.add_argument("--output_dir", help="where to write. Default: `report` in the first DIR")
    return parser


def what_if() -> SuggestingParser:
    """Flags of `rlhf-bayes what-if`."""
    parser = SuggestingParser(
        prog="rlhf-bayes what-if",
        description="Estimates the posteriors of several β from a store of completions, which `rlhf-bayes sample "
        "--store` or a trainer with `store` wrote. No model is loaded, and nothing is drawn.",
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument(
        "--beta",
        nargs="+",
        type=float,
        metavar="B",
        help="units of reward per nat of evidence. Default: seven around the standard deviation of the rewards",
    )
    parser.add_argument(
        "--reward_weights", nargs="+", type=float, metavar="W", help="one for each reward of the store. Default: 1"
    )
    parser.add_argument(
        "--reward_clip_range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="bounds of the weighted sum"
    )
    parser.add_argument("--missing_eos_penalty", type=float, metavar="R", help="subtracted where no EOS came")
    return parser


def merge() -> SuggestingParser:
    """Flags of `rlhf-bayes merge`."""
    parser = SuggestingParser(
        prog="rlhf-bayes merge",
        description="Merges a policy's adapter, or those of a reward model, into the base that they name, and writes "
        "whole models that plain transformers loads.",
    )
    parser.add_argument("folder", metavar="DIR", help="output folder of a training with LoRA")
    parser.add_argument("--output_dir", help="where to write; must be new or empty. Default: DIR-merged")
    return parser


def export() -> SuggestingParser:
    """Flags of `rlhf-bayes export`."""
    parser = SuggestingParser(
        prog="rlhf-bayes export",
        description="Writes a reward model, or the mean of an ensemble of heads, as one sequence classifier with one "
        "label, whose logit plain transformers gives as the reward: normalised, with EOS appended by the tokenizer.",
    )
    parser.add_argument("folder", metavar="DIR", help="output folder of a reward training")
    parser.add_argument("--output_dir", help="where to write; must be new or empty. Default: DIR-exported")
    parser.add_argument("--member", help="one member of an ensemble, by its name in reward_model.json")
    return parser


def memory() -> SuggestingParser:
    """Flags of `rlhf-bayes memory`, named as in `rlhf-bayes ppo`."""
    parser = SuggestingParser(
        prog="rlhf-bayes memory",
        description="Predicts the memory of PPO by role, and compares it with four full models.",
        renamed={
            "--model": "--model_name_or_path",
            "--lora": "--lora_r",
            "--batch": "--per_device_train_batch_size",
            "--prompt": "--max_prompt_length",
            "--completion": "--max_completion_length",
            "--reward-members": "--num_members",
            "--zero": "--zero_stage",
            "--processes": "--num_processes",
        },
    )
    flag = parser.add_argument
    flag("--model_name_or_path", help="Folder or name on the hub. Default: the bundled model.")
    flag("--lora_r", type=int, metavar="R", help="Rank of the policy's adapter; without, all is trained.")
    flag("--lora_target_modules", nargs="+", metavar="NAME", help="Names, or all-linear. Default: PEFT's.")
    flag("--critic", choices=("ridge", "shared", "separate"), default="ridge")
    flag("--reward", choices=("function", "adapter", "model"), help="Default: adapter with --lora_r, else model.")
    flag("--num_members", type=int, default=1, help="Members of a reward ensemble.")
    flag("--per_device_train_batch_size", type=int, default=8, help="Sequences of a micro-batch.")
    flag("--max_prompt_length", type=int, default=128, help="Tokens.")
    flag("--max_completion_length", type=int, default=128, help="Tokens.")
    flag("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Of the weights.")
    flag("--gradient_checkpointing", action="store_true")
    flag("--zero_stage", type=int, choices=(0, 1, 2, 3), default=0, help="Stage of DeepSpeed.")
    flag("--num_processes", type=int, default=1)
    return parser


def actor() -> SuggestingParser:
    """Flags of `rlhf-bayes actor`, named as in `rlhf-bayes sample`."""
    parser = SuggestingParser(
        prog="rlhf-bayes actor",
        description="Draws from the policy of a `GDCTrainer` with `actor_weights` while it trains, scores, and adds "
        "to the store that it learns from. Any number of actors may run. Each ends when the training does, with "
        "Ctrl-C, or when there is a file `stop` in the folder of the weights.",
    )
    flag = parser.add_argument
    flag("--store", required=True, metavar="DIR", help="The store, made where there is none.")
    flag("--weights", required=True, metavar="DIR", help="The learner's `actor_weights`.")
    flag("--model_name_or_path", help="The prior, where the learner started. Default: the bundled model.")
    flag("--dataset_name", help="Prompts: a name on the hub, a file, or a folder of `save_to_disk`.")
    flag("--dataset_config", help="Configuration of a dataset on the hub.")
    flag("--dataset_split", default="train", help="Default: train.")
    flag("--prompt_column", default="prompt", help="Column that holds the prompts. Default: prompt.")
    flag("--prompt", action="append", help="A prompt in place of a dataset; may be given several times.")
    flag("--max_prompts", type=int, help="This many prompts of the dataset, chosen at random. Default: all.")
    flag("--reward_func", action="append", metavar="MODULE:FUNCTION", help="May be given several times.")
    flag("--reward_model_path", help="A reward model; added to the functions.")
    flag("--likelihood", metavar="MODULE:OBJECT", help="Evidence in nats instead of rewards.")
    flag("--max_completion_length", type=int, help="Tokens. Default: 64; 32 with the bundled model.")
    flag("--temperature", type=float, default=1.0, help="Divides the logits. Default: 1.")
    flag("--chat_template_kwargs", metavar="JSON", help="What the chat template gets beside the messages.")
    flag("--batch_size", type=int, default=256, help="Sequences in one forward pass. Default: 256.")
    flag("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="float32", help="Of the weights.")
    flag("--vllm", action="store_true", help="Draw by vLLM, which is given the new weights when the learner has some.")
    flag("--seed", type=int, help="Of all draws. Each actor needs its own. Default: from the operating system.")
    flag("--timeout", type=float, default=1800.0, help="Seconds without the learner, to end after. Default: 1800.")
    return parser


def environment() -> SuggestingParser:
    """Flags of `rlhf-bayes env`: none."""
    return SuggestingParser(
        prog="rlhf-bayes env", description="Prints versions and devices, to go with a report of a bug."
    )


PARSERS: dict[str, Callable[[], SuggestingParser]] = {
    "what-if": what_if,
    "actor": actor,
    "report": report,
    "merge": merge,
    "export": export,
    "memory": memory,
    "env": environment,
}
"""Command -> what makes its parser. The other commands have parsers of their own."""
