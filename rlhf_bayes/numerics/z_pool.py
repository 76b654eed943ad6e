"""Pools estimates of the normaliser of a prompt over batches: the target never changes, so all estimate the same Z."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from rlhf_bayes.numerics.log_weights import importance_ess


@final
class ZPool:
    r"""
    Running estimate of log Z for each prompt, from batches of importance log-weights of any proposals.

        Ẑ = Σ_b a_b·Ẑ_b / Σ_b a_b,    Ẑ_b = (1/n) Σ_i w_i

    Each Ẑ_b is unbiased. Its weight a_b is 1 plus the mean effective sample size of the *other* prompts of the batch,
    or of the prompt's previous batch where it is alone. So a_b measures the quality of the proposal with draws other
    than those of Ẑ_b. With its own ESS as weight the pool would be biased: a draw of large weight raises Ẑ_b and
    lowers ESS_b, and for a rare condition a batch without a hit has an ESS of 0 and would never count.

    Args:
        log_z_bound (`float`, *optional*):
            Upper bound on log Z, in nats: that of the log-likelihood, if known; 0 for a condition. Larger estimates
            are lowered to it.
    """

    def __init__(self, log_z_bound: float | None = None):
        if log_z_bound is not None and not math.isfinite(log_z_bound):
            raise ValueError(f"`log_z_bound` must be finite, got {log_z_bound}: pass `None` where none is known.")
        self.log_z_bound = log_z_bound
        # for each prompt: log Σ a·Ẑ, log Σ a, Σ ESS, Σ n, and the ESS per draw in its last batch
        self._entries: dict[str, tuple[float, float, float, int, float]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def update(self, keys: Sequence[str], log_weights: Tensor) -> None:
        """
        Add a batch.

        Args:
            keys (`Sequence[str]`):
                P different prompts.
            log_weights (`torch.Tensor`):
                `log π0 + log_likelihood − log q` (P, n), in nats, n independent draws from q of each prompt; `-inf`
                for a forbidden completion, nan for one to be left out.

        Raises:
            `ValueError`: if the shapes do not fit, a prompt comes twice, or a weight is `+inf`.
        """
        log_weights = self._checked(keys, log_weights)  # (P, n)
        draws, ess, log_sums = _summaries(log_weights)
        log_batch_weights = self._log_batch_weights(keys, draws, ess)
        for row, key in enumerate(keys):
            if draws[row] == 0:
                continue
            n = int(draws[row])
            log_sum, log_total, total_ess, total, _ = self._entries.get(key, _EMPTY)
            log_a = float(log_batch_weights[row])
            self._entries[key] = (
                _log_add(log_sum, log_a + float(log_sums[row]) - math.log(n)),
                _log_add(log_total, log_a),
                total_ess + float(ess[row]),
                total + n,
                float(ess[row]) / n,
            )

    def log_z(self, keys: Sequence[str]) -> Tensor:
        """
        Pooled log Z of each prompt: (P,), nats, fp64 on the CPU.

        It is `-inf` where every weight was 0, and nan for a prompt without draws.
        """
        entries = [self._entries.get(key, _EMPTY) for key in keys]
        values = [log_sum - log_total if total else math.nan for log_sum, log_total, _, total, _ in entries]
        return self._bounded(torch.tensor(values, dtype=torch.float64))

    def standard_error(self, keys: Sequence[str]) -> Tensor:
        """
        Standard error of `log_z` by the delta method, `√(1/Σ ESS − 1/Σ n)`: (P,), nats, fp64 on the CPU.

        It is infinite for fewer than two draws, or where every weight was 0.
        """
        entries = [self._entries.get(key, _EMPTY) for key in keys]
        values = [
            math.sqrt(max(1 / ess - 1 / total, 0.0)) if total > 1 and ess > 0 else math.inf
            for _, _, ess, total, _ in entries
        ]
        return torch.tensor(values, dtype=torch.float64)

    def leave_one_out(self, keys: Sequence[str], log_weights: Tensor) -> Tensor:
        """
        log Z for each draw of a batch that is not in the pool yet, from the pool and the batch's *other* draws.

        A weight divided by an estimate that contains it is biased, since a large weight is divided by itself.

        Args:
            keys (`Sequence[str]`):
                P different prompts.
            log_weights (`torch.Tensor`):
                (P, n), as in `update`, which must be called after this.

        Returns:
            `torch.Tensor`: (P, n), nats, fp64 on the CPU; `-inf` where every other weight was 0, nan where there is
                none.

        Raises:
            `ValueError`: as `update`.
        """
        log_weights = self._checked(keys, log_weights)  # (P, n)
        draws, ess, _ = _summaries(log_weights)
        log_a = self._log_batch_weights(keys, draws, ess)[:, None]  # (P, 1)
        others = _log_sum_of_others(_without_nan(log_weights))  # (P, n)
        counts = draws[:, None] - (~log_weights.isnan()).double()  # (P, n): of the others
        past = torch.tensor([self._entries.get(key, _EMPTY)[:2] for key in keys], dtype=torch.float64)  # (P, 2)
        share = log_a - draws[:, None].log()  # of one draw
        log_sum = torch.logaddexp(past[:, :1], share + others)
        log_total = torch.logaddexp(past[:, 1:], share + counts.log())
        return self._bounded(torch.where(log_total == -torch.inf, torch.nan, log_sum - log_total))

    def subset(self, keys: Sequence[str]) -> "ZPool":
        """A separate pool that holds only these prompts."""
        pool = ZPool(self.log_z_bound)
        pool._entries = {key: self._entries[key] for key in keys if key in self._entries}
        return pool

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers, five for each prompt, for JSON or `torch.save`."""
        return {"log_z_bound": self.log_z_bound, "entries": {key: list(entry) for key, entry in self._entries.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Restore what `state_dict` returned.

        Raises:
            `ValueError`: if the bound differs, since the saved pool then belongs to another target.
        """
        if state["log_z_bound"] != self.log_z_bound:
            raise ValueError(
                f"`log_z_bound` must be that of the saved pool, {state['log_z_bound']}, got {self.log_z_bound}: the "
                "target has changed, and with it Z. Start a new pool."
            )
        self._entries = {
            key: (float(a), float(b), float(c), int(d), float(e)) for key, (a, b, c, d, e) in state["entries"].items()
        }

    def _log_batch_weights(self, keys: Sequence[str], draws: Tensor, ess: Tensor) -> Tensor:
        """log a_b of each prompt: (P,), from other draws than its own, except in the first batch of a lone prompt."""
        drawn = draws > 0
        if int(drawn.sum()) > 1:
            others = (ess.sum() - ess) / (drawn.sum() - 1)
        else:
            last = [self._entries.get(key, _EMPTY)[-1] for key in keys]
            lagged = torch.tensor(last, dtype=torch.float64) * draws
            others = torch.where(lagged.isnan(), ess, lagged)
        return others.clamp(min=0).log1p()

    def _bounded(self, log_z: Tensor) -> Tensor:
        return log_z if self.log_z_bound is None else log_z.clamp(max=self.log_z_bound)

    @staticmethod
    def _checked(keys: Sequence[str], log_weights: Tensor) -> Tensor:
        if log_weights.dim() != 2 or len(keys) != len(log_weights) or len(set(keys)) != len(keys):
            raise ValueError(
                f"`log_weights` must be (P, n) for P different keys, got {tuple(log_weights.shape)} for {len(keys)} "
                f"keys, {len(set(keys))} of them different. Put the draws of a prompt into one row."
            )
        if bool((log_weights == torch.inf).any()):
            raise ValueError("`log_weights` must be finite, -inf or nan, got +inf. Look for a reward that is +inf.")
        return log_weights.detach().double().cpu()


_EMPTY = (-math.inf, -math.inf, 0.0, 0, math.nan)


def _summaries(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of weights (P, n), without nan: number of draws, effective sample size, log of the sum of weights, each (P,)."""
    filled = _without_nan(log_weights)
    return (~log_weights.isnan()).sum(-1).double(), importance_ess(filled), filled.logsumexp(-1)


def _without_nan(log_weights: Tensor) -> Tensor:
    # not nan_to_num, which would also make −inf finite
    return torch.where(log_weights.isnan(), -torch.inf, log_weights)


def _log_sum_of_others(table: Tensor) -> Tensor:
    """
    For each entry, the log-sum-exp of its row's other entries: (P, n) -> (P, n).

    It is not computed as total minus own entry, since a large entry would cancel all digits of the others.
    """
    nothing = torch.full_like(table[:, :1], -torch.inf)
    before = torch.cat([nothing, table.logcumsumexp(-1)[:, :-1]], -1)
    after = torch.cat([table.flip(-1).logcumsumexp(-1).flip(-1)[:, 1:], nothing], -1)
    return torch.logaddexp(before, after)


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
