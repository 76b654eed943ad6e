import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from .scripts import load

speed_worker = load("speed_worker")
device_limits = load("device_limits")
worker = load("gpu_speed_worker")
gpu_speed = load("gpu_speed")

TINY = replace(worker.QWEN2_HALF_B, **gpu_speed.MINIATURE)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_has_what_its_tables_show(device, monkeypatch):
    for module in (speed_worker, worker):
        monkeypatch.setattr(module, "WARM_UP", 0)
    found = worker.work(worker.Row("ppo", lora=True), TINY, torch.device(device), rollouts=1)
    for phase in ("generation", "training"):
        # a model of some thousand weights is far from any limit
        assert 0 < found[phase] < found[f"{phase}_limit"] < math.inf
    assert found["peak"] > 0
    assert found["predicted"] > 0
    results = {"PPO, LoRA": [found, found], "RLOO, LoRA": [found | {"generation": 2 * found["generation"]}] * 2}
    args = gpu_speed.parse_args(["--device", "cpu", "--quick"])
    assert len(gpu_speed.speed_table(results, args).rows) == 2
    assert gpu_speed.ratio(results, "PPO, LoRA", "RLOO, LoRA", "generation") == pytest.approx(0.5)
    assert len(gpu_speed.peers_table(results).rows) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_noise_of_a_completion_is_that_of_its_tokens_added_up(device):
    found = worker.noise(TINY, torch.device(device))
    assert len(gpu_speed.noise_table(found).rows) == 3
    for errors in found.values():
        assert 0 < errors["completion"] < TINY.completion * errors["token"] < 0.5


def test_operations_are_those_that_torch_counts():
    model = AutoModelForCausalLM.from_config(worker.config_of(TINY), attn_implementation="eager")
    tokens, scored = TINY.prompt + TINY.completion, TINY.completion
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long), logits_to_keep=scored)
    trunk = sum(p.numel() for name, p in model.named_parameters() if "proj.weight" in name)
    masked = 2 * TINY.layers * TINY.hidden * tokens**2  # products with masked keys, which torch counts too
    assert counter.get_total_flops() - masked == worker.forward_flops(TINY, trunk, tokens, scored)


def test_without_arithmetic_decoding_reads_weights_and_cache():
    model = AutoModelForCausalLM.from_config(worker.config_of(TINY), dtype=torch.float32)
    least = worker.shortest(worker.Row("ppo"), TINY, device_limits.Limits(1.0, math.inf), model)
    cache = model(torch.zeros(1, 1, dtype=torch.long)).past_key_values
    of_token = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 2  # in bf16
    lengths = sum(range(TINY.prompt + 1, TINY.prompt + TINY.completion))
    weights = 4 * model.num_parameters()
    assert least["generation"] == (TINY.completion - 1) * weights + TINY.batch * of_token * lengths
    assert least["training"] == 28 * model.num_parameters()


def test_without_bandwidth_an_adapter_saves_a_pass():
    model = AutoModelForCausalLM.from_config(worker.config_of(TINY)).requires_grad_(False)
    limits = device_limits.Limits(math.inf, 1.0)
    adapted, whole = (worker.shortest(worker.Row("ppo", lora=x), TINY, limits, model) for x in (True, False))
    assert adapted["training"] / whole["training"] == pytest.approx(3 / 4)


def test_the_peak_is_that_of_tensors_that_exist_at_once():
    before = torch.zeros(10_000)
    with device_limits.peak_memory(torch.device("cpu")) as peak:
        first = before + 1  # 40,000 bytes
        first.view(100, 100).add_(1)  # no new ones
        second = torch.cat([first, first])  # 80,000
        del first, second
        torch.zeros(25_000).sum()  # 100,000, and 4
    assert peak.bytes == 120_000


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_speed, "measure", lambda *_: pytest.fail("it measured"))
    gpu_speed.main([])
    assert "torch sees no GPU" in capsys.readouterr().out


def test_what_is_not_installed_is_said(monkeypatch, capsys):
    monkeypatch.setattr(gpu_speed.importlib.util, "find_spec", lambda name: None)
    row = {"generation": 2.0, "training": 3.0, "generation_limit": 4.0, "training_limit": 6.0}
    row |= {"peak": 2**30, "predicted": 2**29}
    errors = {"weights in bf16": {"token": 0.01, "completion": 0.02}}
    monkeypatch.setattr(gpu_speed, "measure", lambda row_, args: errors if row_["method"] == "noise" else row)
    gpu_speed.main(["--device", "cpu", "--quick"])
    printed = capsys.readouterr().out
    assert "PPO, QLoRA, 4 bits: left out. bitsandbytes is not installed" in printed
    assert "pip install 'rlhf_bayes[vllm]'" in printed
    assert "0.50" in printed
    assert "2.00" in printed  # measured / predicted
