"""Metrics of a stream, worked out by hand from small matrices."""

import pytest

from hf_clmul.evaluation import stream


def column(name, learned, forgotten=(), kind="task", task=None):
    return {"name": name, "kind": kind, "task": task or name, "learned": list(learned), "forgotten": list(forgotten)}


def record(columns, matrix, **more):
    return {"columns": columns, "score": "rouge_l_recall", "matrix": matrix, **more}


def three_tasks():
    """Three tasks, each learned once: the papers' case."""
    return record(
        [column("a", [1]), column("b", [2]), column("c", [3])],
        [
            [0.10, 0.20, 0.30],
            [0.80, 0.25, 0.28],
            [0.90, 0.70, 0.40],
            [0.60, 0.50, 1.00],
        ],
    )


def test_the_papers_formulas_for_tasks_learned_once():
    found = three_tasks()
    assert stream.average_performance(found) == pytest.approx((0.6 + 0.5 + 1.0) / 3)
    assert [stream.average_performance(found, t) for t in (1, 2)] == pytest.approx([0.8, 0.8])
    assert stream.incremental_average(found) == pytest.approx((0.8 + 0.8 + 0.7) / 3)
    assert stream.bwt(found) == pytest.approx(((0.6 - 0.8) + (0.5 - 0.7)) / 2)
    assert stream.forgetting(found) == pytest.approx(((0.9 - 0.6) + (0.7 - 0.5)) / 2)
    assert stream.fwt_transfer(found) == pytest.approx(((0.25 - 0.2) + (0.4 - 0.3)) / 2)
    single = {"a": 0.85, "b": 0.75, "c": 0.9}
    assert stream.fwt_single(found, single) == pytest.approx((-0.05 - 0.05 + 0.1) / 3)
    assert stream.relapse(found) is None


def mixed():
    """Learn a, learn b, unlearn a part of a, unlearn b whole, learn c, learn a again, learn b again with leave."""
    return record(
        [
            column("a", [1, 6]),
            column("b", [2, 7], [4]),
            column("c", [5]),
            column("two-rows", [1], [3], kind="forgotten", task="a"),
        ],
        [
            [0.10, 0.20, 0.30, 0.10],
            [0.90, 0.20, 0.30, 0.95],
            [0.80, 0.90, 0.30, 0.85],
            [0.70, 0.88, 0.30, 0.20],
            [0.60, 0.25, 0.30, 0.15],
            [0.50, 0.35, 0.80, 0.30],
            [0.85, 0.30, 0.76, 0.40],
            [0.81, 0.70, 0.78, 0.35],
        ],
    )


def test_a_forgotten_task_counts_until_it_is_forgotten_and_after_its_return():
    found = mixed()
    assert [stream.average_performance(found, t) for t in range(1, 8)] == pytest.approx(
        [0.9, 0.85, (0.7 + 0.88) / 2, 0.6, (0.5 + 0.8) / 2, (0.85 + 0.76) / 2, (0.81 + 0.7 + 0.78) / 3]
    )
    assert stream.incremental_average(found) == pytest.approx((0.9 + 0.85 + 0.79 + 0.6 + 0.65 + 0.805 + 2.29 / 3) / 7)
    assert stream.average_performance(found, 0) is None


def test_a_task_learned_twice_is_compared_with_its_last_learning():
    found = mixed()
    # b came last; a was last learned at 6, c at 5.
    assert stream.bwt(found) == pytest.approx(((0.81 - 0.85) + (0.78 - 0.80)) / 2)
    # The best of a since it was first learned; b was forgotten on purpose, which is no forgetting.
    assert stream.forgetting(found) == pytest.approx(((0.9 - 0.81) + (0.8 - 0.78)) / 2)
    found["columns"][1]["learned"].append(6)  # learned at 2, forgotten at 4, learned again at 6 and 7
    found["matrix"].append([0.8, 0.6, 0.7, 0.3])
    assert stream.bwt(found) == pytest.approx(((0.8 - 0.85) + (0.6 - 0.7) + (0.7 - 0.8)) / 3)


def test_the_best_score_is_taken_since_the_task_was_last_forgotten():
    found = record([column("a", [1, 3], [2])], [[0.0], [1.0], [0.1], [0.6], [0.7], [0.5]])
    assert stream.forgetting(found) == pytest.approx(0.7 - 0.5)
    assert stream.bwt(found) == pytest.approx(0.5 - 0.6)


def test_transfer_is_about_the_first_learning():
    found = mixed()
    assert stream.fwt_transfer(found) == pytest.approx(((0.2 - 0.2) + (0.3 - 0.3)) / 2)
    found["matrix"][4][2] = 0.42
    assert stream.fwt_transfer(found) == pytest.approx((0.0 + 0.12) / 2)
    assert stream.fwt_single(found, {"a": 0.8, "b": 0.8, "c": 0.8}) == pytest.approx((0.1 + 0.1 + 0.0) / 3)


def test_relapse_is_the_best_later_score_minus_that_right_after():
    found = mixed()
    # b: forgotten at 4, learned again at 7, so rows 5 and 6 count. The part of a: rows 4 to 7.
    assert stream.relapses(found) == pytest.approx({"b": 0.35 - 0.25, "two-rows": 0.4 - 0.2})
    assert stream.relapse(found) == pytest.approx((0.1 + 0.2) / 2)


def test_of_several_forgettings_the_worst_relapse_counts():
    again = record([column("a", [1, 4], [2, 5])], [[0.0], [1.0], [0.2], [0.5], [0.9], [0.3], [0.1]])
    assert stream.relapses(again) == pytest.approx({"a": 0.3})
    again["matrix"][3] = [0.1]
    assert stream.relapses(again) == pytest.approx({"a": -0.1})


def test_right_after_the_last_request_there_is_no_relapse_yet():
    found = record([column("a", [1], [2])], [[0.0], [1.0], [0.2]])
    assert stream.relapses(found) == {} and stream.relapse(found) is None
    assert stream.average_performance(found) is None and stream.bwt(found) is None
    assert stream.incremental_average(found) == 1.0  # after the first request


def test_one_task_alone_has_no_transfer_and_no_forgetting():
    found = stream.stream_metrics(record([column("a", [1])], [[0.1], [0.9]]))
    assert found == {
        "average_performance": 0.9,
        "incremental_average": 0.9,
        "bwt_last_minus_learned": None,
        "forgetting_best_minus_last": None,
        "fwt_before_minus_base": None,
        "fwt_learned_minus_single": None,
        "relapse_best_minus_forgotten": None,
    }


def test_a_kept_task_shows_what_an_unlearn_request_cost_it():
    found = record(
        [column("a", [1]), column("part", [1], [2], kind="forgotten", task="a")], [[0.1, 0.1], [0.9, 0.9], [0.85, 0.1]]
    )
    assert stream.bwt(found) == pytest.approx(-0.05)
    assert stream.average_performance(found) == 0.85  # of the task; its forgotten part is none


@pytest.mark.parametrize(
    ("t", "j", "lost"),
    [
        (3, 0, {"average_performance", "incremental_average", "bwt", "forgetting"}),
        (1, 0, {"incremental_average", "bwt", "forgetting", "fwt_single"}),
        (2, 0, {"incremental_average", "forgetting"}),
        (1, 1, {"fwt_transfer"}),
        (0, 2, {"fwt_transfer"}),
        (0, 0, set()),
        (1, 2, set()),
    ],
)
def test_a_number_that_is_missing_is_not_averaged_away(t, j, lost):
    found = three_tasks()
    found["matrix"][t][j] = None
    single = {"a": 0.8, "b": 0.8, "c": 0.8}
    values = {
        name: getattr(stream, name)(found)
        for name in ("average_performance", "incremental_average", "bwt", "forgetting", "fwt_transfer")
    } | {"fwt_single": stream.fwt_single(found, single)}
    assert {name for name, value in values.items() if value is None} == lost


def test_a_missing_later_score_leaves_the_relapse_open():
    found = mixed()
    found["matrix"][5][3] = None
    assert stream.relapses(found)["two-rows"] is None and stream.relapse(found) is None


def test_scores_of_tasks_learned_alone_stand_in_the_record():
    found = three_tasks() | {"single": {"a": 0.8, "b": 0.7, "c": 0.4}}
    assert stream.stream_metrics(found)["fwt_learned_minus_single"] == pytest.approx(0.2)
    del found["single"]["b"]
    assert stream.stream_metrics(found)["fwt_learned_minus_single"] is None


def test_an_unfinished_run_is_measured_as_far_as_it_got():
    found = mixed()
    found["matrix"] = found["matrix"][:3]
    assert stream.average_performance(found) == pytest.approx(0.85)
    assert stream.bwt(found) == pytest.approx(0.8 - 0.9)
    assert stream.fwt_transfer(found) == pytest.approx(0.0)
    assert stream.relapse(found) is None
    assert set(stream.stream_metrics(found | {"matrix": found["matrix"][:1]}).values()) == {None}


def test_the_record_is_built_from_the_stages():
    def stage(**scores):
        return {
            "tasks": {
                name: {"examples": 4, "metrics": {"rouge_l_recall": v, "fluency": 1.0}} for name, v in scores.items()
            }
        }

    columns = [column("a", [1]), column("b", [2])]
    stages = [stage(a=0.1, b=0.2), stage(a=0.9), stage(a=0.8, b=None)]
    del stages[1]["tasks"]["a"]["metrics"]["rouge_l_recall"]
    assert stream.stream_record(stages, columns, "rouge_l_recall") == {
        "columns": columns,
        "score": "rouge_l_recall",
        "matrix": [[0.1, 0.2], [None, None], [0.8, None]],
    }
    assert stream.stream_record(stages, columns, "fluency")["matrix"] == [[1.0, 1.0], [1.0, None], [1.0, 1.0]]
