"""The reward trainer: TRL's without new options, what votes change, evaluation, and what is refused."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import GPT2Config, GPT2ForSequenceClassification
from trl import RewardTrainer as TRLRewardTrainer

from rlhf_bayes import RewardTrainer
from rlhf_bayes.numerics.bradley_terry import preference_metrics

from ..preferring import LORA, VOTES, classifier, expanded, hard_pairs, quiet, trained, weights


def assert_same_weights(ours, theirs, **tolerance):
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        if tolerance:
            assert_close(ours[name], weight, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(ours[name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("option", [{}, {"center_rewards_coefficient": 0.1}, {"max_length": 3}])
@pytest.mark.parametrize("margin", [False, True])
def test_without_new_options_it_is_the_trainer_of_trl(toy, tmp_path, option, peft, margin):
    pairs = hard_pairs(toy, 12, **({"margin": [0.3 * i for i in range(12)]} if margin else {}))
    options = option | {"max_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-2}
    ours, theirs = (
        trained(
            kind,
            toy,
            quiet(tmp_path / kind.__module__, ours=kind is RewardTrainer, **options),
            pairs,
            eval_dataset=pairs.select(range(8)),
            peft_config=LoraConfig(**LORA) if peft else None,
        )
        for kind in (RewardTrainer, TRLRewardTrainer)
    )
    assert_same_weights(ours.model, theirs.model)
    for our_log, their_log in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        assert our_log.keys() >= their_log.keys()
        assert {name: our_log[name] for name in their_log} == pytest.approx(their_log, rel=1e-5, abs=1e-6)
    ours, theirs = ours.evaluate(), theirs.evaluate()
    timing = ("_runtime", "_per_second")
    theirs = {name: value for name, value in theirs.items() if not name.endswith(timing)}
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs)


def test_conversations_train_as_in_trl(toy, tmp_path):
    pairs = hard_pairs(toy)
    chats = {
        name: [[{"role": "user", "content": "a b"}, {"role": "assistant", "content": text}] for text in pairs[name]]
        for name in ("chosen", "rejected")
    }
    ours, theirs = (
        trained(kind, toy, quiet(tmp_path / kind.__module__, ours=kind is RewardTrainer), Dataset.from_dict(chats))
        for kind in (RewardTrainer, TRLRewardTrainer)
    )
    assert_same_weights(ours.model, theirs.model)


# Votes: the other route is one row for each vote, with the labels turned round where it went the other way


@pytest.mark.parametrize("form", ["votes", "dict", "chosen_prob", "annotators"])
def test_votes_are_so_many_rows(toy, tmp_path, form):
    pairs = hard_pairs(toy, votes=VOTES)
    names = ("chosen", "rejected", "tie")
    if form == "dict":
        given = pairs.remove_columns("votes").add_column(
            "votes", [dict(zip(names, votes, strict=True)) for votes in VOTES]
        )
    elif form == "chosen_prob":
        given = pairs.remove_columns("votes").add_column("chosen_prob", [(c + t / 2) / 4 for c, _, t in VOTES])
    elif form == "annotators":
        said = [[name for name, n in zip(names, votes, strict=True) for _ in range(n)] for votes in VOTES]
        given = pairs.add_column("annotators", [["w", "x", "y", "z"]] * 8).add_column("annotator_votes", said)
    else:
        given = pairs
    ours = trained(RewardTrainer, toy, quiet(tmp_path / "ours", ours=True), given)
    rows = expanded(pairs)
    theirs = trained(TRLRewardTrainer, toy, quiet(tmp_path / "theirs", per_device_train_batch_size=len(rows)), rows)
    assert_same_weights(ours.model, theirs.model, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("option", [{"label_smoothing": 0.25}, {"annotator_agreement": 0.75**2 + 0.25**2}])
def test_smoothing_is_one_turned_row_in_four(toy, tmp_path, option):
    ours = trained(RewardTrainer, toy, quiet(tmp_path / "ours", ours=True, **option), hard_pairs(toy))
    rows = expanded(hard_pairs(toy, votes=[[3, 1, 0]] * 8))
    theirs = trained(TRLRewardTrainer, toy, quiet(tmp_path / "theirs", per_device_train_batch_size=len(rows)), rows)
    assert_same_weights(ours.model, theirs.model, rtol=1e-4, atol=1e-6)


# Evaluation


@pytest.mark.parametrize("ensemble", ["heads", "lora"])
def test_evaluation_sees_each_pair_once(toy, tmp_path, ensemble):
    votes = [*VOTES, [5, 0, 1], [0, 1, 0], [2, 3, 0]]
    pairs = hard_pairs(toy, 11, votes=votes)
    args = quiet(
        tmp_path, ours=True, num_members=3, ensemble=ensemble, per_device_eval_batch_size=4, eval_strategy="steps",
        eval_steps=1,
    )  # fmt: skip
    peft_config = LoraConfig(**LORA) if ensemble == "lora" else None
    trainer = trained(RewardTrainer, toy, args, pairs, eval_dataset=pairs, peft_config=peft_config)
    metrics = trainer.evaluate()
    rewards = {}
    model = trainer.model.eval()
    for name in ("chosen", "rejected"):
        ids = [toy.tokenizer(text + toy.tokenizer.eos_token)["input_ids"] for text in pairs[name]]
        with torch.no_grad():
            if ensemble == "heads":
                logits = [model(input_ids=torch.tensor([row])).logits[0] for row in ids]
            else:
                logits = []
                for row in ids:
                    members = []
                    for member in trainer.index.members:
                        model.set_adapter(member)
                        members.append(model(input_ids=torch.tensor([row])).logits[0, 0])
                    logits.append(torch.stack(members))
        rewards[name] = torch.stack(logits, -1)  # (K, N)
    expected = preference_metrics(**rewards, votes=torch.tensor(votes))
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    logged = [entry for entry in trainer.state.log_history if "eval_log_loss" in entry]
    assert logged[-1]["eval_log_loss"] == pytest.approx(expected["log_loss"], rel=1e-4)


def test_metrics_of_several_evaluation_sets(toy, tmp_path):
    pairs = hard_pairs(toy, 11)
    trainer = trained(
        RewardTrainer, toy, quiet(tmp_path, ours=True), pairs,
        eval_dataset={"all": pairs, "few": pairs.select(range(3))}, train=False,
    )  # fmt: skip
    metrics = trainer.evaluate()
    alone = trainer.evaluate(pairs.select(range(3)))
    assert metrics["eval_few_log_loss"] == pytest.approx(alone["eval_log_loss"])
    assert metrics["eval_all_log_loss"] != pytest.approx(alone["eval_log_loss"])


# The reward


@pytest.mark.parametrize("kind", ["single", "heads", "lora"])
def test_the_reward_is_what_was_trained(toy, tmp_path, kind):
    num_members = 1 if kind == "single" else 3
    args = quiet(tmp_path, ours=True, num_members=num_members, ensemble="lora" if kind == "lora" else "heads")
    peft_config = LoraConfig(**LORA) if kind == "lora" else None
    pairs = hard_pairs(toy, 11)
    trainer = trained(RewardTrainer, toy, args, pairs, eval_dataset=pairs, peft_config=peft_config)
    trainer.evaluate()
    rewards = trainer.reward().member_rewards([""] * len(pairs), pairs["chosen"])
    assert_close(rewards, trainer.evaluation_pairs["chosen"])
    assert not trainer.model.training
    trainer.normalize([""] * len(pairs), pairs["chosen"], "the chosen texts")
    normalised = trainer.reward().member_rewards([""] * len(pairs), pairs["chosen"])
    assert_close(normalised.mean(-1), torch.zeros(num_members), atol=1e-5, rtol=0)
    assert_close(normalised.std(-1, correction=0), torch.ones(num_members))
    # order is kept, and evaluation goes on with raw rewards
    assert torch.equal(normalised.argsort(-1), rewards.argsort(-1))
    before = trainer.evaluation_pairs["chosen"]
    trainer.evaluate()
    assert_close(trainer.evaluation_pairs["chosen"], before)


# Refusals


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"num_members": 2, "ensemble": "lora"}, {}, r"`ensemble='lora'` needs a `peft_config`"),
        ({"ensemble": "lora"}, {}, r"`ensemble='lora'` needs a `peft_config`"),
        ({"annotator_reliability": True}, {}, r"`annotator_reliability=True` needs .* the column `annotator`"),
        ({"num_members": 2, "bootstrap": "annotators"}, {"votes": VOTES}, r"`bootstrap='annotators'` needs"),
        (
            {"num_members": 3, "bootstrap": "annotators"},
            {"annotator": ["u", "v"] * 4},
            "at least one annotator for each of 3 members, got 2",
        ),
        ({"annotator_reliability": True}, {"annotator": ["u"] * 8}, r"at least two annotators, got \['u'\]"),
        ({"annotator_agreement": 0.7}, {"votes": VOTES}, "`annotator_agreement` must be left out where the data say"),
        ({}, {"chosen_prob": [0.5] * 8}, "at least one pair that is not a tie, got 8 ties"),
        ({"max_length": 1}, {}, "8 of 8 pairs in `train` .* none is left"),
        ({"max_length": 3, "overlong": "error"}, {}, "Raise `max_length`, or set `overlong`"),
    ],
)
def test_what_is_refused(toy, tmp_path, options, data, message):
    with pytest.raises(ValueError, match=message):
        trained(RewardTrainer, toy, quiet(tmp_path, ours=True, **options), hard_pairs(toy, **data), train=False)


def test_arguments_that_are_refused(toy, tmp_path):
    args, pairs = quiet(tmp_path, ours=True, num_members=2), hard_pairs(toy)
    with pytest.raises(TypeError, match=r"`args` must be a rlhf_bayes\.RewardConfig, got trl\..*RewardConfig"):
        trained(RewardTrainer, toy, quiet(tmp_path), pairs)
    model = classifier(toy, tmp_path / "base")
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="`optimizers` must be left out with `num_members` = 2"):
        RewardTrainer(model, args, train_dataset=pairs, processing_class=toy.tokenizer, optimizers=(optimizer, None))
    model.score.requires_grad_(False)
    with pytest.raises(ValueError, match="needs a head that learns, got one whose weights are frozen"):
        RewardTrainer(model, args, train_dataset=pairs, processing_class=toy.tokenizer)


# a head that is not saved beside the adapter is drawn anew when the adapter is read
@pytest.mark.parametrize("given_as", ["peft_config", "PeftModel"])
@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["embed_tokens"]}, {"task_type": "CAUSAL_LM"}, {"task_type": "FEATURE_EXTRACTION"}],
)
@pytest.mark.parametrize("members", [{}, {"num_members": 2}, {"num_members": 2, "ensemble": "lora"}])
def test_adapters_saved_without_their_head_are_refused(toy, tmp_path, given_as, options, members):
    config, model = LoraConfig(r=2, target_modules=["q_proj"], **options), "no/such/model"  # before it is loaded
    if given_as == "PeftModel":
        base, task = classifier(toy, tmp_path / "base"), options.get("task_type")
        if task == "CAUSAL_LM":
            base.prepare_inputs_for_generation = None  # as PEFT wants of a causal LM
        model, config = get_peft_model(base, config), None
    args = quiet(tmp_path, ours=True, **members)
    with pytest.raises(ValueError, match=r"must train and save the classification head .*Set `task_type='SEQ_CLS'`"):
        RewardTrainer(model, args, train_dataset=hard_pairs(toy), processing_class=toy.tokenizer, peft_config=config)


def test_a_frozen_adapter_is_refused(toy, tmp_path):
    get_peft_model(classifier(toy, tmp_path / "base"), LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(classifier(toy, tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"whose head PEFT keeps frozen.*is_trainable=True"):
        trained(RewardTrainer, toy, quiet(tmp_path, ours=True), hard_pairs(toy), train=False, model=model)


def test_data_is_refused_before_the_model_loads(tmp_path, toy):
    pairs = hard_pairs(toy).rename_column("chosen", "better")
    with pytest.raises(ValueError, match="must have the columns `chosen` and `rejected`"):
        RewardTrainer("no/such/model", quiet(tmp_path, ours=True), train_dataset=pairs)


def test_a_stream_trains_like_a_dataset(toy, tmp_path):
    pairs = hard_pairs(toy, votes=VOTES)
    options = {"num_members": 2, "max_steps": 1}
    rows = trained(RewardTrainer, toy, quiet(tmp_path / "rows", ours=True, **options), pairs, train=False)
    stream = trained(
        RewardTrainer, toy, quiet(tmp_path / "stream", ours=True, **options), pairs.to_iterable_dataset(), train=False
    )
    for name in ("pair_prob", "pair_votes", "pair_weights"):
        assert list(rows.train_dataset[name]) == [row[name] for row in stream.train_dataset]
    rows.train()
    stream.train()
    assert_same_weights(stream.model, rows.model, rtol=1e-4, atol=1e-6)


def test_an_evaluation_of_one_pair_is_reported(toy, tmp_path, caplog):
    pairs = hard_pairs(toy)
    trainer = trained(RewardTrainer, toy, quiet(tmp_path, ours=True), pairs, eval_dataset=pairs.select([0]))
    metrics = trainer.evaluate()
    assert "`eval_dataset` has a single pair" in caplog.text
    assert math.isfinite(metrics["eval_log_loss"])
    assert "eval_reward_chosen_std" not in metrics


def test_rewards_that_are_not_finite_lose_no_run(toy, tmp_path, caplog):
    pairs = hard_pairs(toy)
    trainer = trained(RewardTrainer, toy, quiet(tmp_path, ours=True), pairs, eval_dataset=pairs)
    with torch.no_grad():
        trainer.model.score.weight.fill_(float("nan"))
    assert "eval_log_loss" not in trainer.evaluate()
    assert "Rewards are not finite" in caplog.text


def test_more_training_forgets_the_normalization(toy, tmp_path):
    trainer = trained(RewardTrainer, toy, quiet(tmp_path, ours=True), hard_pairs(toy))
    trainer.normalize([""] * 8, hard_pairs(toy)["chosen"])
    assert trainer.index.normalization is not None
    trainer.train()
    assert trainer.index.normalization is None


def test_an_evaluation_set_may_be_called_train(toy, tmp_path):
    args = quiet(tmp_path, ours=True, num_members=2, annotator_reliability=True, max_length=64)
    sets = {"train": hard_pairs(toy, 4, annotator=list("abca")), "test": hard_pairs(toy, 5, annotator=list("zzzzz"))}
    pairs = hard_pairs(toy, annotator=list("abababab"))
    trainer = trained(RewardTrainer, toy, args, pairs, train=False, eval_dataset=sets)
    assert trainer.eval_dataset["train"].column_names == trainer.eval_dataset["test"].column_names
    assert "pair_weights" in trainer.train_dataset.column_names
    assert trainer.num_dropped == {"train": 0, "eval_train": 0, "test": 0}


def test_data_of_another_trainer_are_read_anew(toy, tmp_path):
    pairs = hard_pairs(toy, votes=[[1, 2, 0]] * 8)
    first = trained(RewardTrainer, toy, quiet(tmp_path / "a", ours=True), pairs, train=False)
    args = quiet(tmp_path / "b", ours=True, num_members=3)
    second = trained(RewardTrainer, toy, args, first.train_dataset, train=False)
    fresh = trained(RewardTrainer, toy, args, pairs, train=False)
    assert second.train_dataset["pair_weights"][:] == fresh.train_dataset["pair_weights"][:]
    third = trained(RewardTrainer, toy, quiet(tmp_path / "c", ours=True), second.train_dataset, train=False)
    assert "pair_weights" not in third.train_dataset.column_names


def test_data_of_an_evaluation_are_checked(toy, tmp_path):
    trainer = trained(RewardTrainer, toy, quiet(tmp_path, ours=True), hard_pairs(toy), train=False)
    with pytest.raises(ValueError, match="`eval_dataset` must hold at least one pair, got none"):
        trainer.evaluate(hard_pairs(toy).select([]))


def test_an_interrupted_training_leaves_all_members(toy, tmp_path):
    args = quiet(tmp_path, ours=True, num_members=2, ensemble="lora")
    trainer = trained(RewardTrainer, toy, args, hard_pairs(toy), train=False, peft_config=LoraConfig(**LORA))

    def interrupted(rewards, batch):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "pair_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    trainer.evaluate(hard_pairs(toy, 5))
    assert trainer.evaluation_pairs["chosen"].shape == (2, 5)


@pytest.mark.parametrize("names", [["other"], ["default", "member_1"]])
def test_adapters_that_are_there_already_are_refused(toy, tmp_path, names):
    model = get_peft_model(classifier(toy, tmp_path / "base"), LoraConfig(**LORA), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**LORA))
    args = quiet(tmp_path, ours=True, num_members=2, ensemble="lora")
    with pytest.raises(ValueError, match=f"one adapter, named 'default', .* got {', '.join(names)}"):
        trained(RewardTrainer, toy, args, hard_pairs(toy), model=model)


def test_an_agreement_is_for_labels_and_leaves_votes_to_judge_by_alone(toy, tmp_path):
    judged = hard_pairs(toy, votes=VOTES)
    trainer = trained(
        RewardTrainer, toy, quiet(tmp_path, ours=True, annotator_agreement=0.7), hard_pairs(toy), eval_dataset=judged
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_log_loss"], rel=1e-5)


def test_whole_evaluations_have_means_of_their_own(toy, tmp_path):
    pairs = hard_pairs(toy, 11)
    args = quiet(tmp_path, ours=True, num_members=2, per_device_eval_batch_size=4)
    trainer = trained(RewardTrainer, toy, args, pairs, eval_dataset=pairs)
    metrics = trainer.evaluate()
    chosen, rejected = (trainer.evaluation_pairs[name].mean(0).tolist() for name in ("chosen", "rejected"))
    assert metrics["eval_margin"] == pytest.approx(sum(chosen) / 11 - sum(rejected) / 11, rel=1e-4)
    assert metrics["eval_mean_reward"] == pytest.approx((sum(chosen) + sum(rejected)) / 22, rel=1e-4)
    assert metrics["eval_min_reward"] == pytest.approx(min(chosen + rejected))
    assert metrics["eval_max_reward"] == pytest.approx(max(chosen + rejected))


@pytest.mark.parametrize("learnt", [True, False])
def test_texts_beyond_the_positions_of_the_model_are_not_trained_on(toy, tmp_path, learnt):
    size = {"vocab_size": len(toy.tokenizer), "num_labels": 1, "pad_token_id": toy.tokenizer.pad_token_id}
    if learnt:
        model = GPT2ForSequenceClassification(GPT2Config(**size, n_positions=4, n_embd=8, n_layer=1, n_head=2))
    else:
        model = classifier(toy, tmp_path / "base")  # rotary
        model.config.max_position_embeddings = 4
    pairs = Dataset.from_dict({"chosen": ["a b a", "a b a b", "b"], "rejected": ["b", "a", "a"]})
    trainer = trained(RewardTrainer, toy, quiet(tmp_path, ours=True), pairs, model=model, eval_dataset=pairs)
    assert len(trainer.train_dataset) == 2
    assert trainer.num_dropped == {"train": 1, "eval": 1}
    assert math.isfinite(trainer.evaluate()["eval_log_loss"])
    # scoring draws the line at the same place
    assert len(trainer.reward()([""] * 2, ["a b a", "b"])) == 2
    with pytest.raises(ValueError, match=r"4 tokens; got 5 with its tokenizer in row 1"):
        trainer.reward()([""] * 2, pairs["chosen"][:2])
