"""Layer 3: completions that were drawn and scored once, on disk, for any posterior of their prior."""

from rlhf_bayes.store.actor import Actor
from rlhf_bayes.store.completion_store import CompletionStore
from rlhf_bayes.store.provenance import Provenance
from rlhf_bayes.store.score_draws import provenance_of, scored_completions
from rlhf_bayes.store.scored_completion import ScoredCompletion
from rlhf_bayes.store.stored_column import StoredColumn

__all__ = [
    "Actor",
    "CompletionStore",
    "Provenance",
    "ScoredCompletion",
    "StoredColumn",
    "provenance_of",
    "scored_completions",
]
