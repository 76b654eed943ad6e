"""log Z of each prompt during training, pooled over rollouts, also for a target that is annealed."""

import math
from collections import deque
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from rlhf_bayes.numerics.groups import grouped
from rlhf_bayes.numerics.z_pool import ZPool

_REMEMBERED = 8  # number of last rollouts from which Z is estimated again when the target changes


class LogZs(NamedTuple):
    """log Z of the prompt of each completion: (B,), fp64, nats, `-inf` where every weight was 0."""

    others: Tensor
    """From all completions but this one; from all, if this one has more weight than all the others together. So p/q is
    at most about the number of completions so far, and the first allowed completion has an effect."""
    pooled: Tensor
    """From all completions."""


@final
class Normalizers:
    """
    log Z of each prompt for the target π0·exp(power·log_likelihood)/Z.

    Args:
        bound (`float`, *optional*):
            Upper bound of log_likelihood, nats.
        anneals (`bool`):
            Whether `power` will change, so that the last rollouts must be kept.
    """

    def __init__(self, bound: float | None, anneals: bool):
        self.bound, self.power = bound, 1.0
        self.pool = ZPool(bound)
        self.recent: deque[tuple[list[str], Tensor, Tensor]] = deque(maxlen=_REMEMBERED if anneals else 0)

    def retarget(self, power: float) -> None:
        """Change the power of the evidence."""
        if power == self.power:
            return
        self.power = power
        self.pool = ZPool(None if self.bound is None else power * self.bound)
        for keys, log_ratios, log_likelihood in self.recent:
            self.pool.update(keys, log_ratios + power * log_likelihood)

    def estimate(self, prompt_keys: Tensor, log_ratios: Tensor, log_likelihood: Tensor, keep: bool) -> LogZs:
        """
        log Z from all completions so far and these.

        Args:
            prompt_keys (`Tensor` (B,)):
                Integers, equal for completions of a prompt.
            log_ratios (`Tensor` (B,)):
                log π0 − log q, nats.
            log_likelihood (`Tensor` (B,)):
                Evidence, nats; `-inf` where forbidden, nan for one to be left out.
            keep (`bool`):
                Whether to keep these completions for later estimates.
        """
        layout = grouped(prompt_keys)
        keys = [str(key) for key in prompt_keys.unique().tolist()]
        log_ratios, log_likelihood = (
            layout.table(x.double(), torch.nan).cpu() for x in (log_ratios, log_likelihood)
        )  # (P, n)
        pool = self.pool if keep else self.pool.subset(keys)
        log_weights = log_ratios + self.power * log_likelihood
        others = pool.leave_one_out(keys, log_weights)  # (P, n)
        pool.update(keys, log_weights)
        if keep and self.recent.maxlen:
            self.recent.append((keys, log_ratios, log_likelihood))
        pooled = pool.log_z(keys)[:, None].expand_as(others)
        tables = (torch.where(others > pooled - math.log(2), others, pooled), pooled)
        return LogZs(*(layout.rows(table.to(prompt_keys.device)) for table in tables))

    def log_z(self, prompt_keys: Tensor) -> Tensor:
        """The current estimate of log Z of each completion's prompt: (B,), fp64, nats."""
        unique, row = prompt_keys.cpu().unique(return_inverse=True)
        return self.pool.log_z([str(key) for key in unique.tolist()])[row].to(prompt_keys.device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"power": self.power, "pool": self.pool.state_dict(), "recent": [list(entry) for entry in self.recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restore what `state_dict` returned.

        Raises:
            ValueError: if the evidence has another bound, since Z then belongs to another target.
        """
        saved = state["pool"]["log_z_bound"]
        bound = None if self.bound is None else state["power"] * self.bound
        if saved is not None and bound is not None and not math.isclose(saved, bound, rel_tol=1e-3, abs_tol=1e-3):
            raise ValueError(
                f"`likelihood` must be that of the checkpoint, whose evidence has the bound {saved:.6g} nats, got one "
                f"with {bound:.6g}: Z and what was drawn belong to the target of before. Resume with it, or start "
                "from the weights of the checkpoint: pass the folder as the model, and the prior as `ref_model`."
            )
        self.power = state["power"]
        self.pool = ZPool(saved)
        self.pool.load_state_dict(state["pool"])
        self.recent.extend((keys, log_ratios.cpu(), evidence.cpu()) for keys, log_ratios, evidence in state["recent"])
