"""Keeps what libraries print off the screen: on a normal run their bars of shards and deprecations, or all of it."""

import logging
import warnings

import torch
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

# a warning of a library is shown as one of the module that called it, which may be ours
_LIBRARIES = r"(accelerate|datasets|deepspeed|huggingface_hub|peft|rlhf_bayes|torch|transformers|trl)\b"


def quiet_libraries() -> None:
    """Hide bars of weights and of datasets, deprecations, and banners of libraries. Their other warnings stay."""
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    # it objects to a top_k that is set so that none is taken from the model's own configuration
    logging.getLogger("transformers.generation.configuration_utils").setLevel(logging.ERROR)
    deepspeed = logging.getLogger("DeepSpeed")  # which sets its level when it is imported, perhaps later
    if _is_no_banner not in deepspeed.filters:
        deepspeed.addFilter(_is_no_banner)


def quiet(threads: int | None = None) -> None:
    """
    Log errors only, and hide the progress bars of libraries: for a script that shows progress of its own.

    Args:
        threads (`int`, *optional*): threads of torch. Default: as many as it uses already.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    quiet_libraries()
    transformers_logging.set_verbosity_error()
    for name in ("trl", "rlhf_bayes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def _is_no_banner(record: logging.LogRecord) -> bool:
    """Whether a message of DeepSpeed is neither information nor a warning that there is no GPU."""
    return record.levelno >= logging.WARNING and record.filename != "real_accelerator.py"
