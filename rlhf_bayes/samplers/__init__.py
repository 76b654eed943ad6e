"""Samplers: they draw from a posterior without training."""

from rlhf_bayes.samplers.best_of_n import BestOfN
from rlhf_bayes.samplers.critic_value import CriticValue
from rlhf_bayes.samplers.dependence import ChainRows, IndependentRows, ParticleRows, ResampledRows
from rlhf_bayes.samplers.draws import Draws, Guarantee, LogZ
from rlhf_bayes.samplers.expectation import Expectation, expectation
from rlhf_bayes.samplers.gradient_guided import GradientGuidedProposal
from rlhf_bayes.samplers.guided import GuidedProposal
from rlhf_bayes.samplers.importance import ImportanceSampler
from rlhf_bayes.samplers.metropolis_hastings import MetropolisHastings
from rlhf_bayes.samplers.protocol import Proposal, Sampler
from rlhf_bayes.samplers.rejection import RejectionSampler
from rlhf_bayes.samplers.smc import SMC
from rlhf_bayes.samplers.values import EnumeratedValue, ExpertsValue, HeadValue, PrefixValue, Value

__all__ = [
    "SMC",
    "BestOfN",
    "ChainRows",
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
    "IndependentRows",
    "LogZ",
    "MetropolisHastings",
    "ParticleRows",
    "PrefixValue",
    "Proposal",
    "RejectionSampler",
    "ResampledRows",
    "Sampler",
    "Value",
    "expectation",
]
