"""A field of a configuration is explained once, by its `help`, and its explanation is found in the docstring."""

import dataclasses

import pytest
from trl import RewardConfig as TRLRewardConfig
from trl import RLOOConfig

from rlhf_bayes.trainers import GDCConfig, PPOConfig, RewardConfig
from rlhf_bayes.trainers.field_help import document_fields

BASES = {PPOConfig: RLOOConfig, GDCConfig: RLOOConfig, RewardConfig: TRLRewardConfig}


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("config", BASES, ids=lambda config: config.__name__)
def test_every_new_field_has_help_and_stands_in_the_docstring(config):
    of_trl = {field.name for field in dataclasses.fields(BASES[config])}
    new = [field for field in dataclasses.fields(config) if field.name not in of_trl]
    assert {"max_nonfinite_steps", "save_on_sigterm"} < {field.name for field in new}
    for field in new:
        assert len(field.metadata.get("help", "")) > 20, f"`{field.name}` has no help"
        start = config.__doc__.index(f"\n    {field.name} (`")
        entry = one_line(config.__doc__[start:].partition("):\n")[2])
        assert entry.startswith(one_line(field.metadata["help"])), f"`{field.name}` is explained otherwise"


def test_own_fields_come_first_with_types_and_defaults():
    parameters = PPOConfig.__doc__.partition("Parameters:\n")[2]
    names = [line.split()[0] for line in parameters.splitlines() if line[4:5].strip()]
    assert names[0] == "kl_estimator"
    assert names[-1] == "save_on_sigterm"
    assert len(set(names)) == len(names)
    assert "    vf_coef (`float`, *optional*, defaults to `0.1`):\n" in parameters
    assert "    target_kl (`float`, *optional*):\n" in parameters


def test_a_field_without_help_is_refused_by_name():
    @dataclasses.dataclass
    class Config:
        __module__ = "rlhf_bayes.trainers.mine"

        gain: float = 1.0

    with pytest.raises(ValueError, match=r"`gain` of Config .* `help`"):
        document_fields(Config)
