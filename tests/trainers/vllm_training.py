"""
One short training with vLLM in its process, which prints what the engine and the policy say of each rollout, as JSON.

    python vllm_training.py FOLDER '{"kind": "ppo", "critic": "shared"}'

`test_vllm_in_training.py` starts it, since one process can hold one engine. Not a test module.
"""

import functools
import json
import sys
from typing import Any

import torch
import trl.generation.vllm_generation as generation
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_here import IN_FP32, prepare_vllm

from rlhf_bayes import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer, toy

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
PROMPTS = {"toy": toy.PROMPTS[:4], "stories": ["Once upon a time", "One day", "Lily", "The dog"]}


def reward(completion_ids, **columns):
    """Share of tokens with an even number: of ids alone, so that any model will do."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def main(folder: str, options: dict[str, Any]) -> None:
    prepare_vllm()
    kind, model = options.pop("kind"), options.pop("model", toy.model_path())
    lora, synced, chat = (
        options.pop(name, default) for name, default in (("lora", False), ("sync", True), ("chat", False))
    )
    on_gpu = options.pop("device", "cpu") == "cuda"
    options.setdefault("learning_rate", 3e-3)
    prompts: list[Any] = list(PROMPTS["toy" if model == toy.model_path() else "stories"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    config, trainer = {"ppo": (PPOConfig, PPOTrainer), "gdc": (GDCConfig, GDCTrainer)}[kind]
    args = config(
        output_dir=folder,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=12,
        max_steps=3,
        lr_scheduler_type="constant",
        logging_steps=1,
        beta=0.1,
        **options,
    )
    # TRL leaves the engine's dtype to vLLM, which takes half precision
    generation.LLM = functools.partial(generation.LLM, **({"enforce_eager": True} if on_gpu else IN_FP32))
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trained = trainer(
        policy,
        reward,
        args,
        train_dataset=Dataset.from_dict({"prompt": prompts * 4}),
        processing_class=tokenizer,
        peft_config=LORA if lora else None,
    )
    held = trained.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    load, sent = held.load_weights, set()
    held.load_weights = lambda weights: load([(sent.add(name), (name, weight))[1] for name, weight in weights])
    if not synced:
        trained.vllm_generation.sync_weights = lambda: None
    make_batch, rollouts = trained.objective.batch, []

    def kept(rollout):
        rollouts.append(rollout)
        return make_batch(rollout)

    trained.objective.batch = kept
    trained.train()
    names = [name for name, _ in trained.model.named_parameters()]
    found = {
        "drawn_from": [rollout.drawn_from for rollout in rollouts],
        "apart": [(rollout.log_proposal - rollout.token_log_probs.sum(-1)).abs().max().item() for rollout in rollouts],
        "from_prior": [
            (rollout.token_log_probs - rollout.ref_token_log_probs).sum(-1).abs().max().item() for rollout in rollouts
        ],
        "mismatch": [log["engine/mismatch"] for log in trained.state.log_history if "engine/mismatch" in log],
        "ended": sum(int((r.completion_mask.sum(-1) < 12).sum()) for r in rollouts),
        "truncated": sum(int((r.completion_mask.sum(-1) == 12).sum()) for r in rollouts),
        "sent": sorted(sent),
        "has_critic": any("critic" in name for name in names),
    }
    print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
