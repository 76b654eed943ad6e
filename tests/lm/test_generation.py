import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlhf_bayes.lm.generation import first_eos_mask, raw_generation_config, sampling_config

from .families import tiny_model


@pytest.mark.parametrize(
    ("ids", "eos", "expected"),
    [
        ([1, 2, 9, 3, 9], [9], [True, True, True, False, False]),
        ([9, 9, 9, 9, 9], [9], [True, False, False, False, False]),  # padded with EOS
        ([1, 2, 3, 4, 5], [9], [True] * 5),
        ([1, 8, 9, 3, 9], [9, 8], [True, True, False, False, False]),
        ([0, 0, 9, 0, 0], [9], [True, True, True, False, False]),  # a pad token that was drawn is a token
    ],
)
def test_first_eos_mask(ids, eos, expected):
    assert first_eos_mask(torch.tensor([ids]), eos).tolist() == [expected]


@pytest.mark.parametrize("peft", [False, True])
def test_the_models_generation_config_is_away_and_comes_back(peft):
    model = tiny_model("llama")
    if peft:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    config = model.generation_config
    config.top_k, config.repetition_penalty, config.eos_token_id = 3, 1.7, [16, 5]
    with raw_generation_config(model):
        assert model.generation_config.top_k is None
        assert model.generation_config.repetition_penalty is None
        assert model.generation_config.eos_token_id == [16, 5]
    assert model.generation_config is config
    with pytest.raises(RuntimeError, match="stop"), raw_generation_config(model):
        raise RuntimeError("stop")
    assert model.generation_config is config
    assert (config.top_k, config.repetition_penalty) == (3, 1.7)


def test_scores_of_generation_are_the_models_logits():
    model = tiny_model("llama")
    model.generation_config.top_k, model.generation_config.repetition_penalty = 2, 5.0
    ids = torch.tensor([[1, 2, 3]])
    config = sampling_config(5, [16], pad_token_id=17, temperature=1.6)
    with torch.no_grad(), raw_generation_config(model):
        out = model.generate(ids, generation_config=config, return_dict_in_generate=True, output_scores=True)
        logits = model(out.sequences).logits[0].float() / 1.6
    scores = torch.stack(out.scores)[:, 0]
    torch.testing.assert_close(scores, logits[2 : 2 + len(scores)], rtol=1e-4, atol=1e-4)
