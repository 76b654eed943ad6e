"""Layer 3: draws from the posterior without training."""

from .draws import Draws, Guarantee, LogZ
from .expectation import Expectation, expectation
from .importance import ImportanceSampler
from .protocol import Proposal, Sampler
from .rejection import RejectionSampler

__all__ = [
    "Draws",
    "Expectation",
    "Guarantee",
    "ImportanceSampler",
    "LogZ",
    "Proposal",
    "RejectionSampler",
    "Sampler",
    "expectation",
]
