"""The completions of a store as draws of a posterior: their evidence, and the density of what drew them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from datasets import Dataset
from torch import Tensor

from rlhf_bayes.likelihoods import Likelihood, checked_evidence, combine_rewards
from rlhf_bayes.lm import Prompt
from rlhf_bayes.lm.language_model import as_completion
from rlhf_bayes.numerics.mixture import log_balance
from rlhf_bayes.store.completion_store import CompletionStore
from rlhf_bayes.store.scored_completion import DENSITY, FEATURE, REWARD
from rlhf_bayes.store.stored_column import STORED

_AT_ONCE = 1024  # rows whose evidence is computed together


@final
@dataclass(frozen=True)
class StoredDraws:
    """N completions of P prompts. Log-probabilities are in nats, (N,), fp64."""

    rows: Dataset
    """The rows of the store, in its order."""
    prompts: list[Prompt]
    """The P prompts: a prompt with other columns of its dataset is another one."""
    columns: list[dict[str, Any]]
    """The other columns of the dataset of each of the P prompts."""
    prompt_index: Tensor
    """(N,) int64: the prompt of each row."""
    log_prior: Tensor
    """log π0."""
    log_proposal: Tensor
    """log q: of the mixture of all that drew for the prompt where its density is known, else of what drew the row."""
    num_mixed: int = 0
    """The number of prompts whose rows are weighted by the mixture, though several proposals drew them."""
    num_own: int = 0
    """The number of prompts of which several proposals drew, and each row is weighted by its own."""
    names: list[str] = field(default_factory=list)
    """The names of all that drew."""

    @classmethod
    def of(cls, store: CompletionStore) -> "StoredDraws":
        """
        The draws of a store.

        Raises:
            ValueError: if it holds no completion.
        """
        rows = store.read()
        if len(rows) == 0:
            raise ValueError(
                f"`{store.path}` must hold completions, got none. Draw some: `rlhf-bayes sample --store {store.path}`."
            )
        return cls.of_rows(rows)

    @classmethod
    def of_rows(cls, rows: Dataset) -> "StoredDraws":
        """The draws of some rows of a store."""
        keys = list(zip(rows["prompt"], rows["is_chat"], rows["columns"], strict=True))
        unique = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        prompt_index = torch.tensor([unique[key] for key in keys])
        log_prior, own = (torch.tensor(rows[name], dtype=torch.float64) for name in ("log_prior", "log_proposal"))
        drawn_by = list(rows["drawn_by"])
        log_proposal, mixed, apart = _mixtures(rows, prompt_index, drawn_by, log_prior, own)
        return cls(
            rows=rows,
            prompts=[json.loads(text) if is_chat else text for text, is_chat, _ in unique],
            columns=[json.loads(columns) for _, _, columns in unique],
            prompt_index=prompt_index,
            log_prior=log_prior,
            log_proposal=log_proposal,
            num_mixed=mixed,
            num_own=apart,
            names=list(dict.fromkeys(drawn_by)),
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def weighting(self) -> str:
        """By what the rows are weighted, in words."""
        if self.num_mixed == self.num_own == 0:
            return "each completion by what drew it: one proposal for each prompt"
        parts = []
        if self.num_mixed:
            parts.append(f"by the mixture of all that drew, for {self.num_mixed} prompts")
        if self.num_own:
            parts.append(f"each completion by what drew it, for {self.num_own} prompts with several proposals")
        return "; ".join(parts)

    def rewards(
        self,
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        clip_range: tuple[float, float] | None = None,
        missing_eos_penalty: float | None = None,
    ) -> Tensor:
        """
        One reward for each completion, (N,), in units of reward: see [`~rlhf_bayes.likelihoods.combine_rewards`].

        Args:
            names (`Sequence[str]`): Reward functions of the store.
            weights (`Sequence[float]`, *optional*): One for each of them. Default: 1 each.
            clip_range, missing_eos_penalty: As in [`~rlhf_bayes.likelihoods.RewardLikelihood`].

        Raises:
            ValueError: if there are no rewards, or another number of weights.
        """
        if not names:
            raise ValueError(
                "The store must hold rewards, got none. Pass evidence that is made of its features: "
                "`likelihood=RewardLikelihood(StoredColumn('log_likelihood'), beta=1.0)`, or a `Constraint`."
            )
        weights = [1.0] * len(names) if weights is None else list(weights)
        if len(weights) != len(names):
            raise ValueError(
                f"`reward_weights` must hold one weight for each of {list(names)}, got {len(weights)}. Use 0 to leave "
                "one out."
            )
        per_func = torch.stack([self._column(REWARD + name) for name in names], dim=-1)  # (N, F)
        ended = torch.tensor(self.rows["ended"])
        return combine_rewards(per_func, torch.tensor(weights), clip_range, missing_eos_penalty, ended)

    def evidence(self, likelihood: Likelihood) -> tuple[Tensor, dict[str, Tensor]]:
        """
        The log-likelihood of each completion, (N,), nats, and the features that it comes from, (N,) each.

        Args:
            likelihood ([`~rlhf_bayes.likelihoods.Likelihood`]):
                Evidence of any kind. [`StoredColumn`] reads the rewards and features of the store.
        """
        parts = [self._evidence_of(range(start, min(start + _AT_ONCE, len(self))), likelihood)
                 for start in range(0, len(self), _AT_ONCE)]  # fmt: skip
        log_likelihood = torch.cat([part.log_likelihood for part in parts])
        features = {name: torch.cat([part.features[name].cpu() for part in parts]) for name in parts[0].features}
        return log_likelihood.cpu(), features

    def _evidence_of(self, which: range, likelihood: Likelihood) -> Any:
        rows = self.rows[which.start : which.stop]
        of_prompt = self.prompt_index[which.start : which.stop].tolist()
        prompts = [self.prompts[index] for index in of_prompt]
        completions = [as_completion(p, text) for p, text in zip(prompts, rows["completion"], strict=True)]
        names = dict.fromkeys(name for index in of_prompt for name in self.columns[index])
        columns = {name: [self.columns[index].get(name) for index in of_prompt] for name in names}
        for name, values in rows.items():
            prefix = next((prefix for prefix in (REWARD, FEATURE) if name.startswith(prefix)), None)
            if prefix is not None:
                columns[STORED + name.removeprefix(prefix)] = values
        return checked_evidence(likelihood, prompts, completions, rows["completion_ids"], columns)

    def _column(self, name: str) -> Tensor:
        values = [torch.nan if value is None else value for value in self.rows[name]]
        return torch.tensor(values, dtype=torch.float64)


def _mixtures(
    rows: Dataset, prompt_index: Tensor, drawn_by: list[str], log_prior: Tensor, own: Tensor
) -> tuple[Tensor, int, int]:
    """log q of each row, and the numbers of prompts with a mixture whose density is known, and is not."""
    log_proposal, mixed, apart = own.clone(), 0, 0
    known: Mapping[str, Tensor] = {"prior": log_prior} | {
        name.removeprefix(DENSITY): torch.tensor(
            [torch.nan if value is None else value for value in rows[name]], dtype=torch.float64
        )
        for name in rows.column_names
        if name.startswith(DENSITY)
    }
    order = prompt_index.argsort(stable=True)
    for members in order.split(prompt_index.bincount().tolist()):
        counts: dict[str, int] = {}
        for row in members.tolist():
            counts[drawn_by[row]] = counts.get(drawn_by[row], 0) + 1
        if len(counts) == 1:
            continue
        densities = [_density(name, known, drawn_by, own, members) for name in counts]
        if any(bool(density.isnan().any()) for density in densities):
            apart += 1
            continue
        log_proposal[members] = log_balance(torch.stack(densities), list(counts.values()))
        mixed += 1
    return log_proposal, mixed, apart


def _density(name: str, known: Mapping[str, Tensor], drawn_by: list[str], own: Tensor, members: Tensor) -> Tensor:
    """log-density of one proposal at the rows of a prompt, nan where it is not known: (n,)."""
    missing = torch.full_like(own[members], torch.nan)
    density = known[name][members] if name in known else missing
    is_own = torch.tensor([drawn_by[row] == name for row in members.tolist()])
    return torch.where(is_own, own[members], density)
