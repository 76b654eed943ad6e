"""Folders give the model that was saved, every weight of it, or an error."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
)

from rlhf_bayes import LanguageModel
from rlhf_bayes.commands.flags.named import load_language_model
from rlhf_bayes.lm.pretrained import load_causal_lm, load_trunk, read_renamed_weights

from ..trainers.training import config, trainer
from .families import tiny_model, tiny_tokenizer

PROMPTS, COMPLETIONS = ["abc", "d"], [[7, 8, 9, 16], [10, 16]]
BART = {"vocab_size": 18, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}


def whole(folder, family="llama"):
    tiny_model(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def adapter(folder, **changes):
    """A folder with an adapter that has learnt something, and log-probs by plain PEFT on a base loaded fresh."""
    base = whole(folder / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    model.save_pretrained(folder / "adapter")
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter").eval()
    sums = []
    for prompt, ids in zip(tiny_tokenizer()(PROMPTS)["input_ids"], COMPLETIONS, strict=True):
        with torch.no_grad():
            logits = fresh(torch.tensor([prompt + ids])).logits[0, -len(ids) - 1 : -1]
        sums.append(logits.log_softmax(-1)[range(len(ids)), ids].sum())
    return folder / "adapter", torch.stack(sums)


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "pissa"}], ids=str)
def test_an_adapter_folder_is_read_as_peft_reads_it(tmp_path, changes):
    folder, expected = adapter(tmp_path, **changes)
    args = config(tmp_path / "out", max_completion_length=4)
    # the tokenizer is the base's: none was saved beside the adapter
    by_recipes = load_language_model(str(folder), args, tiny_tokenizer())
    for lm in (LanguageModel(folder, max_completion_length=4), by_recipes):
        assert_close(lm.log_prob(PROMPTS, COMPLETIONS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("as_ref_model", [True, False])
def test_an_adapter_folder_is_a_policy_and_a_prior(toy, tmp_path, as_ref_model):
    base = toy.save(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", use_dora=True),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
        expected = toy.log_probs(model)
    model.save_pretrained(tmp_path / "adapter")
    path = str(tmp_path / "adapter")
    if as_ref_model:
        trained = trainer(toy, config(tmp_path / "out"), base, ref_model=path)
    else:
        trained = trainer(toy, config(tmp_path / "out"), path)
        assert_close(toy.log_probs(trained.model).detach(), expected, rtol=0, atol=1e-4)
        assert any(p.requires_grad for name, p in trained.model.named_parameters() if ".default." in name)
    with trained.reference.active(trained.model) as ref_model:
        assert_close(toy.log_probs(ref_model), expected, rtol=0, atol=1e-4)


def without_head(folder):
    AutoModelForCausalLM.from_pretrained(whole(folder)).base_model.save_pretrained(folder)
    config_file = folder / "config.json"  # as tools that strip the head leave it
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"architectures": ["LlamaForCausalLM"]}))


def with_another_head(folder):
    torch.manual_seed(0)
    base = whole(folder)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(folder)


def with_more(folder):
    file = whole(folder) / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.extra.weight": torch.zeros(2)}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_head, "must hold all weights of a causal LM, but its checkpoint lacks lm_head.weight"),
        (with_another_head, "must hold all weights of a causal LM, but its checkpoint lacks lm_head.weight"),
        (with_more, "must hold a causal LM and nothing else, but its checkpoint has model.layers.0.extra.weight"),
    ],
)
def test_a_checkpoint_that_is_not_read_whole_is_refused(toy, tmp_path, spoil, message):
    spoil(tmp_path / "model")
    path = str(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=message):
        LanguageModel(path, tokenizer)
    with pytest.raises(ValueError, match=message):
        load_language_model(path, config(tmp_path / "out"), tokenizer)
    with pytest.raises(ValueError, match=message):
        trainer(toy, config(tmp_path / "out"), ref_model=path)
    if spoil is not with_another_head:  # which names a class of its own, and TRL would load that
        with pytest.raises(ValueError, match=message):
            trainer(toy, config(tmp_path / "out"), path)


def test_an_adapter_that_lacks_weights_is_refused(tmp_path):
    folder, _ = adapter(tmp_path, use_dora=True)
    file = folder / "adapter_model.safetensors"
    weights = {name: weight for name, weight in load_file(file).items() if "magnitude" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    message = r"all weights of LlamaForCausalLM with a LORA adapter and no others, .*lacks"
    with pytest.raises(ValueError, match=message):
        LanguageModel(folder)


def test_a_trunk_is_read_with_any_head_but_not_with_weights_at_random(tmp_path):
    expected = tiny_model("llama").base_model.state_dict()
    for spoil in (whole, without_head, with_another_head):
        spoil(tmp_path / spoil.__name__)
        trunk = load_trunk(tmp_path / spoil.__name__, torch.float32)
        assert all(torch.equal(weight, expected[name]) for name, weight in trunk.state_dict().items())
    file = tmp_path / "whole" / "model.safetensors"
    weights = {name: weight for name, weight in load_file(file).items() if "layers.1.mlp.up" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .*layers\.1\.mlp\.up_proj\.weight"):
        load_trunk(tmp_path / "whole", torch.float32)


def test_encoder_decoder_models_are_refused_as_instances_and_as_paths(toy, tmp_path):
    model = BartForConditionalGeneration(BartConfig(**BART))
    model.save_pretrained(tmp_path / "bart")
    for given in (model, str(tmp_path / "bart")):
        with pytest.raises(ValueError, match=r"A causal LM is needed, but '.*' is an encoder-decoder model"):
            LanguageModel(given, tiny_tokenizer())
        with pytest.raises(ValueError, match="A causal LM is needed"):
            trainer(toy, config(tmp_path / "out"), given)
        with pytest.raises(ValueError, match="A causal LM is needed"):
            trainer(toy, config(tmp_path / "out"), ref_model=given)


def test_models_without_a_head_and_models_that_read_ahead_are_refused():
    with pytest.raises(ValueError, match="A causal LM is needed, got LlamaModel, which has no head"):
        LanguageModel(tiny_model("llama").base_model, tiny_tokenizer())
    sizes = {"vocab_size": 18, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(**sizes, intermediate_size=32))
    for _ in range(2):  # the second time too
        with pytest.raises(ValueError, match=r"`model` .* must"):
            LanguageModel(model, tiny_tokenizer())


def test_a_base_that_was_trained_on_more_tokens_is_resized(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(whole(tmp_path / "base"))
    base.resize_token_embeddings(20)
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(r=2, **settings))
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 19, 3]])
    loaded = load_causal_lm(tmp_path / "adapter")
    with torch.no_grad():
        assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_weights_are_read_under_the_names_that_they_were_stored_by(tmp_path):
    stored, other = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", seed=1)
    stored.save_pretrained(tmp_path)
    left_over = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).unexpected_keys
    assert left_over  # what a resumed `Trainer` leaves as it was
    read_renamed_weights(other, tmp_path)
    for name, weight in stored.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
