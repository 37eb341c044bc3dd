"""What evaluation leaves beside a stage's records, tables and finished parts of a stage, is searched and blanked as well."""

import json

import pytest
from ledger_bed import GONE, LATER, MODEL, PEOPLE, STATE, Bed, lines, write

from hf_clmul.errors import RunError
from hf_clmul.evaluation.tables import read_table, write_table
from hf_clmul.ledger.scan import scan
from hf_clmul.ledger.scan_redact import redact
from hf_clmul.ledger.scan_text import ERASED

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
    write_table(ROWS, made.root / TABLE)
    write(made.root / PART, lines(ROWS))
    return made


def test_tables_that_quote_are_found_and_blanked_with_every_figure_kept(bed):
    assert [(f.kind, f.path) for f in scan(bed.root) if f.wrong] == [("evaluation", TABLE), ("evaluation", PART)]
    assert redact(bed.root) == [TABLE, PART]
    blank = [
        {**row, **(dict.fromkeys(("question", "answer", "generated"), ERASED) if row["id"] in GONE else {})}
        for row in ROWS
    ]
    assert read_table(bed.root / TABLE) == blank
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
