"""LanguageModel over every kind of model.

Architectures × kinds of PEFT, alone and in a padded batch, from memory and from disk: what plain
transformers and PEFT compute row by row without padding, or refused by name.
"""

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch.testing import assert_close

from rlhf_bayes import LanguageModel

from .families import ALL, tiny_model, tiny_tokenizer

PROMPTS = ["abc", "d", "efghij"]
COMPLETIONS = [[7, 8, 16], [9, 10, 11, 12, 2, 16], [13, 16]]
LENGTH = 6

# what each kind needs to fit the tiny models; a kind that is not here is made with its defaults
_SIZES = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 8},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 2},
    "PSOFT": {"r": 2},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [3, 7], "target_modules": None},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 8},
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1, "target_modules": None},
}
# LoRA that initialises, or trains, in another way
_LORA = {
    "LORA pissa": {"init_lora_weights": "pissa"},
    "LORA olora": {"init_lora_weights": "olora"},
    "LORA orthogonal": {"init_lora_weights": "orthogonal"},
    "LORA random": {"init_lora_weights": False},
    "LORA DoRA": {"use_dora": True},
    "LORA biases": {"bias": "all"},
    "LORA tokens": {"trainable_token_indices": [3, 7]},
    "LORA head": {"modules_to_save": ["lm_head"]},
}
KINDS = ["full", *sorted(str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING), *_LORA]

# what LanguageModel refuses, by its message
REFUSED = {
    "ADAPTION_PROMPT": "runs another one, which cannot score completions",
    "LILY": "its log-prob of a token changes with the tokens after it",  # it routes by the mean over the sequence
}
# what plain PEFT cannot run on a text alone; on other families than llama, it is found by trying
NOT_RUN = {"MULTITASK_PROMPT_TUNING", "POLY", "SHADOW"}
# what PEFT itself cannot make of a tiny llama here
NOT_MADE = {"ADAMSS", "XLORA"}


def config_of(kind):
    name = kind.split()[0]
    types = {str(getattr(key, "value", key)): value for key, value in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    arguments = {"task_type": "CAUSAL_LM"}
    fields = types[name].__dataclass_fields__
    if "target_modules" in fields:
        arguments["target_modules"] = "all-linear" if name in ("LORA", "LOHA") else ["q_proj", "v_proj"]
    if "num_virtual_tokens" in fields:
        arguments["num_virtual_tokens"] = 3
    return types[name](**arguments | _SIZES.get(name, {}) | _LORA.get(kind, {}))


def adapted(family, kind):
    """A model that has learnt something, or None where PEFT does not make it."""
    model = tiny_model(family)
    if kind == "full":
        return model
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(model, config_of(kind))
    except Exception:  # PEFT's own refusals have many types
        return None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.eval()


@torch.no_grad()
def row_by_row(model):
    """Plain transformers and PEFT: each row alone, without padding."""
    sums = []
    for prompt, completion in zip(tiny_tokenizer()(PROMPTS)["input_ids"], COMPLETIONS, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, -len(completion) - 1 : -1]
        sums.append(logits.log_softmax(-1)[range(len(completion)), completion].sum())
    return torch.stack(sums)


def check(family, kind, folder):
    model = adapted(family, kind)
    if model is None:
        assert family != "llama" or kind in NOT_MADE, f"PEFT should make {kind}: mend its arguments above"
        return
    tokenizer, options = tiny_tokenizer(), {"max_completion_length": LENGTH}
    problem = REFUSED.get(kind)
    try:
        expected = row_by_row(copy.deepcopy(model))
    except Exception:  # PEFT's own failures have many types
        assert family != "llama" or kind in NOT_RUN
        problem = "must give logits for `input_ids` and `attention_mask` alone"
    if problem is not None:
        with pytest.raises(ValueError, match=problem):
            LanguageModel(model, tokenizer, **options)
        return
    lm = LanguageModel(model, tokenizer, **options)
    alone = [lm.log_prob([p], [c]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert_close(torch.cat(alone), expected, rtol=0, atol=1e-4)
    assert_close(lm.log_prob(PROMPTS, COMPLETIONS), expected, rtol=0, atol=1e-4)
    from_disk = LanguageModel(saved(model, family, folder), tokenizer, **options)
    assert_close(from_disk.log_prob(PROMPTS, COMPLETIONS), expected, rtol=0, atol=1e-4)


def saved(model, family, folder):
    """The folder that `save_pretrained` leaves, of a base that is on disk too."""
    tiny_model(family).save_pretrained(folder / "base")
    for config in getattr(model, "peft_config", {}).values():
        config.base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "model")
    return folder / "model"


# in the fast set each kind is met once, and each family once
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
def test_each_kind_of_adapter_is_scored_as_by_peft_row_by_row_or_refused(kind, tmp_path):
    check("llama", kind, tmp_path)


@pytest.mark.parametrize("family", ALL)
def test_each_family_is_scored_as_by_transformers_row_by_row(family, tmp_path):
    check(family, "full", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
@pytest.mark.parametrize("family", ["gemma2", "opt", "lfm2", "bart"])
def test_each_kind_of_adapter_on_each_family(family, kind, tmp_path):
    check(family, kind, tmp_path)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("rwkv", "full"), ("bart", "full"), ("llama", "PROMPT_TUNING"), ("llama", "PREFIX_TUNING"), ("gpt2", "P_TUNING")],
)
def test_what_is_drawn_has_the_log_probs_that_it_was_drawn_with(family, kind):
    # at this temperature nearly all is on one completion, which plain passes find token by token
    model = adapted(family, kind)
    expected_model = copy.deepcopy(model)
    lm = LanguageModel(model, tiny_tokenizer(), max_completion_length=LENGTH, temperature=1e-4)
    drawn = lm.sample(PROMPTS, generator=torch.Generator().manual_seed(0))
    for prompt, ids in zip(lm.prompt_token_ids(PROMPTS), drawn.completion_ids, strict=True):
        for position, token in enumerate(ids):
            with torch.no_grad():
                logits = expected_model(input_ids=torch.tensor([prompt + ids[:position]])).logits[0, -1]
            assert int(logits.argmax()) == token
    assert_close(drawn.log_prob, torch.zeros(3), rtol=0, atol=1e-3)
