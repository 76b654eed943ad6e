"""The critic that is fitted in closed form: what it learns, and how it chooses its penalty."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_bayes.numerics.ppo import explained_variance
from rlhf_bayes.objectives import OneProcess
from rlhf_bayes.objectives.ridge_critic import RidgeCritic

MASK = torch.arange(6) < torch.tensor([6, 3, 5, 6, 1, 4] * 20)[:, None]  # (120, 6)


def critic():
    return RidgeCritic(OneProcess(lambda batch: torch.zeros(len(batch)), 10))


def rollout(generator, noise):
    """Features (120, 6, 4) whose first entry at each token is the return, but for noise; returns (120,)."""
    returns = torch.randn(120, generator=generator)
    features = torch.randn(120, 6, 4, generator=generator)
    features[..., 0] = 3 - 2 * returns[:, None] + noise * features[..., 0]
    return features, returns


def test_it_forecasts_what_can_be_forecast():
    fitted, generator = critic(), torch.Generator().manual_seed(0)
    features, returns = rollout(generator, noise=0.5)
    assert_close(fitted.forecast(features), torch.zeros(120, 6))
    for _ in range(5):
        features, returns = rollout(generator, noise=0.5)
        explained = explained_variance(fitted.forecast(features), returns[:, None].expand(120, 6), MASK)
        fitted.learn(features, returns, MASK)
    # the best linear forecast explains 4 / (4 + 0.25) of the variance
    assert explained == pytest.approx(4 / 4.25, abs=0.03)


def test_where_nothing_can_be_forecast_it_forecasts_the_mean():
    fitted, generator = critic(), torch.Generator().manual_seed(0)
    for _ in range(5):
        features, returns = torch.randn(120, 6, 40, generator=generator), torch.randn(120, generator=generator)
        fitted.learn(features, 2 + returns, MASK)
    spread = fitted.forecast(features).std()
    assert spread < 0.1
    assert fitted.forecast(features).mean() == pytest.approx(2.0, abs=0.2)


def test_padding_and_lengths_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    features, returns = rollout(generator, noise=0.5)
    spoilt = torch.where(MASK[..., None], features, torch.nan)
    clean, other = critic(), critic()
    clean.learn(features, returns, MASK)
    other.learn(spoilt, returns, MASK)
    assert_close(clean.forecast(features), other.forecast(features))
    # a completion with one token counts as much as one with six
    assert clean.sums.gram[0, 0] == pytest.approx(120)


def test_a_resumed_critic_goes_on_as_if_never_stopped():
    generator = torch.Generator().manual_seed(0)
    first, second = rollout(generator, 0.5), rollout(generator, 0.5)
    whole, before, resumed = critic(), critic(), critic()
    for features, returns in (first, second):
        whole.learn(features, returns, MASK)
    before.learn(*first, MASK)
    resumed.load_state_dict(before.state_dict())
    resumed.learn(*second, MASK)
    assert torch.equal(whole.forecast(second[0]), resumed.forecast(second[0]))
    assert torch.equal(whole.errors, resumed.errors)


def test_large_states_are_projected_alike_everywhere():
    hidden = torch.randn(7, 900, generator=torch.Generator().manual_seed(0))
    states = critic().states(hidden)
    assert states.shape == (7, 512)
    assert torch.equal(states, critic().states(hidden))
    # distances are kept but for a few percent
    ratios = torch.pdist(states) / torch.pdist(hidden)
    assert ratios.min() > 0.85
    assert ratios.max() < 1.15
    assert torch.equal(critic().states(hidden[:, :512]), hidden[:, :512])
