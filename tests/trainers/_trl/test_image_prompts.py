"""What `_trl/image_prompts.py` relies on in TRL, by name, and trainings on images as TRL's own suite has them."""

import pytest
import torch
import trl.data_utils
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText
from trl import RLOOTrainer

from rlhf_bayes import GDCConfig, LanguageModel, PPOConfig
from rlhf_bayes.trainers._trl import image_prompts

from ..image_models import dataset_of_images, processor_and_model
from ..rollout.test_images import LORA, image_trainer
from ..training import logged, weights
from .names import moved


def test_methods_and_functions():
    assert moved(RLOOTrainer, image_prompts.PRIVATE_NAMES) == []
    assert moved(trl.data_utils, {"prepare_multimodal_messages": ("messages", "images")}) == []


def test_inputs_that_rloo_passes():
    names = {"pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes"}
    assert set(image_prompts._inputs_that_rloo_passes()) == names | {
        "token_type_ids",
        "mm_token_type_ids",
        "image_position_ids",
    }


@pytest.mark.parametrize("of", [PPOConfig, GDCConfig], ids=["ppo", "gdc"])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(("family", "column"), [("qwen2_5_vl", "image"), ("gemma3", "chat"), ("idefics3", "images")])
def test_all_parts_of_the_policy_learn(family, column, peft_config, of, tmp_path):
    got = []

    def reward(prompts, completions, **columns):
        got.append((prompts, columns))
        return [float(i % 3) for i in range(len(completions))]

    trained = image_trainer(
        tmp_path, family, of, reward, peft_config=peft_config, train_dataset=dataset_of_images(column)
    )
    before = weights(trained.model)
    trained.train()
    after = weights(trained.model)
    learnt = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    if peft_config is None:
        parts = ("vision", "visual"), ("language_model", "text_model")
        assert all(any(name for name in learnt if any(part in name for part in names)) for names in parts)
    else:
        assert learnt
        assert all("lora_" in name or "critic" in name for name in learnt)
    assert logged(trained, "posterior/kl_to_prior")[0] == pytest.approx(0.0, abs=1e-5)
    prompts, columns = got[0]
    assert (column in columns) == (column != "chat")
    assert {part["type"] for prompt in prompts for part in prompt[0]["content"]} == {"image", "text"}


def test_a_policy_in_a_folder_is_saved_and_read_with_its_processor(tmp_path):
    processor, model = processor_and_model("gemma3")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = {"model": str(tmp_path / "model"), "processing_class": None, "ref_model": str(tmp_path / "model")}
    trained = image_trainer(tmp_path / "out", "gemma3", **arguments)
    assert type(trained.processing_class) is type(processor)
    trained.train()
    trained.save_model()
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in trained.model.state_dict().items():
        assert name.startswith("critic.") or torch.equal(weight, saved[name])
    LanguageModel(tmp_path / "out", processor.tokenizer, 4).sample(["what color"])


def test_an_adapter_of_a_family_that_is_no_causal_lm_is_trained_on(tmp_path):
    _, model = processor_and_model("llava")
    model.save_pretrained(tmp_path / "base")
    adapter = get_peft_model(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), LORA)
    adapter.save_pretrained(tmp_path / "adapter")
    trained = image_trainer(tmp_path, "llava", model=str(tmp_path / "adapter"))
    trained.train()
    assert logged(trained, "posterior/kl_to_prior")[0] == pytest.approx(0.0, abs=1e-5)


def test_evaluation_reads_images_too(tmp_path):
    trained = image_trainer(tmp_path, "llava", eval_dataset=dataset_of_images(), changes={"num_generations_eval": 2})
    metrics = trained.evaluate()
    assert metrics["eval_posterior/kl_to_prior"] == pytest.approx(0.0, abs=1e-5)


def test_the_token_of_images_is_never_drawn(tmp_path):
    trained = image_trainer(tmp_path, "llava", changes={"max_completion_length": 16})
    token = trained.model.config.image_token_id
    with torch.no_grad():
        trained.model.lm_head.weight[token] = 50 * trained.model.lm_head.weight[token]
    trained.train()
    assert not any((rollout.completion_ids == token).any() for rollout in trained.rollouts)


def test_models_that_are_run_in_plain_passes_are_refused(tmp_path):
    from peft import PromptTuningConfig

    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="must be trained with a tokenizer, got LlavaProcessor"):
        image_trainer(tmp_path, "llava", peft_config=config)


def test_an_input_of_unknown_shape_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_prompts, "_inputs_that_rloo_passes", lambda: ["pixel_values"])
    with pytest.raises(
        ValueError, match=r"inputs among \['pixel_values'\], got \['mm_token_type_ids', 'image_grid_thw'"
    ):
        image_trainer(tmp_path, "qwen2_5_vl").train()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_rewrites_the_vision_tower_is_no_other_prior(init, tmp_path):
    lora = LoraConfig(r=2, target_modules=r".*vision_tower.*v_proj", init_lora_weights=init, task_type="CAUSAL_LM")
    trained = image_trainer(tmp_path, "llava", peft_config=lora)
    trained.train()
    assert logged(trained, "posterior/kl_to_prior")[0] == pytest.approx(0.0, abs=1e-4)
