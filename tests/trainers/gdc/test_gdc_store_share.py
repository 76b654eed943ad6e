"""GDCTrainer with a share of its batches from a store."""

import pytest
import torch

from rlhf_bayes.store import CompletionStore
from rlhf_bayes.testing import EnumerableLM, toy_reward
from rlhf_bayes.trainers.gdc import stored_share

from ...store.stored import completion, drawn, provenance
from ..rollout.test_rollout_checkpoint import assert_same_run
from ..training import Recorder, gdc_config, prompts_of, trainer

SIZES = {"per_device_train_batch_size": 48, "num_generations": 12, "store_share": 0.25}


@pytest.fixture(scope="module")
def toy():
    return EnumerableLM(vocab_size=4, max_completion_length=3)


@pytest.fixture
def store(toy, tmp_path):
    store = CompletionStore.create(tmp_path / "store", provenance(toy))
    store.append(drawn(toy, toy.log_prior, 20, "prior"))
    return store


def mixed(toy, store, folder, policy=None, reward=toy_reward, data=None, **changes):
    args = gdc_config(folder, replay_store=str(store.path), **SIZES | {"divergence": "js"} | changes)
    data = prompts_of(toy, 4) if data is None else data
    return trainer(toy, args, policy, reward, train_dataset=data)


def test_a_quarter_of_the_prompts_is_read_and_weighted_as_the_mixture(toy, store, tmp_path, monkeypatch):
    policy, recorder = toy.random_policy(noise=0.0), Recorder()
    trained = mixed(toy, store, tmp_path, policy, max_steps=3)
    trained.add_callback(recorder)
    steps, learn = [], trained.objective.step
    trained.objective.step = lambda batches, new: (steps.append(batches[0]), learn(batches, new))[1]
    rows, read = [], stored_share.scored_rows
    monkeypatch.setattr(stored_share, "scored_rows", lambda *a: (rows.append(a[2]), read(*a))[1])
    trained.train()
    draws = trained.stored_share.rollouts.draws
    assert [len(rollout.rewards) for rollout in trained.rollouts] == [36] * 3
    assert [len(batch) for batch in steps] == [48] * 3
    assert all(len(draws.prompt_index[which].unique()) == 1 for which in rows)  # a group of a prompt
    assert len({frozenset(which.tolist()) for which in rows}) == 3  # another one each time
    first = steps[0]  # whose policy is the prior, and so is the mixture
    torch.testing.assert_close(first.log_proposal, first.log_prior, rtol=0, atol=1e-4)
    last = steps[-1]
    mixture = torch.logaddexp(last.log_policy + torch.tensor(0.75).log(), last.log_prior + torch.tensor(0.25).log())
    torch.testing.assert_close(last.log_proposal, mixture, rtol=0, atol=1e-4)
    assert (last.log_policy - last.log_prior).abs().max() > 0.05
    assert all(torch.cat([g.flatten() for g in one.values()]).abs().max() > 0 for one in recorder.gradients)
    # Z of every prompt is known from the first rollout on, from the store
    assert first.log_z.isfinite().all()


def test_what_is_read_depends_on_the_rollout_alone(toy, store, tmp_path):
    share = mixed(toy, store, tmp_path).stored_share
    inputs = [{"prompt": prompt} for prompt in toy.prompts + toy.prompts[:1] for _ in range(12)]

    class At:
        accelerator = type("", (), {"process_index": 0})()

        def __init__(self, micro_steps):
            self.micro_steps = micro_steps

    found = [share.split(At(step), inputs) for step in range(8)]
    assert share.split(At(5), inputs) == found[5]
    assert all((len(fresh), len(read)) == (36, 12) for fresh, read in found)
    assert len({read[0]["prompt"] for _, read in found}) > 1


def test_any_number_of_processes_reads_the_same(toy, store, tmp_path):
    """Eight groups of one process, or four of each of two: the same are read, with the same completions."""
    share = mixed(toy, store, tmp_path, data=prompts_of(toy, 8), per_device_train_batch_size=96).stored_share
    inputs = [{"prompt": prompt} for prompt in (toy.prompts * 3)[:8] for _ in range(12)]

    class Process:
        micro_steps = 3

        def __init__(self, index):
            self.accelerator = type("", (), {"process_index": index})()

    read = {}

    def rows_of(process, rows):
        def kept(trainer, draws, which, *others):
            read.setdefault(len(rows), []).extend(which.tolist())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stored_share, "scored_rows", kept)
            fresh, stored = share.split(process, rows)
            share.rollout(process, stored)
        return fresh

    whole = rows_of(Process(0), inputs)
    assert rows_of(Process(0), inputs[:48]) + rows_of(Process(1), inputs[48:]) == whole
    assert read[48] == read[96]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"divergence": "log_variance", "num_iterations": 2, "replay_batches": 2}])
def test_a_resumed_run_is_bitwise_that_of_an_uninterrupted_one(toy, store, tmp_path, changes):
    def make(folder):
        schedule = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear", "beta_init": 3.0}
        sizes = {"per_device_train_batch_size": 24, "steps_per_generation": 2}
        saving = {"max_steps": 9, "save_strategy": "steps", "save_steps": 5}
        return mixed(toy, store, tmp_path / folder, **schedule | sizes | saving | changes)

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert 0 < len(resumed.rollouts) < len(whole.rollouts)
    assert_same_run(resumed, whole)


def test_refusals(toy, store, tmp_path):
    for name, value, message in (
        ("store_share", 0.3, "`store_share` must be a whole number of the 4 prompts"),
        ("store_share", 1.0, "`store_share` must be between 0 and 1"),
        ("num_generations", 48, "whole groups"),
        ("proposal", "prior", "`proposal` must be 'policy'"),
        ("baseline", "leave_one_out", "`baseline` must be 'constant'"),
        ("temperature", 0.7, "`temperature` must be that of `replay_store`"),
    ):
        with pytest.raises(ValueError, match=message):
            mixed(toy, store, tmp_path, **{name: value})
    with pytest.raises(ValueError, match="`replay_store` must be a store made with the same `prior`"):
        mixed(toy, store, tmp_path, toy.random_policy(noise=1e-3))

    def other(completions, **kwargs):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match="made with the same `rewards`"):
        mixed(toy, store, tmp_path, reward=other)
    few = CompletionStore.create(tmp_path / "few", provenance(toy))
    few.append(completion(toy, 0, index, -1.0, "prior") for index in range(12))
    with pytest.raises(ValueError, match=r"must hold `num_generations` = 12 completions of each row .* got 0"):
        mixed(toy, few, tmp_path)
