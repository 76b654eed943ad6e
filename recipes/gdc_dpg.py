r"""Distributional control: trains a language model so that features of its completions have given means.

It is `rlhf-bayes gdc` as a script for `accelerate launch`; the code is in `rlhf_bayes/commands/train_gdc.py`.

Without arguments, in about two minutes on two CPU cores, a bundled tiny model learns to write reviews that all contain
"but", and half of them "not":

    accelerate launch recipes/gdc_dpg.py

Any causal LM, prompts and features, by flags or `--config file.yaml`, as in TRL's scripts:

    accelerate launch recipes/gdc_dpg.py --model_name_or_path Qwen/Qwen2.5-0.5B --use_peft \
        --dataset_name stanfordnlp/imdb --prompt_column text --max_prompts 2000 --max_completion_length 64 \
        --words women:she,her,woman,actress=0.5 --features my_features:is_kind=0.9 --features my_features:curses=0

Towards any other posterior, by an object with a method `log_likelihood` in a module of the current folder:

    accelerate launch recipes/gdc_dpg.py --likelihood my_evidence:likelihood
"""

import sys

from rlhf_bayes.commands import main

if __name__ == "__main__":
    main(["gdc", *sys.argv[1:]])
