import json

import pytest

from .scripts import load

pytestmark = pytest.mark.slow

load("speed_worker")  # which the worker takes from its folder when it runs as a script
reward_speed = load("reward_speed")
worker = load("reward_speed_worker")

TINY = worker.Shape(layers=1, hidden=8, vocabulary=16, prompt=2, completion=3, batch=4)


@pytest.mark.parametrize(
    ("name", "options"), reward_speed.ROWS.values(), ids=[row[0] for row in reward_speed.ROWS.values()]
)
def test_every_row_trains_as_many_steps_as_are_timed(name, options):
    clock = worker.Clock()
    worker.train(worker.Row(**options), TINY, 2, clock)
    assert len(clock.starts) - 1 - worker.WARM_UP == 2
    for column in clock.medians(TINY.batch).values():
        assert column["total"] > 0


def test_pairs_fill_every_step_with_texts_of_one_length():
    pairs = worker.build_pairs(TINY, steps=3)
    assert len(pairs) == 3 * TINY.batch
    texts = [*pairs["chosen_ids"], *pairs["rejected_ids"]]
    assert {len(ids) for ids in texts} == {5}
    # padding would have the model read an earlier token
    assert max(map(max, texts)) < min(worker.build_tokenizer(TINY).pad_token_id, TINY.vocabulary)


def test_ratios_compare_runs_of_the_same_repetition():
    ours, theirs = [{"time": 2.0}, {"time": 20.0}, {"time": 6.0}], [{"time": 1.0}, {"time": 10.0}, {"time": 2.0}]
    results = {reward_speed.OURS: ours, reward_speed.TRL: theirs}
    assert reward_speed.ratio(results, reward_speed.OURS, reward_speed.TRL, "time") == 2.0


def test_a_missed_aim_is_seen():
    results = {row: [{"time": 1.0, "memory": 100.0}] for row in reward_speed.ROWS}
    results[reward_speed.HEADS] = [{"time": 1.6, "memory": 119.0}]
    texts, ratios = (list(column.cells) for column in reward_speed.aims_table(results).columns)
    missed = [text for text, ratio in zip(texts, ratios, strict=True) if ratio.startswith("[red]")]
    assert missed == ["K = 4 heads: at most 1.5 × the time of K = 1"]


def test_memory_and_time_come_from_processes_of_their_own(tmp_path, monkeypatch):
    def measure(row, shape, steps, environment):
        members = row.get("num_members", 1)
        # memory of the rows that are timed is what the allocator kept: not to be reported
        return {"wall": 2.0 * members, "cpu": 1.0 * members, "memory": 50.0 if environment else 1000.0}

    monkeypatch.setattr(reward_speed, "measure", measure)
    reward_speed.main(["--repetitions", "2", "--clock", "cpu", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows["K = 4 heads"] == [{"time": 4.0, "memory": 50.0}] * 2
    assert rows["TRL"] == [{"time": 1.0, "memory": 50.0}] * 2


@pytest.mark.processes
def test_a_failing_row_shows_its_error():
    with pytest.raises(RuntimeError, match="unexpected keyword argument 'trainers'"):
        reward_speed.measure({"trainers": "trl"}, {}, 1, {})
