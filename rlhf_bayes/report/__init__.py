"""One page of HTML on one or several runs."""

from .files import write_sampling
from .page import write_report
from .run import Run, read_runs
from .what_if import betas_around, what_if_of

__all__ = ["Run", "betas_around", "read_runs", "what_if_of", "write_report", "write_sampling"]
