"""All samplers by the name of their flag. A new one needs a file with its class and record, and a line here."""

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
    """Names of the samplers that target the posterior with any settings."""
    return [name for name, record in SAMPLERS.items() if "none" not in record.guarantees]
