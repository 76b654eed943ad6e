"""A language model whose completions vLLM draws and transformers scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_bayes.lm.generation import first_eos_mask
from rlhf_bayes.lm.language_model import LanguageModel, pad_ids


@final
class VLLMLanguageModel(LanguageModel):
    """
    A [`LanguageModel`] whose completions are drawn by vLLM. It can be prior, policy or proposal.

        prior = VLLMLanguageModel(model_id, vllm.LLM(model_id, dtype="float32"), max_completion_length=64)

    Log-probabilities are those of the transformers model, so that prior, proposal and policy are scored by the same
    kernels. The engine must hold the same weights, which cannot be checked here. Its draws deviate by the rounding
    difference of the two kernels, which weights do not correct. Requests have a temperature and no other setting,
    whatever the model's generation config says. Each has its own seed, so that batching does not matter.

    Importance and rejection sampling, best of n and Metropolis–Hastings draw with the engine. SMC and guided decoding,
    which look at each token, use the transformers model.

    **It was not run against vLLM itself**, which was not available: the tests use a stand-in with its interface,
    `LLM.generate` and `SamplingParams` as TRL 1.16 calls them.

    Args:
        model_or_path (`str`, `Path` or `PreTrainedModel` or `PeftModel`):
            The model that scores.
        engine (`vllm.LLM`):
            The engine that draws. Its `max_model_len` must leave room for prompt and completion.
        tokenizer, max_completion_length, temperature, chat_template_kwargs:
            As for [`LanguageModel`].
        batch_size (`int`):
            Requests that the engine gets at once, and sequences in one forward pass of the model.

    Raises:
        TypeError: if `engine` has no `generate`.
        ImportError: if vLLM is not installed.
        ValueError: as [`LanguageModel`].
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
            raise ImportError("VLLMLanguageModel needs vLLM: `pip install 'rlhf_bayes[vllm]'`.") from error
        super().__init__(
            model_or_path, tokenizer, max_completion_length, temperature, batch_size, chat_template_kwargs
        )
        self.engine = engine
        self._sampling_params = SamplingParams

    def generate_ids(self, prompt_ids: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Token ids that follow B token sequences, up to and including the first EOS."""
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
                detokenize=False,
            )
            # seeds come from the global random state, which the caller has seeded for `generate`
            for seed in torch.randint(2**31, (len(prompt_ids),)).tolist()
        ]
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        outputs = self.engine.generate(prompts, sampling_params=requests, use_tqdm=False)
        drawn, mask = pad_ids([list(output.outputs[0].token_ids) for output in outputs], "right", torch.device("cpu"))
        kept = mask & first_eos_mask(drawn, self.eos_token_ids)
        return [ids[keep].tolist() for ids, keep in zip(drawn, kept, strict=True)]
