import dataclasses
import math

import pytest
from transformers import HfArgumentParser
from trl import RLOOConfig, TrlParser

from rlhf_bayes import PPOConfig

from ..training import config

OLD_NAMES = {field.name for field in dataclasses.fields(RLOOConfig)}
NEW_FIELDS = {field.name: field for field in dataclasses.fields(PPOConfig) if field.name not in OLD_NAMES}
CPU = ["--use_cpu", "--bf16", "false", "--report_to", "none"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 0.9}, r"`top_p` must be 1\.0, got 0\.9: rollouts would come from another distribution"),
        ({"top_k": 50}, "`top_k` must be 0, got 50"),
        ({"min_p": 0.1}, r"`min_p` must be None, got 0\.1"),
        ({"repetition_penalty": 1.2}, r"`repetition_penalty` must be 1\.0, got 1\.2"),
        ({"generation_kwargs": {"typical_p": 0.9}}, "`generation_kwargs` may hold .*, got 'typical_p'"),
        ({"generation_kwargs": {"num_beams": 2}}, "got 'num_beams': it may change the distribution"),
        ({"temperature": 0.0}, r"`temperature` must be positive and finite, got 0\.0"),
        ({"temperature": math.inf}, "`temperature` must be positive and finite, got inf"),
        (
            {"mask_truncated_completions": True},
            "`mask_truncated_completions` must be False: .* members of",
        ),
        ({"sync_ref_model": True}, "`sync_ref_model` must be False: .* moves the target"),
        ({"disable_dropout": False}, "`disable_dropout` must be True: under dropout"),
        ({"kl_estimator": "k3"}, "`kl_estimator` must be 'k1', got 'k3': its optimum is not the posterior"),
        ({"kl_estimator": "k2"}, "`kl_estimator` must be 'k1', got 'k2': it is biased"),
        ({"kl_estimator": "exact"}, "got 'exact': as a reward it loses what k1 has at the optimum"),
        ({"kl_estimator": "k4"}, "got 'k4': it is not known"),
        ({"beta": -0.1}, r"`beta` must be at least 0 .*, got -0\.1"),
        ({"beta": math.inf}, "`beta` must be at least 0 .*, got inf"),
        ({"beta": 0.0, "target_kl": 6.0}, r"`beta` must be positive with `target_kl`=6\.0, got 0"),
        ({"target_kl": 0.0}, r"`target_kl` must be positive \(nats per sequence\), or None, got 0\.0"),
        ({"kl_horizon": 0}, r"`kl_horizon` must be at least 1 \(episodes\), got 0"),
        ({"lam": 1.1}, r"`lam` must be in \[0, 1\], got 1\.1"),
        ({"lam": -0.1}, r"`lam` must be in \[0, 1\], got -0\.1"),
        ({"vf_coef": -1.0}, r"`vf_coef` must be at least 0, got -1\.0"),
        ({"cliprange_value": 0.0}, r"`cliprange_value` must be positive, or None for no clipping, got 0\.0"),
        ({"critic_warmup_steps": -1}, "`critic_warmup_steps` must be at least 0, got -1"),
        ({"missing_eos_penalty": -1.0}, r"`missing_eos_penalty` must be at least 0, or None, got -1\.0"),
        ({"critic": "none"}, "`critic` must be 'ridge', 'shared' or 'separate', got 'none'"),
        ({"critic": "ridge", "vf_coef": 0.5}, r"`vf_coef` must be left out with `critic='ridge'`, got 0\.5"),
        (
            {"critic": "ridge", "critic_warmup_steps": 2},
            "`critic_warmup_steps` must be left out with `critic='ridge'`",
        ),
        ({"critic": "ridge", "cliprange_value": 0.2}, "`cliprange_value` must be left out with `critic='ridge'`"),
        ({"critic": "shared", "prefix_rewards": True}, "`prefix_rewards` must be left out with `critic`='shared'"),
        ({"num_generations": 0}, "`num_generations` must be at least 1, got 0"),
        ({"num_generations": -2}, "`num_generations` must be at least 1, got -2"),
        ({"num_iterations": 0}, "`num_iterations` must be at least 1, got 0"),
        ({"max_completion_length": 0}, r"`max_completion_length` must be at least 1 \(tokens\), got 0"),
        ({"epsilon": -0.2}, r"`epsilon` must be in \(0, 1\], got -0\.2"),
        ({"epsilon": 1.2}, r"`epsilon` must be in \(0, 1\], got 1\.2"),
        ({"epsilon_high": -0.2}, r"`epsilon_high` must be positive, or None for `epsilon`, got -0\.2"),
        ({"reward_clip_range": (1.0, -1.0)}, r"`reward_clip_range` must be \(low, high\) with low < high"),
        ({"reward_weights": [1.0, math.inf]}, "`reward_weights` must be finite"),
        ({"num_generations": 7}, "divisible by num_generations"),
    ],
)
def test_refusals(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    "name",
    [
        "beta",
        "lam",
        "vf_coef",
        "cliprange_value",
        "critic_warmup_steps",
        "target_kl",
        "kl_horizon",
        "missing_eos_penalty",
        "max_engine_mismatch",
        "prior_probe",
        "reward_timeout",
        "reward_retries",
        "max_nonfinite_steps",
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "epsilon",
        "epsilon_high",
    ],
)
def test_nan_is_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got nan"):
        config(tmp_path, **{name: math.nan})


@pytest.mark.parametrize("value", [[math.nan], [1.0, math.nan]])
def test_nan_in_a_list_is_refused_by_name(value, tmp_path):
    with pytest.raises(ValueError, match=r"`reward_weights` must be finite, got .*nan"):
        config(tmp_path, reward_weights=value)
    with pytest.raises(ValueError, match=r"`reward_clip_range` must be .*nan"):
        config(tmp_path, reward_clip_range=(0.0, math.nan))


def test_every_number_that_is_new_is_among_the_nan_tests():
    numbers = {name for name, field in NEW_FIELDS.items() if field.type in (int, float, float | None, int | None)}
    tested = test_nan_is_refused_by_name.pytestmark[0].args[1]
    assert numbers <= set(tested)


def test_neutral_settings_are_accepted(tmp_path):
    config(tmp_path, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0)
    config(tmp_path, top_k=-1, min_p=0.0, generation_kwargs={"cache_implementation": "static"})
    config(tmp_path, beta=0.0)
    config(tmp_path, lam=0.0, epsilon=1.0, missing_eos_penalty=0.0, reward_clip_range=(-1.0, 1.0))
    config(tmp_path, lam=1.0, target_kl=6.0, critic="shared", cliprange_value=0.2)


def test_a_single_generation_is_accepted_with_all_derived_fields(tmp_path):
    args = config(tmp_path, num_generations=1, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert (args.steps_per_generation, args.generation_batch_size) == (3, 12)
    args = config(tmp_path, num_generations=1, per_device_train_batch_size=4, generation_batch_size=16)
    assert args.steps_per_generation == 4
    # TRL's other checks still hold
    with pytest.raises(ValueError, match="global eval batch size"):
        config(tmp_path, num_generations=1, num_generations_eval=5, eval_strategy="steps", eval_steps=1)


def test_help_can_be_printed(capsys):
    with pytest.raises(SystemExit):  # a lone % in a help text raises something else
        HfArgumentParser(PPOConfig).parse_args_into_dataclasses(["--help"])
    assert "--kl_horizon" in capsys.readouterr().out


@pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
def test_flags(parser_class, tmp_path):
    flags = ["--output_dir", str(tmp_path), *CPU, "--beta", "0.2", "--target_kl", "6", "--critic", "separate"]
    flags += ["--lam", "0.9", "--cliprange_value", "0.3", "--num_generations", "1", "--missing_eos_penalty", "1"]
    (args,) = parser_class(PPOConfig).parse_args_into_dataclasses(flags)
    assert (args.beta, args.target_kl, args.critic, args.lam) == (0.2, 6.0, "separate", 0.9)
    assert (args.cliprange_value, args.num_generations, args.missing_eos_penalty) == (0.3, 1, 1.0)


def test_yaml(tmp_path):
    file = tmp_path / "ppo.yaml"
    settings = "use_cpu: true\nbf16: false\nkl_horizon: 500\nbeta: 1e-2\ncritic: shared\nvf_coef: 0.5\n"
    file.write_text(f"output_dir: {tmp_path}\n{settings}")
    (args,) = TrlParser(PPOConfig).parse_args_and_config(["--config", str(file), "--vf_coef", "0.25"])
    assert (args.kl_horizon, args.beta, args.vf_coef) == (500, 0.01, 0.25)


def test_what_rloo_accepts_is_accepted(tmp_path):
    assert {field.name for field in dataclasses.fields(PPOConfig)} >= OLD_NAMES
    plain = RLOOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    ours = PPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    changed = {name for name in OLD_NAMES if getattr(plain, name) != getattr(ours, name)}
    assert changed <= {"disable_dropout", "logging_dir", "run_name", "distributed_state", "router_aux_loss_coef"}
