"""An engine that a test can get wrong, in the place of TRL's vLLM. Not a test module."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from rlhf_bayes.lm import enable_completion_scoring, score_completions
from rlhf_bayes.lm.generation import draw_plainly
from rlhf_bayes.lm.language_model import pad_ids


class FakeVLLM:
    """
    Draws from a model at a temperature of its own, and returns the log-probs of that distribution as vLLM does.

    Args:
        model: what it draws from.
        spoil: changes what is returned, (completion_ids, log_probs) -> the same, at each call.
    """

    def __init__(self, model: nn.Module, eos_token_id: int, length: int, temperature: float = 1.0, spoil: Any = None):
        self.model, self.eos, self.length, self.temperature = model, eos_token_id, length, temperature
        self.spoil, self.logprobs, self.calls, self.synced, self.vllm_client = spoil, None, 0, 0, None

    def sync_weights(self):
        self.synced += 1

    @torch.no_grad()
    def generate(self, prompts, images, num_generations, profiler=None):
        self.calls += 1
        with profiler or nullcontext():
            ids = draw_plainly(self.model, prompts, self.length, [self.eos], self.temperature)
        log_probs = [None] * len(ids)
        if self.logprobs is not None:  # TRL's value for RLOO, with which vLLM returns none
            log_probs = self._log_probs(prompts, ids)
        if self.spoil is not None:
            ids, log_probs = self.spoil(self.calls, ids, log_probs)
        if self.logprobs is None:
            return prompts, ids, None, None
        return prompts, ids, [[[x] for x in row] for row in log_probs], [[[token] for token in row] for row in ids]

    def _log_probs(self, prompts, ids):
        enable_completion_scoring(self.model)
        (prompt_ids, prompt_mask), (padded, mask) = (
            pad_ids(rows, side, torch.device("cpu")) for rows, side in ((prompts, "left"), (ids, "right"))
        )
        scores = score_completions(
            self.model, prompt_ids, prompt_mask, padded, mask, self.temperature, with_values=False
        ).log_probs
        return [row[keep].tolist() for row, keep in zip(scores, mask, strict=True)]


def drawn_by_engine(trained: Any, temperature: float = 1.0, spoil: Any = None, model: nn.Module | None = None) -> Any:
    """The trainer, whose completions come from such an engine, by default with its own policy."""
    policy = trained.model if model is None else model
    trained.use_vllm, trained._last_loaded_step = True, -1
    trained.vllm_generation = FakeVLLM(
        policy, trained.processing_class.eos_token_id, trained.args.max_completion_length, temperature, spoil
    )
    return trained
