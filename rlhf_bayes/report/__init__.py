"""One page of HTML on one or several runs."""

from rlhf_bayes.report.files import write_sampling
from rlhf_bayes.report.page import write_report
from rlhf_bayes.report.run import Run, read_runs
from rlhf_bayes.report.what_if_table import betas_around, what_if_of

__all__ = ["Run", "betas_around", "read_runs", "what_if_of", "write_report", "write_sampling"]
