"""What `_trl/preference_trainer.py` uses of TRL, by name: a release that moves a name fails here, and says which."""

import pytest
from transformers import Trainer
from trl import RewardTrainer as TRLRewardTrainer

from rlhf_bayes.trainers._trl import fault_tolerance, preference_trainer

from ..preferring import hard_pairs, quiet, trained
from .names import lost, moved, names_used

# of transformers' Trainer, under TRL's
TRAINER_NAMES = {
    "evaluation_loop": ("dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"),
    "_save_rng_state": ("output_dir",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
}


@pytest.fixture(scope="module")
def theirs(toy, tmp_path_factory):
    return trained(TRLRewardTrainer, toy, quiet(tmp_path_factory.mktemp("trl")), hard_pairs(toy))


def test_methods_that_are_overridden():
    assert moved(TRLRewardTrainer, {n: p for n, p in preference_trainer.PRIVATE_NAMES.items() if n[0] == "_"}) == []
    assert moved(Trainer, TRAINER_NAMES) == []


def test_attributes(theirs):
    assert lost(theirs, preference_trainer.PRIVATE_ATTRIBUTES) == []
    assert lost(theirs, fault_tolerance.TRL_ATTRIBUTES) == []


def test_every_name_that_is_used(theirs):
    used = names_used(preference_trainer, "PreferenceTrainer") - vars(fault_tolerance.FaultTolerantTrainer).keys()
    assert {"_metrics", "_signature_columns", "_prepare_dataset", "is_deepspeed_enabled"} & used  # it sees them
    assert lost(theirs, used) == []


def test_the_list_is_complete():
    private = {name for name in names_used(preference_trainer, "PreferenceTrainer") if name.startswith("_")}
    missing = (
        private
        - preference_trainer.PRIVATE_NAMES.keys()
        - set(preference_trainer.PRIVATE_ATTRIBUTES)
        - TRAINER_NAMES.keys()
    )
    assert missing == set(), "name them in PRIVATE_NAMES or PRIVATE_ATTRIBUTES"


def test_rewards_of_a_batch_are_chosen_first(theirs):
    batch = theirs.data_collator([theirs.train_dataset[i] for i in (0, 1)])
    chosen, rejected = batch["input_ids"].chunk(2)
    for row in (0, 1):
        for tokens, name in ((chosen, "chosen_ids"), (rejected, "rejected_ids")):
            ids = theirs.train_dataset[row][name]
            assert tokens[row, : len(ids)].tolist() == ids


def test_an_objective_must_define_its_loss(toy, tmp_path):
    base = trained(preference_trainer.PreferenceTrainer, toy, quiet(tmp_path, ours=True), hard_pairs(toy), train=False)
    with pytest.raises(NotImplementedError, match="PreferenceTrainer must define `pair_loss`"):
        base.train()
