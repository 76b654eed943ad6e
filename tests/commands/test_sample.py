"""Sampling a posterior that can be enumerated: each sampler's means, the table over β, files, and wrong input."""

import json
import math
import re
import sys
from dataclasses import replace
from io import StringIO
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console
from trl import TrlParser

from rlhf_bayes import commands
from rlhf_bayes.commands.sample import Arguments, load_model
from rlhf_bayes.commands.sampling import Mean, Method, _trustworthy, agreement, agreement_table
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.samplers import Draws, IndependentRows
from rlhf_bayes.samplers.all_samplers import SAMPLERS as SAMPLERS_BY_NAME

SAMPLERS = ("importance", "rejection", "metropolis_hastings")


@pytest.fixture(scope="module")
def sampled(toy, tmp_path_factory):
    """Folder of what the command wrote for the enumerable model, and what it printed."""
    folder = tmp_path_factory.mktemp("sample")
    toy.save(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        commands.main(
            [
                "sample",
                *("--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "out")),
                *(flag for prompt in toy.prompts for flag in ("--prompt", prompt)),
                *("--reward_func", "rlhf_bayes.testing.enumerable:toy_reward", "--reward_clip_range", "-9", "2.5"),
                *("--beta", "1.0", "--what_if_beta", "2.0", "0.02", "--sampler", *SAMPLERS, "best_of_n"),
                *("--num_samples", "400", "--max_completion_length", "3", "--policy", str(folder / "model")),
            ]
        )
    return folder / "out"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def truth(toy, beta):
    """E[r], KL to the prior and log Z: means over prompts, by enumeration of the clipped reward."""
    rewards = toy.rewards.clamp(-9, 2.5)
    log_posterior = toy.log_posterior(rewards / beta)
    return {
        "reward": (log_posterior.exp() * rewards).sum(-1).mean().item(),
        "kl_to_prior": (log_posterior.exp() * (log_posterior - toy.log_prior)).sum(-1).mean().item(),
        "log_z": toy.log_z(rewards / beta).mean().item(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_sampler_finds_the_posteriors_means(sampled, toy, sampler):
    found, exact = read(sampled / sampler / "evaluation.json"), truth(toy, 1.0)
    for name in ("reward", "log_z"):
        if name in found:
            assert 0 < found[name]["standard_error"] < 0.2
            assert abs(found[name]["mean"] - exact[name]) < 4 * found[name]["standard_error"], name
    assert ("log_z" in found) == (sampler != "metropolis_hastings")


def test_other_betas_come_from_draws_of_the_prior(sampled, toy):
    sampling = read(sampled / "prior" / "sampling.json")
    assert [row["beta"] for row in sampling["what_if"]] == [2.0, 1.0, 0.02]
    for row in sampling["what_if"][:2]:
        exact = truth(toy, row["beta"])
        for name in exact:
            assert abs(row[name] - exact[name]) < 4 * row[f"{name}_standard_error"], name
    assert not sampling["what_if"][2]["trustworthy"]
    best = {row["n"]: row for row in sampling["best_of_n"]}
    assert best[1]["kl_to_prior"] == pytest.approx(0, abs=1e-6)
    # 40 completions tie a lot: below log n − (n−1)/n
    assert 0 < best[64]["kl_to_prior"] < math.log(64) - 63 / 64
    assert best[1]["reward"] < best[8]["reward"] < best[64]["reward"]


def test_draws_are_json_lines_with_weights(sampled, toy):
    rows = [json.loads(line) for line in (sampled / "importance" / "draws.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 400
    for prompt in toy.prompts:
        assert sum(row["weight"] for row in rows if row["prompt"] == prompt) == pytest.approx(1)
    index = {tuple(ids): column for column, ids in enumerate(toy.completion_ids)}
    for row in rows[::50]:
        column = index[tuple(row["completion_ids"])]
        reward = toy.rewards.clamp(-9, 2.5)[toy.prompts.index(row["prompt"]), column].item()
        assert (row["reward"], row["log_weight"]) == (pytest.approx(reward, abs=1e-5), pytest.approx(reward, abs=1e-5))
        assert row["completion"] == toy.completions[column]


def test_the_report_holds_all_of_it(sampled):
    html = (sampled / "report" / "index.html").read_text(encoding="utf-8")
    for text in (*SAMPLERS, "best_of_n", "What if β were another", "Samples"):
        assert text in html
    assert (sampled / "report" / "reward_kl.png").is_file()


def test_a_policy_is_judged(sampled, toy):
    (folder,) = (sampled / "policies").iterdir()
    found = read(folder / "evaluation.json")
    # this policy is the prior: KL(π0‖π*) = log Z − E_π0[r]/β
    exact = (toy.log_z(toy.rewards.clamp(-9, 2.5)) - (toy.log_prior.exp() * toy.rewards.clamp(-9, 2.5)).sum(-1)).mean()
    gap = found["policy"]["gap"]
    assert abs(gap["mean"] - exact.item()) < 4 * gap["draws_standard_error"]


def test_a_condition_alone(toy, tmp_path, monkeypatch, capsys):
    toy.save(tmp_path / "model")
    (tmp_path / "rules.py").write_text(
        "def short(completion_ids, **columns):\n    return [len(i) < 3 for i in completion_ids]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "200")
    flags = ["--model_name_or_path", "model", "--prompt", toy.prompts[1], "--condition", "rules:short"]
    commands.main(["sample", *flags, "--num_samples", "200", "--max_completion_length", "3", "--output_dir", "out",
                   "--sampler", "rejection"])  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejection" / "draws.jsonl").read_text().splitlines()]
    assert len(rows) == 200
    assert all(len(row["completion_ids"]) < 3 and row["reward"] is None for row in rows)
    allowed = torch.tensor([len(ids) < 3 for ids in toy.completion_ids])
    exact = toy.log_prior[1].masked_fill(~allowed, -torch.inf).logsumexp(0).item()
    log_z = read(tmp_path / "out" / "rejection" / "evaluation.json")["log_z"]
    assert abs(log_z["mean"] - exact) < 4 * log_z["standard_error"]
    printed = capsys.readouterr().out
    assert "What if" not in printed
    assert "E[r]" not in printed


def test_a_likelihood(toy, tmp_path, monkeypatch, capsys):
    toy.save(tmp_path / "model")
    (tmp_path / "evidence_of_test_sample.py").write_text(
        "import torch\n\n\n"
        "class ShortOrNot:\n"
        "    forbids = True\n\n"
        "    def log_likelihood(self, prompts, completions, completion_ids, columns=None):\n"
        "        nats = {1: -0.5, 2: -float('inf'), 3: 0.75}\n"
        "        return torch.tensor([nats[len(ids)] for ids in completion_ids])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "200")
    flags = ["--model_name_or_path", "model", "--prompt", toy.prompts[1], "--num_samples", "400"]
    flags += ["--max_completion_length", "3", "--output_dir", "out", "--sampler", "importance"]
    commands.main(["sample", *flags, "--likelihood", "evidence_of_test_sample:ShortOrNot"])
    nats = torch.tensor([{1: -0.5, 2: -math.inf, 3: 0.75}[len(ids)] for ids in toy.completion_ids])
    exact = (toy.log_prior[1] + nats).logsumexp(0).item()
    log_z = read(tmp_path / "out" / "importance" / "evaluation.json")["log_z"]
    assert 0 < log_z["standard_error"] < 0.1
    assert abs(log_z["mean"] - exact) < 4 * log_z["standard_error"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "importance" / "draws.jsonl").read_text().splitlines()]
    assert all(len(row["completion_ids"]) != 2 and row["reward"] is None for row in rows if row["weight"] > 0)
    printed = capsys.readouterr().out
    assert "What if" not in printed


@pytest.mark.parametrize(
    "flags",
    [
        ["--reward_func", "a:b"],
        ["--reward_model_path", "a"],
        ["--condition", "a:b"],
        ["--beta", "0.5"],
        ["--what_if_beta", "1"],
        ["--reward_clip_range", "0", "1"],
    ],
)
def test_a_likelihood_is_the_whole_evidence(flags, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        commands.main(["sample", "--likelihood", "a:b", *flags])
    assert f"`{flags[0]}` must be left out with `--likelihood`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--likelihood", "nothing"], "`likelihood` must have the form `module:object`"),
        (["--model_name_or_path", "some/model"], "`--dataset_name` or `--prompt` must be given"),
        (["--model_name_or_path", "some/model", "--prompt", "a"], "`--condition` or `--likelihood` must be given"),
        (["--num_samples", "1"], "`--num_samples` must be at least 2, got 1"),
        (["--num_samples", "3"], "`--num_samples` must be at least 4 for metropolis_hastings, got 3"),
        (["--max_prompts", "0"], "`--max_prompts` must be at least 1, got 0"),
        (["--reward_clip_range", "1"], "must be two numbers"),
        (["--max_completion_length", "0"], "`--max_completion_length` must be at least 1, got 0"),
        (["--batch_size", "-1"], "`--batch_size` must be at least 1, got -1"),
        (["--temperature", "0"], "`--temperature` must be positive and finite, got 0.0"),
        (["--chat_template_kwargs", "thinking"], "`--chat_template_kwargs` must be JSON, got 'thinking'"),
        (["--chat_template_kwargs", "[1]"], "`--chat_template_kwargs` must be a JSON object"),
        (["--beta", "0"], "`--beta` must be positive and finite, got 0.0"),
        (["--dtype", "float17"], "invalid choice: 'float17'"),
        (["--vllm"], "`--vllm` must be left out where vLLM is not installed"),
        (["--policy", "./nowhere"], "`--policy` must be the folder of a trained policy"),
        (["--policy", "."], "`--policy` must be the folder of a trained policy"),
        (["--output_dir", __file__], "`--output_dir` must be a folder, or not exist yet, got the file"),
        (["--reward_func", "nothing"], "must have the form `module:function`"),
        (["--what_if_beta", "-1"], "`--what_if_beta` must be positive"),
        (["--dataset_name", "nowhere.jsonl"], "`dataset_name` must be a file or folder that exists"),
    ],
)
def test_wrong_flags_end_with_a_line_before_anything_is_drawn(flags, message, monkeypatch, capsys, tmp_path):
    from rlhf_bayes.lm import LanguageModel

    monkeypatch.setattr(LanguageModel, "sample", lambda *args: pytest.fail("drawn"))
    monkeypatch.setitem(sys.modules, "vllm", None)  # not installed, wherever this runs
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        commands.main(["sample", *flags])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--policy", "--proposal"])
def test_policies_with_other_tokens_are_refused_before_anything_is_drawn(flag, toy, tmp_path, monkeypatch, capsys):
    toy.save(tmp_path / "policy")
    monkeypatch.setattr(LanguageModel, "sample", lambda *args: pytest.fail("drawn"))
    with pytest.raises(SystemExit):
        commands.main(["sample", flag, str(tmp_path / "policy"), "--output_dir", str(tmp_path / "out")])
    assert f"`{flag}` must have the tokens of the prior" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_vllm_draws_from_the_prior(toy, tmp_path, monkeypatch):
    toy.save(tmp_path / "model")
    asked = []

    class LLM:
        def __init__(self, model, **options):
            assert model == str(tmp_path / "model")
            assert options == {
                "dtype": "float32",
                "gpu_memory_utilization": 0.5,
                "logprobs_mode": "processed_logprobs",
            }

        def generate(self, prompts, sampling_params, use_tqdm):
            asked.extend(sampling_params)
            eos = toy.tokenizer.eos_token_id
            log_prob = toy.log_prior[0, toy.completion_ids.index([eos])].item()
            drawn = SimpleNamespace(token_ids=[eos], logprobs=[{eos: SimpleNamespace(logprob=log_prob)}])
            return [SimpleNamespace(outputs=[drawn])] * len(prompts)

    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    commands.main(
        [
            *("sample", "--vllm", "--model_name_or_path", str(tmp_path / "model"), "--prompt", toy.prompts[0]),
            *("--reward_func", "rlhf_bayes.testing.enumerable:toy_reward", "--sampler", "importance"),
            *("--num_samples", "16", "--max_completion_length", "3", "--output_dir", str(tmp_path / "out")),
            *("--policy", str(tmp_path / "model")),
        ]
    )
    assert len(asked) == 3 * 16  # for the table over β, by the sampler, and beside the policy, which draws by itself
    rows = [json.loads(line) for line in (tmp_path / "out" / "importance" / "draws.jsonl").read_text().splitlines()]
    assert {tuple(row["completion_ids"]) for row in rows} == {(toy.tokenizer.eos_token_id,)}


@pytest.mark.parametrize("n", [5, 30, 48, 128])
def test_any_number_of_samples_makes_chains_of_one_length(n):
    sampler = SAMPLERS_BY_NAME["metropolis_hastings"].make(None, None, n)
    assert n % sampler.num_chains == 0
    assert n // sampler.num_chains >= 4


def test_a_flag_given_twice_adds_up():
    (args,) = TrlParser(Arguments).parse_args_and_config(
        ["--sampler", "smc", "--sampler", "rejection", "--policy", "a", "--policy", "b", "--what_if_beta", "1", "2"]
    )
    assert (args.sampler, args.policy, args.what_if_beta) == (["smc", "rejection"], ["a", "b"], [1.0, 2.0])


@pytest.mark.parametrize(("sizes", "trusted"), [([40.0, 12.0], True), ([40.0, 8.0], False), ([None], True)])
def test_few_independent_draws_are_not_trusted(toy, sizes, trusted):
    drawn = LanguageModel(toy.model, toy.tokenizer, 3).sample(toy.prompts, 4)
    draws = Draws.of(drawn, 3, guarantee="consistent", dependence=IndependentRows())
    for name in ("effective_sample_size", "ancestors"):
        info = {name: sizes}
        assert _trustworthy(replace(draws, info=info)) == trusted


def method(value, error, guarantee="consistent", trustworthy=True):
    draws = Draws([], torch.tensor([], dtype=torch.long), [], [], [], None, guarantee, 1, IndependentRows())
    return Method("m", draws, None, {"reward": Mean(value, error, trustworthy)})


def test_nothing_is_cut_from_the_table_on_a_terminal_of_80_columns():
    names = ["reward", "length", "log_z"]
    wide = dict.fromkeys(names, Mean(2.417, 0.346))
    untrusted = dict.fromkeys(names, Mean(2.417, 0.346, trustworthy=False))
    methods = [
        replace(method(0.0, 1.0, guarantee="unconverged"), name="metropolis_hastings", estimates=wide),
        replace(method(0.0, 1.0), name="smc", estimates=untrusted),
    ]
    console = Console(width=80, file=StringIO())
    console.print(agreement_table(methods))
    printed = console.file.getvalue()
    assert "…" not in printed
    (row,) = re.findall(r"^ *metropolis_hastings +(.*)$", printed, re.MULTILINE)
    assert row.split("  ")[0] == "unconverged"
    assert row.count("2.417 ± 0.346") == 3
    assert printed.count("trustworthy") == 3


def test_agreement_is_a_chi_squared_test():
    # two estimates 2 apart with errors of 1: χ² = 2 on one degree of freedom
    assert agreement([method(0.0, 1.0), method(2.0, 1.0)], "reward") == "p = 0.16"
    # weights 1 and 1/4 about 0.4: 0.16 + 1.6²/4 = 0.8
    assert agreement([method(0.0, 1.0), method(2.0, 2.0)], "reward") == "p = 0.37"
    assert agreement([method(0.0, 0.1), method(2.0, 0.1)], "reward") == "p = 0.00"
    others = [
        method(9.0, 0.1, guarantee="none"),
        method(9.0, 0.1, guarantee="bounded"),
        method(9.0, 0.1, trustworthy=False),
    ]
    assert agreement([method(0.0, 1.0), method(2.0, 1.0), *others], "reward") == "p = 0.16"
    assert agreement([method(0.0, 1.0), *others], "reward") == "–"
    assert agreement([method(32.0, 1e-15), method(32.0, 0.0)], "reward") == "–"


def test_what_the_chat_template_gets_reaches_every_model(toy, tmp_path):
    chat = [{"role": "user", "content": toy.prompts[0]}]
    folder = toy.save(tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ messages[0]['content'] }}{% if thinking %} b{% endif %}")
    args = Arguments(model_name_or_path=folder, chat_template_kwargs='{"thinking": true}', max_completion_length=3)
    prior = load_model(args, folder)
    expected = [toy.tokenizer(f"{toy.prompts[0]} b")["input_ids"]]
    assert prior.prompt_token_ids([chat]) == load_model(args, folder, prior).prompt_token_ids([chat]) == expected
