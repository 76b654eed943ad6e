"""`rlhf-bayes merge`: the merged model says what base and adapter said."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_bayes import PPOConfig, PPOTrainer, commands
from rlhf_bayes.lm import Critic
from rlhf_bayes.rewards import Normalization, RewardEnsemble, RewardIndex, load_reward
from rlhf_bayes.testing import EnumerableLM

from ..lm.families import tiny_model, tiny_tokenizer
from ..rewards.adapters import COMPLETIONS, PROMPTS, adapters, saved_base
from ..rewards.conftest import llama, llama_tokenizer  # noqa: F401
from ..trainers.training import QUIET, prompts_of, table_reward


def trained(folder, critic):
    toy = EnumerableLM(vocab_size=5, max_completion_length=3)
    toy.model.save_pretrained(folder / "base")
    toy.tokenizer.save_pretrained(folder / "base")
    trainer = PPOTrainer(
        str(folder / "base"),
        table_reward(toy, toy.log_likelihood),
        PPOConfig(
            str(folder / "out"),
            per_device_train_batch_size=12,
            max_steps=2,
            learning_rate=0.05,
            max_completion_length=3,
            critic=critic,
            **QUIET,
        ),
        prompts_of(toy, repeats=4),
        processing_class=toy.tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    return folder / "out"


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_policy(tmp_path, capsys, critic):
    folder = trained(tmp_path, critic)
    commands.main(["merge", str(folder), "--output_dir", str(tmp_path / "merged")])
    assert "Merged into" in capsys.readouterr().out
    ids = torch.arange(4)[None]  # (1, 4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = base(ids).logits
    expected = PeftModel.from_pretrained(base, folder).eval()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    torch.testing.assert_close(merged.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert (expected - before).abs().max() > 1e-3
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 5
    if critic == "shared":
        value_head = Critic.from_pretrained(tmp_path / "merged" / "critic").value_head.weight
        assert torch.equal(value_head, Critic.from_pretrained(folder / "critic").value_head.weight)
        assert value_head.abs().max() > 0
    else:
        assert not (tmp_path / "merged" / "critic").exists()


def saved_reward(folder, llama, tokenizer, num_members):  # noqa: F811
    model = adapters(saved_base(llama, tokenizer, folder / "base"), num_members)
    model.save_pretrained(folder / "adapters")
    tokenizer.save_pretrained(folder / "adapters")
    return folder / "adapters"


def test_a_reward_model_keeps_its_scale(tmp_path, llama, llama_tokenizer):  # noqa: F811
    folder = saved_reward(tmp_path, llama, llama_tokenizer, 1)
    RewardIndex(append_eos=True, normalization=Normalization((2.0,), (-0.5,), "none")).save(folder)
    commands.main(["merge", str(folder)])
    merged = tmp_path / "adapters-merged"
    assert load_file(merged / "model.safetensors")["score.weight"].shape == (1, 16)
    expected = load_reward(folder)(PROMPTS, COMPLETIONS)
    assert load_reward(merged)(PROMPTS, COMPLETIONS) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    AutoModelForSequenceClassification.from_pretrained(merged)


def test_an_ensemble_becomes_whole_models(tmp_path, llama, llama_tokenizer):  # noqa: F811
    folder = saved_reward(tmp_path, llama, llama_tokenizer, 3)
    scale = Normalization((1.0, 2.0, 3.0), (0.0, 0.5, -1.0), "none")
    RewardIndex("lora", ["default", "member_1", "member_2"], append_eos=True, normalization=scale).save(folder)
    commands.main(["merge", str(folder), "--output_dir", str(tmp_path / "merged")])
    expected = RewardEnsemble.from_pretrained(folder).member_rewards(PROMPTS, COMPLETIONS)
    merged = RewardEnsemble.from_pretrained(tmp_path / "merged")
    assert merged.index.kind == "models"
    torch.testing.assert_close(merged.member_rewards(PROMPTS, COMPLETIONS), expected, rtol=1e-4, atol=1e-4)


def test_bad_folders(tmp_path, capsys):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for folder, output, message in (
        ("whole", "new", "`folder` must hold an adapter"),
        ("adapter", "whole", "`output_dir` must be new or empty"),
    ):
        with pytest.raises(SystemExit) as ended:
            commands.main(["merge", str(tmp_path / folder), "--output_dir", str(tmp_path / output)])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


LORA = {"r": 2, "task_type": "CAUSAL_LM"}


def saved_policy(folder, config, tied):
    """A tiny causal LM with an adapter that has learnt something, and what PEFT computes of it."""
    base = tiny_model("llama")
    if tied:
        base.config.tie_word_embeddings = True
        base.tie_weights()
        base.save_pretrained(folder / "base")
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    ids = torch.arange(10)[None]
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    with torch.no_grad():
        return ids, fresh.eval()(ids).logits.log_softmax(-1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_what_is_merged_computes_the_same_or_nothing_is_written(tmp_path, changes, tied):
    ids, expected = saved_policy(tmp_path, LoraConfig(**LORA, **changes), tied)
    commands.main(["merge", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits.log_softmax(-1), expected, rtol=0, atol=1e-3)


def test_prompts_of_virtual_tokens_cannot_be_merged(tmp_path, capsys):
    saved_policy(tmp_path, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), tied=False)
    with pytest.raises(SystemExit):
        commands.main(["merge", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")])
    message = " ".join(capsys.readouterr().err.split())
    assert "An adapter must change weights to be merged, and LlamaForCausalLM with a PROMPT_TUNING adapter" in message
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_comes_out_as_another_model_is_removed(tmp_path, capsys, monkeypatch):
    saved_policy(tmp_path, LoraConfig(**LORA, target_modules=["q_proj"]), tied=False)
    monkeypatch.setattr("rlhf_bayes.commands.merge.merged", lambda model: model.unload())  # the adapter is dropped
    with pytest.raises(SystemExit):
        commands.main(["merge", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")])
    assert "The merged model must compute what" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "merged").exists()
