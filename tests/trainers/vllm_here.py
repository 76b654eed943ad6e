"""How vLLM is run on a CPU in fp32, where its log-probs are those of transformers. Not a test module."""

import os

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where what it does to the random state can be seen
    "VLLM_LOGGING_LEVEL": "WARNING",
}
IN_FP32 = {"dtype": "float32", "enforce_eager": True}


def prepare_vllm() -> None:
    """Set vLLM up for this process; call it before an engine is made."""
    os.environ.update(ENVIRONMENT)
    import torch._dynamo

    from rlhf_bayes.lm.vllm_model import prepare_for_new_weights

    torch._dynamo.config.disable = True  # it would start a compiler, for one small function
    # nor can TRL replace packed weights: "no attribute 'weight_loader'"
    prepare_for_new_weights()
