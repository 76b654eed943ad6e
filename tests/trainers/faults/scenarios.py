"""
Trainings in processes of their own, disturbed from outside. Not a test module.

    python scenarios.py FOLDER [launched]

Forks every process from this one, which has imported all they need, and writes what became of them to found.json.
With `launched` it is itself one of several processes, that train until they are killed.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import Dataset

from rlhf_bayes import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer, RewardConfig, RewardTrainer
from rlhf_bayes.testing import EnumerableLM, toy_reward
from rlhf_bayes.trainers.faults.whole_checkpoints import checkpoints, defect, whole_checkpoints

sys.path.insert(0, str(Path(__file__).parents[2]))
import children

torch.set_num_threads(1)
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True}
fork = multiprocessing.get_context("fork")


def make(kind, folder, **changes):
    toy = EnumerableLM(vocab_size=4, max_completion_length=3)
    args = {"max_steps": 2000, "save_steps": 2, "save_total_limit": 2, "logging_steps": 1, **QUIET} | changes
    if kind == "reward":
        texts = [text for text in dict.fromkeys(toy.completions) if text]
        pairs = Dataset.from_dict({"chosen": texts * 2, "rejected": texts[1:] * 2 + texts[:1] * 2})
        base = toy.save(folder / f"base{os.environ.get('RANK', 0)}")
        args = RewardConfig(str(folder), per_device_train_batch_size=4, **args)
        return RewardTrainer(base, args, train_dataset=pairs, processing_class=toy.tokenizer)
    args |= {"beta": 0.5, "max_completion_length": 3, "num_generations": 3, "per_device_train_batch_size": 6}
    data = {"train_dataset": Dataset.from_dict({"prompt": toy.prompts * 4}), "processing_class": toy.tokenizer}
    config, trainer = (PPOConfig, PPOTrainer) if kind == "ppo" else (GDCConfig, GDCTrainer)
    return trainer(toy.random_policy(noise=0.0), reward, config(str(folder), **args), **data)


def reward(prompts, completions, completion_ids, trainer_state, **columns):
    if os.environ.get("FAILS_AT") == f"{trainer_state.global_step} in {os.environ.get('RANK')}":
        raise ConnectionError("the judge is away")
    return toy_reward(prompts, completions, completion_ids)


def work(kind, folder, environment, resume, changes):
    os.environ.update(environment)
    out = os.open(folder / f"said{environment.get('RANK', 0)}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    trainer = make(kind, folder, **changes)
    assert trainer.accelerator.num_processes == int(environment.get("WORLD_SIZE", 1))
    trainer.train(resume_from_checkpoint=resume)
    if trainer.accelerator.is_main_process:
        torch.save(trainer.model.state_dict(), folder / "weights.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def start(kind, folder, num_processes=1, resume="auto", environment=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(num_processes):
        own = dict(environment or {})
        if num_processes > 1:
            own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(fork.Process(target=work, args=(kind, folder, own, resume, changes)))
        processes[-1].start()
    return processes


def wait_for_step(folder, step, processes):
    def saved():
        assert all(process.is_alive() for process in processes), ended(folder, processes)
        return any(done >= step and not defect(path) for done, path in checkpoints(folder).items())

    children.wait_until(saved, [process.pid for process in processes], [folder])


def ended(folder, processes):
    """How they ended, what they said, and what they left. One that makes no progress is killed: its code says so."""
    with suppress(TimeoutError):
        children.wait_until(
            lambda: not any(process.is_alive() for process in processes),
            [process.pid for process in processes],
            [folder],
        )
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    said = [path.read_text()[-4000:] for path in sorted(folder.glob("said*"))]
    return {"codes": codes, "said": said, "whole": list(whole_checkpoints(folder))}


def sigterm(kind, folder, num_processes, asked=True):
    processes = start(kind, folder, num_processes, save_on_sigterm=asked, save_steps=5)
    wait_for_step(folder, 5, processes)
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    found = ended(folder, processes)
    if asked:  # as a scheduler would: the same command
        steps = found["whole"][-1] + 2
        found["resumed"] = ended(folder, start(kind, folder, num_processes, max_steps=steps))["codes"]
    return found


def killed(kind, folder, rank):
    processes = start(kind, folder, 2)
    wait_for_step(folder, 2, processes)
    os.kill(processes[rank].pid, signal.SIGKILL)
    return ended(folder, processes)


def reward_fails(kind, folder):
    """In one process of two; the others must save with it, and the run end like one that was not disturbed."""
    options = {"max_steps": 6, "save_steps": 100}
    assert ended(folder / "whole", start(kind, folder / "whole", 2, **options))["codes"] == [0, 0]
    found = ended(folder, start(kind, folder, 2, environment={"FAILS_AT": "3 in 1"}, **options))
    found["resumed"] = ended(folder, start(kind, folder, 2, **options))["codes"]
    first, second = (torch.load(path / "weights.pt") for path in (folder, folder / "whole"))
    found["same"] = all(torch.equal(weight, second[name]) for name, weight in first.items())
    return found


def main(folder: Path) -> None:
    found = {
        **{f"sigterm {kind}": sigterm(kind, folder / f"sigterm-{kind}", 1) for kind in ("ppo", "gdc", "reward")},
        "sigterm two": sigterm("ppo", folder / "sigterm-two", 2),
        "sigterm unasked": sigterm("ppo", folder / "sigterm-unasked", 1, asked=False),
        "killed 0": killed("ppo", folder / "killed-0", 0),
        "killed 1": killed("gdc", folder / "killed-1", 1),
        "killed reward": killed("reward", folder / "killed-reward", 1),
        **{f"reward fails {kind}": reward_fails(kind, folder / f"fails-{kind}") for kind in ("ppo", "gdc")},
    }
    (folder / "found.json").write_text(json.dumps(found))


def launched(folder: Path) -> None:
    (folder / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    make("ppo", folder).train()


if __name__ == "__main__":
    (launched if sys.argv[2:] else main)(Path(sys.argv[1]))
