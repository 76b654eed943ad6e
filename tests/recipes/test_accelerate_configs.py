"""The launch configurations: read by accelerate itself, and none of them a single process in disguise."""

import re
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from ..children import run

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"
EXPECTED = {
    "cpu": (DistributedType.NO, 1),
    "multi_cpu": (DistributedType.MULTI_GPU, 2),
    "multi_gpu": (DistributedType.MULTI_GPU, 2),
    "zero2": (DistributedType.DEEPSPEED, 2),
    "zero3": (DistributedType.DEEPSPEED, 2),
    "fsdp2": (DistributedType.FSDP, 2),
}


def test_all_are_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes) == EXPECTED[name]
    assert config.mixed_precision == "no"
    # elsewhere it would turn several processes into one
    assert config.use_cpu == (name == "cpu")


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_takes_the_optimizer_of_the_script(stage):
    plugin = load_config_from_file(str(FOLDER / f"zero{stage}.yaml")).deepspeed_config
    assert plugin["zero_stage"] == stage
    assert {plugin["offload_optimizer_device"], plugin["offload_param_device"]} == {"none"}
    assert not {"optimizer", "deepspeed_config_file"} & set(plugin)


@pytest.mark.processes
def test_multi_cpu_starts_two_processes(tmp_path):
    # some configurations that look right start one, and end with exit status 0
    script = tmp_path / "count.py"
    script.write_text(
        "from accelerate import PartialState\n"
        "state = PartialState(cpu=True)\n"
        "print(f'process {state.process_index} of {state.num_processes}, {state.device.type}', flush=True)\n"
        "state.wait_for_everyone()\n"
        "import os; os._exit(0)  # the teardown of a process group may abort\n"
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    done = run([*launcher, "--config_file", FOLDER / "multi_cpu.yaml", script])
    assert done.returncode == 0, done.stderr
    # two processes write to one pipe: their lines may meet
    assert sorted(re.findall(r"process (\d) of 2, cpu", done.stdout)) == ["0", "1"]


def test_fsdp_loads_all_weights_in_all_processes():
    # those of the first only, which it could broadcast, are too late for adapters that copy them
    config = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    assert (config["fsdp_version"], config["fsdp_cpu_ram_efficient_loading"]) == (2, False)
