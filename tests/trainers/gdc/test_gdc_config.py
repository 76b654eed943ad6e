"""What a configuration refuses, and that its fields can be set from everywhere."""

import dataclasses
import math

import pytest
from transformers import HfArgumentParser
from trl import RLOOConfig, TrlParser

from rlhf_bayes import GDCConfig

from ..training import gdc_config

OLD_NAMES = {field.name for field in dataclasses.fields(RLOOConfig)} - {"beta"}
NEW_FIELDS = {field.name: field for field in dataclasses.fields(GDCConfig) if field.name not in OLD_NAMES}
CPU = ["--use_cpu", "--bf16", "false", "--report_to", "none"]
LOG_VARIANCE = {"divergence": "log_variance"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "kl"}, "`divergence` must be one of forward_kl, .*, log_variance, got 'kl'"),
        ({"beta": 0.0}, r"`beta` must be positive and finite: at 0 there is no posterior, got 0\.0"),
        ({"beta": -0.1}, r"`beta` must be positive .*, got -0\.1"),
        ({"divergence": "alpha"}, r"`alpha` must be in \[0, 1\] .*, got None"),
        ({"divergence": "alpha", "alpha": 1.1}, r"`alpha` must be in \[0, 1\] .*, got 1\.1"),
        ({"alpha": 0.5}, r'`alpha` belongs to `divergence="alpha"`, got 0\.5 with \'forward_kl\'. Leave it out'),
        ({"baseline": "mean"}, "`baseline` must be one of leave_one_out, constant, none, or None, got 'mean'"),
        ({"baseline": "leave_one_out", "num_generations": 1}, "`num_generations` must be at least 2 .*`baseline`"),
        ({"proposal": "best"}, "`proposal` must be one of policy, adaptive, prior, got 'best'"),
        ({"replay_batches": 0}, r"`replay_batches` must be at least 1 \(rollouts\), got 0"),
        ({"replay_sampling": "newest"}, "`replay_sampling` must be 'uniform' or 'recency', got 'newest'"),
        ({"huber_delta": 1.0}, r"`huber_delta` belongs to `divergence`='log_variance', got 1\.0 with 'forward_kl'"),
        ({"forbidden_gap": 2.0, "divergence": "js"}, r"`forbidden_gap` belongs to .*, got 2\.0 with 'js'. Leave"),
        ({"huber_delta": 0.0} | LOG_VARIANCE, r"`huber_delta` must be positive \(nats\), or None, got 0\.0"),
        ({"forbidden_gap": math.inf} | LOG_VARIANCE, "`forbidden_gap` must be positive and finite"),
        ({"ess_min": -1.0}, r"`ess_min` must be at least 0 \(completions\), got -1\.0"),
        ({"max_pseudo_reward": 0.0}, r"`max_pseudo_reward` must be positive, or None, got 0\.0"),
        ({"beta_init": 0.0}, r"`beta_init` must be positive and finite, or None, got 0\.0"),
        ({"beta_init": math.inf}, "`beta_init` must be positive and finite, or None, got inf"),
        ({"beta_init": 1.0, "beta_init_steps": 0}, r"`beta_init_steps` must be at least 1 \(optimizer steps\)"),
        ({"beta_init_steps": 5}, r"`beta_init_steps` \(5\) is of no use without `beta_init`"),
        ({"prior_samples": 12}, r"`prior_samples` must be a multiple of `num_generations` \(8\), got 12"),
        ({"prior_samples": -8}, r"`prior_samples` must be a multiple of `num_generations` \(8\), got -8"),
        ({"num_generations": 1} | LOG_VARIANCE, "`num_generations` must be at least 2 .*: one completion has no var"),
        ({"alpha": 0.5} | LOG_VARIANCE, r"`alpha` is of no use with `divergence`='log_variance', got 0\.5: the loss"),
        ({"baseline": "none"} | LOG_VARIANCE, "`baseline` is of no use with `divergence`='log_variance'"),
        ({"max_pseudo_reward": 9.0} | LOG_VARIANCE, "`max_pseudo_reward` is of no use .*no pseudo-reward"),
        ({"normalize_advantages": True}, "`normalize_advantages` must be False: dividing by the spread"),
        ({"epsilon": 0.1}, r"`epsilon` must be left out, got 0\.1: .* not clipped. `ess_min` skips steps"),
        ({"epsilon_high": 0.3}, r"`epsilon_high` must be left out, got 0\.3"),
        # as PPO's
        ({"top_p": 0.9}, r"`top_p` must be 1\.0, got 0\.9: rollouts would come from another distribution"),
        ({"top_k": 50}, "`top_k` must be 0, got 50"),
        ({"min_p": 0.1}, r"`min_p` must be None, got 0\.1"),
        ({"repetition_penalty": 1.2}, r"`repetition_penalty` must be 1\.0, got 1\.2"),
        ({"generation_kwargs": {"num_beams": 2}}, "got 'num_beams': it may change the distribution"),
        ({"temperature": 0.0}, r"`temperature` must be positive and finite, got 0\.0"),
        ({"mask_truncated_completions": True}, "`mask_truncated_completions` must be False: .* members of"),
        ({"sync_ref_model": True}, "`sync_ref_model` must be False: .* moves the target"),
        ({"disable_dropout": False}, "`disable_dropout` must be True: under dropout"),
        ({"neftune_noise_alpha": 5.0}, r"`neftune_noise_alpha` must be None, got 5\.0"),
        ({"generation_kwargs": {"max_time": 1.0}}, "`generation_kwargs` may hold .*, got 'max_time'"),
        ({"missing_eos_penalty": -1.0}, r"`missing_eos_penalty` must be at least 0, or None, got -1\.0"),
    ],
)
def test_refusals(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        gdc_config(tmp_path, **changes)


@pytest.mark.parametrize(
    "name",
    [
        "beta",
        "alpha",
        "replay_batches",
        "huber_delta",
        "forbidden_gap",
        "ess_min",
        "max_pseudo_reward",
        "beta_init",
        "beta_init_steps",
        "prior_samples",
        "store_share",
        "push_steps",
        "max_staleness",
        "actor_timeout",
        "missing_eos_penalty",
        "temperature",
    ],
)
def test_nan_is_refused_by_name(name, tmp_path):
    options = {"alpha": {"divergence": "alpha"}, "beta_init_steps": {"beta_init": 2.0}}
    options |= {"huber_delta": LOG_VARIANCE, "forbidden_gap": LOG_VARIANCE}
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got nan"):
        gdc_config(tmp_path, **{name: math.nan}, **options.get(name, {}))


def test_every_number_that_is_new_is_among_the_nan_tests():
    numbers = {name for name, field in NEW_FIELDS.items() if field.type in (int, float, float | None, int | None)}
    numbers -= {
        "max_nonfinite_steps",
        "max_engine_mismatch",
        "prior_probe",
        "reward_retries",
        "reward_timeout",
    }  # of both configs: test_ppo_config.py
    assert numbers <= set(test_nan_is_refused_by_name.pytestmark[0].args[1])


def test_what_goes_together_is_accepted(tmp_path):
    gdc_config(tmp_path, divergence="alpha", alpha=0.0)
    gdc_config(tmp_path, divergence="alpha", alpha=1.0, baseline="leave_one_out")
    gdc_config(
        tmp_path, divergence="log_variance", huber_delta=2.0, forbidden_gap=3.0, replay_batches=8, beta_init=1.0
    )
    gdc_config(tmp_path, divergence="tv", proposal="adaptive", ess_min=4.0, max_pseudo_reward=10.0, prior_samples=16)
    gdc_config(tmp_path, divergence="reverse_kl", num_generations=1)
    args = gdc_config(tmp_path, num_generations=1, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert (args.steps_per_generation, args.generation_batch_size) == (3, 12)
    assert GDCConfig(str(tmp_path), use_cpu=True, bf16=False).beta is None


def test_help_can_be_printed(capsys):
    with pytest.raises(SystemExit):  # a lone % in a help text raises something else
        HfArgumentParser(GDCConfig).parse_args_into_dataclasses(["--help"])
    assert "--replay_batches" in capsys.readouterr().out


@pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
def test_flags(parser_class, tmp_path):
    flags = ["--output_dir", str(tmp_path), *CPU, "--divergence", "alpha", "--alpha", "0.5", "--proposal", "adaptive"]
    flags += ["--baseline", "leave_one_out", "--ess_min", "3", "--beta_init", "2", "--prior_samples", "16"]
    (args,) = parser_class(GDCConfig).parse_args_into_dataclasses(flags)
    assert (args.divergence, args.alpha, args.proposal, args.baseline) == ("alpha", 0.5, "adaptive", "leave_one_out")
    assert (args.ess_min, args.beta_init, args.beta, args.prior_samples) == (3.0, 2.0, None, 16)


def test_yaml(tmp_path):
    file = tmp_path / "gdc.yaml"
    file.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\ndivergence: log_variance\nhuber_delta: 3\n")
    (args,) = TrlParser(GDCConfig).parse_args_and_config(["--config", str(file), "--replay_batches", "4"])
    assert (args.divergence, args.huber_delta, args.replay_batches) == ("log_variance", 3, 4)


def test_what_rloo_accepts_is_accepted(tmp_path):
    plain = RLOOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    ours = GDCConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    changed = {name for name in OLD_NAMES if getattr(plain, name) != getattr(ours, name)}
    assert changed <= {"disable_dropout", "logging_dir", "run_name", "distributed_state", "router_aux_loss_coef"}
