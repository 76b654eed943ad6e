import time

import pytest

from .scripts import load

pytestmark = pytest.mark.slow

ppo_speed = load("ppo_speed")
speed_worker = load("speed_worker")

TINY = speed_worker.Shape(layers=1, hidden=8, vocabulary=16, prompt=2, completion=3, batch=4)


@pytest.mark.parametrize(
    "row",
    [
        speed_worker.Row("floor"),
        speed_worker.Row("rloo", epochs=2),
        speed_worker.Row("ppo", lora=True),
        speed_worker.Row("ppo", critic="separate", epochs=2),
        speed_worker.Row("gdc", epochs=2),
        speed_worker.Row("gdc", lora=True),
    ],
    ids=str,
)
def test_phases_add_up_to_the_rollout(row):
    clock = speed_worker.Clock()
    speed_worker.RUN[row.method](row, TINY, 2, clock)
    assert len(clock.starts) - 1 - speed_worker.WARM_UP == 2
    for column in clock.medians(TINY.batch).values():
        assert all(column[phase] > 0 for phase in speed_worker.PHASES)
        # medians of two are means: they add up
        assert sum(column.values()) - column["total"] == pytest.approx(column["total"])
        assert column["rest"] > -0.01 * column["total"]


def test_time_inside_another_phase_is_taken_from_it():
    clock = speed_worker.Clock()
    clock.start_rollout()
    inner = clock.timed("generation", lambda: time.sleep(0.2), not_in="scoring")
    clock.timed("scoring", lambda: (inner(), time.sleep(0.05)))()
    generation, scoring = (clock.spent[0][phase][0] for phase in ("generation", "scoring"))
    assert generation >= 0.2
    assert 0.05 <= scoring < generation


def test_every_completion_has_the_full_length():
    tokenizer = speed_worker.build_tokenizer(TINY)
    assert min(tokenizer.eos_token_id, tokenizer.pad_token_id) >= speed_worker.build_model(TINY).config.vocab_size
    assert {len(ids) for ids in tokenizer(speed_worker.build_prompts(TINY))["input_ids"]} == {TINY.prompt}


def test_ratios_compare_runs_of_the_same_repetition():
    slow, fast = [{"total": 2.0}, {"total": 20.0}, {"total": 6.0}], [{"total": 1.0}, {"total": 10.0}, {"total": 2.0}]
    results = {("full", ppo_speed.OLD): slow, ("full", ppo_speed.PPO): fast}
    assert ppo_speed.ratio(results, "full", ppo_speed.OLD, ppo_speed.PPO, "total") == 2.0
