"""The posterior during training: estimates of each prompt's Z, and evidence that may be annealed."""

from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from rlhf_bayes.objectives.normalizers import Normalizers
from rlhf_bayes.objectives.stored_normalizers import StoredNormalizers
from rlhf_bayes.objectives.world import World


class TargetEstimate(NamedTuple):
    """The posterior of the completions of all processes: (B_global,)."""

    log_target: Tensor
    """log p, nats; nan where no Z is known or no evidence applies."""
    log_z: Tensor
    """log Z of the prompt from all its completions but this one."""
    pooled_log_z: Tensor
    """log Z of the prompt from all its completions."""


@final
class PosteriorTarget:
    r"""
    The target p(x|c) = π0(x|c)·exp(power·log_likelihood(c, x))/Z(c), with Z pooled over all completions so far.

    Args:
        world ([`World`]):
            The training loop, whose step determines the power.
        beta (`float`):
            β, units of reward per nat of evidence; 1 where the evidence is in nats.
        bound (`float`, *optional*):
            Upper bound of log_likelihood, nats, if one is known.
        beta_init (`float`, *optional*):
            The temperature at the start, above β. The power is β/β_t, where β_t goes geometrically from it to β.
            Default: the power is 1 throughout.
        beta_init_steps (`int`, *optional*):
            Optimizer steps of this annealing. Default: half of the training.
        forbids (`bool`, *optional*, defaults to `False`):
            Whether the evidence is known to forbid completions. If not, this is found out when it first does.
        normalizers ([`StoredNormalizers`], *optional*):
            Estimates of Z from stored draws. Default: from the completions that `estimate` is given.
    """

    def __init__(
        self,
        world: World,
        *,
        beta: float,
        bound: float | None = None,
        beta_init: float | None = None,
        beta_init_steps: int | None = None,
        forbids: bool = False,
        normalizers: StoredNormalizers | None = None,
    ):
        self.world, self.beta, self.forbids = world, beta, forbids
        self.beta_init, self.beta_init_steps = beta_init, beta_init_steps
        self.normalizers: Normalizers | StoredNormalizers = (
            Normalizers(bound, anneals=beta_init is not None) if normalizers is None else normalizers
        )

    @property
    def power(self) -> float:
        """The current factor of the evidence, in (0, 1]."""
        return self.normalizers.power

    def estimate(
        self, prompt_keys: Tensor, log_prior: Tensor, log_proposal: Tensor, log_likelihood: Tensor
    ) -> TargetEstimate:
        """
        The posterior of these completions, with Z from all completions so far. In training they are kept for Z.

        Args:
            prompt_keys (`Tensor` (B_global,)):
                Integers, equal for completions of a prompt.
            log_prior, log_proposal, log_likelihood (`Tensor` (B_global,)):
                log π0, log q and the evidence, nats; the evidence nan for a completion to be left out.
        """
        self.forbids |= bool((log_likelihood == -torch.inf).any())
        if self.world.training:
            self.normalizers.retarget(self._power_of_step())
        log_zs = self.normalizers.estimate(
            prompt_keys, log_prior - log_proposal, log_likelihood, keep=self.world.training
        )
        return TargetEstimate(self.log_target(log_prior, log_likelihood, log_zs.others), *log_zs)

    def log_target(self, log_prior: Tensor, log_likelihood: Tensor, log_z: Tensor) -> Tensor:
        """log p, nats; nan where log Z is not known."""
        log_z = torch.where(log_z.isfinite(), log_z, torch.nan)
        return log_prior + self.power * log_likelihood - log_z

    def log_z(self, prompt_keys: Tensor) -> Tensor:
        """The current estimate of log Z of each completion's prompt: (B,), fp32, nats."""
        return self.normalizers.log_z(prompt_keys).float()

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"beta": self.beta, "normalizers": self.normalizers.state_dict(), "forbidden_seen": self.forbids}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restore what `state_dict` returned.

        Raises:
            ValueError: if β or the bound of the evidence differs, since Z then belongs to another target.
        """
        check_same_beta(self.beta, state["beta"])
        self.normalizers.load_state_dict(state["normalizers"])
        self.forbids = state["forbidden_seen"]

    def _power_of_step(self) -> float:
        if self.beta_init is None:
            return 1.0
        steps = self.beta_init_steps or max(1, self.world.max_steps // 2)
        return (self.beta / self.beta_init) ** (1.0 - min(1.0, self.world.step / steps))


def check_same_beta(beta: float, saved: float) -> None:
    """
    Refuse to go on from a checkpoint of another target.

    Args:
        beta (`float`):
            β of this run.
        saved (`float`):
            β of the checkpoint.

    Raises:
        ValueError: if they differ.
    """
    if beta != saved:
        raise ValueError(
            f"`beta` must be that of the checkpoint, {saved}, got {beta}: what was learnt and drawn belongs to the "
            "target of before. Resume with it, or start from the weights of the checkpoint: pass the folder as the "
            "model, and the prior as `ref_model`."
        )
