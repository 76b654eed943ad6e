"""An actor: draws from the newest policy of a learner, scores, and adds to a store, until the learner has finished."""

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch

from rlhf_bayes.likelihoods import Likelihood
from rlhf_bayes.lm import LanguageModel, Prompt, VLLMLanguageModel
from rlhf_bayes.lm.pretrained import is_adapter
from rlhf_bayes.store.completion_store import CompletionStore
from rlhf_bayes.store.score_draws import provenance_of, scored_completions
from rlhf_bayes.store.weights_folder import PolicyVersion, Wanted, WeightsFolder

logger = logging.getLogger(__name__)

_POLL = 0.05  # seconds
_LOGGED_EVERY = 60.0  # seconds


@final
class Actor:
    """
    Draws completions from the policy of a learner, and scores them under policy, prior and evidence.

    The learner is a `GDCTrainer` with the store as `train_dataset` and the folder as `actor_weights`. It says how many
    completions a file of the store has, and an actor waits where the learner has as many unread files as it wants.
    Several actors may write to one store. Each writes whole files, so that one may be killed at any time.

    Args:
        store (`str` or `Path`):
            The store, made where there is none.
        weights (`str` or `Path`):
            The learner's `actor_weights`.
        prior ([`~rlhf_bayes.LanguageModel`]):
            π0, from which the learner's policy started. Where it is a [`~rlhf_bayes.lm.VLLMLanguageModel`], its engine
            draws from the policy: it is given the weights of each version, and its own log-probs are log q.
        likelihood ([`~rlhf_bayes.likelihoods.Likelihood`]):
            The evidence. Its rewards and features are stored raw, so that its β does not matter.
        prompts (`Sequence` of `str` or of chats):
            The prompts, drawn in an order of this actor's own, each once before any comes again.
        columns (`Mapping[str, Sequence]`, *optional*):
            Other columns of their dataset, for the evidence.
        seed (`int`, *optional*):
            Of all that is drawn. Two actors with the same would draw the same. Default: from the operating system.
        timeout (`float`, *optional*, defaults to `1800.0`):
            Seconds without a sign of the learner after which the actor ends.

    Raises:
        ValueError: if the store was made by another prior, tokenizer or reward, or there is no prompt.
    """

    def __init__(
        self,
        store: Any,
        weights: Any,
        prior: LanguageModel,
        likelihood: Likelihood,
        prompts: Sequence[Prompt],
        columns: Mapping[str, Sequence] | None = None,
        *,
        seed: int | None = None,
        timeout: float = 1800.0,
    ):
        if len(prompts) == 0:
            raise ValueError("`prompts` must hold at least one prompt, got none.")
        self.store = CompletionStore.create(store, provenance_of(prior, likelihood))
        self.folder = WeightsFolder(weights)
        self.prior, self.likelihood = prior, likelihood
        self.prompts, self.columns, self.timeout = prompts, dict(columns or {}), timeout
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self.num_drawn = 0
        self._order = self._rows()
        self._policy: LanguageModel | None = None
        self._loaded: str | None = None

    def run(self, say: Callable[[str], None] = logger.info) -> None:
        """
        Draw until the training has ended, or the file `stop` is in the folder.

        Args:
            say (`Callable[[str], None]`, *optional*): Gets a line on what was drawn, once a minute. Default: logged.

        Raises:
            TimeoutError: if the learner gives no sign for `timeout` seconds.
        """
        sign, since, logged = None, time.monotonic(), time.monotonic()
        while not self.folder.stopped:
            if self.draw_once():
                since = time.monotonic()
                if since > logged + _LOGGED_EVERY:
                    logged = since
                    say(f"{self.num_drawn:,} completions drawn, the last ones by the {self._loaded}.")
                continue
            found = self.folder.wanted(), self.folder.num_read()
            if found != sign:
                sign, since = found, time.monotonic()
            if time.monotonic() > since + self.timeout:
                raise TimeoutError(
                    f"The learner gave no sign for `timeout` = {self.timeout:g} seconds: it has "
                    f"{self._unread()} unread files in {str(self.store.path)!r}, and reads none. What was drawn is "
                    "kept there. Start the learner, or resume it, then this actor again."
                )
            time.sleep(_POLL)

    def draw_once(self) -> bool:
        """Add a file to the store. False where the learner has not started, or has enough that it has not read."""
        wanted = self.folder.wanted()
        if wanted is None or self._unread() >= wanted.max_unread:
            return False
        version = self.folder.newest(wanted.run)
        if version is None or not self._load(version):
            return False
        self._draw(wanted, version)
        return True

    def _draw(self, wanted: Wanted, version: PolicyVersion) -> None:
        rows = [next(self._order) for _ in range(wanted.num_prompts)]
        assert self._policy is not None
        drawn = self._policy.sample([self.prompts[row] for row in rows], wanted.num_generations, self.generator)
        columns = {
            name: [values[row] for row in rows for _ in range(wanted.num_generations)]
            for name, values in self.columns.items()
        }
        scored = scored_completions(
            drawn, self.prior, self.likelihood, drawn_by=version.name, columns=columns, step=version.step
        )
        self.store.append(scored)
        self.num_drawn += len(scored)

    def _unread(self) -> int:
        return len(self.store.files()) - self.folder.num_read()

    def _rows(self) -> Iterator[int]:
        """Numbers of prompts without end, each once before any comes again."""
        while True:
            yield from torch.randperm(len(self.prompts), generator=self.generator).tolist()

    def _load(self, version: PolicyVersion) -> bool:
        """Take the weights of a version. False where newer ones have replaced it meanwhile."""
        if version.name == self._loaded:
            return True
        try:
            weights = version.weights()
            if self._policy is None:
                self._policy = self._new_policy(version)
        except OSError:
            if version.path.exists():
                raise
            return False
        parameters = dict(self._policy.model.named_parameters())
        missing = sorted(weights.keys() - parameters.keys())
        if missing:
            raise ValueError(
                f"`prior` must be the model that the learner trains, got a {type(self.prior.model).__name__} without "
                f"{missing[0]!r}, which is among the weights in {str(version.path)!r}. Pass the learner's prior."
            )
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)
        if isinstance(self._policy, VLLMLanguageModel):
            self._policy.update_engine()
        self._loaded = version.name
        return True

    def _new_policy(self, version: PolicyVersion) -> LanguageModel:
        prior, model = self.prior, copy.deepcopy(self.prior.model)
        if is_adapter(version.path):
            from peft import PeftConfig, get_peft_model

            model: Any = get_peft_model(model, PeftConfig.from_pretrained(str(version.path)))
        options = prior.max_completion_length, prior.temperature, prior.batch_size, prior.chat_template_kwargs
        if isinstance(prior, VLLMLanguageModel):
            return VLLMLanguageModel(model, prior.engine, prior.tokenizer, *options)
        return LanguageModel(model, prior.tokenizer, *options)
