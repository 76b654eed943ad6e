"""The state of the random number generators that a training draws from."""

import random
from typing import final

import numpy as np
import torch


@final
class RandomState:
    """The global generators of Python, NumPy and torch as they are now."""

    def __init__(self):
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 (what the Trainer saves)
        self._torch = torch.get_rng_state()
        # only where CUDA is initialised already: asking for its state would initialise it
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        """Set the generators back to what they were."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
