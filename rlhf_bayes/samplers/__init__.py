"""Layer 3: draws from the posterior without training."""

from .best_of_n import BestOfN
from .draws import Draws, Guarantee, LogZ
from .expectation import Expectation, expectation
from .gradient_guided import GradientGuidedProposal
from .guided import GuidedProposal
from .importance import ImportanceSampler
from .metropolis_hastings import MetropolisHastings
from .protocol import Proposal, Sampler
from .rejection import RejectionSampler
from .smc import SMC
from .values import CriticValue, EnumeratedValue, ExpertsValue, HeadValue, PrefixValue, Value

__all__ = [
    "SMC",
    "BestOfN",
    "CriticValue",
    "Draws",
    "EnumeratedValue",
    "Expectation",
    "ExpertsValue",
    "GradientGuidedProposal",
    "Guarantee",
    "GuidedProposal",
    "HeadValue",
    "ImportanceSampler",
    "LogZ",
    "MetropolisHastings",
    "PrefixValue",
    "Proposal",
    "RejectionSampler",
    "Sampler",
    "Value",
    "expectation",
]
