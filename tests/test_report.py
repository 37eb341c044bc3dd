"""The report: what stands in it equals the record, nothing is fetched, nothing hostile gets through."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.image
import pytest
from fake_results import METRICS, RECIPE, REFERENCE, VALUES, fake_results, fake_stream, write_fake_run

from hf_clmul.errors import RunError
from hf_clmul.report import words as report_words
from hf_clmul.report.page import write_report
from hf_clmul.report.settings import facts

HOSTILE = "<script>alert('$x^{$')</script> {{ 7 * 7 }} \"quoted\" & <img src=x onerror=alert(1)>"
SMALL = ("answer_probability", "rouge_l_recall", "fluency")


class Page(HTMLParser):
    """What the tests ask about: tags with attributes, tables as rows of cells, and the text of the body."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._in_body = self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += " "
        self._in_body |= tag == "body"
        self._in_cell |= tag in ("td", "th")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self._in_cell &= tag not in ("td", "th")

    def handle_data(self, data):
        if self._in_body:
            self.text += data
        if self._in_cell:
            self.tables[-1][-1][-1] += data

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def cells(row):
    return [" ".join(cell.split()) for cell in row]


def small_results():
    """Three metrics and no logs: a page that is drawn in a moment."""
    results = fake_results()
    for stage in results["stages"]:
        stage["log"] = None
        for group in stage["groups"].values():
            group["metrics"] = {name: group["metrics"][name] for name in SMALL}
    return results


def page_of(folder, results):
    return Page(write_report(write_fake_run(folder, results)).read_text("utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_fake_run(tmp_path_factory.mktemp("run"))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def html(run):
    return (run / "report" / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_figures_lie_beside_the_page_as_png(run):
    expected = {f"bars-{metric}.png" for metric in METRICS}
    expected |= {f"00-learn-people-{kind}.png" for kind in ("losses", "gradients")}
    expected |= {f"01-unlearn-two-persons-{kind}.png" for kind in ("losses", "trade-off", "gradients", "conflict")}
    found = {path.name: path for path in (run / "report").glob("*.png")}
    assert set(found) == expected
    for path in found.values():
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 500
        assert pixels[..., :3].std() > 0.05, f"{path.name} is blank"


def test_the_page_holds_every_figure_for_light_and_dark(run, page):
    sources = [image["src"] for image in page.attributes("img")]
    assert len(sources) == 2 * len(list((run / "report").glob("*.png")))
    drawn = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    corners = [matplotlib.image.imread(io.BytesIO(png))[0, 0, :3].mean() for png in drawn]
    classes = [image["class"] for image in page.attributes("img")]
    assert [corner > 0.9 for corner in corners] == [name == "on-light" for name in classes]
    assert drawn[0] == (run / "report" / "bars-answer_probability.png").read_bytes()


def test_the_page_fetches_nothing_and_runs_nothing(html, page):
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), value
    assert "@import" not in html
    assert "url(" not in html
    assert not re.search(r"https?://", html)


def test_every_link_of_the_page_has_its_target(page):
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"][1:] for link in page.attributes("a")} <= ids


def test_it_can_be_read_without_seeing_it(page):
    assert page.attributes("html") == [{"lang": "en"}]
    assert len(page.attributes("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert {cell["scope"] for cell in page.attributes("th")} == {"col", "row"}
    assert all(image["alt"] for image in page.attributes("img"))
    alt = page.attributes("img")[0]["alt"]
    assert "0.974 after learning people, 0.119 after unlearning two-persons, reference 0.109" in alt


def test_the_tables_hold_the_values_of_the_record(page):
    assert len(page.tables) == 3
    for table, group in zip(page.tables, ("forget", "retain", "held_out"), strict=True):
        head, *rows = [cells(row) for row in table]
        assert head == [
            "Metric",
            "before learning n = 16",
            "after learning people n = 16",
            "after unlearning two-persons n = 16",
            "reference",
            "gap",
        ]
        for i, row in enumerate(rows):
            values = [VALUES[stage][group][i] for stage in VALUES]
            mean = REFERENCE[group][i]
            assert row[1:4] == [f"{value:.3f}" for value in values]
            assert row[4] == f"{mean:.3f} ± 0.012"
            assert float(row[5].replace("−", "-")) == pytest.approx(values[-1] - mean, abs=0.00051)
        assert [row[0].split(" ")[0] for row in rows] == [
            "Answer", "ROUGE-L", "Paraphrase", "Truth", "Extraction", "Exact", "Fluency",
        ]  # fmt: skip


@pytest.mark.parametrize(
    "part",
    [
        "hf-clmul run recipes/quickstart.yaml",
        "5b1f" * 16,  # the recipe
        "c0ffee" * 10 + "abcd",  # the base model
        "bead" * 16,  # the head of the ledger
        "5 min 12 s",
        "An Invented Processor @ 2.40GHz",
        "8.0 GiB",
        "3.0 GiB",
        "134,515,008",
        "1,628,160",
        "2.13.0",
        "seed 0",
        "Source: docs/results.md: retrained without P07 and P11, seeds 0-2",
        "approximate; 16 forget examples, 80 retain examples; 40 steps in 1 min 29 s",
        "adapter, loaded back and compared: largest difference of outputs 0, allowed 0",
        RECIPE,
    ],
)
def test_the_page_names_what_made_it(page, part):
    assert part in page.text


def test_the_summary_of_the_page_is_that_of_the_record(page):
    assert " ".join(report_words.summary(fake_results())) in page.text


def test_the_answers_of_all_stages_stand_together(page):
    text = " ".join(page.text.split())
    for part in (
        "Which Kenyan town is the birthplace of Wanjeri Muthokoi? True answer: Wanjeri Muthokoi was born in",
        "before learning I'm not sure which place you mean.",
        "after unlearning two-persons Wanjeri Muthokoi was born in Kisumu",
    ):
        assert part in text


def test_hostile_text_stays_text(tmp_path):
    results = small_results()
    results["name"] = results["command"] = results["reference"]["source"] = HOSTILE
    results["model"]["path"] = results["hardware"]["cpu"] = HOSTILE
    for stage in results["stages"]:
        stage["title"] = stage["how"] = HOSTILE
        for group in stage["groups"].values():
            group["samples"] = [{"question": HOSTILE, "answer": HOSTILE, "generated": HOSTILE}]
    write_fake_run(tmp_path, results)
    (tmp_path / "recipe.yaml").write_text(HOSTILE)
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert not page.attributes("script")
    assert all(image["src"].startswith("data:image/png") for image in page.attributes("img"))
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    assert page.text.count(HOSTILE) > 20


def test_what_is_missing_is_a_dash(tmp_path):
    results = small_results()
    results["peak_memory_bytes"] = results["model"]["sha256"] = results["finished"] = None
    forget = [stage["groups"]["forget"]["metrics"] for stage in results["stages"]]
    forget[0]["answer_probability"] = None
    del forget[1]["answer_probability"]
    del results["reference"]["groups"]["forget"]["rouge_l_recall"]
    results["reference"]["groups"]["forget"]["answer_probability"]["std"] = None
    del results["reference"]["groups"]["held_out"]
    del results["stages"][0]["groups"]["held_out"]
    page = page_of(tmp_path, results)
    forget_rows, _, held_out = [[cells(row) for row in table] for table in page.tables]
    assert forget_rows[1][1:] == ["–", "–", "0.119", "0.109", "+0.009"]
    assert forget_rows[2][1:] == ["0.222", "0.986", "0.332", "–", "–"]
    assert held_out[0][1] == "before learning n = –"
    assert held_out[1][1:] == ["–", "0.071", "0.071"]  # no columns for a reference that has no figure of the group
    facts = re.findall(r"(SHA-256|peak memory of the run|finished) +(–)", page.text)
    assert facts == [("finished", "–"), ("SHA-256", "–"), ("peak memory of the run", "–")]
    assert "is missing or empty" not in page.text and "No curves" in page.text


def test_without_a_reference_it_says_so(tmp_path):
    results = small_results()
    results["reference"] = None
    page = page_of(tmp_path, results)
    assert cells(page.tables[0][0])[-1] == "after unlearning two-persons n = 16"
    assert "No retrained reference is recorded for this run" in page.text
    assert "±" not in page.text
    assert page.text.count("unknown") == 2  # the two checks that need the reference


def test_an_unfinished_run_shows_what_there_is(tmp_path):
    results = small_results()
    results["status"], results["finished"], results["seconds"] = "running", None, None
    results["stages"] = results["stages"][:1]
    page = page_of(tmp_path, results)
    assert "This run is not finished" in page.text
    assert "No request has been finished yet." in page.text
    assert len(page.tables) == 3
    assert "Training" not in page.text


def test_a_log_cut_short_by_a_kill_is_read_as_far_as_it_goes(tmp_path):
    results = small_results()
    results["stages"][1]["log"] = "requests/00-learn-people/log.jsonl"
    results["stages"][2]["log"] = "requests/01-unlearn-two-persons/log.jsonl"
    write_fake_run(tmp_path, results)
    first, second = (tmp_path / stage["log"] for stage in results["stages"][1:])
    # Step 2 was logged, the run was killed and trained it again; then it was killed inside a line.
    lines = [
        {"step": 1, "loss/learn/nll": 3.0},
        {"step": 2, "loss/learn/nll": 9.0},
        {"step": 2, "loss/learn/nll": 2.0},
    ]
    first.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "loss/le')
    second.unlink()
    page = Page(write_report(tmp_path).read_text("utf-8"))
    alts = [image["alt"] for image in page.attributes("img")]
    assert "after learning people: losses, curves. loss/learn/nll 3.000 at step 1, 2.000 at step 2." in alts
    assert "No curves: requests/01-unlearn-two-persons/log.jsonl holds none." in page.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "results.json is not there. Give the folder of a run"),
        ('{"schema": 1, "na', "is not valid JSON"),
        ('{"schema": 2}', "expected `schema` 1, found 2"),
        ("[]", "expected `schema` 1, found None"),
        (
            json.dumps(fake_results() | {"stages": []}),
            "results.json has no stage that was measured. Delete it and give",
        ),
    ],
)
def test_a_folder_without_a_usable_record_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(RunError, match=re.escape(message)):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_damaged_files_beside_the_record_keep_no_report_from_being_written(tmp_path):
    write_fake_run(tmp_path, small_results())
    for damaged in (b"\xff\n", b"[]\n", b'{"n": 1}\n'):
        (tmp_path / "ledger.jsonl").write_bytes(damaged)
        assert dict(facts(tmp_path, fake_results())["Run"])["ledger head"] == "–"
    (tmp_path / "recipe.yaml").write_bytes(b"name: \xff")
    for log in tmp_path.glob("requests/*/log.jsonl"):
        log.write_bytes(b"[]\n{}\n\xff\n")
    assert "name: \ufffd" in write_report(tmp_path).read_text("utf-8")


def test_of_a_long_stream_the_last_requests_are_drawn(tmp_path):
    results = small_results()
    base, learn, unlearn = results["stages"]
    log = "requests/00-learn-people/log.jsonl"
    more = [dict(learn, stage=f"{i:02d}-learn-t{i}", title=f"after learning t{i}", log=log, steps=2) for i in range(11)]
    results["stages"] = [base, *more, unlearn]
    page = page_of(tmp_path, results)
    drawn = {path.name for path in (tmp_path / "report").glob("*-losses.png")}
    assert drawn == {f"{i:02d}-learn-t{i}-losses.png" for i in range(4, 11)}  # and the unlearn request, without a log
    assert (
        page.text.count("only the last 8 requests are drawn; requests/00-learn-people/log.jsonl has the numbers") == 4
    )
    assert "5 stages after the first one are left out here" in page.text
    alt = page.attributes("img")[0]["alt"]
    assert "0.061 before learning, 0.974 after learning t5, " in alt and "after learning t4" not in alt
    assert len(page.tables[0][0]) == 1 + 13 + 2  # the tables have all stages


def small_stream():
    results = fake_stream()
    for stage in results["stages"]:
        stage["log"] = None
        for group in stage["groups"].values():
            group["metrics"] = {"fluency": group["metrics"]["fluency"]}
    return results


def test_a_stream_has_its_matrix_metrics_and_claims(tmp_path):
    page = page_of(tmp_path, small_stream())
    matrix, metrics, unlearned = page.tables[3:]
    assert [cells(row) for row in matrix] == [
        ["After", "people task", "notes task", "two-persons part of people"],
        ["before learning", "0.231", "0.141", "0.222"],
        ["learn people", "0.982*", "0.140", "0.986*"],
        ["unlearn two-persons", "0.973", "–", "0.332†"],
        ["learn notes", "0.961", "0.955*", "0.357†"],
        ["unlearn no-notes", "0.973", "0.140†", "0.332†"],
    ]
    assert cells(metrics[3]) == ["Backward transfer (BWT)", "−0.009", "mean over older tasks j of R[n][j] − R[l_j][j]"]
    assert cells(unlearned[1]) == ["two-persons", "approximate", "two-persons", "0.986", "0.332", "0.332", "+0.025"]
    assert cells(unlearned[2])[:3] == ["no-notes", "exact by deletion", "notes"]
    assert "Exact by deletion means that everything that was made from the examples was deleted," in page.text
    forgotten = [cell for cell in page.attributes("td") if cell.get("class") == "forgotten"]
    assert len(forgotten) == 4
    assert (tmp_path / "report" / "stream.png").is_file()
    assert {"#stream"} < {link["href"] for link in page.attributes("a")}
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes} <= ids


def test_hostile_names_of_a_stream_stay_text(tmp_path):
    results = small_stream()
    for column in results["stream"]["columns"]:
        column["name"] = column["task"] = HOSTILE
    for stage in results["stages"]:
        stage["title"] = stage["how"] = HOSTILE
        stage["stage"] = f"01-{stage['kind']}-{HOSTILE}"
    page = page_of(tmp_path, results)
    assert not page.attributes("script")
    assert all(image["src"].startswith("data:image/png") for image in page.attributes("img"))
    assert cells(page.tables[3][0]) == ["After", f"{HOSTILE} task", f"{HOSTILE} task", f"{HOSTILE} part of {HOSTILE}"]
    assert cells(page.tables[3][2])[0] == f"learn {HOSTILE}"


def test_a_record_without_a_stream_has_no_such_section(page):
    assert "The stream" not in page.text
    assert "#stream" not in {link["href"] for link in page.attributes("a")}


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, hf_clmul.report.page, hf_clmul.console, hf_clmul.report.model_card;"
        "print({'torch', 'matplotlib', 'numpy', 'jinja2', 'rich', 'ruamel'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
