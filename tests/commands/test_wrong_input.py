"""Which errors are a line, and which keep their traceback."""

import pytest
import torch

from rlhf_bayes import PPOConfig
from rlhf_bayes.commands.flags import load_prompts
from rlhf_bayes.commands.wrong_input import in_a_line
from rlhf_bayes.likelihoods import RewardLikelihood
from rlhf_bayes.numerics import pool


def caught(function):
    with pytest.raises(Exception) as found:  # noqa: PT011 (any error is looked at)
        function()
    error = found.value
    # as it would come from the console: without the frame of this test
    error.__traceback__ = error.__traceback__.tb_next.tb_next
    return error


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: load_prompts("nowhere.jsonl"), "`dataset_name` must be a file"),
        (lambda: pool(torch.zeros(1, 1), "average"), "average"),
        (lambda: PPOConfig("x", beta=-1, use_cpu=True, bf16=False), "`beta` must be at least 0"),
        # a check of TRL
        (lambda: PPOConfig("x", num_generations=7, use_cpu=True, bf16=False), "num_generations"),
    ],
)
def test_what_is_refused_is_a_line(function, message):
    assert message in in_a_line(caught(function))


def test_notes_are_lines_too():
    error = caught(lambda: load_prompts("nowhere.jsonl"))
    error.add_note("Go on.")
    assert in_a_line(error).endswith("\nGo on.")


def test_errors_in_other_code_keep_their_traceback():
    def mine(completions, **columns):
        raise ValueError("mine")

    likelihood = RewardLikelihood(mine, 1.0)
    assert in_a_line(caught(lambda: likelihood.log_likelihood(["a"], ["b"], [[0]]))) is None
    # the bug of a library, or a use of it that is none of the user's
    assert in_a_line(caught(lambda: torch.distributions.Normal(0.0, -1.0))) is None
    assert in_a_line(ZeroDivisionError()) is None
