"""Stores of the enumerable toy: all of its completions once, or draws of several models. Not a test module."""

import math

import torch

from rlhf_bayes import LanguageModel
from rlhf_bayes.store import CompletionStore, Provenance, ScoredCompletion
from rlhf_bayes.testing import toy_reward


def starts_with_a(prompts, completions, completion_ids, **kwargs):
    return [float(ids[0] == 0) for ids in completion_ids]


def language_model(toy, model=None):
    model = toy.random_policy(noise=0.0) if model is None else model
    return LanguageModel(model, toy.tokenizer, toy.max_completion_length, temperature=toy.temperature)


def provenance(toy, **rewards):
    return Provenance.of(language_model(toy), rewards or {"toy_reward": toy_reward})


def completion(toy, number, index, log_proposal, drawn_by, **changes):
    """A completion of the toy by numbers, of its prompt and its own, with its reward and a feature."""
    ids = toy.completion_ids[index]
    values = {
        "prompt": toy.prompts[number],
        "prompt_ids": toy.tokenizer(toy.prompts[number])["input_ids"],
        "completion": toy.completions[index],
        "completion_ids": ids,
        "ended": ids[-1] == toy.tokenizer.eos_token_id,
        "log_prior": toy.log_prior[number, index].item(),
        "log_proposal": float(log_proposal),
        "drawn_by": drawn_by,
        "rewards": {"toy_reward": toy.rewards[number, index].item()},
        "features": {"starts_with_a": float(ids[0] == 0)},
    }
    return ScoredCompletion(**values | changes)


def all_once(toy, folder, prompts=(0, 1, 2)) -> CompletionStore:
    """Each completion of some prompts once, as if a uniform distribution had drawn them: sums over it are exact."""
    store = CompletionStore.create(folder, provenance(toy))
    number = len(toy.completion_ids)
    for prompt in prompts:  # a file for each
        store.append(completion(toy, prompt, index, -math.log(number), "uniform") for index in range(number))
    return store


def drawn(toy, log_probs, n, drawn_by, seed=0, **changes):
    """n completions of each prompt from the densities (P, N)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        completion(toy, prompt, index, log_probs[prompt, index], drawn_by, **changes)
        for prompt in range(len(toy.prompts))
        for index in torch.multinomial(log_probs[prompt].exp(), n, True, generator=generator).tolist()
    ]
