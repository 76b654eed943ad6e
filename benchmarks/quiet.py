"""What the libraries would print beside a benchmark's own table, left out."""

import logging
import warnings

import torch
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging


def quiet() -> None:
    """Errors only, no progress bars but one's own, one thread."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
