"""The posteriors of `real_posterior.py`: a real model as prior, prompts, and evidence that is never -inf."""

import gzip
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import real_reward
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_bayes.toy.rewards import vader_reward

Reward = Callable[..., list[float]]
NUM_PROMPTS, PROMPT_WORDS = 32, 6
LENGTH = 32  # tokens of the longest completion
NUM_GENERATIONS = 8  # completions a prompt in a rollout
PROBE = ("She was happy and smiled.", "He was sad and cried.", "The dog ran home, and it was wonderful.")


@dataclass(frozen=True)
class Folders:
    """Where the data are (`models/` and `data/`), and where the benchmark writes."""

    shared: Path
    output: Path


@dataclass(frozen=True)
class Task:
    """The posterior π0·exp(r/β)/Z of some prompts."""

    name: str
    model: Path
    prompts: list[str]
    reward: Reward
    """Of TRL's protocol. It gets the decoded completion, without special tokens."""
    beta: float
    length: int = LENGTH
    num_generations: int = NUM_GENERATIONS

    def load_model(self, folder: Path | None = None) -> PreTrainedModel:
        """The prior, or a policy of a folder, in evaluation mode."""
        return AutoModelForCausalLM.from_pretrained(folder or self.model, dtype=torch.float32).eval()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.model)

    def log_likelihood(self, prompt: str, completions: list[str], completion_ids: Sequence[Sequence[int]]) -> Tensor:
        """r/β of completions of one prompt: (N,), nats, fp64."""
        rewards = self.reward(
            prompts=[prompt] * len(completions), completions=completions, completion_ids=list(completion_ids)
        )
        return torch.tensor(rewards, dtype=torch.float64) / self.beta

    def fingerprint(self, model: torch.nn.Module) -> str:
        """A hash of the prior's weights, the prompts, β, and the rewards of some fixed texts."""
        digest = hashlib.sha256()
        for name, weight in sorted(model.state_dict().items()):
            digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
        texts = [*PROBE, *self.prompts]
        rewards = self.reward(prompts=texts, completions=texts, completion_ids=[[0]] * len(texts))
        facts = [self.prompts, self.beta, self.length, [f"{reward:.5g}" for reward in rewards]]
        digest.update(json.dumps(facts).encode())
        return digest.hexdigest()[:12]


def first_words(folders: Folders) -> list[str]:
    """The first six words of sentences that begin TinyStories, in the order of the file, each once."""
    path = folders.shared / "data" / "tinystories" / "first_sentences.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        sentences = [json.loads(line)["text"] for line in lines]
    beginnings = dict.fromkeys(" ".join(sentence.split()[:PROMPT_WORDS]) for sentence in sentences)
    return list(beginnings)[:NUM_PROMPTS]


def stories(folders: Folders) -> Task:
    model = folders.shared / "models" / "stories260K"
    return Task("stories", model, first_words(folders), vader_reward, beta=0.25)


def bitstories(folders: Folders) -> Task:
    model = folders.shared / "models" / "bitstories3M"
    return Task("bitstories", model, first_words(folders), vader_reward, beta=0.25)


def convincing(folders: Folders) -> Task:
    model, prompts, beta = folders.shared / "models" / "stories260K", first_words(folders), 0.25
    trained = real_reward.trained_reward(
        folders.output / "reward_model", model, folders.shared / "data", prompts, LENGTH
    )
    reward = real_reward.as_reward(real_reward.evidence(trained), beta)
    return Task("convincing", model, prompts, reward, beta)


TASKS: dict[str, Callable[[Folders], Task]] = {"stories": stories, "bitstories": bitstories, "convincing": convincing}
# the weights of bitstories3M are about 0.0005, those of stories260K about 0.05, and a step of Adam is as large as its
# rate whatever the weights are
RATE_SCALES = {"bitstories": 0.01}
