"""The launch configurations: read by accelerate itself, and none of them a single process in disguise."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

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
