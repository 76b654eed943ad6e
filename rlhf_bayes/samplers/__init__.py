"""Layer 3: draws from the posterior without training."""

from .draws import Draws, Guarantee, LogZ
from .protocol import Proposal, Sampler

__all__ = ["Draws", "Guarantee", "LogZ", "Proposal", "Sampler"]
