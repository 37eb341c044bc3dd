"""Forget quality, utility and fluency from hand-made run folders."""

import json
import math
from pathlib import Path

import pytest
from fake_results import fake_results

from hf_clmul.errors import RunError
from hf_clmul.run.comparison import compare, examples


def write_run(folder: Path, ratios: list[float]) -> Path:
    """A run whose forget rows have these truth ratios (wrong answers' probability over the paraphrase's)."""
    rows = [{"group": "forget", "paraphrase_logps": [-1.0], "perturbed_logps": [[-1.0 + math.log(r)]]} for r in ratios]
    rows.append({"group": "retain", "paraphrase_logps": None, "perturbed_logps": None})
    place = folder / "requests" / "01-unlearn-x"
    place.mkdir(parents=True)
    (place / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = {"answer_probability": 0.5, "rouge_l_recall": 1.0, "truth_ratio": 1.0}
    forgotten = {"answer_probability": 0.1, "rouge_l_recall": 0.2, "fluency": 0.9}
    record = fake_results()
    groups = {"forget": {"metrics": forgotten, "examples": len(ratios)}, "retain": {"metrics": kept, "examples": 1}}
    record["stages"][-1] |= {"stage": "01-unlearn-x", "groups": groups}
    (folder / "results.json").write_text(json.dumps(record))
    return folder


def test_equal_truth_ratios_cannot_be_told_apart(tmp_path: Path) -> None:
    ratios = [0.5, 0.8, 1.2, 2.0]
    found = compare(write_run(tmp_path / "a", ratios), write_run(tmp_path / "b", ratios))
    assert found["forget_quality"] == pytest.approx(1.0)
    assert found["utility"] == pytest.approx(3 / (1 / 0.5 + 1 + 1))  # harmonic mean of 0.5, 1, 1 = 0.75
    assert (found["fluency"], found["forget_probability"], found["forget_rouge"]) == (0.9, 0.1, 0.2)


def test_separate_truth_ratios_are_told_apart(tmp_path: Path) -> None:
    knows, does_not = [0.1, 0.2, 0.3, 0.4], [1.1, 1.2, 1.3, 1.4]
    found = compare(write_run(tmp_path / "a", knows), write_run(tmp_path / "b", does_not))
    # Two samples of 4 without overlap: KS statistic 1, exact p = 2 / binomial(8, 4) = 2 / 70.
    assert found["forget_quality"] == pytest.approx(2 / 70)


def test_rows_are_grouped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [1.0, 1.0])
    assert {group: len(rows) for group, rows in examples(run).items()} == {"forget": 2, "retain": 1}


def test_damaged_rows_are_explained(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [1.0])
    file = run / "requests" / "01-unlearn-x" / "examples.jsonl"
    for content in ("{", "[]", '{"id": 1}'):
        file.write_text(content)
        with pytest.raises(
            RunError, match=r"examples.jsonl cannot be read as the rows of a stage .*Delete .*result.json"
        ):
            examples(run)
    file.unlink()
    with pytest.raises(RunError, match="cannot be read as the rows of a stage"):
        examples(run)
