"""Files of others are read, and never run."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_bayes import LanguageModel
from rlhf_bayes.trainers.rollout.rollout_checkpoint import read_rollout_state


class Hostile:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def state(folder):
    process = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    return read_rollout_state(folder, process, {})


@pytest.mark.parametrize(("name", "read"), [("rollout_state_0.pt", state), ("pytorch_model.bin", LanguageModel)])
def test_what_a_pickle_asks_for_is_not_done(name, read, toy, tmp_path):
    folder, mark = Path(toy.save(tmp_path / "model")), tmp_path / "was-run"
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Hostile(mark)}, folder / name)
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        read(folder if read is state else str(folder))
    assert not mark.exists()
    torch.load(folder / name, weights_only=False)
    assert mark.exists()  # it would have been
