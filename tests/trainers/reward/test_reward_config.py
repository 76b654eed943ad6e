"""Options of the reward trainer: ranges, contradictions, help."""

from dataclasses import fields

import pytest
from transformers import HfArgumentParser
from trl import RewardConfig as TRLRewardConfig

from rlhf_bayes import RewardConfig

from ..preferring import quiet


def test_every_field_has_help():
    own = {field.name for field in fields(RewardConfig)} - {field.name for field in fields(TRLRewardConfig)}
    assert own == {
        "num_members", "ensemble", "bootstrap", "label_smoothing", "annotator_agreement", "annotator_reliability",
        "overlong", "max_nonfinite_steps", "save_on_sigterm",
    }  # fmt: skip
    for field in fields(RewardConfig):
        if field.name in own:
            assert field.metadata["help"].endswith(".")
            assert f"{field.name} (`" in RewardConfig.__doc__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_members": 0}, "`num_members` must be a whole number from 1, got 0"),
        ({"num_members": 2.5}, r"got 2\.5"),
        ({"ensemble": "models"}, r"`ensemble` must be one of \('heads', 'lora'\), got 'models'"),
        ({"bootstrap": True}, "`bootstrap` must be one of"),
        ({"overlong": "cut"}, "`overlong` must be one of"),
        ({"bootstrap": "annotators"}, "needs `num_members` above 1, got 1"),
        ({"label_smoothing": 0.5}, r"`label_smoothing` must be in \[0, 0\.5\), got 0\.5"),
        ({"label_smoothing": -0.1}, r"got -0\.1"),
        ({"label_smoothing_factor": 0.1}, "Set `label_smoothing` instead"),
        ({"annotator_agreement": 0.4}, "0.4"),
        ({"annotator_agreement": 1.1}, "1.1"),
        ({"label_smoothing": 0.1, "annotator_agreement": 0.8}, "got `label_smoothing` and `annotator_agreement`"),
        ({"label_smoothing": 0.1, "annotator_reliability": True}, "Keep one"),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        quiet(tmp_path, ours=True, **change)


def test_noise_of_an_agreement(tmp_path):
    # the table of accuracies that agreement allows: .63, .73, .77 → .755, .839, .867
    for agreement, ceiling in ((0.63, 0.755), (0.73, 0.839), (0.77, 0.867)):
        assert 1 - quiet(tmp_path, ours=True, annotator_agreement=agreement).label_noise == pytest.approx(
            ceiling, abs=6e-4
        )
    assert quiet(tmp_path, ours=True, label_smoothing=0.1).label_noise == 0.1
    assert quiet(tmp_path, ours=True).label_noise == 0.0


def test_it_parses_from_the_command_line(tmp_path):
    words = f"--output_dir {tmp_path} --use_cpu --bf16 False --num_members 3 --ensemble lora --annotator_reliability"
    (args,) = HfArgumentParser(RewardConfig).parse_args_into_dataclasses(words.split())
    assert (args.num_members, args.ensemble, args.annotator_reliability, args.bootstrap) == (3, "lora", True, "pairs")
