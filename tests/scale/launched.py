"""
All trainings, then the recipes, by as many processes as the launcher started. Not a test module.

    accelerate launch --config_file recipes/accelerate/zero2.yaml tests/scale/launched.py MODELS FOLDER DEEPSPEED 2
"""

import json
import os
import runpy
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
import trainings
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer

from rlhf_bayes import LanguageModel
from rlhf_bayes.diagnostics import PosteriorCallback
from rlhf_bayes.lm import head
from rlhf_bayes.testing import toy_reward

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--report_to", "none", "--disable_tqdm", "true"]
ROLLOUTS = [*SMALL, "--num_generations", "4", "--max_completion_length", "8"]
REPORT = ["--report_prompts", "2", "--report_samples", "8"]
RECIPES = {
    "ppo": ("recipes/ppo_klrl.py", *ROLLOUTS, *REPORT),
    "ppo-lora": ("recipes/ppo_klrl.py", *ROLLOUTS, "--report_prompts", "0", "--use_peft"),
    "gdc": ("recipes/gdc_dpg.py", *ROLLOUTS, *REPORT, "--words", "a,the=0.5", "--fit_samples", "16"),
    "reward": ("reward_models/train.py", *SMALL, "--num_members", "2"),
}


def without_compiling() -> None:
    """DeepSpeed would compile a faster all-reduce between processes of a CPU, for more than a minute."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def sharding_without_a_gpu() -> None:
    """accelerate runs DDP where FSDP is asked for on a CPU: it is told of a GPU, and given tensors on the CPU."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    trainings.SETTINGS["use_cpu"] = False


def check_launch(trainer: Trainer, distributed_type: str, zero_stage: int) -> None:
    # several obvious ways to launch end with one process, or without what the configuration asks for, and no error
    state = trainer.accelerator.state
    assert (state.num_processes, state.distributed_type.name) == (2, distributed_type), state
    assert zero_stage == (state.deepspeed_plugin.zero_stage if distributed_type == "DEEPSPEED" else 0), state
    parameters = list(trainer.model.parameters())
    sharded = [isinstance(parameter, DTensor) for parameter in parameters]
    assert all(sharded) if distributed_type == "FSDP" else not any(sharded), "FSDP shards all weights"
    whole = [parameter.numel() > 0 or shard for parameter, shard in zip(parameters, sharded, strict=True)]
    assert any(whole) != (zero_stage == 3), "ZeRO-3 parts all weights, and nothing else does"


def criticise(trainer: Trainer, folder: Path) -> None:
    """What each process is told by PosteriorCallback, of a reward that works and of one that fails."""

    def fails(**columns):
        raise OSError("the reward is out")

    toy, said = trainings.TOY, {}
    prior = LanguageModel(toy.model, toy.tokenizer, toy.max_completion_length)
    for name, reward in (("works", toy_reward), ("fails", fails)):
        said[name] = {}
        try:
            callback = PosteriorCallback(prior.tilt(reward, toy.beta), trainer, toy.prompts, n=40)
            callback.on_evaluate(trainer.args, trainer.state, trainer.control, metrics=said[name])
        except (ValueError, OSError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    (folder / f"criticism-{trainer.accelerator.process_index}.json").write_text(json.dumps(said))


def run_recipes(folder: Path) -> None:
    # each would take the group of processes down, and the next one needs it
    Accelerator.end_training = lambda self, *args: None
    for name, (script, *flags) in RECIPES.items():
        sys.argv = [script, *flags, "--output_dir", str(folder / name)]
        runpy.run_path(str(ROOT / script), run_name="__main__")


def main(models: Path, folder: Path, distributed_type: str, zero_stage: int) -> None:
    if zero_stage:
        without_compiling()
    if distributed_type == "FSDP":
        sharding_without_a_gpu()
    # two tokens at a time: one process has more chunks of the vocabulary than the other
    usual, head.MAX_CHUNK_ELEMENTS = head.MAX_CHUNK_ELEMENTS, 2 * trainings.TOY.vocab_size
    for training in trainings.TRAININGS:
        trainer = trainings.run(training, models, folder / training, num_processes=2)
        check_launch(trainer, distributed_type, zero_stage)
        if training == "ppo":
            criticise(trainer, folder / training)
    if zero_stage != 3:
        by_one = trainings.run_by_one_forward(models, folder / "one-forward", num_processes=2)
        if trainer.accelerator.is_main_process:
            torch.save(by_one, folder / "one-forward.pt")
    found = trainings.run_ragged(models, folder / "ragged", num_processes=2)
    if trainer.accelerator.is_main_process:
        (folder / "ragged.json").write_text(json.dumps(found))
    head.MAX_CHUNK_ELEMENTS = usual
    if distributed_type != "FSDP":  # they run on the CPU where there is no GPU, which FSDP refuses
        run_recipes(folder / "recipes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    torch.distributed.barrier()
    # a process that leaves while its group is up may abort, and so may gloo's threads as the interpreter ends
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
