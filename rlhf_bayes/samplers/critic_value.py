"""PPO's critic as the value of a prefix: it guides decoding, and twists SMC, after the training that made it."""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from rlhf_bayes.likelihoods import Likelihood
from rlhf_bayes.likelihoods.reward_likelihood import check_beta
from rlhf_bayes.lm import Critic, LanguageModel, Prompt
from rlhf_bayes.lm.critic import CRITIC, active_adapter
from rlhf_bayes.lm.decoding import PrefixReader
from rlhf_bayes.lm.fitted_critic import FittedCritic
from rlhf_bayes.lm.forward import base_causal_lm
from rlhf_bayes.lm.trunk import trunk_of
from rlhf_bayes.samplers.values import PrefixValue


@final
class CriticValue:
    r"""
    The critic of [`~rlhf_bayes.PPOTrainer`]: `u(c, x_≤t)/β + log π(x_≤t | c) − log π0(x_≤t | c)`.

    The critic u forecasts r − β·log(π/π0) of the whole completion; the log-ratio of the prefix turns this into a value
    under the prior. If the policy π is the posterior, it is the soft value; otherwise, with an exact critic, it is a
    lower bound. Training may shift it by a constant for each prompt, which matters only where completions end at
    different lengths. The critic was not trained on whole completions, so for them u is that before the last token.

    Args:
        policy ([`~rlhf_bayes.LanguageModel`]):
            π, whose model holds the critic if it has a value head.
        prior ([`~rlhf_bayes.LanguageModel`]):
            π0.
        beta (`float`):
            Units of reward per nat, as in training.
        critic ([`~rlhf_bayes.lm.FittedCritic`], *optional*):
            The critic of a training with `critic="ridge"`, the default: `FittedCritic.from_pretrained(folder)`, with
            the folder `critic` beside the policy.
        likelihood (`Likelihood`, *optional*):
            For a fitted critic that reads the rewards of prefixes: the evidence of the reward functions that training
            asked for them. Times β it is r of a prefix. It gets no columns of the dataset.

    Raises:
        ValueError: if there is no critic, it belongs to a policy of another size, `likelihood` is missing or not
            wanted, or `beta` is not positive.
    """

    def __init__(
        self,
        policy: LanguageModel,
        prior: LanguageModel,
        beta: float,
        critic: FittedCritic | None = None,
        likelihood: Likelihood | None = None,
    ):
        self.policy, self.beta = policy, check_beta(beta)
        self._policy, self._prior = PrefixReader(policy), PrefixReader(prior)
        lm = base_causal_lm(policy.model)
        if critic is not None:
            _check_fits(critic, lm, likelihood)
        elif likelihood is not None:
            raise ValueError(
                f"`likelihood` must be None without `critic`, got a {type(likelihood).__name__}: a critic with a "
                "value head reads hidden states only."
            )
        self._fitted = critic
        self._prefix_value = None if likelihood is None else PrefixValue(likelihood, policy.tokenizer)
        if critic is None:
            self._value_head, self._states = _head_of(policy, self._policy)

    @torch.no_grad()
    def log_value(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]]) -> Tensor:
        """(B,) fp32, nats."""
        whole = [self._is_whole(prefix) for prefix in prefixes]
        before = [prefix[:-1] if end else prefix for prefix, end in zip(prefixes, whole, strict=True)]
        value = self._forecast(prompts, before)
        log_ratio = self._log_prob(self._policy, prompts, prefixes, before)
        log_ratio = log_ratio - self._log_prob(self._prior, prompts, prefixes, before).to(log_ratio.device)
        return value / self.beta + log_ratio

    def _forecast(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]]) -> Tensor:
        """u of prefixes that have not ended: (B,), fp32, units of the reward."""
        if self._fitted is None:
            hidden = self._states.read(prompts, prefixes).hidden  # (B, H)
            return self._value_head(hidden.to(self._value_head.weight.dtype)).squeeze(-1).float()
        states = self._policy.read(prompts, prefixes)
        log_ratio = states.log_prob - self._prior.read(prompts, prefixes).log_prob.to(states.log_prob)  # (B,)
        time = torch.tensor([len(prefix) for prefix in prefixes], device=log_ratio.device)
        rewards = self._rewards(self._prefix_value, prompts, prefixes, log_ratio) if self._prefix_value else None
        return self._fitted.forecast(states.hidden, -self.beta * log_ratio, time, rewards)

    def _rewards(
        self, value: PrefixValue, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], like: Tensor
    ) -> Tensor:
        """r of prefixes, as training saw them: (B,). It is 0 where there is no text, and where it is forbidden."""
        rewards = torch.zeros_like(like)
        rows = [row for row, prefix in enumerate(prefixes) if len(prefix) > 0]
        if rows:
            nats = value.log_value([prompts[row] for row in rows], [prefixes[row] for row in rows])
            rewards[rows] = torch.where(nats.isfinite(), self.beta * nats, 0.0).to(like)
        return rewards

    def _is_whole(self, prefix: Sequence[int]) -> bool:
        if len(prefix) == 0:
            return False
        return len(prefix) == self.policy.max_completion_length or prefix[-1] in self.policy.eos_token_ids

    @staticmethod
    def _log_prob(
        reader: PrefixReader,
        prompts: Sequence[Prompt],
        prefixes: Sequence[Sequence[int]],
        before: Sequence[Sequence[int]],
    ) -> Tensor:
        states = reader.read(prompts, before)
        last = [prefix[-1] if len(prefix) > len(old) else -1 for prefix, old in zip(prefixes, before, strict=True)]
        tokens = torch.tensor(last, device=states.log_prob.device)
        if bool((tokens < 0).all()):
            return states.log_prob
        added = reader.next_log_probs(states.hidden).gather(1, tokens.clamp(min=0)[:, None]).squeeze(1)
        return states.log_prob + torch.where(tokens < 0, 0.0, added)


def _check_fits(critic: FittedCritic, lm: Any, likelihood: Likelihood | None) -> None:
    size = lm.config.get_text_config().hidden_size
    if critic.hidden_size != size:
        raise ValueError(
            f"`critic` must have been fitted to hidden states of the policy, which have {size} entries, got one for "
            f"{critic.hidden_size}. Load the policy that it was saved with."
        )
    if critic.reads_rewards and likelihood is None:
        raise ValueError(
            "`likelihood` must be given with this `critic`, got None: it reads the rewards of prefixes. Pass the "
            "evidence of the training, for instance `posterior.likelihood`."
        )
    if likelihood is not None and not critic.reads_rewards:
        raise ValueError(
            f"`likelihood` must be None with this `critic`, got a {type(likelihood).__name__}: it was fitted without "
            "rewards of prefixes."
        )


def _head_of(policy: LanguageModel, reader: PrefixReader) -> tuple[Any, PrefixReader]:
    """The value head of a policy's critic, and the reader of the hidden states that it was trained on."""
    lm = base_causal_lm(policy.model)
    critic = getattr(lm, CRITIC, None)
    if not isinstance(critic, Critic):
        raise ValueError(
            f"`policy` must hold a critic, got a {type(lm).__name__} without one. Load the one that PPOTrainer saved "
            f"beside it: with a value head, `model.add_module({CRITIC!r}, Critic.from_pretrained(folder))`; from "
            "`critic='ridge'`, pass `critic=FittedCritic.from_pretrained(folder)`."
        )
    if critic.backbone is not None:
        return critic.value_head, PrefixReader(policy, critic.backbone)
    if critic.adapter is not None:
        return critic.value_head, PrefixReader(policy, _under_adapter(lm, critic.adapter))
    return critic.value_head, reader


def _under_adapter(lm: Any, name: str) -> Callable[..., Any]:
    def trunk(**inputs: Any) -> Any:
        with active_adapter(lm, name):
            return trunk_of(lm)(**inputs)

    return trunk
