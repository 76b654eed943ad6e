"""The target while training: annealed evidence, Z that improves, and states of other targets that are refused."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.objectives import OneProcess, PosteriorTarget

KEYS = torch.tensor([3, 3, 3, 8, 8, 8])
LOG_PRIOR = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5, -0.2]).double()
EVIDENCE = torch.tensor([0.3, 2.0, -1.0, 0.0, 1.0, 4.0]).double()


def target_of(max_steps=10, **options):
    world = OneProcess(lambda batch: torch.zeros(len(batch)), max_steps)
    return world, PosteriorTarget(world, **options)


def estimate(target, evidence=EVIDENCE):
    return target.estimate(KEYS, LOG_PRIOR, LOG_PRIOR, evidence)


@pytest.mark.parametrize(
    ("options", "betas"),
    [
        ({"beta": 0.5, "beta_init": 8.0}, [8.0 * (0.5 / 8.0) ** (min(step, 5) / 5) for step in range(8)]),
        ({"beta": 1.0, "beta_init": 4.0, "beta_init_steps": 2}, [4.0, 2.0, *[1.0] * 6]),
        ({"beta": 0.5}, [0.5] * 8),
    ],
)
def test_the_temperature_goes_down_geometrically(options, betas):
    world, target = target_of(**options)
    found = []
    for world.step in range(8):
        estimate(target)
        found.append(target.beta / target.power)
    assert found == pytest.approx(betas)


def test_z_is_pooled_over_rollouts_and_leaves_the_completion_out():
    _, target = target_of(beta=1.0)
    first, second = estimate(target), estimate(target, EVIDENCE + 1.0)
    weights = torch.stack([EVIDENCE.view(2, 3), EVIDENCE.view(2, 3) + 1.0]).exp()  # (2, P, n): q is the prior
    pooled = weights.mean((0, 2)).log()
    assert_close(second.pooled_log_z, pooled.repeat_interleave(3))
    assert_close(first.pooled_log_z, weights[0].mean(-1).log().repeat_interleave(3))
    assert_close(target.log_z(torch.tensor([8, 3])), pooled.flip(0).float())
    # the first completion of prompt 3, from the two others of the rollout
    assert_close(first.log_z[0], weights[0, 0, 1:].mean().log())
    assert_close(first.log_target[0], LOG_PRIOR[0] + EVIDENCE[0] - first.log_z[0])


def test_an_evaluation_is_not_remembered():
    world, target = target_of(beta=1.0)
    world.training = False
    estimate(target)
    assert target.log_z(KEYS).isneginf().all() or target.log_z(KEYS).isnan().all()


def test_what_is_forbidden_is_noticed():
    _, target = target_of(beta=1.0)
    estimate(target)
    assert not target.forbids
    estimate(target, torch.where(EVIDENCE > 3, -math.inf, EVIDENCE))
    assert target.forbids


def test_the_state_of_another_target_is_refused():
    _, target = target_of(beta=1.0)
    estimate(target)
    _, same = target_of(beta=1.0)
    same.load_state_dict(target.state_dict())
    assert_close(same.log_z(KEYS), target.log_z(KEYS))
    _, other = target_of(beta=2.0)
    with pytest.raises(ValueError, match=r"`beta` must be that of the checkpoint, 1\.0, got 2\.0"):
        other.load_state_dict(target.state_dict())
