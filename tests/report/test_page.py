"""The page: what stands in it, that it needs nothing else, and that no text of a model becomes markup."""

import json
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_bayes.diagnostics.quantities import shown_in
from rlhf_bayes.report import read_runs, write_report, write_sampling
from rlhf_bayes.report.diversity_curves import diversity_over_training
from rlhf_bayes.report.figures import ceiling, moments_figure, panels_of, reward_kl_figure, stack_panels
from rlhf_bayes.report.run import Estimate, Run, Sample, estimates_of
from rlhf_bayes.report.tables import evaluation_table, samples_tables, settings_tables, verdicts, what_if_tables

from .conftest import HOSTILE, elbo

pytestmark = pytest.mark.slow

VOID = {"meta", "img", "br", "link", "source"}


class Page(HTMLParser):
    """Tags that are open, all tags and attributes, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(training_run, sampled_run, tmp_path):
    path = write_report([training_run, sampled_run], tmp_path / "report")
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_is_whole_and_alone(page):
    assert page.open == []
    assert "script" not in page.tags
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(links) > 4
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes


def test_texts_of_models_are_no_markup(page):
    assert HOSTILE in "".join(page.text)
    assert "was great & good" in "".join(page.text)


def test_names_of_folders_are_no_markup(training_run, tmp_path):
    folder = training_run.rename(tmp_path / "<b>bold")
    html = write_report([folder], tmp_path / "report").read_text(encoding="utf-8")
    assert "<b>bold" not in html
    assert "&lt;b&gt;bold" in html


def test_sections_are_there_where_there_is_data(page, sampled_run, tmp_path):
    text = "".join(page.text)
    for title in (
        "Summary",
        "ELBO under its ceiling",
        "Reward against the distance from the prior",
        "Over training",
        "Moments",
        "Diversity",
        "What if β were another",
        "Samples",
        "Settings",
    ):
        assert title in text
    alone = "".join(Page(write_report([sampled_run], tmp_path / "other").read_text(encoding="utf-8")).text)
    assert "Over training" not in alone
    assert "What if β were another" in alone


def test_each_figure_is_a_png_too(page, tmp_path):
    names = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert names == {"elbo.png", "reward_kl.png", "training.png", "moments.png", "diversity.png"}
    assert page.tags.count("img") == len(names)
    assert all((tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_the_summary_is_of_the_end(page):
    text = " ".join(page.text)
    # the last 6 of 60 steps: rewards 1.20 … 1.30, KL 55/30 … 60/30
    assert re.search(r"reward\s+1\.25\b", text)
    assert re.search(r"KL to the prior \(nats\)\s+1\.92\b", text)


def test_the_ceiling_is_that_of_the_same_posterior(training_run, sampled_run):
    training, sampled = read_runs([training_run, sampled_run])
    assert training.beta is None
    assert ceiling(training, [sampled]) is None
    training.settings["beta"] = 0.5
    best = ceiling(training, [sampled])
    assert (best.value, best.low) == pytest.approx((2.25, 2.25 - 1.96 * 0.03))
    assert best.value > elbo(60)
    training.settings["beta"] = 0.1  # there, what was sampled is not trustworthy
    assert ceiling(training, [sampled]) is None
    training.settings["beta"] = 0.5
    sampled.sampling["reward_names"] = ["sentiment"]
    assert ceiling(training, [sampled]) is None


def test_the_runs_own_evaluation_is_the_ceiling_where_it_can_be_trusted(training_run, sampled_run):
    training, sampled = read_runs([training_run, sampled_run])
    training.settings["beta"] = 0.5
    training.estimates["log_z"] = Estimate(2.4, trustworthy=False)
    assert ceiling(training, [sampled]).value == 2.25
    training.estimates["log_z"] = Estimate(2.4)
    assert ceiling(training, [sampled]).value == 2.4


def test_what_cannot_be_trusted_says_so(page):
    titles = [value for name, value in page.attributes if name == "title" and value.startswith("importance ESS")]
    assert titles == ["importance ESS 2.0, k̂ 1.20: draw more completions, or raise β"] * 3
    assert "".join(page.text).count("not trustworthy") == 3


def test_evaluations_have_a_column_for_each_part(training_run, sampled_run):
    def fit(kl):
        return {
            "kl_to_prior": {"mean": kl, "standard_error": 0.1, "trustworthy": True},
            "tv": {"mean": None, "trustworthy": False},
            "reward": None,
        }

    evaluation = {"prompts": 16, "prior": fit(0.0), "policy": fit(1.25), "verdict": "far <off>"}
    (training_run / "evaluation.json").write_text(json.dumps(evaluation))
    (run,) = read_runs([training_run])
    page = Page(evaluation_table([run]))
    cells = [text for text in page.text if text]
    assert cells[:5] == ["prior", "policy", "KL to prior (nats)", "0.00 [−0.20, 0.20]", "1.25 [1.05, 1.45]"]
    assert cells[5:8] == ["total variation", "not trustworthy", "not trustworthy"]
    assert Page(verdicts([run])).text == [run.name, ": far <off>"]
    both = Page(evaluation_table([*read_runs([sampled_run]), run]))
    assert "ppo policy" in both.text


def test_what_runs_of_one_seed_share_is_shown_once(sampled_run, tmp_path):
    def fit(kl, entropy):
        return {name: {"mean": mean, "standard_error": 0.1} for name, mean in (("gap", kl), ("entropy", entropy))}

    (what_if := json.loads((sampled_run / "sampling.json").read_text()))["what_if"][0]["reward"] = 0.7
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for index, folder in enumerate(folders):
        # the third has drawn others from the prior
        sampling = json.loads((sampled_run / "sampling.json").read_text()) if index < 2 else what_if
        evaluation = {"prior": fit(2.0 + index / 10, 47.0 + (index == 2)), "policy": fit(1.0 + index, 40.0)}
        write_sampling(folder, [], sampling, evaluation)
    runs = read_runs(folders)
    cells = [text for text in Page(evaluation_table(runs)).text if text]
    assert cells[:5] == ["a prior", "a policy", "b policy", "c prior", "c policy"]
    assert [text for text in Page(what_if_tables(runs)).text if text in ("a, b", "a", "b", "c")] == ["a, b", "c"]
    figure, _ = reward_kl_figure(runs)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert [label for label in labels if label.startswith("posteriors")] == [
        "posteriors of β, a",
        "posteriors of β, c",
    ]


def test_policies_that_were_judged_only_are_in_the_figure(sampled_run, tmp_path):
    evaluation = {"policy": {"reward": {"mean": 0.5}, "kl_to_prior": {"mean": 0.64}}}
    write_sampling(tmp_path / "judged", [], {}, evaluation)
    figure, laws = reward_kl_figure(read_runs([sampled_run, tmp_path / "judged"]))
    (point,) = [line for line in figure.axes[0].lines if line.get_label() == "judged, evaluated"]
    assert point.get_xydata().tolist() == [[0.8, 0.5]]  # √0.64
    assert laws == {}


def test_intervals_have_as_many_digits_as_they_tell():
    assert str(Estimate(0.0006, -0.0003, 0.0015)) == "0.0006 [−0.0003, 0.0015]"
    assert str(Estimate(-0.001, -0.004, 0.002)) == "−0.0010 [−0.0040, 0.0020]"
    assert str(Estimate(1.234, 1.0, 1.5)) == "1.23 [1.00, 1.50]"
    assert str(Estimate(32.0, 32.0, 32.0)) == "32"


def test_the_callback_is_read_where_the_trainer_says_nothing(training_run):
    fit = {
        "eval_posterior_fit/elbo": 1.5,
        "eval_posterior_fit/log_z": 2.0,
        "eval_posterior_fit/log_z_standard_error": 0.1,
    }
    history = [{"step": 10, "reward": 0.3}, {"step": 10, **fit}]
    (training_run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (run,) = read_runs([training_run])
    assert run.curve("posterior/elbo") == ([10], [[1.5]])
    best = ceiling(run, [run])
    assert (best.value, best.high) == pytest.approx((2.0, 2.196))


def test_reward_against_root_kl(training_run, sampled_run):
    figure, laws = reward_kl_figure(read_runs([training_run, sampled_run]))
    # reward = 0.1 + 0.6·KL = 0.1 + 0.6·d²; three n are too few for a law
    assert list(laws) == ["ppo"]
    assert laws["ppo"](1.0) == pytest.approx(0.7, abs=0.03)
    (axes,) = figure.axes
    posteriors = next(line for line in axes.lines if line.get_label() == "posteriors of β")
    assert posteriors.get_xydata().tolist() == [[1.2, 0.6]]  # √1.44, and not the β that cannot be trusted
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names == {"ppo, logging steps", "ppo, fitted", "best of n", "posteriors of β"}


def test_smaller_betas_go_on_as_bounds(sampled_run):
    bounds = {"reward_at_least": 0.7, "kl_to_prior_at_least": 2.25}
    path = sampled_run / "sampling.json"
    sampling = json.loads(path.read_text())
    sampling["what_if"] = [row for row in sampling["what_if"] if row["trustworthy"]]
    smallest = min(row["beta"] for row in sampling["what_if"])
    unknown = sampling["what_if"][0] | bounds | {"beta": smallest / 2, "trustworthy": False}
    path.write_text(json.dumps(sampling | {"what_if": [unknown, *sampling["what_if"]]}))
    figure, _ = reward_kl_figure(read_runs([sampled_run]))
    (line,) = [line for line in figure.axes[0].lines if line.get_label().startswith("at least")]
    assert line.get_xydata().tolist()[1:] == [[1.5, 0.7]]  # √2.25
    assert line.get_markevery() == slice(1, None)  # the first point is the last that is known


def test_the_verdict_comes_first(training_run, tmp_path):
    (training_run / "evaluation.json").write_text(json.dumps({"policy": {}, "verdict": "arrived"}))
    html = write_report([training_run], tmp_path / "report").read_text(encoding="utf-8")
    assert html.index("arrived") < html.index(">Summary</h2>")


def test_every_number_of_an_evaluation_is_explained_at_the_mouse_and_below(tmp_path):
    estimates = estimates_of({"policy": {name: {"mean": 1.0} for name in shown_in("page")}})
    html = evaluation_table([Run("a", tmp_path, estimates=estimates)])
    for quantity in shown_in("page").values():
        assert f'title="{escape(quantity.meaning)}"' in html
        assert f"<dd>{escape(quantity.meaning)}</dd>" in html


def test_panels_are_stacked_for_narrow_screens():
    figure, panels = panels_of(3)
    wide = figure.get_size_inches().tolist()
    stack_panels(figure)
    assert figure.axes == panels
    assert [axes.get_gridspec().ncols for axes in panels] == [1, 1, 1]
    assert figure.get_size_inches().tolist() == pytest.approx([wide[0] / 2, wide[1] / 2 * 3])


def test_settings_that_a_run_does_not_have_are_no_difference(tmp_path):
    runs = [Run("a", tmp_path, settings={"one": 1, "two": 2}), Run("b", tmp_path, settings={"one": 3})]
    page = settings_tables(runs)
    assert page.index(">one<") < page.index("<details>") < page.index(">two<")


def test_diversity_of_logged_completions(training_run):
    measures = diversity_over_training(read_runs([training_run]))
    assert measures["duplicates (share)"]["ppo"] == ([10, 20, 60], [0.0, 0.0, 0.5])
    # "a b c", "d e f": 4 pairs of words; the last completions have a single pair each, the same
    assert measures["distinct-2"]["ppo"][1] == pytest.approx([1.0, 1.0, 0.0])


def test_diversity_compares_equal_numbers():
    def samples(number):
        return [Sample("p", f"same words {index}", step=1) for index in range(number)]

    few, many = Run("few", None, samples=samples(2)), Run("many", None, samples=samples(8))
    measures = diversity_over_training([few, many])["distinct-2"]
    assert measures["few"] == measures["many"] == ([1], [0.75])


def test_samples_are_the_last_ones_drawn_by_weight(sampled_run, training_run):
    html = samples_tables(read_runs([training_run, sampled_run]))
    assert "never drawn" not in html  # weight 0
    assert "a b c" not in html  # of an earlier step
    # the prompt that both answered is the first
    assert html.index("The movie") < html.index("The hotel")


def test_the_priors_samples_stand_beside_those_of_the_run(controlled_run, training_run, sampled_run, tmp_path):
    (alone,) = read_runs([controlled_run])
    cells = Page(samples_tables([alone])).text
    assert cells[:3] == ["prompt", "prior", "gdc"]
    assert cells.index("without") < cells.index("with a cat")
    assert "animal 1.00" in cells
    # two runs whose prior drew the same have one column of it
    twin = controlled_run.rename(tmp_path / "twin")
    again, other = Run("again", twin, before=alone.before), Run("other", twin, before=alone.before[:0])
    assert Page(samples_tables([alone, again, other])).text[:3] == ["prompt", "prior of gdc", "gdc"]


def test_draws_after_training_are_later_than_logged_ones(training_run):
    (training_run / "draws.jsonl").write_text('{"prompt": "The movie", "completion": "drawn afterwards"}\n')
    html = samples_tables(read_runs([training_run]))
    assert "drawn afterwards" in html
    assert "alert" not in html


def test_features_have_their_targets_and_their_evidence_is_no_reward(controlled_run, tmp_path):
    (run,) = read_runs([controlled_run])
    assert run.beta is None
    figure = moments_figure([run])
    (axes,) = [axes for axes in figure.axes if axes.get_visible()]
    assert axes.get_title() == "animal"
    assert [0.4, 0.4] in [list(line.get_ydata()) for line in axes.lines]
    assert run.curve("posterior/kl_to_prior")[0] == list(range(1, 11))
    assert run.curve("reward") == ([], [[]])
    assert reward_kl_figure([run]) is None
    text = "".join(Page(write_report([controlled_run], tmp_path / "page").read_text(encoding="utf-8")).text)
    assert "not finite" in text
    assert "not trustworthy" not in text


def test_nothing_is_written_where_a_folder_is_wrong(training_run, tmp_path):
    with pytest.raises(FileNotFoundError):
        write_report([training_run, tmp_path / "nowhere"], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_the_page_says_what_its_intervals_are_and_what_cannot_be_estimated_is_bounded():
    fit = {"gap": {"mean": 3.0, "standard_error": 1.0, "low": 1.0, "high": 5.0, "trustworthy": False, "at_least": 1.5}}
    both = {"gap": {**fit["gap"], "at_most": 4.25}}
    run = Run("a", Path("a"), estimates=estimates_of({"policy": fit, "prior": both}))
    html = evaluation_table([run])
    assert ">≥ 1.50<" in html
    assert ">≥ 1.50, ≤ 4.25<" in html
    assert html.count("95% interval") == 1


def test_chains_that_disagree_are_told_on_the_page(sampled_run):
    def of(guarantee):
        settings = {"guarantee": guarantee}
        sampling = {"settings": settings, "info": {"rhat": [1.01, 2.96, None], "effective_sample_size": [14.2, 20.0]}}
        return evaluation_table([Run("mh", sampled_run, settings=settings, sampling=sampling)])

    assert "<td>unconverged: the chains disagree by more than chance" in of("unconverged")
    assert "R-hat ≤ 2.96, ESS ≥ 14" in of("consistent")
    assert "unconverged" not in of("consistent")


def test_betas_that_cannot_be_measured_have_bounds(sampled_run):
    (run,) = read_runs([sampled_run])
    run.sampling["what_if"][1] |= {"reward_at_least": 0.59, "kl_to_prior_at_least": 1.41, "log_z_at_least": 5.5}
    html = what_if_tables([run])
    assert html.count("not trustworthy") == 0
    for bound in ("≥ 0.59", "≥ 1.41", "≥ 5.50"):
        assert f">{bound}<" in html
