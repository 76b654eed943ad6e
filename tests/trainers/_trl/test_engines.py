"""A backward pass through a forward that was run outside of its engine."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from rlhf_bayes.lm.forward import CompletionScores
from rlhf_bayes.trainers._trl.engines import as_returned_by, learns_from_earlier_forward


class Scaled(nn.Module):
    """A trunk that multiplies by a buffer, which DDP sends; a head that is used outside of it; and a spare one."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head, self.spare = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x=None, scores=None):
        return scores if scores is not None else self.trunk(x * self.trunk.weight.sum(0)) * self.scale

    def scored(self, x):
        log_probs = self.head(self(x)).log_softmax(-1)
        return CompletionScores(log_probs, log_probs.exp(), None, None)


def doubled(state, bucket):
    """In the place of DDP's mean over processes, so that it shows in one."""
    future = torch.futures.Future()
    future.set_result(2 * bucket.buffer())
    return future


@pytest.fixture
def one_process():
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    destroy_process_group()


@pytest.mark.parametrize("find_unused", [True, False])
def test_ddp_goes_backward_through_an_earlier_forward(one_process, find_unused):
    torch.manual_seed(0)
    plain, x = Scaled(), torch.randn(5, 3)
    if not find_unused:
        del plain.spare
    engine = DistributedDataParallel(plain, find_unused_parameters=find_unused)
    engine.register_comm_hook(None, doubled)
    for _ in range(3):
        trained = [plain.trunk.weight, plain.head.weight, plain.head.bias]
        expected = torch.autograd.grad(plain.scored(x).log_probs[:, 0].sum(), trained)
        plain.scored(x)  # never learnt from, as where a reward fails
        scores = plain.scored(x)
        with torch.no_grad():
            plain.scored(2 * x)  # the prior's
        as_returned_by(engine, scores).log_probs[:, 0].sum().backward()
        assert_close([weight.grad for weight in trained], [2 * gradient for gradient in expected])
        assert not find_unused or plain.spare.weight.grad is None
        engine.zero_grad()


@pytest.mark.parametrize(
    ("kind", "zero_stage", "fsdp2", "expected"),
    [
        ("NO", None, False, True),
        ("MULTI_GPU", None, False, True),
        ("MULTI_CPU", None, False, True),
        ("DEEPSPEED", 1, False, True),
        ("DEEPSPEED", 2, False, True),
        ("DEEPSPEED", 3, False, False),
        ("FSDP", None, True, True),
        ("FSDP", None, False, False),
        ("MEGATRON_LM", None, False, False),
        ("XLA", None, False, False),
    ],
)
def test_which_engines_learn_from_an_earlier_forward(kind, zero_stage, fsdp2, expected):
    plugin = None if zero_stage is None else SimpleNamespace(zero_stage=zero_stage)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType(kind), is_fsdp2=fsdp2, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    assert learns_from_earlier_forward(accelerator) == expected
