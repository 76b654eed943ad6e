"""What `_trl/engine_draws.py` relies on in TRL and transformers, by name."""

import inspect
from dataclasses import fields

from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput
from trl import RLOOConfig, RLOOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from rlhf_bayes.trainers._trl.engine_draws import PRIVATE_ATTRIBUTES, replaced


def test_names_of_engines():
    source = inspect.getsource(RLOOTrainer.__init__)
    assert [name for name in PRIVATE_ATTRIBUTES if f"self.{name} = " not in source] == []
    draw = inspect.getsource(RLOOTrainer._generate_single_turn)
    assert "self.vllm_generation.generate(" in draw
    assert ".generate_batch(" in draw
    assert "continuous_batching_config=self.continuous_batching_config" in draw
    assert "vllm_max_model_length" in {field.name for field in fields(RLOOConfig)}


def test_vllm_is_asked_at_each_call():
    source = inspect.getsource(VLLMGeneration.generate)
    assert '"logprobs": self.logprobs' in source
    assert "return prompt_ids, completion_ids, logprobs, logprob_token_ids" in source
    assert "self.vllm_client.generate(" in source
    assert source.index("if accelerator.is_main_process:") < source.index("self.vllm_client.generate(")
    assert 'logprobs_mode="processed_logprobs"' in inspect.getsource(VLLMGeneration)


def test_continuous_batching_returns_log_probs():
    assert not ContinuousBatchingConfig().return_logprobs
    assert {"generated_tokens", "logprobs"} <= {field.name for field in fields(GenerationOutput)}


def test_an_attribute_is_put_back():
    class Owner:
        name = "of the class"

    owner = Owner()
    with replaced(owner, "name", "another"):
        assert owner.name == "another"
    assert vars(owner) == {}
    owner.name = "own"
    with replaced(owner, "name", "another"):
        assert owner.name == "another"
    assert owner.name == "own"
