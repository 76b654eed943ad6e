"""Trainings with vLLM in their process: after each step its weights are the policy's, and it gives log q."""

import json
import sys
from pathlib import Path

import pytest

from .. import children

pytestmark = [pytest.mark.vllm, pytest.mark.processes, pytest.mark.slow]
pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` installs it in an environment of its own")

STORIES = Path(__file__).parents[3] / "shared/models/stories260K-head32"
VARIANTS = {
    "ppo": {"kind": "ppo"},  # with the critic that is fitted, "ridge"
    "ppo, several updates a rollout": {"kind": "ppo", "num_iterations": 2, "chat": True},
    "ppo, shared critic": {"kind": "ppo", "critic": "shared"},
    "ppo, separate critic": {"kind": "ppo", "critic": "separate"},
    "ppo, LoRA": {"kind": "ppo", "lora": True, "critic": "shared"},
    "ppo, LoRA, separate critic": {"kind": "ppo", "lora": True, "critic": "separate"},
    "gdc": {"kind": "gdc"},
    "gdc, LoRA": {"kind": "gdc", "lora": True},
    "gdc, real model": {"kind": "gdc", "model": str(STORIES)},
}


def training(folder, options):
    script = Path(__file__).with_name("vllm_training.py")
    done = children.run([sys.executable, script, folder, json.dumps(options)])
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert found, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(found[0].removeprefix("FOUND "))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_engine_is_the_policy(tmp_path, name):
    options = VARIANTS[name]
    if options.get("model") == str(STORIES) and not STORIES.exists():
        pytest.skip(f"{STORIES} is not there")
    found = training(tmp_path, options)
    assert set(found["drawn_from"]) == {"engine"}
    assert max(found["apart"]) < 1e-3, found["apart"]  # nats per sequence, in fp32
    assert max(found["mismatch"]) < 1e-5
    assert found["from_prior"][0] < 1e-3 < 0.01 < found["from_prior"][-1]  # the policy has moved meanwhile
    assert found["truncated"] > 0
    assert found["sent"]
    assert not [sent for sent in found["sent"] if "critic" in sent or "lora_" in sent]
    assert found["has_critic"] == ("critic" in options)


def test_an_engine_that_is_not_told_of_new_weights_is_seen(tmp_path):
    """The same training without the transfer of weights: so the test above can fail."""
    found = training(tmp_path, {"kind": "gdc", "sync": False, "max_engine_mismatch": None})
    assert found["apart"][0] < 2e-3
    assert found["apart"][-1] > 0.05
    assert found["mismatch"][-1] > 1e-4
