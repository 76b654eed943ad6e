r"""PPO with an explicit KL penalty to the prior: trains a language model towards π0(x|c)·exp(r(c,x)/β)/Z(c).

It is `rlhf-bayes ppo` as a script for `accelerate launch`; the code is in `rlhf_bayes/commands/train_ppo.py`.

Without arguments, in about two minutes on two CPU cores, a bundled tiny model learns to write kind reviews:

    accelerate launch recipes/ppo_klrl.py

Any causal LM, prompts and reward, by flags or `--config file.yaml`, as in TRL's scripts:

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/ppo_klrl.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B --use_peft --beta 0.05 \
        --dataset_name stanfordnlp/imdb --prompt_column text --max_prompts 2000 \
        --reward_func rlhf_bayes.toy.rewards:vader_reward --max_completion_length 64

With a reward model from reward_models/train.py, an ensemble whose members are pooled pessimistically:

    accelerate launch recipes/ppo_klrl.py --reward_model_path runs/reward_model --reward_rule pessimistic

Towards any posterior, by an object with a method `log_likelihood` in a module of the current folder:

    accelerate launch recipes/ppo_klrl.py --likelihood my_evidence:likelihood
"""

import sys

from rlhf_bayes.commands import main

if __name__ == "__main__":
    main(["ppo", *sys.argv[1:]])
