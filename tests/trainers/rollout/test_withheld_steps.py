"""Optimizer steps that are not taken."""

from types import SimpleNamespace

import torch
from torch import nn

from rlhf_bayes.trainers.rollout.withheld_steps import withheld_steps


def stepped(withhold: bool, wrapped: bool = False) -> tuple[torch.Tensor, dict]:
    """The weight after a step with momentum that is withheld or not, and the optimizer's state; both start at 1."""
    weight = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.ones(())
    outer = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer)) if wrapped else optimizer
    with withheld_steps(outer, lambda: withhold):
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


def test_weights_and_state_stay():
    for wrapped in (False, True):  # as DeepSpeed and accelerate wrap it
        weight, state = stepped(withhold=True, wrapped=wrapped)
        assert weight == 1
        assert state == {}


def test_others_are_taken_as_ever():
    weight, state = stepped(withhold=False)
    assert weight < 0.9
    assert state["step"] == 1


def test_asked_at_each_step_and_only_within():
    weight = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = -torch.ones(())
    answers = iter([True, False])
    with withheld_steps(optimizer, lambda: next(answers)):
        optimizer.step()
        assert weight == 0
        optimizer.step()
        assert weight == 1
    optimizer.step()
    assert weight == 2
