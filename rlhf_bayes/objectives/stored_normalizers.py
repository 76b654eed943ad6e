"""log Z of each prompt from a fixed set of draws, which training reads again and again."""

from typing import Any, final

import torch
from torch import Tensor

from rlhf_bayes.numerics.groups import grouped
from rlhf_bayes.objectives.normalizers import LogZs


@final
class StoredNormalizers:
    """
    log Z of each prompt for the target π0·exp(power·log_likelihood)/Z, from all stored draws of the prompt.

    The estimate is made anew from all draws when the power changes, and does not depend on what was read so far. A
    draw is not left out of its own Z: the draws are the whole data, and their weights sum to 1.

    Args:
        prompt_keys (`Tensor` (N,)):
            Integers, equal for completions of a prompt.
        log_ratios, log_likelihood (`Tensor` (N,)):
            log π0 − log q and the evidence, nats; the evidence `-inf` where it forbids, nan for one to be left out.
        bound (`float`, *optional*):
            Upper bound of log_likelihood, nats.
    """

    def __init__(self, prompt_keys: Tensor, log_ratios: Tensor, log_likelihood: Tensor, bound: float | None = None):
        self.keys = prompt_keys.unique().cpu()  # sorted
        layout = grouped(prompt_keys.cpu())
        left_out = log_likelihood.isnan()
        self._ratios, self._evidence = (
            layout.table(torch.where(left_out, torch.nan, x.double()).cpu(), torch.nan)
            for x in (log_ratios, log_likelihood)
        )  # (P, n)
        self.num_draws, self.bound, self.power = len(prompt_keys), bound, 1.0
        self._log_z = self._estimate()

    def retarget(self, power: float) -> None:
        """Change the power of the evidence."""
        if power != self.power:
            self.power = power
            self._log_z = self._estimate()

    def estimate(self, prompt_keys: Tensor, log_ratios: Tensor, log_likelihood: Tensor, keep: bool) -> LogZs:
        """
        log Z of each completion's prompt from all stored draws.

        Args:
            prompt_keys (`Tensor` (B,)):
                Integers, equal for completions of a prompt.
            log_ratios, log_likelihood, keep:
                Not read, since these completions are among the stored ones.
        """
        found = self.log_z(prompt_keys)
        return LogZs(found, found)

    def log_z(self, prompt_keys: Tensor) -> Tensor:
        """log Z of each completion's prompt: (B,), fp64, nats."""
        return self._log_z[torch.searchsorted(self.keys, prompt_keys.cpu())].to(prompt_keys.device)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"power": self.power, "num_draws": self.num_draws, "mean_log_z": float(self._log_z.mean())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restore what `state_dict` returned.

        Raises:
            ValueError: if there are other draws than in the run that is resumed.
        """
        if state.get("num_draws") != self.num_draws:
            raise ValueError(
                f"`train_dataset` must hold the {state.get('num_draws')} completions of the run that is resumed, got "
                f"{self.num_draws}: it would go on with other data. Start from the weights of the checkpoint to learn "
                "from more: pass the folder as the model, and the prior as `ref_model`."
            )
        self.retarget(state["power"])

    def _estimate(self) -> Tensor:
        """log Z of each prompt, (P,), `-inf` where the evidence forbids all draws, nan where it applies to none."""
        log_weights = self._ratios + self.power * self._evidence  # (P, n), nan in shorter rows too
        counts = (~log_weights.isnan()).sum(-1).double()  # (P,)
        found = torch.where(log_weights.isnan(), -torch.inf, log_weights).logsumexp(-1) - counts.log()
        found = torch.where(counts > 0, found, torch.nan)
        return found if self.bound is None else found.clamp(max=self.power * self.bound)
