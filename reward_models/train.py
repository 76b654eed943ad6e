r"""Trains a reward model, or an ensemble of them, from pairwise preferences: P(chosen ≻ rejected) = σ(r(c) − r(r)).

It is `rlhf-bayes reward` as a script for `accelerate launch`; the code is in `rlhf_bayes/commands/train_reward.py`.

Without arguments, in about a minute on one CPU core, four heads learn from the bundled preferences of three simulated
annotators, one of them careless:

    accelerate launch reward_models/train.py

Any model with a sequence-classification class, and any preferences, by flags or `--config file.yaml`, as in TRL's
scripts (LoRA members share one base in memory):

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml reward_models/train.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/ultrafeedback_binarized \
        --use_peft --ensemble lora --num_members 4 --learning_rate 1e-4 --max_length 1024
"""

import sys

from rlhf_bayes.commands import main

if __name__ == "__main__":
    main(["reward", *sys.argv[1:]])
