"""A training with vLLM on the same GPU: in bf16 the engine is the policy but for rounding, also after a step."""

import json
import sys
from pathlib import Path

import pytest

from .. import children

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.processes, pytest.mark.slow]
pytest.importorskip("vllm", reason="vLLM is not installed; `make test-gpu GPU_VENV=.venv-vllm` has it")

SCRIPT = Path(__file__).parents[1] / "trainers" / "vllm_training.py"


def training(folder, **options):
    # `children.run` hides GPUs from its processes
    command = [sys.executable, SCRIPT, folder, json.dumps({"device": "cuda", **options})]
    done = children.run(command, CUDA_VISIBLE_DEVICES="0")
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert found, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(found[0].removeprefix("FOUND "))


@pytest.mark.parametrize("kind", ["ppo", "gdc"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_the_engine_is_the_policy_but_for_rounding(tmp_path, kind, lora):
    found = training(tmp_path, kind=kind, lora=lora)
    assert set(found["drawn_from"]) == {"engine"}
    # k3 of a difference d is about d²/2: 0.1 nats a sequence were measured on a CPU in bf16
    assert 0 < max(found["mismatch"]) < 0.05, found["mismatch"]
    assert found["from_prior"][-1] > found["from_prior"][0]  # the policy has moved meanwhile
    assert not [sent for sent in found["sent"] if "critic" in sent or "lora_" in sent]


def test_an_engine_that_is_not_told_of_new_weights_is_seen(tmp_path):
    """So the test above can fail: the policy is many times further from weights that it has left."""
    synced = training(tmp_path / "synced", kind="gdc", learning_rate=0.01)
    stale = training(tmp_path / "stale", kind="gdc", learning_rate=0.01, sync=False, max_engine_mismatch=None)
    assert stale["mismatch"][-1] > 4 * synced["mismatch"][-1]
