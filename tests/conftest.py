"""One thread, no hub, and the enumerable toy."""

import logging
import os
import sys

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

_without_children: str | None = None  # the test that runs, where it may not start processes


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    global _without_children
    _without_children = None if item.get_closest_marker("processes") else item.nodeid
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU; `make test-gpu` where there is one")


def pytest_runtest_teardown():
    global _without_children
    _without_children = None


def _refuse_unmarked_children(event: str, args: tuple) -> None:
    """Keep the marker `processes` complete: `make test-fast` leaves out what carries it."""
    if _without_children is None or event not in ("subprocess.Popen", "os.fork"):
        return
    if event == "os.fork" or sys.executable in map(str, args[1]):
        raise RuntimeError(f"{_without_children} starts a process, and so needs the marker `processes`.")


sys.addaudithook(_refuse_unmarked_children)


@pytest.fixture(autouse=True)
def own_log_levels():
    """What a script sets in this process, to be quiet, does not outlive its test."""
    loggers = [logging.getLogger(name) for name in ("rlhf_bayes", "trl", "transformers")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


_shared: list[tuple[EnumerableLM, dict[str, torch.Tensor]]] = []  # with their weights


def _shared_with_all(toy: EnumerableLM) -> EnumerableLM:
    _shared.append((toy, {name: weight.clone() for name, weight in toy.model.state_dict().items()}))
    return toy


@pytest.fixture(autouse=True)
def unchanged_toys():
    """A test that changes the model of a shared toy fails, rather than those after it."""
    yield
    for toy, before in _shared:
        now = toy.model.state_dict()
        if now.keys() != before.keys() or not all(torch.equal(now[name], before[name]) for name in before):
            toy.model.load_state_dict(before, strict=False)
            pytest.fail("This test has changed the model of a shared toy: take `fresh_toy`, or a `random_policy`.")


@pytest.fixture(scope="session")
def toy() -> EnumerableLM:
    """40 completions of up to 3 tokens. Shared: train `toy.random_policy(noise=0.0)`, never `toy.model`."""
    return _shared_with_all(EnumerableLM(vocab_size=4, max_completion_length=3))


@pytest.fixture
def fresh_toy() -> EnumerableLM:
    """The same, for tests that change its model."""
    return EnumerableLM(vocab_size=4, max_completion_length=3)


@pytest.fixture(scope="session")
def large_toy() -> EnumerableLM:
    """4,681 completions of up to 4 tokens. Shared: train a `random_policy`, never `large_toy.model`."""
    return _shared_with_all(EnumerableLM())
