"""Layer 3: draws from the posterior without training."""

from .draws import Draws, Guarantee, LogZ
from .protocol import Proposal, Sampler
from .rejection import RejectionSampler

__all__ = ["Draws", "Guarantee", "LogZ", "Proposal", "RejectionSampler", "Sampler"]
