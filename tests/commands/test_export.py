"""`rlhf-bayes export`: plain transformers and a plain tokenizer give the reward."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from rlhf_bayes import commands
from rlhf_bayes.rewards import Normalization, RewardEnsemble, RewardIndex, RewardModel, load_reward

from ..rewards.adapters import COMPLETIONS, PROMPTS, TEXTS, adapters, heads, saved_base
from ..rewards.conftest import bert, bert_tokenizer, llama, llama_tokenizer  # noqa: F401


def exported(folder, *flags):
    commands.main(["export", str(folder), "--output_dir", str(folder) + "-plain", *flags])
    return str(folder) + "-plain"


@torch.no_grad()
def plain_scores(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.stack([model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in TEXTS])


def test_a_head_with_a_bias_gives_the_reward(bert, bert_tokenizer, tmp_path, capsys):  # noqa: F811
    reward = RewardModel(bert, bert_tokenizer, index=RewardIndex(normalization=Normalization((2.5,), (-0.75,), "x")))
    reward.save_pretrained(tmp_path / "reward")
    folder = exported(tmp_path / "reward")
    assert "Exported to" in capsys.readouterr().out
    assert_close(plain_scores(folder), torch.tensor(reward(PROMPTS, COMPLETIONS)), rtol=1e-4, atol=1e-4)


def test_the_mean_of_heads_is_one_head(llama, llama_tokenizer, tmp_path, capsys):  # noqa: F811
    scale = Normalization((2.0, 3.0, 0.5), (0.5, -1.0, 0.25), "x")
    index = RewardIndex("heads", ["a", "b", "c"], append_eos=True, normalization=scale)
    ensemble = RewardEnsemble(heads(llama, 3), llama_tokenizer, index=index)
    ensemble.save_pretrained(tmp_path / "reward")
    expected = torch.tensor(ensemble(PROMPTS, COMPLETIONS))
    folder = exported(tmp_path / "reward")
    mean_bias = (0.5 - 1.0 + 0.25) / 3
    assert "the logit is the reward minus -0.0833333" in capsys.readouterr().out.replace("\n", " ")
    # the tokenizer appends EOS
    assert_close(plain_scores(folder) + mean_bias, expected, rtol=1e-4, atol=1e-4)
    assert_close(torch.tensor(load_reward(folder)(PROMPTS, COMPLETIONS)), expected, rtol=1e-4, atol=1e-4)
    shown = pipeline("text-classification", folder)(TEXTS[0])[0]
    assert shown == {
        "label": "reward_minus_a_constant",
        "score": pytest.approx(expected[0].item() - mean_bias, rel=1e-3),
    }
    (tmp_path / "reward-plain").rename(tmp_path / "mean")
    one = exported(tmp_path / "reward", "--member", "b")
    assert_close(plain_scores(one) - 1.0, ensemble.member_rewards(PROMPTS, COMPLETIONS)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "models"])
def test_a_member_of_an_ensemble(llama, llama_tokenizer, tmp_path, kind):  # noqa: F811
    scale = Normalization((2.0, 3.0), (0.5, -1.0), "x")
    if kind == "lora":
        adapters(saved_base(llama, llama_tokenizer, tmp_path / "base"), 2).save_pretrained(tmp_path / "reward")
        llama_tokenizer.save_pretrained(tmp_path / "reward")
        RewardIndex("lora", ["default", "member_1"], True, scale).save(tmp_path / "reward")
    else:
        own = RewardIndex(append_eos=True, normalization=Normalization((4.0,), (0.5,), "y"))
        models = [RewardModel(model, llama_tokenizer, index=own) for model in (llama, heads(llama, 1))]
        index = RewardIndex("models", ["member_0", "member_1"], True, scale)
        RewardEnsemble(models, index=index).save_pretrained(tmp_path / "reward")
    expected = load_reward(tmp_path / "reward").member_rewards(PROMPTS, COMPLETIONS)[1]
    folder = exported(tmp_path / "reward", "--member", "member_1")
    difference = expected - plain_scores(folder)
    assert_close(difference, difference.mean().expand(len(TEXTS)), rtol=1e-4, atol=1e-4)
    assert_close(torch.tensor(load_reward(folder)(PROMPTS, COMPLETIONS)), expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_single_model_is_refused(llama, llama_tokenizer, tmp_path, capsys):  # noqa: F811
    model = adapters(saved_base(llama, llama_tokenizer, tmp_path / "base"), 2)
    RewardEnsemble(model, llama_tokenizer).save_pretrained(tmp_path / "lora")
    RewardModel(llama, llama_tokenizer).save_pretrained(tmp_path / "single")
    for folder, flags, message in (
        ("lora", (), "`member` must be given for an ensemble of 2 lora, whose mean is no single model"),
        ("lora", ("--member", "third"), "`member` must be one of default, member_1, got 'third'"),
        ("single", ("--member", "model"), "`member` must be left out for a single reward model"),
        ("nowhere", (), "`folder` must be a folder of a reward model"),
    ):
        with pytest.raises(SystemExit) as ended:
            exported(tmp_path / folder, *flags)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "lora-plain").exists()


@pytest.mark.parametrize("own", ["<s> $A", "<s> $A y y", "$A"])
def test_eos_comes_where_training_put_it(llama, llama_tokenizer, tmp_path, own):  # noqa: F811
    special = [(token, llama_tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "y")]
    llama_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=own, special_tokens=special)
    ids = llama_tokenizer("ab" + llama_tokenizer.eos_token)["input_ids"]
    reward = RewardModel(llama, llama_tokenizer, index=RewardIndex(append_eos=True))
    reward.save_pretrained(tmp_path / "reward")
    folder = exported(tmp_path / "reward")
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == ids
