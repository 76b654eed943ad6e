"""Ensembles of heads, adapters and models: against single texts, and against what was saved."""

import json
import logging
import math
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from rlhf_bayes.rewards import Normalization, RewardEnsemble, RewardIndex, RewardModel, RewardScorer, load_reward

from .adapters import (
    COMPLETIONS,
    PROMPTS,
    TEXTS,
    adapters,
    adapters_one_at_a_time,
    heads,
    lora_config,
    one_at_a_time,
    saved_base,
)

IDS = [[1]] * len(PROMPTS)


@pytest.fixture
def lora(llama, llama_tokenizer, tmp_path):
    return adapters(saved_base(llama, llama_tokenizer, tmp_path / "base"), 3)


@pytest.fixture(params=["heads", "lora", "models"])
def kind(request):
    return request.param


@pytest.fixture
def members(kind, llama, llama_tokenizer, bert, bert_tokenizer, tmp_path):
    """Members of each kind, and their rewards one text at a time (K, N)."""
    if kind == "heads":
        model = heads(llama, 4)
        expected = torch.stack([one_at_a_time(model, llama_tokenizer, TEXTS, label) for label in range(4)])
        return (model, llama_tokenizer), expected
    if kind == "lora":
        model = adapters(saved_base(llama, llama_tokenizer, tmp_path / "base"), 3)
        return (model, llama_tokenizer), adapters_one_at_a_time(model, llama_tokenizer, TEXTS)
    # each with its own tokenizer, of another family and vocabulary
    models = [RewardModel(bert, bert_tokenizer), RewardModel(llama, llama_tokenizer)]
    expected = [one_at_a_time(bert, bert_tokenizer, TEXTS), one_at_a_time(llama, llama_tokenizer, TEXTS)]
    return (models, None), torch.stack(expected)


def test_padded_batches_agree_with_single_texts(members):
    arguments, expected = members
    assert expected.std(0).min() > 0.01
    for batch_size in (1, 3, 64):
        ensemble = RewardEnsemble(*arguments, batch_size=batch_size)
        rewards = ensemble.member_rewards(PROMPTS, COMPLETIONS)
        assert rewards.dtype is torch.float32
        assert_close(rewards, expected, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_with_names_and_normalization(kind, members, tmp_path):
    arguments, expected = members
    ensemble = RewardEnsemble(*arguments)
    ensemble.normalize(PROMPTS, COMPLETIONS, reference="five texts")
    ensemble.save_pretrained(tmp_path / "saved")
    mean, std = expected.mean(1, keepdim=True), expected.std(1, keepdim=True, correction=0)
    fields = json.loads((tmp_path / "saved" / "reward_model.json").read_text())
    assert fields["kind"] == kind
    assert fields["append_eos"] is False
    assert len(fields["members"]) == ensemble.num_members == len(expected)
    assert fields["normalization"]["reference"] == "five texts"
    assert_close(torch.tensor(fields["normalization"]["gain"]), 1 / std[:, 0], rtol=1e-4, atol=1e-5)
    for loaded in (RewardEnsemble.from_pretrained(tmp_path / "saved"), load_reward(str(tmp_path / "saved"))):
        assert isinstance(loaded, RewardEnsemble)
        assert loaded.__name__ == "saved"
        assert_close(loaded.member_rewards(PROMPTS, COMPLETIONS), (expected - mean) / std, rtol=1e-4, atol=1e-4)
        assert loaded.index == ensemble.index


def test_without_an_index_the_files_say_what_they_hold(kind, members, tmp_path):
    arguments, expected = members
    RewardEnsemble(*arguments).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "reward_model.json").unlink()
    loaded = RewardEnsemble.from_pretrained(tmp_path / "saved")
    assert loaded.index.kind == kind
    assert_close(loaded.member_rewards(PROMPTS, COMPLETIONS), expected, rtol=1e-4, atol=1e-5)


def test_one_member_is_a_row(members):
    arguments, expected = members
    ensemble = RewardEnsemble(*arguments)
    ensemble.normalize(PROMPTS, COMPLETIONS)
    normalised = ensemble.member_rewards(PROMPTS, COMPLETIONS)
    for member in range(len(expected)):
        reward = ensemble.member(member)
        assert ensemble.index.members[member] in reward.__name__
        assert_close(torch.tensor(reward(PROMPTS, COMPLETIONS, trainer_state=None)), normalised[member])
    with pytest.raises(IndexError, match=r"in \[0, \d\), the number of members, got -1"):
        ensemble.member(-1)


def test_a_reward_function_of_trl_is_the_mean_and_reports_the_spread(members):
    arguments, expected = members
    logged = {}
    rewards = RewardEnsemble(*arguments)(
        prompts=PROMPTS, completions=COMPLETIONS, completion_ids=IDS, log_metric=logged.__setitem__, log_extra=None
    )
    assert all(type(reward) is float for reward in rewards)
    assert_close(torch.tensor(rewards), expected.mean(0), rtol=1e-4, atol=1e-5)
    by_hand = [(column - column.mean()).square().mean().sqrt().item() for column in expected.T]
    assert logged == {"reward_spread": pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)}
    scorer = RewardScorer(RewardEnsemble(*arguments))
    assert_close(scorer(PROMPTS, COMPLETIONS, IDS)[:, 0], expected.mean(0), rtol=1e-4, atol=1e-5)


def test_adapters_in_one_pass_agree_with_one_after_the_other(lora, llama_tokenizer):
    ensemble = RewardEnsemble(lora, llama_tokenizer)
    together = ensemble.member_rewards(PROMPTS, COMPLETIONS)
    assert ensemble._members.in_one_pass
    ensemble._members.in_one_pass = False
    assert_close(together, ensemble.member_rewards(PROMPTS, COMPLETIONS), rtol=1e-5, atol=1e-6)


def test_adapters_that_cannot_mix_are_scored_one_after_the_other(llama, llama_tokenizer, tmp_path):
    # PEFT mixes no adapters with DoRA
    model = adapters(saved_base(llama, llama_tokenizer, tmp_path), 2, use_dora=True)
    ensemble = RewardEnsemble(model, llama_tokenizer)
    rewards = ensemble.member_rewards(PROMPTS, COMPLETIONS)
    assert not ensemble._members.in_one_pass
    assert_close(rewards, adapters_one_at_a_time(model, llama_tokenizer, TEXTS), rtol=1e-4, atol=1e-5)


def test_scoring_leaves_a_model_in_training_as_it_was(lora, llama_tokenizer):
    ensemble = RewardEnsemble(lora, llama_tokenizer)
    expected = ensemble.member_rewards(PROMPTS, COMPLETIONS)
    lora.train()
    lora.set_adapter("member_1")
    trainable = {name: parameter.requires_grad for name, parameter in lora.named_parameters()}
    for in_one_pass in (True, False):
        ensemble._members.in_one_pass = in_one_pass
        assert_close(ensemble.member_rewards(PROMPTS, COMPLETIONS), expected, rtol=1e-5, atol=1e-6)
    assert lora.training
    assert lora.active_adapter == "member_1"
    assert trainable == {name: parameter.requires_grad for name, parameter in lora.named_parameters()}


def test_heads_under_one_adapter(llama, llama_tokenizer, tmp_path):
    base = saved_base(llama, llama_tokenizer, tmp_path / "base")
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=3), lora_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.5)
    expected = torch.stack([one_at_a_time(model, llama_tokenizer, TEXTS, label) for label in range(3)])
    RewardEnsemble(model, llama_tokenizer).save_pretrained(tmp_path / "saved")
    loaded = RewardEnsemble.from_pretrained(tmp_path / "saved")
    assert loaded.index.kind == "heads"
    assert_close(loaded.member_rewards(PROMPTS, COMPLETIONS), expected, rtol=1e-4, atol=1e-5)


def test_one_adapter_is_a_single_reward_model(llama, llama_tokenizer, tmp_path):
    model = adapters(saved_base(llama, llama_tokenizer, tmp_path / "base"), 1)
    model.save_pretrained(tmp_path / "adapter")  # without a tokenizer: that of the base is taken
    expected = one_at_a_time(model, llama_tokenizer, TEXTS)
    assert_close(torch.tensor(load_reward(tmp_path / "adapter")(PROMPTS, COMPLETIONS)), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must hold an ensemble, and holds a single reward model"):
        RewardEnsemble.from_pretrained(tmp_path / "adapter")


def test_no_report_of_a_random_head_that_adapters_replace(lora, llama_tokenizer, tmp_path, caplog, monkeypatch):
    RewardEnsemble(lora, llama_tokenizer).save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.clear()
    RewardEnsemble.from_pretrained(tmp_path / "saved")
    assert "MISSING" not in caplog.text
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    assert "MISSING" in caplog.text  # as it is said elsewhere


def test_models_of_several_folders(llama, llama_tokenizer, bert, bert_tokenizer, tmp_path):
    RewardModel(bert, bert_tokenizer).save_pretrained(tmp_path / "a")
    normalised = RewardModel(llama, llama_tokenizer)
    normalised.normalize(PROMPTS, COMPLETIONS)
    normalised.save_pretrained(tmp_path / "b")
    ensemble = RewardEnsemble.from_pretrained([tmp_path / "a", str(tmp_path / "b")])
    rewards = ensemble.member_rewards(PROMPTS, COMPLETIONS)
    assert_close(rewards[0], one_at_a_time(bert, bert_tokenizer, TEXTS), rtol=1e-4, atol=1e-5)
    assert_close(rewards[1], torch.tensor(normalised(PROMPTS, COMPLETIONS)))
    assert rewards[1].mean().item() == pytest.approx(0.0, abs=1e-5)
    # a member keeps the normalization that it had, also when the ensemble is normalised and saved
    ensemble.normalize(PROMPTS[1:], COMPLETIONS[1:])
    ensemble.save_pretrained(tmp_path / "both")
    again = load_reward(tmp_path / "both")
    assert_close(again.member_rewards(PROMPTS, COMPLETIONS), ensemble.member_rewards(PROMPTS, COMPLETIONS))
    assert_close(again.member_rewards(PROMPTS[1:], COMPLETIONS[1:]).std(1, correction=0), torch.ones(2))


def test_the_index_decides_whether_eos_is_appended(llama, llama_tokenizer, tmp_path):
    llama_tokenizer.pad_token = "?"
    model = heads(llama, 2)
    index = RewardIndex("heads", ["a", "b"], append_eos=True)
    ensemble = RewardEnsemble(model, llama_tokenizer, index=index)
    ensemble.save_pretrained(tmp_path)
    expected = one_at_a_time(model, llama_tokenizer, [text + "$" for text in TEXTS], 1)
    for one in (ensemble, load_reward(tmp_path)):
        assert_close(one.member_rewards(PROMPTS, COMPLETIONS)[1], expected, rtol=1e-4, atol=1e-5)


# Bad input


def test_a_member_without_its_own_head_is_refused(llama, llama_tokenizer, tmp_path):
    model = adapters(saved_base(llama, llama_tokenizer, tmp_path / "base", causal=False), 2)
    RewardEnsemble(model, llama_tokenizer).save_pretrained(tmp_path / "saved")
    headless = get_peft_model(model.unload(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    headless.save_pretrained(tmp_path / "headless")
    shutil.rmtree(tmp_path / "saved" / "member_1")
    shutil.copytree(tmp_path / "headless", tmp_path / "saved" / "member_1")
    with pytest.raises(ValueError, match=r"The adapter 'member_1' in .* must bring its own classification head"):
        RewardEnsemble.from_pretrained(tmp_path / "saved")


def test_an_index_that_contradicts_the_weights_is_refused(members, kind, tmp_path):
    arguments, _ = members
    ensemble = RewardEnsemble(*arguments)
    ensemble.save_pretrained(tmp_path / "saved")
    names = ensemble.index.members
    RewardIndex(kind, [*names, "member_9"]).save(tmp_path / "saved")
    with pytest.raises((ValueError, OSError), match=r"member_9|it says 5 members"):
        RewardEnsemble.from_pretrained(tmp_path / "saved")
    RewardIndex(kind, names[:-1]).save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"does not know member_\d|it says 3 members \(heads\), they have 4"):
        RewardEnsemble.from_pretrained(tmp_path / "saved")


def test_adapters_of_two_bases_are_refused(lora, llama_tokenizer, tmp_path):
    RewardEnsemble(lora, llama_tokenizer).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "member_2" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "other/base"}))
    with pytest.raises(ValueError, match=r"must name one base model, got .*base, other/base"):
        RewardEnsemble.from_pretrained(tmp_path / "saved")


def test_adapters_on_a_base_from_memory_cannot_be_saved(llama, llama_tokenizer, tmp_path):
    model = get_peft_model(llama, lora_config())
    model.add_adapter("member_1", lora_config())
    with pytest.raises(ValueError, match="got a base that was built in memory"):
        RewardEnsemble(model, llama_tokenizer).save_pretrained(tmp_path)


def test_a_broken_member_is_named(members, kind):
    (source, tokenizer), _ = members
    with torch.no_grad():
        if kind == "heads":
            source.score.weight[1] = math.nan
        elif kind == "lora":
            source.get_submodule("base_model.model.score.modules_to_save.member_1").weight.fill_(math.nan)
        else:
            source[1].model.score.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="must give finite logits, got nan") as caught:
        RewardEnsemble(source, tokenizer)(PROMPTS, COMPLETIONS)
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert {"heads": "member 1 (head_1)", "lora": "member 1 (member_1)", "models": "member 1 (member_1)"}[kind] in text
    assert "'cd'" in text


def test_what_is_no_ensemble_is_refused(llama, llama_tokenizer, lora, tmp_path):
    with pytest.raises(TypeError, match=r"got the path '.*'. Load it with `RewardEnsemble.from_pretrained`"):
        RewardEnsemble(str(tmp_path))
    with pytest.raises(ValueError, match="at least one reward model, got an empty list"):
        RewardEnsemble([])
    with pytest.raises(ValueError, match=r"must hold a model \(config.json\)"):
        load_reward(tmp_path)
    with pytest.raises(ValueError, match=r"it says 3 members \(models\), they have 1 \(heads\)"):
        RewardEnsemble(llama, llama_tokenizer, index=RewardIndex("models", ["a", "b", "c"]))
    with pytest.raises(ValueError, match="must name the adapters of the model, default, member_1, member_2, got a, b"):
        RewardEnsemble(lora, llama_tokenizer, index=RewardIndex("lora", ["a", "b", "c"]))


def test_several_labels_without_an_index_are_no_single_reward(llama, llama_tokenizer, tmp_path):
    heads(llama, 3).save_pretrained(tmp_path)
    llama_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must have 1 label here, but its checkpoint has 3.*RewardEnsemble"):
        load_reward(tmp_path)
    RewardIndex("heads", ["a", "b", "c"], normalization=Normalization([1] * 3, [0] * 3, "none")).save(tmp_path)
    with pytest.raises(ValueError, match=r"single reward model, got an ensemble of 3 members \(heads\)"):
        RewardModel(tmp_path)
    assert load_reward(tmp_path).num_members == 3
