"""What `_trl/fault_tolerance.py` relies on in transformers, by name."""

import pytest
from transformers import Trainer

from rlhf_bayes.trainers._trl import fault_tolerance

from .names import moved, names_used


def test_methods_that_are_overridden():
    assert moved(Trainer, fault_tolerance.PRIVATE_NAMES) == []


def test_every_private_name_that_is_used():
    used = {name for name in names_used(fault_tolerance, "FaultTolerantTrainer") if name.startswith("_")}
    assert "_get_output_dir" in used  # it sees them
    # those of TRL are looked up on its trainers, by test_rollouts.py and test_preferences.py
    used -= fault_tolerance.PRIVATE_NAMES.keys() | set(fault_tolerance.TRL_ATTRIBUTES)
    assert used == set(fault_tolerance.PRIVATE_ATTRIBUTES)
    assert [name for name in fault_tolerance.PRIVATE_ATTRIBUTES if not hasattr(Trainer, name)] == []


@pytest.mark.parametrize("name", fault_tolerance.PRIVATE_NAMES)
def test_a_moved_method_is_named(name, monkeypatch):
    monkeypatch.delattr(Trainer, name)
    assert moved(Trainer, fault_tolerance.PRIVATE_NAMES) == [f"Trainer.{name} is gone"]
