"""Several reward models as one reward function, with their disagreement."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_bayes.notebook import Described
from rlhf_bayes.rewards.ensemble_members import Adapters, Heads, Members, Models
from rlhf_bayes.rewards.folding import write_index
from rlhf_bayes.rewards.index import INDEX_NAME, RewardIndex
from rlhf_bayes.rewards.loading import found_index, load_adapters, load_classifier, load_tokenizer, local_folder
from rlhf_bayes.rewards.normalization import Normalization
from rlhf_bayes.rewards.pooled_reward import PooledReward, PromptCenters
from rlhf_bayes.rewards.reward_model import RewardModel
from rlhf_bayes.rewards.shared import SharedClassifier
from rlhf_bayes.rewards.text_classifier import TextClassifier, without_overlong


@final
class RewardEnsemble(Described):
    """
    K reward models as one reward function of TRL's protocol: the mean of the members, which logs their spread too.

        r(c, x)  =  1/K · Σ_k r_k(c, x),        r_k  =  gain_k · raw_k + bias_k

    `pooled` combines the members in another way. Members are heads on one trunk, adapters on one base (one copy of it
    in memory, one forward pass for all), or whole models, each with its own tokenizer.

    Args:
        members (`torch.nn.Module` or list):
            A classifier with K labels, a `PeftModel` of several adapters with a classification head each, or a list of
            reward models ([`RewardModel`], modules, or paths).
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer of a module, or of the modules and paths in a list. Default: the one saved beside each model.
        device (`torch.device`, *optional*):
            Where to put models that are loaded from a path.
        batch_size (`int`, *optional*, defaults to `64`):
            Rows in one forward pass; a text takes one for each adapter. Changes memory, and results by rounding only.
        index ([`RewardIndex`], *optional*):
            Names, `append_eos` and normalization. Default: no normalization, and texts read as TRL's trainers score
            them.

    Raises:
        `TypeError` or `ValueError`: `members` are no classifiers, or the index contradicts them.
    """

    def __init__(
        self,
        members: nn.Module | Sequence[RewardModel | nn.Module | str | Path],
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
        batch_size: int = 64,
        index: RewardIndex | None = None,
    ):
        if isinstance(members, (str, Path)):
            raise TypeError(
                f"`members` must be a module or a list of models, got the path {str(members)!r}. Load it with "
                "`RewardEnsemble.from_pretrained`."
            )
        if isinstance(members, nn.Module):
            classifier = TextClassifier(members, tokenizer, batch_size=batch_size, index=index)
            adapters = list(members.peft_config) if isinstance(members, (PeftModel, SharedClassifier)) else []
            of_adapters = len(adapters) > 1 or (len(adapters) == 1 and classifier.num_labels == 1)
            self._members: Members = Adapters(classifier) if of_adapters else Heads(classifier)
            self.__name__ = classifier.name
        else:
            self._members = Models([_as_model(member, tokenizer, device, batch_size) for member in members])
            self.__name__ = "ensemble"
        self.normalization: Normalization | None = None
        if index is not None:
            _check_index(index, self._members)
            # the order must be that of the index, since the normalization has it
            self._members.names, self.normalization = list(index.members), index.normalization

    def _facts(self) -> dict[str, Any]:
        return {
            "name": self.__name__,
            "members": self.num_members,
            "kind": self._members.kind,
            "normalized": self.normalization is not None,
        }

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Sequence[str | Path],
        device: torch.device | str | None = None,
        batch_size: int = 64,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | str = torch.float32,
    ) -> "RewardEnsemble":
        """
        Load an ensemble from a folder or a repository of the hub, or combine the single models of several.

        Without a `reward_model.json`, a classifier of several labels is taken as an ensemble of heads, and subfolders
        `member_0`, … as its adapters or models.

        Args:
            path (`str`, `Path`, or a list of these): A folder or a repository of the hub; or those of single models.
            device, batch_size, tokenizer, dtype: As in [`RewardModel`].

        Raises:
            `ValueError`: for a single model, weights that the index contradicts, or a member without a head.
        """
        if not isinstance(path, (str, Path)):
            return cls([RewardModel(one, tokenizer, device, batch_size, dtype=dtype) for one in path])
        folder = local_folder(path)
        index = found_index(folder)
        if index.kind == "single":
            raise ValueError(
                f"'{path}' must hold an ensemble, and holds a single reward model. Use `RewardModel`, or pass a list "
                "of folders to combine several."
            )
        if index.kind == "models":
            models = []
            for name in index.members:
                own = RewardIndex.load(folder / name) or RewardIndex(append_eos=index.append_eos)
                models.append(RewardModel(folder / name, tokenizer, device, batch_size, own, dtype))
            ensemble = cls(models, index=index)
        else:
            if index.kind == "heads":
                module = load_classifier(folder, dtype=dtype)
            else:
                module = load_adapters(folder, index.members, dtype=dtype)
            tokenizer = tokenizer or load_tokenizer(folder, folder.name)
            ensemble = cls(module.to(device or "cpu"), tokenizer, batch_size=batch_size, index=index)
        ensemble.__name__ = str(path).rstrip("/").split("/")[-1]
        return ensemble

    @property
    def num_members(self) -> int:
        """The number of members, K."""
        return len(self._members.names)

    @property
    def classifiers(self) -> list[TextClassifier]:
        """The classifiers that read the texts: one that the members share, or one for each."""
        return self._members.classifiers

    @property
    def takes_prefixes(self) -> bool:
        """Whether a trainer asks for the rewards of prefixes by default: see [`RewardModel.takes_prefixes`]."""
        return self._members.read_trees

    @property
    def index(self) -> RewardIndex:
        """How the ensemble is read, as `save_pretrained` stores it."""
        members = self._members
        return RewardIndex(members.kind, list(members.names), members.append_eos, self.normalization)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, tokenizers and index, for `from_pretrained` or `load_reward`; see [`write_index`]."""
        self._members.save(folder)
        before = self.classifiers[0].index if self._members.kind == "heads" else None
        write_index(folder, self.index, before)

    def member_rewards(self, prompts: Sequence, completions: Sequence) -> Tensor:
        """
        Reward of each completion by each member, normalised: (K, B), fp32, on the CPU.

        Args:
            prompts (`Sequence` of `str` or of chats): B prompts.
            completions (`Sequence` of `str` or of chats): B completions, in the prompt's form.

        Raises:
            `ValueError`: a text that a member cannot read, or a reward that is not finite.
        """
        raw = self._members.raw_rewards(prompts, completions, range(self.num_members))  # (K, B)
        return raw if self.normalization is None else self.normalization.apply(raw)

    def member_logits(self, prompts: Sequence, completions: Sequence, max_length: int | None = None) -> Tensor:
        """
        Logits of each member, before any normalisation, as in training: (K, B), fp32, on the CPU.

        Of longer texts only the last `max_length` tokens are read.
        """
        return self._members.logits(prompts, completions, max_length)

    def __call__(self, prompts: list, completions: list, log_metric: Any = None, **columns: Any) -> list[float]:
        """
        Mean of the members for each completion, in TRL's protocol of reward functions.

        Their spread (standard deviation over members, mean over completions) goes to `log_metric` as `reward_spread`.
        `columns` are TRL's other arguments, which are not needed.
        """
        rewards = self.member_rewards(prompts, completions)  # (K, B)
        if log_metric is not None and rewards.numel():
            log_metric("reward_spread", rewards.std(0, correction=0).mean().item())
        return rewards.mean(0).tolist()

    def pooled(
        self,
        rule: str,
        beta: float | None = None,
        penalty: float | None = None,
        centers: "PromptCenters | Literal[False] | None" = None,
    ) -> PooledReward:
        """
        The members combined by a rule of [`~rlhf_bayes.numerics.pool`], as a reward function.

        Arguments are those of [`PooledReward`].
        """
        return PooledReward(self, rule, beta, penalty, centers)

    def member(self, index: int) -> "EnsembleMember":
        """One member, as a reward function."""
        if not 0 <= index < self.num_members:
            raise IndexError(
                f"`index` must be in [0, {self.num_members}), the number of members, got {index}. Count from 0."
            )
        return EnsembleMember(self, index)

    def normalize(self, prompts: list, completions: list, reference: str = "reference completions") -> None:
        """
        Fit and keep gain and bias, so that each member has mean 0 and standard deviation 1 on these completions.

        Completions that a member has no positions for are left out, and counted in a warning.

        Args:
            prompts (`list` of `str` or of chats): N prompts.
            completions (`list` of `str` or of chats): Their completions, preferably drawn from the prior.
            reference (`str`, *optional*): A description of them, for the model card.

        Raises:
            `ValueError`: fewer than two completions, or a member that does not vary.
        """
        prompts, completions = without_overlong(self.classifiers, prompts, completions)
        raw = self._members.raw_rewards(prompts, completions, range(self.num_members))  # (K, N)
        self.normalization = Normalization.fit(raw, reference)


@final
class EnsembleMember:
    """One member of a [`RewardEnsemble`] as a reward function of TRL's protocol, normalised as in the ensemble."""

    def __init__(self, ensemble: RewardEnsemble, index: int):
        self.ensemble, self.index = ensemble, index
        self.__name__ = f"{ensemble.__name__}_{ensemble.index.members[index]}"

    @property
    def takes_prefixes(self) -> bool:
        """As of the ensemble."""
        return self.ensemble.takes_prefixes

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        """Reward of each completion. `columns` are TRL's other arguments, which a classifier does not use."""
        raw = self.ensemble._members.raw_rewards(prompts, completions, [self.index])  # (1, B)
        normalization = self.ensemble.normalization
        return (raw if normalization is None else normalization.member(self.index).apply(raw))[0].tolist()


def load_reward(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 64,
    dtype: torch.dtype | str = torch.float32,
) -> RewardModel | RewardEnsemble:
    """
    The reward model or ensemble in a folder or a repository of the hub, with its normalization.

    A classifier of several labels is an ensemble only if a `reward_model.json` says so. Arguments are those of
    [`RewardModel`].

    Raises:
        `ValueError`: as [`RewardModel`] and [`RewardEnsemble.from_pretrained`].
    """
    index = RewardIndex.load(path)
    if index is None and Path(path).is_dir():
        found = found_index(Path(path))
        index = None if found.kind == "heads" else found
    if index is None or index.kind == "single":
        return RewardModel(path, tokenizer, device, batch_size, dtype=dtype)
    return RewardEnsemble.from_pretrained(path, device, batch_size, tokenizer, dtype)


def _as_model(
    member: RewardModel | nn.Module | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device | str | None,
    batch_size: int,
) -> RewardModel:
    if isinstance(member, RewardModel):
        return member
    return RewardModel(member, tokenizer, device, batch_size)


def _check_index(index: RewardIndex, members: Members) -> None:
    if index.kind != members.kind or index.num_members != len(members.names):
        raise ValueError(
            f"{INDEX_NAME} and the weights must be of the same ensemble: it says {index.num_members} members "
            f"({index.kind}), they have {len(members.names)} ({members.kind}). Correct the file, or save the ensemble "
            "again."
        )
    if members.kind == "lora" and sorted(index.members) != sorted(members.names):
        raise ValueError(
            f"{INDEX_NAME} must name the adapters of the model, {', '.join(members.names)}, got "
            f"{', '.join(index.members)}. Correct the file."
        )
