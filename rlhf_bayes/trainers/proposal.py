"""What completions are drawn from, where it is not the policy as it is now."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
from torch import nn


@final
class Snapshot:
    """
    The policy as it once was: a copy of its trainable weights, an adapter's or the whole model's.

    Args:
        policy (`nn.Module`):
            The plain policy, not sharded.
    """

    def __init__(self, policy: nn.Module):
        self.weights = {
            name: parameter.detach().clone()
            for name, parameter in policy.named_parameters()
            if parameter.requires_grad
        }

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[None]:
        """Within: the policy has these weights. Run without gradient."""
        self._swap(policy)
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap(policy)

    def _swap(self, policy: nn.Module) -> None:
        parameters = dict(policy.named_parameters())
        for name, weight in self.weights.items():
            self.weights[name], parameters[name].data = parameters[name].data, weight
