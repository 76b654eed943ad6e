"""What the numbers of a store were made by: the prior, its tokenizer, the rewards, and the settings of the draws."""

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_bayes.lm.adapters import base_causal_lm

_PLAIN = (str, int, float, bool, type(None))


@final
@dataclass(frozen=True)
class Provenance:
    """
    What a store was made by. Two stores whose records differ do not hold the same quantities.

    `name` is for messages, and is not compared.
    """

    prior: str
    """Hash of the prior's weights: see [`prior_hash`]."""
    tokenizer: str
    """Hash of the tokenizer: see [`tokenizer_hash`]."""
    chat_template: str
    """Hash of the chat template and its arguments."""
    temperature: float
    """Divides the logits of the prior."""
    max_completion_length: int
    """Longest completion, in tokens."""
    eos_token_ids: list[int]
    """The tokens that end a completion, sorted."""
    rewards: dict[str, str] = field(default_factory=dict)
    """Name of each reward function -> what it is: see [`reward_identity`]."""
    features: dict[str, str] = field(default_factory=dict)
    """Name of each other part of the evidence -> what it is."""
    name: str = ""
    """The prior's path or name."""

    @classmethod
    def of(
        cls, prior: Any, rewards: Mapping[str, Any] | None = None, features: Mapping[str, Any] | None = None
    ) -> "Provenance":
        """
        The record of draws that a prior scores.

        Args:
            prior ([`~rlhf_bayes.LanguageModel`]):
                π0, with its tokenizer, temperature and longest completion.
            rewards (`Mapping[str, Callable | nn.Module]`, *optional*):
                Name -> reward function.
            features (`Mapping[str, Any]`, *optional*):
                Name -> function or likelihood whose features are stored.
        """
        return cls(
            prior=prior_hash(prior.model),
            tokenizer=tokenizer_hash(prior.tokenizer),
            chat_template=template_hash(prior.tokenizer, prior.chat_template_kwargs),
            temperature=float(prior.temperature),
            max_completion_length=prior.max_completion_length,
            eos_token_ids=sorted(prior.eos_token_ids),
            rewards={name: reward_identity(func) for name, func in (rewards or {}).items()},
            features={name: reward_identity(part) for name, part in (features or {}).items()},
            name=str(getattr(base_causal_lm(prior.model).config, "_name_or_path", "")),
        )

    def check_same(self, other: "Provenance", argument: str, path: Any, rewards: bool = True) -> None:
        """
        Refuse a store whose numbers were made otherwise than these.

        Args:
            other ([`Provenance`]): The record of the store.
            argument (`str`): Name of the argument that names the store, for the message.
            path (`str` or `Path`): The store.
            rewards (`bool`): Whether rewards and features must be the same too.

        Raises:
            ValueError: with the first entry that differs, and both its values.
        """
        for entry in dataclasses.fields(self):
            if entry.name == "name" or (entry.name in ("rewards", "features") and not rewards):
                continue
            wanted, found = getattr(self, entry.name), getattr(other, entry.name)
            if wanted != found:
                raise ValueError(
                    f"`{argument}` must be a store made with the same `{entry.name}`, {_shown(wanted)}, got "
                    f"{str(path)!r}, made with {_shown(found)}{self._names(entry.name, other)}. "
                    f"{_WAYS_OUT[entry.name]}"
                )

    def _names(self, entry: str, other: "Provenance") -> str:
        return f" (prior {self.name!r} here, {other.name!r} there)" if entry == "prior" and self.name else ""

    def as_dict(self) -> dict[str, Any]:
        """The record for JSON."""
        return dataclasses.asdict(self)


_WAYS_OUT = {
    "prior": "Its log-probabilities are those of other weights. Start from the prior of the store; for a policy that "
    "was trained from it, pass the prior as `ref_model`. Half precision counts as other weights.",
    "tokenizer": "Its token ids mean other texts. Use the tokenizer that is saved beside the prior.",
    "chat_template": "Its prompts were other tokens. Use the same template and `chat_template_kwargs`.",
    "temperature": "It is part of the prior. Set it to that of the store, or draw a new store.",
    "max_completion_length": "It is part of the support. Set it to that of the store, or draw a new store.",
    "eos_token_ids": "Completions end elsewhere. Use the generation config of the prior.",
    "rewards": "Leave the rewards out to use what is stored, or score the completions anew into a new store.",
    "features": "Use the evidence of the store, or a new store.",
}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} ({what})" for name, what in value.items()) or "none"
    return repr(value)


def weights_hash(module: nn.Module, skip: Sequence[str] = ()) -> str:
    """
    A hash of the weights of a model, with the type that most of them have.

    It is the same for a plain model and for the base of a PEFT model. Critics and adapters are left out.

    Args:
        module (`nn.Module`): The model, whose weights are whole.
        skip (`Sequence[str]`, *optional*): Parts of names that are left out too.
    """
    left_out = {"critic", *skip, *getattr(module, "peft_config", {})}
    weights: dict[str, Tensor] = {}
    for name, weight in module.state_dict().items():
        parts = [part for part in name.split(".") if part not in ("base_layer", "original_module")]
        if left_out.isdisjoint(parts) and isinstance(weight, Tensor):
            weights[".".join(parts).removeprefix("base_model.model.")] = weight
    digest, sizes = hashlib.blake2b(digest_size=8), {}
    for name in sorted(weights):
        weight = weights[name].detach()
        sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.numel()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    kind = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
    return f"{str(kind).removeprefix('torch.')}-{digest.hexdigest()}"


def prior_hash(policy: nn.Module) -> str:
    """
    A hash of the prior within a policy that is not trained yet.

    Args:
        policy (`nn.Module`):
            A plain model; or a PEFT model, whose prior is the base, with the adapter "ref" if it has one, or with the
            active adapter where that is frozen, as in a loaded model.
    """
    adapters = getattr(policy, "peft_config", None)
    base = weights_hash(policy)
    if adapters is None:
        return base
    frozen = not any(parameter.requires_grad for parameter in policy.parameters())
    adapter = "ref" if "ref" in adapters else policy.active_adapter if frozen else None
    if adapter is None:
        return base
    from peft import get_peft_model_state_dict

    digest = hashlib.blake2b(base.encode(), digest_size=8)
    for name, weight in sorted(get_peft_model_state_dict(policy, adapter_name=str(adapter)).items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"{base.split('-')[0]}-{digest.hexdigest()}"


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of how a tokenizer makes token ids of texts. What it pads with, and to which length it cuts, is not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    return _digest([content, tokenizer.eos_token_id, tokenizer.bos_token_id])


def template_hash(tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None) -> str:
    """A hash of the chat template and its arguments."""
    return _digest([getattr(tokenizer, "chat_template", None), dict(template_kwargs or {})])


def reward_identity(func: Any) -> str:
    """
    What a reward function is, as a text that is the same for the same function in another process.

    A function is told by its name, its source, its defaults and the plain values that it closes over; a model by its
    class and its weights; another object by its class, its plain attributes, and the models in it. What a function
    calls is not looked at.

    Args:
        func (`Callable` or `nn.Module`): The reward function. A path must be loaded first.
    """
    func = inspect.unwrap(func)
    if isinstance(func, functools.partial):
        inner, arguments = reward_identity(func.func), [_plain(func.args), _plain(func.keywords)]
        return f"{inner}-{_digest(arguments)}"
    if isinstance(func, nn.Module):
        return f"{type(func).__name__} {weights_hash(func)}"
    if inspect.isroutine(func):
        cells = [cell.cell_contents for cell in getattr(func, "__closure__", None) or ()]
        content = [_source(func), _plain(getattr(func, "__defaults__", None)), _plain(cells)]
        return f"{func.__module__}.{func.__qualname__} {_digest(content)}"
    attributes = vars(func) if hasattr(func, "__dict__") else {}
    models = {name: weights_hash(x) for name, x in attributes.items() if isinstance(x, nn.Module)}
    scorer = attributes.get("_scorer")  # of a likelihood
    asked = [reward_identity(inner) for inner in scorer.functions.values()] if scorer is not None else []
    parts = [reward_identity(part) for part in attributes.get("likelihoods", [])]
    content = [_source(type(func)), _plain(attributes), models, asked, parts]
    return f"{type(func).__module__}.{type(func).__qualname__} {_digest(content)}"


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # built in, or typed into a console
        code = getattr(thing, "__code__", None)
        return "" if code is None else f"{code.co_code.hex()} {code.co_consts!r}"


def _plain(value: Any) -> Any:
    """The part of a value that JSON can hold: what else there is, is named by its class."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return type(value).__qualname__


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
