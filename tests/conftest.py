"""One thread, no hub, and the enumerable toy."""

import os

# before torch and huggingface_hub are imported: both read their environment once
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"

import pytest  # noqa: E402
import torch  # noqa: E402

from rlhf_bayes.testing import EnumerableLM  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy() -> EnumerableLM:
    """40 completions of up to 3 tokens. Shared: train `toy.random_policy(noise=0.0)`, never `toy.model`."""
    return EnumerableLM(vocab_size=4, max_completion_length=3)


@pytest.fixture
def fresh_toy() -> EnumerableLM:
    """The same, for tests that change its model."""
    return EnumerableLM(vocab_size=4, max_completion_length=3)


@pytest.fixture(scope="session")
def large_toy() -> EnumerableLM:
    """4,681 completions of up to 4 tokens. Shared: train a `random_policy`, never `large_toy.model`."""
    return EnumerableLM()
