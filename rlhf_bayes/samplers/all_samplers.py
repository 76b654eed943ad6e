"""Every sampler by the name of its flag. A new one is a file with its class and its record, and a line here."""

from rlhf_bayes.samplers import best_of_n, importance, metropolis_hastings, rejection, smc
from rlhf_bayes.samplers.protocol import SamplerRecord

SAMPLERS: dict[str, SamplerRecord] = {
    "importance": importance.RECORD,
    "rejection": rejection.RECORD,
    "metropolis_hastings": metropolis_hastings.RECORD,
    "smc": smc.RECORD,
    "best_of_n": best_of_n.RECORD,
}
"""Name -> record."""


def samplers_of_the_posterior() -> list[str]:
    """Names of those that target the posterior, whatever their settings."""
    return [name for name, record in SAMPLERS.items() if "none" not in record.guarantees]
