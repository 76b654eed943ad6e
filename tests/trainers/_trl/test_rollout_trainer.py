"""What `_trl/` relies on in TRL for rollouts, by name: a release that moves a name fails here, and says which."""

import ast
import inspect
from pathlib import Path

import pytest
import trl.models.utils
from transformers import Trainer
from trl import RLOOConfig, RLOOTrainer

from rlhf_bayes.testing import toy_reward
from rlhf_bayes.trainers._trl import fault_tolerance, image_prompts, rloo_repairs, rollout_trainer

from ..training import prompts_of
from .names import lost, moved, names_used

HELPERS = {
    "prepare_deepspeed": ("model", "accelerator"),
    "prepare_fsdp": ("model", "accelerator"),
}
# of transformers' Trainer, under TRL's
TRAINER_NAMES = {
    "_save": ("output_dir", "state_dict"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
    "_save_rng_state": ("output_dir",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_maybe_log_save_evaluate": ("tr_loss",),
}
# set with vLLM only, or by the training loop
NOT_ON_EVERY_INSTANCE = {"vllm_generation", "current_gradient_accumulation_steps"}


@pytest.fixture(scope="module")
def rloo(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rloo")
    args = RLOOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        max_completion_length=3,
        num_generations=2,
        per_device_train_batch_size=6,
        max_steps=1,
        beta=0.5,
    )
    calls = []

    class Recording(RLOOTrainer):
        def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
            calls.append("policy" if model is self.model else "reference" if model is self.ref_model else "other")
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

        def _calculate_rewards(self, *args):
            calls.append("rewards")
            return super()._calculate_rewards(*args)

    model = toy.save(folder / "model")
    trainer = Recording(model, toy_reward, args, train_dataset=prompts_of(toy), processing_class=toy.tokenizer)
    trainer.train()
    trainer.calls = calls
    return trainer


def test_methods_that_are_overridden():
    assert moved(RLOOTrainer, rollout_trainer.PRIVATE_NAMES) == []
    assert moved(RLOOTrainer, rloo_repairs.PRIVATE_NAMES) == []
    assert moved(Trainer, TRAINER_NAMES) == []


def test_functions_that_are_imported():
    assert moved(trl.models.utils, HELPERS) == []


def test_attributes(rloo):
    assert lost(rloo, rollout_trainer.PRIVATE_ATTRIBUTES) == []
    assert lost(rloo, rloo_repairs.PRIVATE_ATTRIBUTES) == []
    assert lost(rloo, fault_tolerance.TRL_ATTRIBUTES) == []


def all_names_used() -> set[str]:
    own = vars(fault_tolerance.FaultTolerantTrainer).keys() | vars(image_prompts.ImagePromptRLOO).keys()
    return names_used(rollout_trainer, "RolloutTrainer") - {name for name in own if not hasattr(RLOOTrainer, name)}


def test_every_name_that_is_used(rloo):
    used = all_names_used()
    assert {"_step", "_buffered_inputs", "_prepare_inputs", "reward_func_names", "use_vllm"} <= used  # it sees them
    assert lost(rloo, used - NOT_ON_EVERY_INSTANCE) == []


def test_the_list_is_complete(rloo):
    private = {name for name in all_names_used() if name.startswith("_")}
    missing = (
        private - rollout_trainer.PRIVATE_NAMES.keys() - set(rollout_trainer.PRIVATE_ATTRIBUTES) - TRAINER_NAMES.keys()
    )
    missing -= fault_tolerance.PRIVATE_NAMES.keys()
    assert missing == set(), "name them in PRIVATE_NAMES or PRIVATE_ATTRIBUTES"
    overridden = {
        name for name in vars(rollout_trainer.RolloutTrainer) if name in vars(RLOOTrainer) and name.startswith("_")
    }
    assert (
        overridden - {"__init__", "__doc__", "__module__", "__annotations__"} <= rollout_trainer.PRIVATE_NAMES.keys()
    )


def test_policy_is_scored_before_the_reference_and_rewards_come_last(rloo):
    # then the loss scores the policy once more
    assert rloo.calls == ["policy", "reference", "rewards", "policy"]


def test_which_tokens_end_a_completion(rloo, toy):
    # absent before eos ids of the model's generation config were honoured: then the tokenizer's is the only one
    assert getattr(rloo, "eos_token_ids", [rloo._tokenizer.eos_token_id]) == [toy.tokenizer.eos_token_id]


def test_vllm_sends_weights_through_one_method():
    source = Path(trl.__file__).parent / "generation" / "vllm_generation.py"
    classes = {node.name: node for node in ast.parse(source.read_text(encoding="utf-8")).body if hasattr(node, "name")}
    methods = {node.name for node in classes["VLLMGeneration"].body if isinstance(node, ast.FunctionDef)}
    assert "sync_weights" in methods
    assert "self.vllm_generation.sync_weights()" in inspect.getsource(RLOOTrainer)


@pytest.mark.parametrize("name", rollout_trainer.PRIVATE_NAMES)
def test_a_moved_method_is_named(name, monkeypatch):
    def renamed(self, other):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(RLOOTrainer, name, renamed)
        assert moved(RLOOTrainer, rollout_trainer.PRIVATE_NAMES)[0].startswith(f"RLOOTrainer.{name} takes ['other']")
    with monkeypatch.context() as patch:
        patch.delattr(RLOOTrainer, name)
        assert moved(RLOOTrainer, rollout_trainer.PRIVATE_NAMES) == [f"RLOOTrainer.{name} is gone"]
    with monkeypatch.context() as patch:
        patch.delattr(trl.models.utils, "prepare_fsdp")
        assert moved(trl.models.utils, HELPERS) == ["trl.models.utils.prepare_fsdp is gone"]


@pytest.mark.parametrize("name", rollout_trainer.PRIVATE_ATTRIBUTES)
def test_a_moved_attribute_is_named(name, rloo, monkeypatch):
    monkeypatch.delattr(rloo, name)
    assert lost(rloo, rollout_trainer.PRIVATE_ATTRIBUTES) == [f"RLOOTrainer has no `{name}`"]
