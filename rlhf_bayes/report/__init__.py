"""One page of HTML on one or several runs."""

from .files import write_sampling
from .page import write_report
from .run import Run, read_runs

__all__ = ["Run", "read_runs", "write_report", "write_sampling"]
