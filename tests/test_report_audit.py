"""The report's audit: its numbers are the record's, with and without a reference."""

import pytest
from fake_audit import estimate, fake_audit, write_fake_audit
from fake_pictures import fake_pictures
from fake_results import fake_results, write_fake_run
from test_report import Page, cells

from hf_clmul.evaluation.audit.verdict import verdict
from hf_clmul.hashes import digest
from hf_clmul.ledger import chain as ledger
from hf_clmul.report.audit import attack_tables, general, referenced, shown
from hf_clmul.report.audit_age import of_earlier_model
from hf_clmul.report.audit_figure import attack_figure, describe_attack, is_curve, worth_drawing
from hf_clmul.report.figures import DARK, LIGHT
from hf_clmul.report.headlines import headline
from hf_clmul.report.page import Audit, _audit, rendered, write_report


def test_an_estimate_shows_its_interval_and_none_is_a_dash():
    assert shown({"value": 0.5, "n": 3, "low": 0.4, "high": 0.625}) == ("0.500", "0.400 to 0.625")
    assert shown({"value": 0.5, "n": 1, "low": None, "high": None}) == ("0.500", "")
    assert shown(None) == ("–", "")


def test_a_table_has_a_row_for_each_point_and_three_cells_for_each_metric():
    relearn, quantize, removed = attack_tables(fake_audit())
    assert relearn.metrics == ("Answer probability", "ROUGE-L recall")
    assert [label for label, _ in relearn.rows] == ["0 steps", "5 steps", "10 steps", "20 steps"]
    assert relearn.rows[3][1][:3] == (
        ("0.910", "0.890 to 0.940"),
        ("0.110", "0.090 to 0.140"),
        ("0.800", "0.780 to 0.830"),
    )
    assert "steps 20, learning rate 2e-05" in relearn.facts
    said = ("0 steps", "At 0 steps."), ("20 steps", "At 20 steps."), ("reference, 20 steps", "I do not know.")
    assert relearn.samples == (("Where was Wanjeri Muthokoi born?", "In Nyahururu.", said),)
    assert [label for label, _ in quantize.rows] == ["unchanged", "int8", "nf4"]
    assert removed.absent == "the run left no adapter that could be taken off" and removed.rows == ()


def test_a_card_of_an_attack_that_ended_early_says_why():
    audit = fake_audit()
    audit["attacks"][0]["stopped"] = "the fine-tuning diverged at step 30"
    text = section(audit)
    assert "It ended early: the fine-tuning diverged at step 30</p>" in text


def test_a_card_says_once_why_an_attack_ended_early_or_was_not_tried():
    audit = fake_audit()
    audit["attacks"][0]["stopped"] = "the fine-tuning diverged at step 30"
    audit["verdict"] = verdict(audit["before"], audit["attacks"], None)
    text = section(audit)
    assert text.lower().count("ended early") == 1 and "It ended early, the fine-tuning diverged at step 30." in text
    absent = "Not tried, the run left no adapter that could be taken off."
    assert text.lower().count("not tried") == 1 and absent in text


def section(audit):
    shown = Audit([(table, None) for table in attack_tables(audit)], [], "")
    return " ".join(rendered("report_audit.html.j2", audit=shown, said=headline(fake_results())).split())


def test_a_metric_has_no_rows_of_dashes_for_points_that_it_was_not_measured_at():
    audit = fake_audit()
    attack = audit["attacks"][0]
    own = {"run": estimate(0.5), "reference": None, "gap": None}
    attack["points"].append({"label": "summed up", "x": None, "metrics": {"leak_share": own}, "samples": []})
    by_metric = dict(attack_tables(audit)[0].by_metric)
    assert [label for label, _ in by_metric["ROUGE-L recall"]] == ["0 steps", "5 steps", "10 steps", "20 steps"]
    assert by_metric["Share of leaks"] == [("summed up", (("0.500", "0.480 to 0.530"), ("–", ""), ("–", "")))]


def test_every_metric_is_shown_and_long_tables_are_folded_up():
    audit = fake_audit()
    attack = audit["attacks"][0]
    for one in attack["points"]:
        one["metrics"] |= {f"metric_{i}": one["metrics"]["rouge_l_recall"] for i in range(5)}
    table = attack_tables(audit)[0]
    assert len(table.by_metric) == 7 and not table.long
    attack["points"] *= 4  # 16
    assert attack_tables(audit)[0].long


def test_what_the_verdict_says_of_an_attack_stands_at_it_and_the_rest_above():
    audit = fake_audit()
    audit["verdict"] = [
        "The gap was 0.009.",
        "relearn: it came back.",
        "1 of 2 attacks brought something back: relearn.",
    ]
    assert general(audit) == ["The gap was 0.009.", "1 of 2 attacks brought something back: relearn."]
    assert [table.said for table in attack_tables(audit)] == [("It came back.",), (), ()]


@pytest.mark.parametrize(("examples", "known"), [(16, True), (15, False)])
def test_figures_of_the_reference_are_taken_from_an_audit_of_as_many_examples(examples, known):
    results = fake_results() | {"reference": None}
    results["stages"][-1]["groups"]["forget"]["examples"] = examples
    found = referenced(results, fake_audit())["reference"]
    figures = {"answer_probability": {"mean": 0.11, "std": None}, "rouge_l_recall": {"mean": 0.3, "std": None}}
    source = "the audit, which measured quickstart-retrained on the same examples"
    assert found == ({"groups": {"forget": figures}, "source": source} if known else None)


def test_the_reference_of_a_run_is_its_own_before_that_of_an_audit():
    assert referenced(fake_results(), fake_audit()) == fake_results()
    alone = fake_results() | {"reference": None}
    assert referenced(alone, None) == referenced(alone, fake_audit(reference=False)) == alone


def test_without_a_reference_only_the_run_is_shown():
    relearn = attack_tables(fake_audit(reference=False))[0]
    assert relearn.rows[0][1] == (("0.119", "0.099 to 0.149"), ("0.332", "0.312 to 0.362"))


def test_a_curve_is_drawn_over_its_own_scale_with_the_reference_beside():
    relearn, quantize, _ = fake_audit()["attacks"]
    assert is_curve(relearn) and not is_curve(quantize)
    for theme in (LIGHT, DARK):
        above, below = attack_figure(relearn, theme).axes
        run, reference = above.lines
        assert list(run.get_xdata()) == [0, 5, 10, 20] and list(run.get_ydata()) == [0.119, 0.41, 0.73, 0.91]
        assert list(reference.get_ydata()) == [0.11] * 4
        assert below.get_title("left") == "ROUGE-L recall"


@pytest.mark.parametrize(
    ("name", "axis"), [("relearn", "steps"), ("logit_lens", "layer"), ("sample", "answers to each question")]
)
def test_the_scale_of_a_curve_has_its_name(name, axis):
    assert attack_figure(fake_audit()["attacks"][0] | {"attack": name}, LIGHT).axes[-1].get_xlabel() == axis


def test_a_point_that_sums_up_is_no_part_of_the_curve():
    relearn = fake_audit()["attacks"][0]
    whole = {"run": estimate(0.4), "reference": None, "gap": None}
    summed = {"label": "depth of unlearning", "x": None, "metrics": {"unlearning_depth": whole}, "samples": []}
    attack = {**relearn, "points": [*relearn["points"], summed]}
    assert is_curve(attack) and describe_attack(attack) == describe_attack(relearn)
    above, below = attack_figure(attack, LIGHT).axes
    assert list(above.lines[0].get_xdata()) == [0, 5, 10, 20]
    (table, *_) = attack_tables({**fake_audit(), "attacks": [attack]})
    assert table.metrics[-1] == "Depth of unlearning" and table.rows[-1][1][-3:] == (
        ("0.400", "0.380 to 0.430"),
        ("–", ""),
        ("–", ""),
    )


def test_labels_are_drawn_as_dots():
    axes = attack_figure(fake_audit()["attacks"][1], LIGHT).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["unchanged", "int8", "nf4"]
    assert [list(c.lines[0].get_ydata()) for c in axes.containers] == [[0.119, 0.12, 0.2135], [0.11, 0.11, 0.11]]


def test_two_points_need_no_figure():
    attack, _, absent = fake_audit()["attacks"]
    assert worth_drawing({**attack, "points": attack["points"][:3]})
    assert not worth_drawing({**attack, "points": attack["points"][:2]}) and not worth_drawing(absent)


def test_a_page_shows_the_table_of_two_points_alone(tmp_path):
    audit = write_fake_audit(tmp_path)
    audit["attacks"][0]["points"] = audit["attacks"][0]["points"][:2]
    (table, none), (_, drawn), _ = _audit(audit, tmp_path, False).attacks
    assert len(table.rows) == 2 and none is None and drawn is not None
    assert not (tmp_path / "audit-relearn.png").exists()


def test_the_words_of_a_figure_tell_its_ends():
    told = describe_attack(fake_audit()["attacks"][0])
    assert "0 steps 0.119 (reference 0.110), 20 steps 0.910 (reference 0.110)" in told


def test_the_page_shows_the_verdict_each_attack_and_why_one_was_not_tried(tmp_path):
    write_fake_audit(write_fake_run(tmp_path))
    page = Page(write_report(tmp_path).read_text("utf-8"))
    text = " ".join(page.text.split())
    assert "Relearning opens the gap to the reference from 0.009 to 0.800." in text
    assert "Not tried: the run left no adapter that could be taken off" in text
    tables = [t for t in page.tables if cells(t[0])[1:] == ["unlearned", "reference", "gap"]]
    assert [cells(t[0])[0] for t in tables] == ["Answer probability", "ROUGE-L recall"] * 2  # relearn, quantize
    assert [cells(row) for row in tables[0][1:5:3]] == [
        ["0 steps", "0.119 0.099 to 0.149", "0.110 0.090 to 0.140", "0.009 0.000 to 0.039"],
        ["20 steps", "0.910 0.890 to 0.940", "0.110 0.090 to 0.140", "0.800 0.780 to 0.830"],
    ]
    images = [tag for tag in page.attributes("img") if (tag["alt"] or "").startswith("Relearning what was forgotten")]
    assert len(images) == 2 and (tmp_path / "report" / "audit-relearn.png").is_file()


@pytest.mark.parametrize(
    ("record", "found", "other"),
    [
        (fake_results(), ("What it says", "True answer:", "over the examples"), "What is seen"),
        (fake_pictures(), ("What is seen in its pictures", "In the place of:", "over the prompts"), "What it says"),
    ],
)
def test_the_samples_are_called_what_they_are(record, found, other):
    audit = Audit([(table, None) for table in attack_tables(fake_audit())], [], "")
    text = " ".join(rendered("report_audit.html.j2", audit=audit, said=headline(record)).split())
    assert all(part in text for part in found) and other not in text


def test_a_run_without_an_audit_says_nothing_of_one(tmp_path):
    text = write_report(write_fake_run(tmp_path)).read_text("utf-8")
    assert "does it come back" not in text


def test_a_missing_reference_is_said(tmp_path):
    write_fake_audit(write_fake_run(tmp_path), reference=False)
    text = " ".join(write_report(tmp_path).read_text("utf-8").split())
    assert "no reference: none was trained" in text


def exported(run, audit):
    """Lets the ledger tell of an export that the audit is of."""
    files = {"model.safetensors": "12" * 32, "README.md": "34" * 32}
    ledger.append(run / "ledger.jsonl", "exported", kind="merged", files=files)
    results = fake_results()
    return audit | {"model_sha256": digest([{"model.safetensors": "12" * 32}, results["model"]["sha256"]])}


def test_the_ledger_tells_whether_an_audit_is_of_this_model(tmp_path):
    results = fake_results()
    audit = exported(tmp_path, fake_audit())
    assert not of_earlier_model(tmp_path, results, audit)
    assert not of_earlier_model(tmp_path, results | {"finished": "2030-01-01T00:00:00+00:00"}, audit)  # the same again
    assert of_earlier_model(tmp_path, results | {"finished": None}, audit)
    ledger.append(tmp_path / "ledger.jsonl", "exported", kind="merged", files={"model.safetensors": "56" * 32})
    assert of_earlier_model(tmp_path, results, audit)
    assert not of_earlier_model(tmp_path, results, None)


def test_where_the_ledger_does_not_the_times_tell_it(tmp_path):
    results, audit = fake_results(), fake_audit()  # created 2026-11-21T10:00:00
    assert not of_earlier_model(tmp_path, results | {"finished": audit["created"]}, audit)
    assert of_earlier_model(tmp_path, results | {"finished": "2026-11-21T10:00:01+00:00"}, audit)


def test_an_audit_of_an_earlier_model_is_no_answer_for_this_one(tmp_path):
    results = fake_results() | {"reference": None}
    write_fake_audit(write_fake_run(tmp_path, results))
    earlier = "it is of an earlier model. Audit it again."
    text = " ".join(write_report(tmp_path).read_text("utf-8").split())
    assert earlier not in text and "Yes, after 2 of 2 attacks" in text and "the audit, which measured" in text
    write_fake_run(tmp_path, results | {"finished": "2026-11-22T00:00:00+00:00"})
    text = " ".join(write_report(tmp_path).read_text("utf-8").split())
    assert earlier in text and "No attack was made on this model." in text and "from 0.009 to 0.800" in text
    assert "Yes, after" not in text and "the audit, which measured" not in text
