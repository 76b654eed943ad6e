"""GDCTrainer while actors draw: exact where their draws are, bounded staleness, an exact position, and faults."""

import math
import multiprocessing
import os
import signal
import time

import pytest
import torch
from peft import LoraConfig

from rlhf_bayes.store import Actor, CompletionStore
from rlhf_bayes.store.weights_folder import WeightsFolder
from rlhf_bayes.testing import toy_reward
from rlhf_bayes.trainers.faults.whole_checkpoints import whole_checkpoints
from rlhf_bayes.trainers.gdc import actor_rollouts

from ...children import wait_until
from ...store.stored import completion, drawn, language_model, provenance
from ..rollout.test_rollout_checkpoint import assert_same_run
from ..training import Recorder, gdc_config, logged, trainer

SIZES = {"divergence": "log_variance", "per_device_train_batch_size": 12, "num_generations": 4}
TRAINING = {"optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "linear"}


class Clock:
    """Time that passes only where the learner waits, and what others do meanwhile."""

    def __init__(self):
        self.now, self.meanwhile = 0.0, lambda: None

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(actor_rollouts, "time", found)
    return found


@pytest.fixture
def store(toy, tmp_path):
    return CompletionStore.create(tmp_path / "store", provenance(toy))


def learner(toy, tmp_path, out="out", model=None, weights="weights", **changes):
    arguments = {name: changes.pop(name) for name in ("callbacks", "peft_config", "ref_model") if name in changes}
    folder = {"actor_weights": str(tmp_path / weights)}
    args = gdc_config(tmp_path / out, **folder | SIZES | TRAINING | changes)
    store = CompletionStore(tmp_path / "store")
    return trainer(toy, args, model, None, train_dataset=store, **arguments)


def assert_resumes_as_if_never_stopped(toy, tmp_path, **options):
    """The run in `out` goes on, and ends as another does that reads the same store without a stop."""
    resumed = learner(toy, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    whole = learner(toy, tmp_path, "whole", weights="other", **options)
    whole.train()
    assert_same_run(resumed, whole)


def actor(toy, tmp_path, seed=0, model=None):
    prior = language_model(toy, model)
    likelihood = prior.tilt(toy_reward, beta=1.0).likelihood
    return Actor(tmp_path / "store", tmp_path / "weights", prior, likelihood, toy.prompts, seed=seed)


def recorded(trained):
    """What each rollout was made of: lists of (step of the policy that drew, token ids)."""
    found, take = [], trained.stored._take

    def taken(training):
        groups, dropped = take(training)
        found.append([(row["step"], row["completion_ids"]) for group in groups for row in group])
        return groups, dropped

    trained.stored._take = taken
    return found


def test_the_gradient_is_exact_where_a_file_holds_all_completions(toy, tmp_path, store):
    number = len(toy.completion_ids)
    store.append(
        completion(toy, prompt, index, -math.log(number), "uniform") for prompt in range(3) for index in range(number)
    )
    policy, recorder = toy.random_policy(noise=0.05, seed=2), Recorder()
    changes = {"per_device_train_batch_size": 120, "num_generations": 40, "callbacks": [recorder]}
    trained = learner(toy, tmp_path, model=policy, ref_model=toy.random_policy(noise=0.0), **changes)
    difference = toy.log_probs(policy) - toy.log_prior - toy.rewards / 0.5
    expected = torch.autograd.grad(0.5 * difference.var(-1).mean(), [p for _, p in policy.named_parameters()])
    trained.train()
    for (name, _), gradient in zip(trained.model.named_parameters(), expected, strict=True):
        found = recorder.gradients[0][name]
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-6 + 1e-5 * expected[-1].abs().max().item())
    assert logged(trained, "posterior/log_z") == [pytest.approx(toy.log_z(toy.rewards / 0.5).mean().item(), abs=1e-5)]


@pytest.mark.slow
def test_a_learner_nears_the_posterior_with_actors_that_run_ahead(toy, tmp_path, clock):
    """The prompt "a" left out: see test_gdc_store. In one process it comes as far: see docs/actors.md."""
    drawing = actor(toy, tmp_path)
    drawing.prompts = toy.prompts[1:]

    def ahead():
        while drawing.draw_once():
            pass

    clock.meanwhile = ahead
    policy = toy.random_policy(noise=0.0)
    changes = {"per_device_train_batch_size": 48, "num_generations": 24, "learning_rate": 5e-3, "max_steps": 60}
    before = toy.reverse_kl(policy)[1:].mean().item()
    trained = learner(toy, tmp_path, model=policy, max_staleness=4, **changes)
    trained.train()
    assert toy.reverse_kl(policy)[1:].mean().item() < before / 5
    assert set(logged(trained, "actors/staleness")) == {0, 1, 2}
    assert sum(logged(trained, "actors/dropped")) == 0  # actors wait where more would be too old
    assert 0.2 < logged(trained, "actors/ess")[-1] < 1


def test_weights_are_pushed_every_k_steps_and_what_is_too_old_is_dropped(toy, tmp_path, clock):
    """Steps of the policies that drew follow from a rule: an actor draws a file whenever the learner waits."""
    drawing = actor(toy, tmp_path)
    clock.meanwhile = drawing.draw_once
    trained = learner(toy, tmp_path, max_steps=6, push_steps=2, max_staleness=2)
    steps = recorded(trained)
    trained.train()
    assert [rollout[0][0] for rollout in steps] == [0, 0, 2, 2, 4, 4]
    assert logged(trained, "actors/staleness") == [0, 1, 0, 1, 0, 1]
    assert logged(trained, "actors/waiting") == [1.0] * 6  # no time passes elsewhere
    assert drawing.folder.newest(trained.stored.run).step == 6
    assert drawing.folder.stopped
    weights = drawing.folder.newest(trained.stored.run).weights()
    assert all(torch.equal(weights[name], weight) for name, weight in trained.model.named_parameters())


def test_old_completions_are_dropped_counted_and_never_learnt_from(toy, tmp_path, store, clock):
    for number, step in enumerate([0, 0, 0, 0, 0, 3, 4, 5]):  # a file each, of three groups
        store.append(drawn(toy, toy.log_prior, 4, f"policy at step {step}", seed=number, step=step), f"{number}")
    trained = learner(toy, tmp_path, max_steps=6, max_staleness=2)
    steps = recorded(trained)
    trained.train()
    assert [{step for step, _ in rollout} for rollout in steps] == [{0}, {0}, {0}, {3}, {4}, {5}]
    assert logged(trained, "actors/staleness") == [0, 1, 2, 0, 0, 0]
    assert logged(trained, "actors/dropped") == [0, 0, 0, 24, 0, 0]


def test_groups_come_from_files_of_any_size(toy, tmp_path, store):
    """Files of one completion of each prompt: four of them make the groups of a rollout."""
    rows = drawn(toy, toy.log_prior, 8, "prior")
    for number in range(8):
        store.append(rows[number::8], f"{number}")
    trained = learner(toy, tmp_path, max_steps=2)
    read = recorded(trained)
    trained.train()
    for start, rollout in zip((0, 4), read, strict=True):
        expected = [row.completion_ids for prompt in range(3) for row in rows[8 * prompt :][start : start + 4]]
        assert [ids for _, ids in rollout] == expected


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"steps_per_generation": 2, "num_iterations": 2, "beta_init": 3.0}])
def test_a_killed_learner_that_is_resumed_is_bitwise_that_of_an_uninterrupted_one(toy, tmp_path, store, clock, sizes):
    """Two actors' files come in another order than that of their names, also after the checkpoint."""
    for number in range(10):
        rows = drawn(toy, toy.log_prior, 5, "prior", seed=number)  # a fifth of each prompt, for a later group
        store.append(rows, f"{number}-{'ba'[number % 2]}")
    (tmp_path / "weights").mkdir()
    order = [1, 0, 3, 2, 5, 4, 6]
    (tmp_path / "weights" / "read.txt").write_text("".join(f"{n}-{'ba'[n % 2]}.parquet\n" for n in order))
    saving = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4, **sizes}
    whole = learner(toy, tmp_path, "whole", **saving)
    read = recorded(whole)
    whole.train()
    names = [name[0] for name in whole.stored.reader.taken]
    assert names[: len(order)] == [str(n) for n in order][: len(names)]
    resumed = learner(toy, tmp_path, "resumed", **saving)
    again = recorded(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert 0 < len(again) < len(read)
    assert again == read[-len(again) :]
    assert_same_run(resumed, whole)


def test_without_actors_it_ends_with_the_command_and_goes_on_from_its_checkpoint(toy, tmp_path, store, clock):
    files = [drawn(toy, toy.log_prior, 4, "prior", seed=number) for number in range(6)]
    for number in range(3):
        store.append(files[number], f"{number}")
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 100, "actor_timeout": 30.0}
    killed = learner(toy, tmp_path, **saving)
    with pytest.raises(TimeoutError, match=r"for `actor_timeout` = 30 seconds: is an actor running\?") as failed:
        killed.train()
    assert f"rlhf-bayes actor --store {store.path} --weights {tmp_path / 'weights'}" in str(failed.value)
    assert "checkpoint-3" in failed.value.__notes__[-1]
    assert clock.now == pytest.approx(30, abs=0.1)
    for number in range(3, 6):  # an actor was started
        store.append(files[number], f"{number}")
    assert_resumes_as_if_never_stopped(toy, tmp_path, **saving)


def test_an_adapter_is_what_is_pushed(toy, tmp_path, clock):
    drawing = actor(toy, tmp_path)
    clock.meanwhile = drawing.draw_once
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trained = learner(toy, tmp_path, max_steps=3, peft_config=adapter, learning_rate=0.1)
    trained.train()
    assert all("lora" in name for name in drawing.folder.newest(trained.stored.run).weights())
    (first, *_, last) = [drawing.store.rows_of(name) for name in drawing.store.files()]
    assert max(abs(row["log_proposal"] - row["log_prior"]) for row in first) < 1e-5
    assert max(abs(row["log_proposal"] - row["log_prior"]) for row in last) > 1e-3


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"push_steps": 9}, r"`max_staleness` must be at least `push_steps` \(9\), got 8"),
            ({"max_steps": -1}, "`max_steps` must be at least 1 with `actor_weights`"),
            ({"replay_batches": 2}, "`replay_batches` must be 1 .*`max_staleness` bounds"),
            ({"prior_samples": 4}, "`prior_samples` must be 0"),
            ({"push_steps": 0}, "`push_steps` must be at least 1"),
            ({"actor_timeout": 0.0}, "`actor_timeout` must be positive"),
        ],
    )
    def test_settings(self, toy, tmp_path, store, changes, message):
        with pytest.raises(ValueError, match=message):
            learner(toy, tmp_path, **changes)

    def test_settings_without_actors(self, tmp_path):
        with pytest.raises(ValueError, match="`max_staleness` belongs to `actor_weights`, got 4 without it"):
            gdc_config(tmp_path, max_staleness=4)

    def test_prompts_in_place_of_a_store(self, toy, tmp_path):
        with pytest.raises(ValueError, match="`actor_weights` must be left out without a store as `train_dataset`"):
            trainer(toy, gdc_config(tmp_path, actor_weights=str(tmp_path / "weights")))

    def test_another_prior(self, toy, tmp_path):
        actor(toy, tmp_path)
        with pytest.raises(ValueError, match="made with the same `prior`"):
            learner(toy, tmp_path, model=toy.random_policy(noise=1e-3))
        with pytest.raises(ValueError, match="made with the same `prior`"):
            actor(toy, tmp_path, model=toy.random_policy(noise=1e-3))


def _learn(toy, tmp_path, options):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    learner(toy, tmp_path, **options).train()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "asked", "code", "checkpoint"),
    [(signal.SIGTERM, True, 0, 3), (signal.SIGINT, False, 1, 2)],
)
def test_a_signal_ends_a_learner_that_waits_and_it_goes_on_from_its_checkpoint(
    toy, tmp_path, store, number, asked, code, checkpoint
):
    """Only SIGTERM where that is asked for saves a checkpoint, of the step before, and leaves the actors waiting."""
    files = [drawn(toy, toy.log_prior, 4, "prior", seed=number) for number in range(6)]
    for name in range(3):
        store.append(files[name], f"{name}")
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_on_sigterm": asked}
    process = multiprocessing.get_context("fork").Process(target=_learn, args=(toy, tmp_path, options))
    process.start()
    folder = WeightsFolder(tmp_path / "weights")
    wait_until(lambda: any("version-00000003" in path.name for path in folder.path.iterdir()), [process.pid])
    time.sleep(0.3)  # from the push, which ends a step, to the wait for the next rollout
    os.kill(process.pid, number)
    signalled = time.monotonic()
    wait_until(lambda: not process.is_alive(), [process.pid])
    assert time.monotonic() - signalled < 30  # seconds, of which most are those of other work; it waits for 1,800
    assert process.exitcode == code
    assert not folder.stopped
    assert max(whole_checkpoints(tmp_path / "out")) == checkpoint
    for name in range(3, 6):
        store.append(files[name], f"{name}")
    assert_resumes_as_if_never_stopped(toy, tmp_path, **options)
    assert folder.stopped


def test_sigterm_without_any_step_leaves_nothing_and_says_so(toy, tmp_path, store, clock, caplog):
    clock.meanwhile = lambda: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        learner(toy, tmp_path, max_steps=2, save_on_sigterm=True).train()
    assert ended.value.code == 0
    assert "SIGTERM: nothing to save at step 0." in caplog.text
    assert not (tmp_path / "out").exists() or not whole_checkpoints(tmp_path / "out")


def _draw(toy, tmp_path):
    actor(toy, tmp_path, seed=None).run()


@pytest.mark.processes
def test_two_actors_in_processes_of_their_own_of_which_one_is_killed(toy, tmp_path, store):
    """The learner goes on with the other one, all that it learns from is whole, and the end ends both."""
    context = multiprocessing.get_context("fork")
    actors = [context.Process(target=_draw, args=(toy, tmp_path)) for _ in range(2)]
    for process in actors:
        process.start()
    trained = learner(toy, tmp_path, max_steps=12, max_staleness=6, actor_timeout=60.0)
    steps, take = recorded(trained), trained.stored._take

    def killing(training):
        if training.state.global_step == 4:
            os.kill(actors[0].pid, signal.SIGKILL)
        return take(training)

    trained.stored._take = killing
    trained.train()
    deadline = time.monotonic() + 60
    while actors[1].is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [process.exitcode for process in actors] == [-signal.SIGKILL, 0]
    assert trained.state.global_step == 12
    assert all(0 <= step - drawn_at <= 6 for step, rollout in enumerate(steps) for drawn_at, _ in rollout)
    assert max(drawn_at for rollout in steps for drawn_at, _ in rollout) > 2
    assert len(store) == 12 * len(store.files())
