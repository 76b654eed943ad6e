"""Silences what libraries print, so that a benchmark shows only its own table."""

import logging
import warnings

import torch
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging


def quiet() -> None:
    """Log errors only, hide the progress bars of libraries, and use one thread."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
