"""What is hidden of libraries, and what is not."""

import logging
import warnings

import pytest
from transformers.utils import logging as transformers_logging

from rlhf_bayes.commands.quiet import quiet, quiet_libraries


@pytest.fixture(autouse=True)
def as_before():
    was_shown, deepspeed = transformers_logging.is_progress_bar_enabled(), logging.getLogger("DeepSpeed")
    filters = list(deepspeed.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield
    deepspeed.filters[:] = filters
    if was_shown:
        transformers_logging.enable_progress_bar()


def shown(module, category):
    """Whether a warning of a module is shown."""
    with warnings.catch_warnings(record=True) as found:
        warnings.warn_explicit("old", category, f"{module}.py", 1, module=module)
    return bool(found)


def test_deprecations_of_libraries_are_hidden():
    quiet_libraries()
    assert not shown("transformers.training_args", FutureWarning)
    assert not shown("trl", DeprecationWarning)
    assert shown("transformers.training_args", UserWarning)
    assert shown("my_rewards", FutureWarning)
    assert not transformers_logging.is_progress_bar_enabled()


def test_banners_are_hidden_and_warnings_are_not():
    quiet_libraries()
    quiet_libraries()
    logger = logging.getLogger("DeepSpeed")
    for level, file, expected in (
        (20, "engine.py", False),
        (30, "real_accelerator.py", False),
        (30, "engine.py", True),
    ):
        record = logging.LogRecord("DeepSpeed", level, file, 0, "said", (), None)
        assert bool(logger.filter(record)) == expected


def test_quiet_hides_all_but_errors():
    quiet()
    assert not shown("my_rewards", UserWarning)
    assert logging.getLogger("rlhf_bayes").level == logging.ERROR
    assert transformers_logging.get_verbosity() == logging.ERROR
