"""An actor draws from the newest weights, scores exactly, and waits where the learner has enough."""

import sys
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlhf_bayes import LanguageModel
from rlhf_bayes.lm import VLLMLanguageModel
from rlhf_bayes.store import Actor, CompletionStore, actor
from rlhf_bayes.store.weights_folder import Wanted, WeightsFolder
from rlhf_bayes.testing import EnumerableLM, toy_reward

from ..lm.test_vllm_model import Engine, SamplingParams
from .stored import language_model


class Learner:
    """The learner's side of the folder."""

    def __init__(self, path, run="x"):
        self.folder, self.run = WeightsFolder(path), run
        self.folder.begin(Wanted(run, num_prompts=2, num_generations=4, max_unread=2))

    def push(self, step, policy):
        trained = {name: weight.data for name, weight in policy.named_parameters() if weight.requires_grad}
        config = policy.peft_config["default"] if hasattr(policy, "peft_config") else None
        self.folder.push(step, self.run, trained, config)

    def read(self, name):
        with self.folder.journal.open("a") as file:
            file.write(f"{name}\n")


def make(toy, tmp_path, model=None, seed=0, **options):
    prior = language_model(toy, model)
    return Actor(
        tmp_path / "store", tmp_path / "weights", prior, prior.tilt(toy_reward, beta=1.0).likelihood, toy.prompts,
        seed=seed, **options,
    )  # fmt: skip


def scores_are_exact(toy, rows, policy):
    with torch.no_grad():
        log_policy = toy.log_probs(policy)
    for row in rows:
        prompt, index = toy.prompts.index(row["prompt"]), toy.completion_ids.index(row["completion_ids"])
        assert row["log_proposal"] == pytest.approx(log_policy[prompt, index].item(), abs=1e-4)
        assert row["log_prior"] == pytest.approx(toy.log_prior[prompt, index].item(), abs=1e-4)
        assert row["reward/toy_reward"] == pytest.approx(toy.rewards[prompt, index].item(), abs=1e-5)


def test_each_file_is_drawn_and_scored_by_the_newest_weights(toy, tmp_path):
    learner, drawing = Learner(tmp_path / "weights"), make(toy, tmp_path)
    assert not drawing.draw_once()  # nothing is pushed yet
    policies = [toy.random_policy(noise=0.1, seed=seed) for seed in (1, 2)]
    for step, policy in zip((0, 5), policies, strict=True):
        learner.push(step, policy)
        assert drawing.draw_once()
    store = CompletionStore(tmp_path / "store")
    for name, step, policy in zip(store.files(), (0, 5), policies, strict=True):
        rows = store.rows_of(name)
        assert len(rows) == 8
        assert {(row["step"], row["drawn_by"]) for row in rows} == {(step, f"policy of run x at step {step}")}
        scores_are_exact(toy, rows, policy)
    assert {row["prompt"] for row in store.read()} == set(toy.prompts)  # the third comes before any comes again


def test_it_waits_where_the_learner_has_enough_and_goes_on_when_it_reads(toy, tmp_path):
    learner, drawing = Learner(tmp_path / "weights"), make(toy, tmp_path)
    learner.push(0, toy.random_policy(noise=0.0))
    assert [drawing.draw_once() for _ in range(3)] == [True, True, False]
    another = make(toy, tmp_path, seed=1)
    assert not another.draw_once()
    learner.read(another.store.files()[0])
    assert another.draw_once()
    assert not drawing.draw_once()


def test_actors_draw_different_completions_unless_they_have_one_seed(toy, tmp_path):
    learner = Learner(tmp_path / "weights")
    learner.folder.begin(Wanted("x", 3, 8, 9))
    learner.push(0, toy.random_policy(noise=0.0))
    for seed in (None, None, 3, 3):
        make(toy, tmp_path, seed=seed).draw_once()
    store = CompletionStore(tmp_path / "store")
    a, b, c, d = ([row["completion_ids"] for row in store.rows_of(name)] for name in store.files())
    assert a != b
    assert c == d


def test_an_adapter_is_drawn_from(toy, tmp_path):
    policy = get_peft_model(toy.random_policy(noise=0.0), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    learner, drawing = Learner(tmp_path / "weights"), make(toy, tmp_path)
    learner.push(3, policy)
    assert drawing.draw_once()
    rows = CompletionStore(tmp_path / "store").read().to_list()
    assert max(abs(row["log_proposal"] - row["log_prior"]) for row in rows) > 0.1
    scores_are_exact(toy, rows, policy.merge_and_unload())


@pytest.mark.parametrize("lora", [False, True])
def test_an_engine_draws_from_the_pushed_policy(toy, tmp_path, monkeypatch, lora):
    module = ModuleType("vllm")
    module.SamplingParams = SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    policy = toy.random_policy(noise=0.1, seed=1)
    if lora:
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        policy = get_peft_model(toy.random_policy(noise=0.0), config)
    learner, drawing = Learner(tmp_path / "weights"), make(toy, tmp_path)
    model = drawing.prior.model
    drawing.prior = VLLMLanguageModel(model, Engine(model), toy.tokenizer, toy.max_completion_length)
    learner.push(3, policy)
    assert drawing.draw_once()
    assert not any("lora" in name for name, _ in drawing.prior.engine.model.named_parameters())
    rows = CompletionStore(tmp_path / "store").read().to_list()
    assert max(abs(row["log_proposal"] - row["log_prior"]) for row in rows) > 0.1
    scores_are_exact(toy, rows, policy.merge_and_unload() if lora else policy)


def test_weights_that_were_replaced_meanwhile_are_not_an_error(toy, tmp_path):
    learner, drawing = Learner(tmp_path / "weights"), make(toy, tmp_path)
    learner.push(0, toy.random_policy(noise=0.0))
    old = learner.folder.newest("x")
    for step in (1, 2):
        learner.push(step, toy.random_policy(noise=0.0))
    assert not drawing._load(old)
    assert drawing._load(learner.folder.newest("x"))


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where an actor sleeps."""

    class Clock:
        now, when_asleep = 0.0, staticmethod(lambda: None)

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds
            self.when_asleep()

    found = Clock()
    monkeypatch.setattr(actor, "time", found)
    return found


def test_it_ends_when_the_learner_has(toy, tmp_path, clock):
    learner, drawing = Learner(tmp_path / "weights"), make(toy, tmp_path)
    learner.push(0, toy.random_policy(noise=0.0))
    clock.when_asleep = learner.folder.stop
    drawing.run()
    assert drawing.num_drawn == len(CompletionStore(tmp_path / "store")) == 16


def test_it_ends_when_the_learner_gives_no_sign(toy, tmp_path, clock):
    learner, drawing = Learner(tmp_path / "weights"), make(toy, tmp_path, timeout=30.0)
    learner.push(0, toy.random_policy(noise=0.0))
    reads = iter(range(100))

    def reading():
        if next(reads, 99) == 50:  # a sign, and room for another file
            learner.read("a")

    clock.when_asleep = reading
    with pytest.raises(
        TimeoutError, match=r"no sign for `timeout` = 30 seconds: it has 2 unread files in .*Start the"
    ):
        drawing.run()
    assert clock.now == pytest.approx(50 * 0.05 + 30, abs=0.2)
    assert drawing.num_drawn == 24


def test_another_prior_is_refused(toy, tmp_path):
    make(toy, tmp_path)
    with pytest.raises(ValueError, match="made with the same `prior`"):
        make(toy, tmp_path, toy.random_policy(noise=1e-3))


def test_weights_of_another_kind_of_model_are_refused(toy, tmp_path):
    learner, drawing = Learner(tmp_path / "weights"), make(toy, tmp_path)
    learner.push(0, EnumerableLM("gpt2").model)
    with pytest.raises(ValueError, match="`prior` must be the model that the learner trains"):
        drawing.draw_once()


def test_no_prompt_is_refused(toy, tmp_path):
    prior = LanguageModel(toy.random_policy(noise=0.0), toy.tokenizer, 3)
    with pytest.raises(ValueError, match="`prompts` must hold at least one"):
        Actor(tmp_path / "s", tmp_path / "w", prior, prior.tilt(toy_reward, beta=1.0).likelihood, [])
