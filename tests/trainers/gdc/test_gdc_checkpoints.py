"""A run of GDCTrainer that is resumed ends where it would have ended, in the middle of a rollout too."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from rlhf_bayes.likelihoods import Constraint, MomentLikelihood

from ..rollout.test_rollout_checkpoint import LORA, assert_same_run
from ..training import gdc_config, prompts_of, trainer

pytestmark = pytest.mark.slow


def no_aa(completion_ids, **kwargs):
    return [ids[:2] != [0, 0] for ids in completion_ids]


def make(toy, folder, peft=False, likelihood=None, **changes):
    # rollouts of two micro-batches and two iterations: four steps each
    defaults = {
        "max_steps": 9,
        "per_device_train_batch_size": 12,
        "per_device_eval_batch_size": 48,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 2,
    }
    args = gdc_config(folder, **defaults | ({} if likelihood is None else {"beta": None}) | changes)
    arguments = {} if likelihood is None else {"likelihood": likelihood}
    peft_config = LoraConfig(**LORA) if peft else None
    return trainer(toy, args, eval_dataset=prompts_of(toy), peft_config=peft_config, **arguments)


RUNS = {
    "forward_kl": {"prior_samples": 8, "ess_min": 2.0},
    "reverse_kl": {"divergence": "reverse_kl", "beta_init": 3.0, "beta_init_steps": 8},
    "log_variance": {"divergence": "log_variance", "replay_batches": 2, "replay_sampling": "recency"},
    "replay": {"replay_batches": 2, "beta_init": 3.0, "max_pseudo_reward": 20.0},
    "adaptive": {
        "proposal": "adaptive",
        "per_device_train_batch_size": 96,
        "num_generations": 64,
        "num_generations_eval": 8,
    },
    "prior": {"proposal": "prior", "divergence": "js"},
    "condition": {"likelihood": Constraint(no_aa)},
}


@pytest.mark.parametrize(
    ("name", "peft"), [*((name, False) for name in RUNS), ("adaptive", True), ("log_variance", True)]
)
def test_a_resumed_run_continues_bit_for_bit_in_the_middle_of_a_rollout(toy, tmp_path, name, peft):
    whole = make(toy, tmp_path / "whole", peft, **RUNS[name])
    whole.train()
    resumed = make(toy, tmp_path / "resumed", peft, **RUNS[name])
    # nothing may depend on how the new trainer starts
    resumed.objective.target.normalizers.power = 0.123
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_same_run(resumed, whole)
    # steps 6 to 8 go on with the rollout that the checkpoint holds: of the three, one is drawn after it
    trained = [run.modes.count("train") for run in (whole, resumed)]
    assert trained == [3 + (name == "forward_kl"), 1]
    assert (
        resumed.objective.target.normalizers.state_dict()["pool"]
        == whole.objective.target.normalizers.state_dict()["pool"]
    )
    if name == "adaptive":
        assert torch.equal(resumed.objective.comparison.sums, whole.objective.comparison.sums)
        assert sum(entry.get("gdc/proposal_replaced", 0) for entry in whole.state.log_history) > 0
        for parameter, weight in whole.proposal.weights.items():
            assert torch.equal(resumed.proposal.weights[parameter], weight)


def test_another_target_is_not_gone_on_with(toy, tmp_path):
    make(toy, tmp_path / "reward", max_steps=5).train()
    with pytest.raises(ValueError, match=r"`beta` must be that of the checkpoint, 0\.5, got 0\.4: .*`ref_model`"):
        make(toy, tmp_path / "other", beta=0.4).train(str(tmp_path / "reward" / "checkpoint-5"))
    kinds = [MomentLikelihood({"no_aa": no_aa}, {"no_aa": lam}, {"no_aa": (0, 1)}) for lam in (2.0, 2.0001, 3.0)]
    make(toy, tmp_path / "moments", likelihood=kinds[0], max_steps=5, beta_init=2.0, beta_init_steps=20).train()
    annealed = {"max_steps": 6, "beta_init": 2.0, "beta_init_steps": 20}
    checkpoint = str(tmp_path / "moments" / "checkpoint-5")
    # λ that was fitted anew may differ in its last digits
    assert make(toy, tmp_path / "same", likelihood=kinds[1], **annealed).train(checkpoint).global_step == 6
    with pytest.raises(ValueError, match="`likelihood` must be that of the checkpoint, whose evidence has the bound"):
        make(toy, tmp_path / "other", likelihood=kinds[2], **annealed).train(checkpoint)


def test_without_its_file_z_is_estimated_anew_and_said_so(toy, tmp_path, caplog):
    make(toy, tmp_path).train()
    for name in ("rollout_state_0.pt", "complete.json"):
        (tmp_path / "checkpoint-5" / name).unlink()
    resumed = make(toy, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert "rollout_state_0.pt` is missing" in caplog.text
    assert resumed.state.global_step == 9


def test_a_checkpoint_of_another_number_of_processes(toy, tmp_path, caplog):
    """What all processes share is taken over, the rollout in flight is drawn anew."""
    whole = make(toy, tmp_path / "whole", replay_batches=2)
    whole.train()
    file = tmp_path / "whole" / "checkpoint-5" / "rollout_state_0.pt"
    state = torch.load(file, weights_only=True)
    torch.save(state | {"num_processes": 2}, file)
    resumed = make(toy, tmp_path / "resumed", replay_batches=2)
    taken = []
    make_batch = resumed.objective.batch

    def recorded(rollout):
        taken.append(
            (resumed.mode, len(resumed.objective.target.normalizers.pool), len(resumed.objective.replay.rollouts))
        )
        return make_batch(rollout)

    resumed.objective.batch = recorded
    resumed.train(resume_from_checkpoint=str(file.parent))
    assert "The checkpoint was written by 2 processes, this run has 1" in caplog.text
    assert taken[0] == ("train", 3, 2)
    assert resumed.state.global_step == 9
    assert resumed._step == 9


def test_a_saved_policy_is_an_ordinary_model(toy, tmp_path):
    trained = make(toy, tmp_path / "run", proposal="adaptive", max_steps=5)
    trained.train()
    trained.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-5"):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            torch.testing.assert_close(toy.log_probs(model), toy.log_probs(trained.model))
            assert (toy.log_probs(model) - toy.log_prior).abs().max() > 1e-3


def test_the_best_checkpoint_by_the_divergence_comes_back(toy, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    trained = make(toy, tmp_path, max_steps=4, save_steps=2, eval_steps=2, **best)
    trained.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trained.state.log_history if "eval_loss" in entry}
    assert trained.state.best_global_step == min(losses, key=losses.__getitem__)
