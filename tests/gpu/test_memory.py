"""Peak memory of a training against `rlhf-bayes memory`'s prediction, without autocast, which it does not know."""

import pytest

from ..benchmarks.scripts import load

load("speed_worker")
load("device_limits")
worker = load("gpu_speed_worker")

SIZES = {
    "cpu": worker.Shape(
        2, 64, 512, heads=4, kv_heads=2, intermediate=192, tied=True, prompt=16, completion=8, batch=4
    ),
    # as many heads of keys as of queries: for groups of them in fp32 torch may have no kernel but the plain one
    "cuda": worker.Shape(
        8, 512, 32768, heads=8, kv_heads=8, intermediate=1536, tied=True, prompt=128, completion=128, batch=32
    ),
}
ROWS = {
    "all weights": worker.Row("ppo", autocast=False),
    "LoRA, weights in bf16": worker.Row("ppo", lora=True, autocast=False),
    "LoRA, checkpointing": worker.Row("ppo", lora=True, autocast=False, checkpointing=True),
}
# of predicted / measured
BOUNDS = {False: (0.85, 1.15), True: (0.85, 1.6)}
CASES = [("LoRA, weights in bf16", "cpu")] + [pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ROWS]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "device"), CASES, indirect=["device"])
def test_the_peak_is_what_was_predicted(name, device, tmp_path):
    row, size = ROWS[name], SIZES[device.type]
    worker.save_model(size, str(tmp_path / "base"))
    measured = worker.peak_of(row, size, device, str(tmp_path / "base"), str(tmp_path / "out"))
    ratio = worker.predicted(row, size) / measured
    low, high = BOUNDS[row.checkpointing]
    assert low < ratio < high, f"predicted {ratio:.3f} times the {measured / 2**20:,.1f} MiB that were measured"
