"""Layer 3: draws from the posterior without training."""

from .best_of_n import BestOfN
from .draws import Draws, Guarantee, LogZ
from .expectation import Expectation, expectation
from .importance import ImportanceSampler
from .metropolis_hastings import MetropolisHastings
from .protocol import Proposal, Sampler
from .rejection import RejectionSampler

__all__ = [
    "BestOfN",
    "Draws",
    "Expectation",
    "Guarantee",
    "ImportanceSampler",
    "LogZ",
    "MetropolisHastings",
    "Proposal",
    "RejectionSampler",
    "Sampler",
    "expectation",
]
