"""Numbers, tables and figures of an evaluation at trackers: TensorBoard's files are read back, others are recorded."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

from rlhf_bayes.diagnostics import evaluate, log_evaluation, log_to_trackers
from rlhf_bayes.lm import LanguageModel
from rlhf_bayes.testing import toy_reward


@pytest.fixture(scope="module")
def evaluation(toy):
    prior, policy = (LanguageModel(m, toy.tokenizer, 3) for m in (toy.model, toy.random_policy(noise=0.1)))
    return evaluate(policy, prior.tilt(toy_reward, 1.0), toy.prompts, 60, torch.Generator().manual_seed(0))


@pytest.fixture
def figure(tmp_path):
    from matplotlib.figure import Figure

    Figure(figsize=(1, 1)).savefig(tmp_path / "curves.png")
    return tmp_path / "curves.png"


def trained(*callbacks, folder="out"):
    """What a trainer is to its trackers after a training of 7 steps."""
    args = SimpleNamespace(output_dir=str(folder))
    state = SimpleNamespace(global_step=7, is_world_process_zero=True)
    handler = SimpleNamespace(callbacks=[object(), *callbacks])
    return SimpleNamespace(callback_handler=handler, args=args, state=state, control=None, model=None)


class Recorder:
    """wandb, or trackio: what is logged to it."""

    Table = staticmethod(lambda dataframe: ("table", dataframe))
    Image = staticmethod(lambda path: ("image", path))

    def __init__(self):
        self.logged = []
        self.log = self.logged.append


def recording(kind, recorder):
    """transformers' callback of that kind as it is after its setup, without the library."""
    callback = kind.__new__(kind)
    callback._initialized = True
    callback._wandb = callback._trackio = recorder
    return callback


@pytest.mark.parametrize(("name", "kind"), [("wandb", WandbCallback), ("trackio", TrackioCallback)])
def test_tables_and_images_go_to_the_tracker(name, kind, evaluation, figure, monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, name, recorder)
    log_evaluation(trained(recording(kind, recorder)), evaluation, {"curves": figure})
    numbers, rest = recorder.logged
    assert numbers["eval/report/policy/gap"] == evaluation.policy.gap.mean
    assert numbers["train/global_step"] == rest["train/global_step"] == 7
    assert rest["eval_report/curves"] == ("image", str(figure))
    kind_of, table = rest["eval_report/quantities"]
    assert kind_of == "table"
    assert table.equals(evaluation.to_pandas())
    _, samples = rest["eval_report/samples"]
    assert samples["prompt"].tolist() == evaluation.from_policy.prompts
    assert samples["policy"].tolist() == [texts[0] for texts in evaluation.from_policy.texts]


def test_numbers_that_cannot_be_trusted_stay_out(evaluation, monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    log_evaluation(trained(recording(WandbCallback, recorder)), evaluation)
    names = {name.removeprefix("eval/report/policy/") for name in recorder.logged[0]}
    trusted = {"gap", "log_z", "elbo", "reward"}
    assert all((name in names) == getattr(evaluation.policy, name).trustworthy for name in trusted)


def test_without_trackers_nothing_happens(evaluation, figure):
    log_evaluation(trained(), evaluation, {"curves": figure})


def test_tensorboard_shows_them(evaluation, figure, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = TensorBoardCallback()
    callback.logging_dir = str(tmp_path / "runs")  # as it is after a training, whose end closed the writer
    log_evaluation(trained(callback), evaluation, {"curves": figure})
    found = EventAccumulator(str(tmp_path / "runs"))
    found.Reload()
    (gap,) = found.Scalars("eval/report/policy/gap")
    assert (gap.step, gap.value) == (7, pytest.approx(evaluation.policy.gap.mean))
    (image,) = found.Images("eval_report/curves")
    assert (image.width, image.height) == (100, 100)
    (text,) = found.Tensors("eval_report/quantities/text_summary")
    assert "gap = KL to posterior" in text.tensor_proto.string_val[0].decode()


def test_other_trackers_get_the_numbers(evaluation):
    from transformers.integrations.integration_utils import ClearMLCallback

    logged = []
    callback = ClearMLCallback.__new__(ClearMLCallback)
    callback.on_log = lambda *args, logs, **kwargs: logged.append(logs)
    log_to_trackers(trained(callback), {"eval_report/x": 1.0}, {"t": evaluation.to_pandas()})
    assert logged == [{"eval_report/x": 1.0}]
