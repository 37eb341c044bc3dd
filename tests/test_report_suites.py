"""What the report and the console show beside values: intervals, counts, suites of no single group, and why a metric is absent."""

import copy
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_audit import write_fake_audit
from fake_pictures import fake_pictures
from fake_results import fake_results
from fake_suites import NO_NORMS, NO_PARAPHRASE, NO_REFERENCE, fake_suites
from test_console import cells as console_cells
from test_console import printed
from test_report import cells, page_of

from hf_clmul.console import results_table
from hf_clmul.report.settings import facts
from hf_clmul.report.tables import group_tables, suite_tables
from hf_clmul.report.words import near_neighbours


def row_of(table, key):
    (found,) = [row for row in table.rows if row.key == key]
    return found


def drawn_quickly(results):
    """With one metric in a group, so that one figure is drawn."""
    for stage in results["stages"]:
        stage["log"] = None
        for group in stage["groups"].values():
            group["metrics"] = {"paraphrase_probability": group["metrics"]["paraphrase_probability"]}
    return results


def test_the_last_stage_has_its_interval_and_a_count_that_is_not_the_groups():
    forget, retain, _ = group_tables(fake_suites())
    assert row_of(forget, "answer_probability").note == ("0.077 to 0.172",)  # 0.1187 - 0.0412, 0.1187 + 0.0533
    assert row_of(retain, "rouge_l_recall").note == ("0.932 to 1.026", "n = 15")
    assert row_of(group_tables(fake_results())[0], "answer_probability").note == ()


def test_an_absent_metric_is_called_so_with_its_reason_and_is_no_zero():
    *_, held_out = group_tables(fake_suites())
    found = row_of(held_out, "paraphrase_probability")
    assert (found.values, found.note) == (("absent",) * 3, ())
    assert held_out.absent == (("Paraphrase probability", NO_PARAPHRASE),)


def test_metrics_that_are_absent_for_one_reason_stand_together():
    tofu, mia = suite_tables(fake_suites(referenced=False))
    assert tofu.absent == (("Forget quality", NO_REFERENCE),)
    together = "LOSS AUC, gap; Zlib AUC, gap; Min-k AUC, gap; Min-k++ AUC, gap; PrivLeak"
    assert mia.absent == ((together, NO_REFERENCE), ("Gradient norm AUC; Gradient norm AUC, gap", NO_NORMS))


def test_a_metric_that_is_absent_at_some_stages_names_them():
    results = fake_suites()
    entry = results["stages"][0]["suites"]["tofu"]
    entry["metrics"]["forget_quality"], entry["absent"]["forget_quality"] = None, "nothing is forgotten"
    tofu, _ = suite_tables(results)
    assert tofu.absent == (("Forget quality (before learning)", "nothing is forgotten"),)
    assert row_of(tofu, "forget_quality").values == ("absent", "0.019", "0.037")


def test_suites_have_a_table_each_with_intervals_and_counts():
    tofu, mia = suite_tables(fake_suites())
    assert row_of(tofu, "model_utility").values == ("0.310", "0.510", "0.710")
    assert row_of(tofu, "model_utility").note == ("n = 48",)
    assert row_of(mia, "loss_auc").note == ("0.300 to 0.530", "n = 32")
    assert row_of(mia, "loss_auc_gap").values[-1] == "0.030"
    assert suite_tables(fake_results()) == []


def test_the_page_shows_suites_intervals_and_reasons(tmp_path):
    page = page_of(tmp_path, drawn_quickly(fake_suites()))
    text = " ".join(page.text.split())
    heads = {cells(table[0])[-1] for table in page.tables[3:5]}
    assert heads == {"after unlearning two-persons"}  # no reference, no gap: suites have their own
    *_, utility, quality = [cells(row) for row in page.tables[3]]
    assert utility[-1] == "0.710 n = 48" and quality[1:] == ["0.000", "0.019", "0.037 n = 32"]
    assert cells(page.tables[4][1])[-1] == "0.410 0.300 to 0.530 n = 32"
    assert f"Absent: Paraphrase probability: {NO_PARAPHRASE}" in text
    assert "the 95 % interval over its questions" in text


def test_the_console_says_once_why_a_metric_is_absent_and_has_no_rows_of_it():
    results = fake_suites(referenced=False)
    for stage in results["stages"]:
        retain = stage["groups"]["retain"]
        retain["metrics"]["paraphrase_probability"] = None
        retain["absent"] = {"paraphrase_probability": NO_PARAPHRASE}
    text = printed(results_table(results), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert console_cells(text, "Model utility") == [["0.310", "0.510", "0.710"]]
    assert console_cells(text, "Zlib AUC, gap") == [] and "Gradient norm AUC" in text
    assert [row[2] for row in console_cells(text, "Paraphrase probability")] == ["0.099"]  # of forget alone
    told = " ".join(text[text.index("No figures") :].split())
    gaps = "LOSS AUC, gap; Zlib AUC, gap; Min-k AUC, gap; Min-k++ AUC, gap; PrivLeak"
    assert told == (
        "No figures of a model retrained without the forgotten data are recorded. "
        f"Absent: Paraphrase probability (Retain, Held out): {NO_PARAPHRASE} "
        f"Absent: Forget quality (Suite tofu); {gaps} (Suite mia): {NO_REFERENCE} "
        f"Absent: Gradient norm AUC; Gradient norm AUC, gap (Suite mia): {NO_NORMS}"
    )


def test_near_neighbours_are_named_with_who_chose_them(tmp_path):
    results = fake_pictures()
    told = "Near neighbours: nine (0.931) and one (0.910); chosen by similarity of the pipeline's text embeddings"
    assert near_neighbours(results) == f"{told}, which is in brackets."
    judged = dict(facts(tmp_path, results)["How pictures are judged"])
    assert judged["similarity"] == "nine 0.931, one 0.910, two 0.880" and judged["CLIP"] == "–"
    by_hand = copy.deepcopy(results)
    by_hand["judged"] |= {"near_from": "recipe", "similarity": None}
    assert near_neighbours(by_hand) == "Near neighbours: nine and one; chosen by the recipe."
    by_hand["judged"]["near"] = None
    assert near_neighbours(by_hand) is None and near_neighbours(fake_results()) is None


MEASURE = """<script>addEventListener("load", () => {
  const broken = [...document.images].filter(image => !image.complete || !image.naturalWidth).length;
  parent.postMessage(`${document.documentElement.scrollWidth} wide, ${broken} of ${document.images.length} broken`, "*");
})</script></body>"""
FRAME = """<!doctype html><title>-</title><iframe src="page.html" style="width: 390px; height: 9000px; border: 0"></iframe>
<script>addEventListener("message", message => { document.title = message.data })</script>"""


def test_a_narrow_window_does_not_scroll_sideways_and_misses_no_figure(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed to open the page with")
    (tmp_path / "run").mkdir()
    write_fake_audit(tmp_path / "run")
    page_of(tmp_path / "run", drawn_quickly(fake_suites()))
    html = (tmp_path / "run" / "report" / "report.html").read_text("utf-8")
    start = html.index('<meta http-equiv="Content-Security-Policy"')  # it forbids the script that measures
    html = html[:start] + html[html.index(">", start) + 1 :]
    (tmp_path / "page.html").write_text(html.replace("</body>", MEASURE), "utf-8")
    (tmp_path / "frame.html").write_text(FRAME, "utf-8")  # a window of its own has at least 500 pixels
    assert "390 wide, 0 of 6 broken" in opened(browser, tmp_path)


def opened(browser: str, folder: Path) -> str:
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
        f"--user-data-dir={folder}/profile",
    ]
    done = subprocess.run(
        [browser, *options, "--dump-dom", (folder / "frame.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    return done.stdout
