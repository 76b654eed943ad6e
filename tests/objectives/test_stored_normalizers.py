"""log Z from stored draws, by prompts of different sizes, against sums written out."""

import math

import pytest
import torch

from rlhf_bayes.objectives.stored_normalizers import StoredNormalizers

KEYS = torch.tensor([7, 3, 7, 7, 3, 9])
RATIOS = torch.tensor([0.1, -0.4, 0.3, -1.0, 0.2, 0.5])
EVIDENCE = torch.tensor([1.0, 2.0, -torch.inf, torch.nan, 0.5, torch.nan])


@pytest.mark.parametrize("power", [1.0, 0.3])
def test_the_mean_of_the_weights_of_each_prompt(power):
    normalizers = StoredNormalizers(KEYS, RATIOS, EVIDENCE)
    normalizers.retarget(power)
    asked = torch.tensor([9, 3, 7, 3])
    found = normalizers.log_z(asked).tolist()
    # of prompt 7 one weight is 0, and one completion has no evidence; of prompt 9 none has
    seven = math.log(math.exp(0.1 + power * 1.0) / 2)
    three = math.log((math.exp(-0.4 + power * 2.0) + math.exp(0.2 + power * 0.5)) / 2)
    assert found == pytest.approx([math.nan, three, seven, three], nan_ok=True)
    others, pooled = normalizers.estimate(asked, torch.zeros(4), torch.zeros(4), keep=True)
    assert others.tolist() == pytest.approx(found, nan_ok=True)
    assert pooled.tolist() == pytest.approx(found, nan_ok=True)


def test_the_bound_and_the_state():
    bounded = StoredNormalizers(KEYS, RATIOS, EVIDENCE, bound=0.2)
    assert bounded.log_z(torch.tensor([3])).item() == pytest.approx(0.2)
    bounded.retarget(0.5)
    again = StoredNormalizers(KEYS, RATIOS, EVIDENCE, bound=0.2)
    again.load_state_dict(bounded.state_dict())
    assert again.power == 0.5
    assert again.log_z(torch.tensor([3])).item() == pytest.approx(0.1)
    with pytest.raises(ValueError, match="must hold the 6 completions of the run that is resumed, got 5"):
        StoredNormalizers(KEYS[:5], RATIOS[:5], EVIDENCE[:5]).load_state_dict(bounded.state_dict())
