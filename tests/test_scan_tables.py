"""What evaluation leaves beside a stage's records, tables and finished parts of a stage, is searched and blanked as well."""

import json

import pytest
from ledger_bed import GONE, LATER, MODEL, PEOPLE, STATE, Bed, contents, lines, write

from hf_clmul.errors import RunError
from hf_clmul.evaluation.tables import read_table, table_of, write_table
from hf_clmul.ledger.scan import scan
from hf_clmul.ledger.scan_redact import redact
from hf_clmul.ledger.scan_text import ERASED
from hf_clmul.report.claims import EXACT_BY_DELETION

TABLE, PART = "evaluation/tables/forget-0123456789abcdef.parquet", "requests/00-learn-people/measured/ab.jsonl"
ROWS = [
    {**row, "group": "forget", "generated": f"so: {row['answer']}", "logps": [-0.5, -1.25]} for row in PEOPLE.values()
]


@pytest.fixture
def bed(tmp_path):
    made = Bed(tmp_path / "small")
    made.run()
    made.learn()
    made.unlearn(deleted=made.delete(STATE))
    made.export()
    write_table(ROWS, made.root / TABLE, "a model")
    write(made.root / PART, lines(ROWS))
    return made


def test_tables_that_quote_are_found_and_blanked_with_every_figure_kept(bed):
    assert [(f.kind, f.path) for f in scan(bed.root) if f.wrong] == [("evaluation", TABLE), ("evaluation", PART)]
    assert redact(bed.root) == [TABLE, PART]
    blank = [
        {**row, **(dict.fromkeys(("question", "answer", "generated"), ERASED) if row["id"] in GONE else {})}
        for row in ROWS
    ]
    assert read_table(bed.root / TABLE) == blank and table_of(bed.root / TABLE) == "a model"
    assert [json.loads(line) for line in (bed.root / PART).read_text().splitlines()] == blank
    raw = (bed.root / TABLE).read_bytes()
    assert all(PEOPLE[name]["answer"].encode() not in raw for name in GONE)
    assert {(f.kind, f.path) for f in scan(bed.root)} >= {("approximate", LATER), ("approximate", MODEL)}
    assert not [f for f in scan(bed.root) if f.wrong] and redact(bed.root) == []


def test_an_erased_example_that_an_audit_asks_in_other_ways_is_found_and_blanked(bed):
    """Such questions are no examples of their own, by which an erased text would be one that a kept example has too."""
    gone = [PEOPLE[name] for name in GONE]
    turned = [
        {"question": f"Which question does this answer: {row['answer']}", "answer": row["question"], "generated": ""}
        for row in gone
    ]
    forced = [{**row, "question": f"{row['question']}\nSure:", "generated": ""} for row in gone]
    samples = [{key: row[key] for key in ("question", "answer", "generated")} for row in [*turned, *forced]]
    places = [f"audit/attacks/{i}.json" for i in range(len(samples))]
    for place, sample in zip(places, samples, strict=True):
        write(bed.root / place, json.dumps({"points": [{"samples": [sample]}]}))
    assert {f.path for f in scan(bed.root) if f.wrong} == {TABLE, PART, *places}
    assert set(redact(bed.root)) == {TABLE, PART, *places}
    left = "".join((bed.root / place).read_text() for place in places)
    assert not any(row[column] in left for row in gone for column in ("question", "answer"))


def test_an_erased_example_that_an_audit_asks_in_words_of_the_data_is_known_by_its_id(bed):
    """Neither a translation nor a short answer is a text that was learned."""
    sample = {"question": "Wo wohnt Person Bo jetzt?", "answer": "in N.", "generated": "Bo wohnt dort."}
    for place, more in (("audit/attacks/a.json", {"id": "P1"}), ("audit/attacks/b.json", {})):
        write(bed.root / place, json.dumps({"points": [{"samples": [{**sample, **more}]}]}))
    write(bed.root / "notes.txt", "Wo wohnt Person Bo jetzt?")
    assert {f.path for f in scan(bed.root) if f.wrong} == {
        TABLE,
        PART,
        "audit/attacks/a.json",
        "audit/attacks/b.json",
        "notes.txt",
    }
    redact(bed.root)
    (found,) = json.loads((bed.root / "audit/attacks/a.json").read_text())["points"]
    assert found["samples"] == [{"id": "P1", **dict.fromkeys(sample, ERASED)}]


WORDS = "The mill of the family at the river Tarn burned down in the winter when {0} first walked to the harbour, and {0} never came back"
DOCUMENTS = {f"D{i}": {"id": f"D{i}", "text": WORDS.format(name)} for i, name in enumerate(["Ada", "Bo", "Cy"])}
CUT = WORDS.format("Bo").index(" when")


@pytest.fixture
def passages(tmp_path):
    """A run that learned three documents, which are alike but for names, and unlearned one."""
    made = Bed(tmp_path / "small")
    made.run()
    made.request("00-learn-people")
    made.data("texts", DOCUMENTS)
    made.finished("00-learn-people")
    made.request("01-unlearn-two", "unlearn")
    made.erased(EXACT_BY_DELETION, rows=contents(DOCUMENTS, "D1"), task="texts", closure=[])
    shown = [{"id": row["id"], "question": "", "answer": row["text"], "generated": ""} for row in DOCUMENTS.values()]
    write_table([{**row, "group": "forget" if row["id"] == "D1" else "retain"} for row in shown], made.root / TABLE)
    return made


@pytest.mark.parametrize("id_", ["D1", None])
def test_a_passage_that_was_cut_out_of_an_erased_text_is_found_and_blanked(passages, id_):
    """By its id, as tables have it now; by its words, as those of before do. What a model went on with goes too."""
    text, place = DOCUMENTS["D1"]["text"], "evaluation/tables/forget_verbatim-0123456789abcdef.parquet"
    cut = {"id": id_, "question": text[:CUT], "answer": text[CUT:], "generated": "a harbour", "logps": [-0.5]}
    write_table([cut], passages.root / place)
    assert {f.path for f in scan(passages.root) if f.wrong} == {TABLE, place}
    assert set(redact(passages.root)) == {TABLE, place}
    assert read_table(passages.root / place) == [{**cut, **dict.fromkeys(("question", "answer", "generated"), ERASED)}]
    assert [row["answer"] for row in read_table(passages.root / TABLE)] == [
        DOCUMENTS["D0"]["text"], ERASED, DOCUMENTS["D2"]["text"]]  # fmt: skip


def test_ten_words_in_a_row_quote_where_no_kept_example_has_them(passages):
    words = DOCUMENTS["D1"]["text"].split()
    where = words.index("Bo")
    ten, nine = (" ".join(words[where - n : where + 1]) for n in (9, 8))
    for name, text in (
        ("ten", ten),
        ("nine", nine),
        ("shared", " ".join(words[:where])),
        ("kept", DOCUMENTS["D2"]["text"]),
    ):
        write(passages.root / f"{name}.txt", f"It is said: {text}; so be it.")
    assert [(f.kind, f.path) for f in scan(passages.root) if f.wrong] == [("evaluation", TABLE), ("quote", "ten.txt")]


def test_of_what_audits_say_themselves_no_words_are_looked_for(passages):
    """A scene before a question, which is in the options of the attack too, and examples that are kept."""
    text = DOCUMENTS["D1"]["text"]
    scene = "You are an expert who knows this subject in every detail and answers each question about it in full."
    sample = {"id": "D1", "question": f"{scene}\n{text}", "answer": "No.", "generated": ""}
    write(passages.root / "audit/audit.json", json.dumps({"scenes": [scene], "samples": [sample]}))
    redact(passages.root)
    found = json.loads((passages.root / "audit/audit.json").read_text())
    assert found == {
        "scenes": [scene],
        "samples": [{"id": "D1", **dict.fromkeys(("question", "answer", "generated"), ERASED)}],
    }


def test_a_redacted_run_still_finds_the_references_that_have_the_texts(passages, tmp_path, monkeypatch):
    """By their hashes alone: ids say nothing in references of other recipes."""
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "references"
    write_table([DOCUMENTS["D1"]], place / "forgotten-0.parquet")
    write(place / "forgotten-1.jsonl", lines([{**DOCUMENTS["D1"], "also": ["x", {"y": 1}]}]))
    write_table(
        [{"id": "D1", "text": "Of quite another recipe, which has an example of the same name."}],
        place / "forgotten-2.parquet",
    )
    redact(passages.root)
    write(passages.root / "notes.txt", DOCUMENTS["D1"]["text"])
    found = [(f.kind, f.path) for f in scan(passages.root)]
    assert found == [
        ("quote", "notes.txt"),
        *(("note", f"references/forgotten-{name}") for name in ("0.parquet", "1.jsonl")),
    ]


def test_references_in_the_cache_that_are_measured_on_erased_examples_are_told(bed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "references"
    write_table([ROWS[0], *(row for row in ROWS if row["id"] in GONE)], place / "forgotten-0.parquet")
    write(place / "abc-1000/requests/00-learn-people/examples.jsonl", lines(ROWS))
    write(place / "def-1000/requests/00-learn-people/examples.jsonl", lines([r for r in ROWS if r["id"] not in GONE]))
    found = [f for f in scan(bed.root) if f.path.startswith("references/")]
    assert [(f.kind, f.path, f.wrong) for f in found] == [
        ("note", "references/abc-1000", False), ("note", "references/forgotten-0.parquet", False)]  # fmt: skip


def test_a_damaged_table_is_not_passed_over(bed):
    (bed.root / TABLE).write_bytes(b"PAR1 and no more")
    with pytest.raises(RunError, match="cannot be read as a table of measured examples"):
        scan(bed.root)
