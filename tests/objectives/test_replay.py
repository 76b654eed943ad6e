"""The replay buffer by itself: what it keeps, how it draws, and that it can be saved."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlhf_bayes.objectives.batch import Batch
from rlhf_bayes.objectives.replay import ReplayBuffer


@dataclass(frozen=True)
class LabelledBatch(Batch):
    prompt_keys: Tensor
    identity: Tensor
    token_entropy: Tensor
    beta: Tensor


def rollout(number, prompts=3, per_prompt=4, prompt_width=2, width=3):
    """Micro-batches of a rollout; every completion can be told from all others."""
    size = prompts * per_prompt
    identity = 100 * number + torch.arange(size)
    lengths = 1 + identity % width
    batch = LabelledBatch(
        prompt_keys=torch.arange(prompts).repeat_interleave(per_prompt) + 7,
        identity=identity,
        prompt_ids=identity[:, None].expand(-1, prompt_width),
        prompt_mask=torch.ones(size, prompt_width, dtype=torch.long),
        completion_ids=identity[:, None].expand(-1, width),
        completion_mask=(torch.arange(width) < lengths[:, None]).long(),
        token_entropy=identity[:, None].expand(-1, width).float(),
        beta=torch.tensor(0.5),  # one number for all
    )
    return batch.split([size // 2, size - size // 2])


def test_rows_come_back_as_they_were_and_none_twice():
    buffer = ReplayBuffer(3, "uniform", 0)
    for number, shape in enumerate([(2, 3), (4, 1), (1, 2)]):
        buffer.add(rollout(number, prompt_width=shape[0], width=shape[1]))
    for _ in range(20):
        parts = buffer.sample([5, 7])
        assert [len(part) for part in parts] == [5, 7]
        assert [part.beta.item() for part in parts] == [0.5, 0.5]
        joined = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].columns() if name != "beta"
        }
        identity = joined["identity"]
        assert len(identity.unique()) == 12
        assert torch.equal(joined["prompt_keys"], 7 + identity % 100 // 4)
        for kind in ("prompt", "completion"):
            mask = joined[f"{kind}_mask"].bool()
            ids = joined[f"{kind}_ids"]
            assert torch.equal(ids[mask], identity[:, None].expand_as(ids)[mask])
        # prompts are padded on the left, completions on the right
        width = torch.tensor([2, 4, 1])[identity // 100]
        assert torch.equal(joined["prompt_mask"].sum(-1), width)
        assert joined["prompt_mask"][:, -1].all()
        assert joined["completion_mask"][:, 0].all()


def test_groups_of_a_prompt_stay_together():
    buffer = ReplayBuffer(4, "uniform", 0)
    for number in range(4):
        buffer.add(rollout(number))
    for _ in range(20):
        (batch,) = buffer.sample([10])
        _, counts = (batch.identity // 4).unique(return_counts=True)
        assert sorted(counts.tolist()) == [2, 4, 4]  # the last is cut


def test_the_oldest_is_forgotten():
    buffer = ReplayBuffer(2, "uniform", 0)
    for number in range(5):
        buffer.add(rollout(number))
    drawn = torch.cat([buffer.sample([12])[0].identity for _ in range(50)]) // 100
    assert set(drawn.tolist()) == {3, 4}
    first = ReplayBuffer(8, "uniform", 0)
    first.add(rollout(0))
    assert len(first.sample([12])[0].identity.unique()) == 12  # a window that is not full yet


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["uniform", "recency"])
def test_how_often_rollouts_are_drawn(sampling):
    buffer = ReplayBuffer(3, sampling, 0)
    for number in range(3):
        buffer.add(rollout(number))
    n = 3000
    drawn = torch.cat([buffer.sample([4])[0].identity for _ in range(n)])[::4] // 100  # one group a sample
    shares = torch.tensor([1.0, 1.0, 1.0] if sampling == "uniform" else [1.0, 2.0, 3.0])
    for number, p in enumerate((shares / shares.sum()).tolist()):
        found = (drawn == number).float().mean().item()
        assert abs(found - p) < 4.5 * (p * (1 - p) / n) ** 0.5, (number, found, p)


def test_it_goes_on_from_its_state(tmp_path):
    buffer = ReplayBuffer(2, "recency", 0)
    for number in range(3):
        buffer.add(rollout(number))
    buffer.sample([6])
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    expected = [buffer.sample([6])[0].identity for _ in range(5)]
    other = ReplayBuffer(2, "recency", 1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), LabelledBatch)
    for draw in expected:
        assert torch.equal(other.sample([6])[0].identity, draw)
    other.add(rollout(3))
    assert len(other.rollouts) == 2
