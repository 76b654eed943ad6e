"""Pooling: arithmetic by hand, inequalities, and what each rule makes of a constant."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics import POOLING_RULES, pool
from rlhf_bayes.numerics.pooling import pool_centered, uses_beta

PAGE = (Path(__file__).parents[2] / "docs" / "reward_models.md").read_text(encoding="utf-8")
REWARDS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 0.5]])  # (K, B)
SCALES = {
    "mean": {},
    "min": {},
    "pessimistic": {"beta": 0.7},
    "marginal": {"beta": 0.7},
    "mean_minus_variance": {"penalty": 0.2},
}


@pytest.mark.parametrize(
    ("rule", "scale", "first"),
    [
        ("mean", {}, 0.5),
        ("min", {}, 0.0),
        ("pessimistic", {"beta": 0.7}, -0.7 * math.log((math.exp(-1 / 0.7) + 1) / 2)),
        ("marginal", {"beta": 0.7}, 0.7 * math.log((math.exp(1 / 0.7) + 1) / 2)),
        ("mean_minus_variance", {"penalty": 0.2}, 0.5 - 0.2 * 0.25),
        ("mean_minus_variance", {"beta": 0.7}, 0.5 - 0.25 / 1.4),
    ],
)
def test_by_hand(rule, scale, first):
    pooled = pool(REWARDS, rule, **scale)
    assert pooled[0].item() == pytest.approx(first, rel=1e-6)
    # members that agree
    assert pooled[2].item() == pytest.approx(0.5)
    assert_close(pool(REWARDS.T[None].bfloat16(), rule, **scale), REWARDS.T)  # one member, any shape, raised to fp32


def test_rules_in_order():
    rewards = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    low, pessimistic, mean, marginal = (
        pool(rewards, rule, **SCALES[rule]) for rule in ("min", "pessimistic", "mean", "marginal")
    )
    assert ((low < pessimistic) & (pessimistic < mean) & (mean < marginal)).all()


def test_pessimistic_to_second_order_and_in_the_limits():
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    for beta in (20.0, 80.0):
        gap = (pool(rewards, "pessimistic", beta) - pool(rewards, "mean_minus_variance", beta)).abs().max()
        third_moment = (rewards - rewards.mean(0)).abs().pow(3).mean(0).max()
        assert gap < third_moment / beta**2
    assert_close(pool(rewards, "pessimistic", 1e-4), pool(rewards, "min"), rtol=0, atol=1e-4 * math.log(4) + 1e-9)
    assert_close(pool(rewards, "marginal", 1e6), pool(rewards, "mean"), rtol=0, atol=1e-5)


def test_only_the_mean_moves_alike_for_all_completions_with_a_members_constant():
    shifted = REWARDS + torch.tensor([[5.0], [0.0]])
    for rule, scale in SCALES.items():
        moved = pool(shifted, rule, **scale) - pool(REWARDS, rule, **scale)
        assert (moved.max() - moved.min() < 1e-6) == (rule == "mean"), rule
        # a constant that members share is harmless
        assert_close(pool(REWARDS + 5.0, rule, **scale), pool(REWARDS, rule, **scale) + 5.0)


def test_forbidden_by_one_member():
    rewards = torch.tensor([[1.0, -math.inf], [2.0, 3.0], [-math.inf, -math.inf]]).T  # (2, 3)
    for rule, scale in SCALES.items():
        pooled = pool(rewards, rule, **scale)
        assert pooled.isfinite()[1]
        assert pooled[2] == -math.inf
        if rule == "marginal":
            assert pooled[0].item() == pytest.approx(1.0 - 0.7 * math.log(2))  # half of the members allow it
        else:
            assert pooled[0] == -math.inf


@pytest.mark.parametrize("name", POOLING_RULES)
def test_a_record_is_whole(name):
    """A rule without values here has not been checked by another route."""
    assert name in SCALES, "add its scale to SCALES, and its value to `test_by_hand`"
    assert name in {case[0] for case in test_by_hand.pytestmark[0].args[1]}
    rule = POOLING_RULES[name]
    assert (rule.scale == "none") == (SCALES[name] == {})
    assert uses_beta(name) == (rule.scale in ("beta", "penalty"))
    assert len(rule.help) > 10


@pytest.mark.parametrize("name", POOLING_RULES)
def test_a_pool_lies_between_the_members_on_the_side_that_it_says(name):
    rewards = torch.randn(5, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pooled = pool(rewards, name, **SCALES[name])
    assert (pooled <= rewards.amax(0)).all()
    if POOLING_RULES[name].scale != "penalty":  # mean − λ·variance has no lower bound
        assert (pooled >= rewards.amin(0)).all()
    difference = pooled - rewards.mean(0)
    signs = torch.where(difference.abs() < 1e-12, 0.0, difference.sign())
    assert (signs == POOLING_RULES[name].optimism).all()


def test_the_table_in_the_readme_is_theirs():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", PAGE.split("| rule | reward | posterior |")[1], re.MULTILINE)
    expected = [(name, rule.formula, rule.help) for name, rule in POOLING_RULES.items()]
    assert rows[: len(expected)] == expected


@pytest.mark.parametrize("name", ["harmonic", "Mean"])
def test_an_unknown_rule_is_an_error_everywhere(name):
    for asked in (lambda: uses_beta(name), lambda: pool(REWARDS, name), lambda: pool_centered(REWARDS, REWARDS, name)):
        with pytest.raises(ValueError, match=f"`rule` must be one of {', '.join(POOLING_RULES)}, got '{name}'"):
            asked()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "median"}, "`rule` must be one of mean, pessimistic, .*got 'median'"),
        ({"rule": "pessimistic"}, "`beta` must be given for the rule 'pessimistic', got None"),
        ({"rule": "marginal"}, "`beta` must be given for the rule 'marginal'"),
        ({"rule": "mean_minus_variance"}, "got neither"),
        ({"rule": "mean_minus_variance", "beta": 1.0, "penalty": 1.0}, "got both"),
        ({"rule": "mean", "beta": 1.0}, "`beta` must be left out with the rule 'mean'.*got 1.0"),
        ({"rule": "min", "beta": 1.0}, "`beta` must be left out with the rule 'min'"),
        (
            {"rule": "pessimistic", "beta": 1.0, "penalty": 1.0},
            "`penalty` must be left out with the rule 'pessimistic'",
        ),
        ({"rule": "pessimistic", "beta": 0.0}, "`beta` must be positive and finite, got 0.0"),
        ({"rule": "marginal", "beta": math.nan}, "got nan"),
        ({"rule": "mean_minus_variance", "penalty": -0.5}, "not negative, got -0.5"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        pool(REWARDS, **arguments)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (torch.zeros(0, 3), r"K > 0, got shape \(0, 3\)"),
        (torch.tensor(1.0), r"got shape \(\)"),
        (torch.tensor([[1.0, 2.0], [0.0, math.nan]]), "from member 1"),
        (torch.tensor([math.inf, 0.0]), "from member 0"),
    ],
)
def test_rewards_out_of_range(rewards, message):
    with pytest.raises(ValueError, match=message):
        pool(rewards, "mean")
