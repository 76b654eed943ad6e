"""A causal LM small enough to enumerate, with the exact posterior of a toy reward."""

import itertools
import math
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rlhf_bayes import numerics
from rlhf_bayes.lm.completions import Completion, Prompt

_EOS, _PAD = "<eos>", "<pad>"
# the template holds the contents only, so that a chat prompt has the same tokens as the same words in plain text
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@final
class EnumerableLM:
    """
    A real, tiny, randomly initialised transformers causal LM that is small enough to enumerate.

        log π0(x | c),   log π*(x | c) = log π0(x | c) + log_likelihood(c, x) − log Z(c)

    for P prompts c and all N completions x: the tokens up to and including the first EOS, or the first
    `max_completion_length` without one. With V tokens and length T, N = Σ_{t<T} (V − 1)^t + (V − 1)^T.

    The pad token is in the vocabulary, so the model draws it like any other token: a mask inferred from it is wrong.
    The prior has the weights of construction. `model` may be trained in place: the exact values do not change with it.

    Args:
        family (`"llama"`, `"gpt2"` or `"qwen2"`, defaults to `"llama"`): architecture.
        vocab_size (`int`, defaults to `9`): tokens, EOS and pad included, between 3 and 9.
        max_completion_length (`int`, defaults to `4`): longest completion, EOS included, between 1 and 5 tokens.
        beta (`float`, defaults to `0.5`): units of the reward per nat, for the default likelihood and the objective.
        pad_is_eos (`bool`, defaults to `False`): pad with EOS in place of a token of its own.
        temperature (`float`, defaults to `1.0`): divides the logits of the prior and of every policy.
        seed (`int`, defaults to `0`): of the weights. The global random state is left alone.

    Raises:
        ValueError: if an argument is out of range.
    """

    model: nn.Module
    """The causal LM, in evaluation mode, fp32 on the CPU. `random_policy` gives others of the same shape."""
    tokenizer: PreTrainedTokenizerFast
    """A token is a word, separated by spaces. Pads on the left, and can be saved by `save_pretrained`."""
    prompts: list[str]
    """P prompts of different lengths."""
    completion_ids: list[list[int]]
    """The N completions, as token ids."""
    completions: list[str]
    """The N completions decoded, special tokens skipped, as reward functions get them."""
    log_prior: Tensor
    """(P, N), nats: log π0(x | c), normalised."""
    rewards: Tensor
    """(P, N): [`toy_reward`] of every completion."""

    def __init__(
        self,
        family: Literal["llama", "gpt2", "qwen2"] = "llama",
        vocab_size: int = 9,
        max_completion_length: int = 4,
        beta: float = 0.5,
        pad_is_eos: bool = False,
        temperature: float = 1.0,
        seed: int = 0,
    ):
        if not 3 <= vocab_size <= 9:
            raise ValueError(
                f"`vocab_size` must be between 3 and 9, got {vocab_size}: all completions are enumerated."
            )
        if not 1 <= max_completion_length <= 5:
            raise ValueError(
                f"`max_completion_length` must be between 1 and 5, got {max_completion_length}: all "
                "completions are enumerated."
            )
        for name, value in (("beta", beta), ("temperature", temperature)):
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {value}.")
        self.vocab_size, self.max_completion_length = vocab_size, max_completion_length
        self.beta, self.temperature = beta, temperature
        self.tokenizer = _word_tokenizer(vocab_size, pad_is_eos)
        words = self.tokenizer.convert_ids_to_tokens(list(range(vocab_size - 2 + pad_is_eos)))
        self.prompts = [" ".join(words[i % len(words)] for i in which) for which in ([0], [1, 2], [2, 0, 1, 0])]
        self.completion_ids = self._enumerate()
        self._prefixes, self._positions = self._prefix_table()
        self.completions = self.tokenizer.batch_decode(self.completion_ids, skip_special_tokens=True)
        self._config = _config(family, self.tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = AutoModelForCausalLM.from_config(self._config).eval()
        self._weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        with torch.no_grad():
            self.log_prior = self.log_probs()
        self.rewards = torch.tensor([self._rewards_of(prompt) for prompt in self.prompts])  # (P, N)

    @property
    def log_likelihood(self) -> Tensor:
        """(P, N), nats: `r(c, x) / β` of [`toy_reward`]."""
        return self.rewards / self.beta

    def random_policy(self, noise: float = 0.05, seed: int = 1) -> PreTrainedModel:
        """
        A new causal LM: the prior's weights plus Gaussian noise. Without noise, a copy of the prior to train.

        Args:
            noise (`float`, defaults to `0.05`): its standard deviation; the prior's own weights have about 0.2.
            seed (`int`, defaults to `1`): of the noise.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            policy = AutoModelForCausalLM.from_config(self._config).eval()
        policy.load_state_dict(self._weights)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator)
        return policy

    def save(self, folder: str | Path) -> str:
        """Write the prior and its tokenizer to a folder that the `Auto` classes read; returns the folder."""
        self.random_policy(noise=0.0).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return str(folder)

    def log_probs(self, model: nn.Module | None = None, prompts: Sequence[Prompt] | None = None) -> Tensor:
        """
        log π(x | c) of every completion, with gradient: (P, N), nats, on the CPU.

        Args:
            model (`torch.nn.Module`, *optional*): a causal LM over the same vocabulary; by default `self.model`.
            prompts (`Sequence` of `str` or chat messages, *optional*): P prompts; by default `self.prompts`.

        Raises:
            AssertionError: if the probabilities of a prompt do not sum to 1.
        """
        model = self.model if model is None else model
        prompts = self.prompts if prompts is None else prompts
        was_training = model.training
        if was_training:
            model.eval()  # dropout would make the probabilities random
        log_probs = torch.stack([self._log_probs(model, self._prompt_ids(prompt)) for prompt in prompts])  # (P, N)
        if was_training:
            model.train()
        log_mass = log_probs.detach().logsumexp(-1)  # (P,)
        if not (log_mass.abs() < 1e-4).all():
            raise AssertionError(f"all completions' probabilities must sum to 1, got log-mass {log_mass.tolist()}")
        return log_probs

    def log_z(self, log_likelihood: Tensor | None = None) -> Tensor:
        """log Σ_x π0(x | c)·exp(log_likelihood): (P,), nats, for a log-likelihood (P, N) or toy_reward's."""
        return (self.log_prior + self._evidence(log_likelihood)).logsumexp(-1)

    def log_posterior(self, log_likelihood: Tensor | None = None) -> Tensor:
        """log π*(x | c), normalised: (P, N), nats, for a log-likelihood (P, N) or toy_reward's."""
        log_density = self.log_prior + self._evidence(log_likelihood)  # (P, N)
        return log_density - log_density.logsumexp(-1, keepdim=True)

    def elbo(self, model: nn.Module, log_likelihood: Tensor | None = None) -> Tensor:
        """E_π[log_likelihood] − KL(π‖π0) = log Z − KL(π‖π*): (P,), nats, with gradient."""
        log_prob = self.log_probs(model)  # (P, N)
        evidence = self._evidence(log_likelihood) + self.log_prior - log_prob  # (P, N)
        return (log_prob.exp() * evidence).sum(-1)

    def reverse_kl(self, model: nn.Module, log_likelihood: Tensor | None = None) -> Tensor:
        """KL(π‖π*), which PPO minimises: (P,), nats, with gradient."""
        return numerics.reverse_kl(self.log_posterior(log_likelihood), self.log_probs(model))

    def forward_kl(self, model: nn.Module, log_likelihood: Tensor | None = None) -> Tensor:
        """KL(π*‖π): (P,), nats, with gradient."""
        return numerics.forward_kl(self.log_posterior(log_likelihood), self.log_probs(model))

    def js(self, model: nn.Module, log_likelihood: Tensor | None = None) -> Tensor:
        """Jensen–Shannon divergence of π and π*: (P,), nats, with gradient."""
        return numerics.js(self.log_posterior(log_likelihood), self.log_probs(model))

    def tv(self, model: nn.Module, log_likelihood: Tensor | None = None) -> Tensor:
        """Total variation distance of π and π*: (P,), with gradient."""
        return numerics.tv(self.log_posterior(log_likelihood), self.log_probs(model))

    def objective_gradient(self, model: nn.Module, log_likelihood: Tensor | None = None) -> dict[str, Tensor]:
        """
        Exact gradient of `J = E[r] − β KL(π‖π0)`, the mean over prompts, with respect to the trainable parameters.

        Args:
            model (`torch.nn.Module`): the policy; its `.grad` fields are left alone.
            log_likelihood (`torch.Tensor`, *optional*): (P, N), nats; by default toy_reward's. `r` is `β` times it.

        Returns:
            `dict[str, torch.Tensor]`: gradient by parameter name, 0 for parameters that the objective does not depend
                on.
        """
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        objective = self.beta * self.elbo(model, log_likelihood).mean()
        gradients = torch.autograd.grad(
            objective, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        return dict(zip(parameters, gradients, strict=True))

    def _enumerate(self) -> list[list[int]]:
        eos = self.tokenizer.eos_token_id
        others = [token for token in range(self.vocab_size) if token != eos]
        ended = [
            [*prefix, eos]
            for length in range(self.max_completion_length)
            for prefix in itertools.product(others, repeat=length)
        ]
        return ended + [list(tokens) for tokens in itertools.product(others, repeat=self.max_completion_length)]

    def _log_probs(self, model: nn.Module, prompt_ids: list[int]) -> Tensor:
        """log π(x | c) of the N completions of one prompt: (N,)."""
        device = next(model.parameters()).device
        rows = [[*prompt_ids, *prefix] for prefix in self._prefixes]
        input_ids = torch.tensor(rows, device=device)  # (R, C + T − 1)
        position_ids = torch.arange(input_ids.size(1), device=device).expand_as(input_ids)
        logits = model(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), position_ids=position_ids, use_cache=False
        ).logits
        logits = logits[:, len(prompt_ids) - 1 :].float().cpu()  # (R, T, V)
        token_log_probs = (logits / self.temperature).log_softmax(-1)
        completion, row, step, token = self._positions
        return torch.zeros(len(self.completion_ids)).index_add(0, completion, token_log_probs[row, step, token])

    def _prefix_table(self) -> tuple[list[tuple[int, ...]], Tensor]:
        """
        Rows of tokens that hold every completion's proper prefixes, and an index of the tokens that follow: (4, M).

        The rows are (R, T − 1) and need no padding. The index has a column for each token of each completion: the
        completion, the row that holds the token's prefix, the token's step, and the token.
        """
        n_others = self.vocab_size - 1
        truncated = self.completion_ids[-(n_others**self.max_completion_length) :]
        prefixes = [tuple(ids[:-1]) for ids in truncated[::n_others]]  # the last token varies fastest
        row_of = {prefix[:length]: row for row, prefix in enumerate(prefixes) for length in range(len(prefix) + 1)}
        positions = [
            (completion, row_of[tuple(ids[:-1])], step, token)
            for completion, ids in enumerate(self.completion_ids)
            for step, token in enumerate(ids)
        ]
        return prefixes, torch.tensor(positions).T

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        text = prompt if isinstance(prompt, str) else "".join(f"{message['content']} " for message in prompt)
        return self.tokenizer(text)["input_ids"]

    def _rewards_of(self, prompt: str) -> list[float]:
        return toy_reward([prompt] * len(self.completion_ids), self.completions, self.completion_ids)

    def _evidence(self, log_likelihood: Tensor | None) -> Tensor:
        if log_likelihood is None:
            return self.log_likelihood
        if log_likelihood.shape != self.log_prior.shape:
            raise ValueError(
                f"`log_likelihood` must be (P, N) = {tuple(self.log_prior.shape)}, got {tuple(log_likelihood.shape)}: "
                "a row for each of `prompts`, a column for each of `completion_ids`."
            )
        return log_likelihood


def toy_reward(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    **kwargs: Any,
) -> list[float]:
    """
    A deterministic reward without symmetry: it depends on the tokens, their positions, and the length of the prompt.

    TRL's protocol; takes any token ids. On `EnumerableLM()` the prior is about 1.5 nats from the posterior.

    Args:
        prompts (`Sequence` of `str` or chat messages): B prompts.
        completions (`Sequence` of `str` or chat messages): not read; two completions may decode to the same text.
        completion_ids (`Sequence[Sequence[int]]`): B completions, the first EOS included.
        **kwargs: what TRL passes besides; not read.

    Returns:
        `list[float]`: B rewards.
    """
    rewards = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        words = " ".join([prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]).split()
        by_position = sum(math.sin(1.7 * token + 0.9 * step) for step, token in enumerate(ids))
        by_pair = sum(math.cos(2.3 * left - 1.1 * right) for left, right in itertools.pairwise(ids))
        by_prompt = math.cos(0.7 * len(words) + 0.5 * ids[0] + len(ids))
        rewards.append(0.6 * by_position + 0.35 * by_pair + 0.5 * by_prompt)
    return rewards


def _word_tokenizer(vocab_size: int, pad_is_eos: bool) -> PreTrainedTokenizerFast:
    special = [_EOS] if pad_is_eos else [_PAD, _EOS]
    # special tokens come last, so that token 0 is a word: code that pads with 0 by mistake is caught
    words = [*string.ascii_lowercase[: vocab_size - len(special)], *special]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_EOS,
        pad_token=_EOS if pad_is_eos else _PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=_CHAT_TEMPLATE,
    )


def _config(family: str, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig | GPT2Config | Qwen2Config:
    # ten times the usual scale of the weights, so that the prior is far from uniform and depends on the whole prefix
    common = {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **no_dropout, **common)
    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    if family not in classes:
        raise ValueError(f'`family` must be "llama", "gpt2" or "qwen2", got {family!r}.')
    return classes[family](
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        **common,
    )
