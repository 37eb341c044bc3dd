"""A scan finds what still descends from erased rows, by lineage, content or text, and nothing else; redaction blanks
texts and keeps figures."""

import json

import pytest
from ledger_bed import GONE, LATER, MODEL, PEOPLE, STATE, Bed, contents, lines, write
from typer.testing import CliRunner

from hf_clmul.cli import app
from hf_clmul.errors import RunError
from hf_clmul.ledger import chain as ledger
from hf_clmul.ledger import records
from hf_clmul.ledger.key import key_path
from hf_clmul.ledger.scan import scan
from hf_clmul.ledger.scan_redact import redact
from hf_clmul.ledger.scan_text import ERASED, Erased
from hf_clmul.report.claims import FILTER

EXACT = "exact by deletion"


@pytest.fixture
def bed(tmp_path):
    made = Bed(tmp_path / "small")
    made.run()
    made.learn()
    return made


def kinds(bed, **options):
    return [(finding.kind, finding.path) for finding in scan(bed.root, **options)]


def approximately(bed):
    """As a run leaves it that clears up behind itself."""
    bed.unlearn(deleted=bed.delete(STATE))
    bed.export()


# ---- artefacts -----------------------------------------------------------------------------------------------


def test_before_anything_is_erased_there_is_nothing_to_find(bed):
    bed.evaluation()
    assert scan(bed.root) == []


def test_what_was_trained_on_is_approximate_and_no_error(bed):
    approximately(bed)
    found = scan(bed.root, data=data_file(bed))
    assert [(finding.kind, finding.path, finding.wrong) for finding in found] == [
        ("approximate", LATER, False), ("approximate", MODEL, False)]  # fmt: skip
    assert str(found[0]) == (
        f"approximate: {LATER}: adapter that descends from 2 examples which 'two' unlearned approximately; see the audit"
    )


def test_a_state_from_before_an_approximate_erasure_is_left_over(bed):
    bed.unlearn()
    assert kinds(bed, data=data_file(bed)) == [("leftover", STATE), ("approximate", LATER)]
    assert str(scan(bed.root)[0]) == (
        f"leftover: {STATE}: adapter that descends from 2 examples which 'two' erased later; delete it"
    )


@pytest.mark.parametrize("kind", ["teacher", "cache"])
def test_what_an_approximate_erasure_needed_only_itself_must_go(bed, kind):
    bed.request("01-unlearn-two", "unlearn")
    bed.derived("targets", kind, STATE)
    bed.unlearn(deleted=bed.delete(STATE))
    assert kinds(bed, data=data_file(bed)) == [("leftover", "targets"), ("approximate", LATER)]


def test_after_an_exact_erasure_nothing_that_descends_may_stay(bed):
    bed.derived("memory", "memory", "data/people")
    bed.export(STATE)
    bed.request("01-unlearn-two", "unlearn")
    bed.erased(EXACT, closure=[STATE, "memory", MODEL])
    data = data_file(bed)
    assert kinds(bed, data=data) == [("leftover", STATE), ("leftover", "memory"), ("leftover", MODEL)]
    for artefact in (STATE, "memory", MODEL):
        bed.delete(artefact)
    assert kinds(bed, data=data) == []


def test_parts_trained_again_are_clean(bed):
    gone = bed.delete(STATE)
    bed.unlearn("exact by partial retraining", deleted=gone)
    bed.export()
    assert kinds(bed, data=data_file(bed)) == []


def test_a_filter_says_so_and_is_no_error(bed):
    bed.unlearn(FILTER)
    bed.evaluation()
    found = scan(bed.root)
    assert [(finding.kind, finding.path, finding.wrong) for finding in found] == [
        ("filter", STATE, False), ("filter", LATER, False)]  # fmt: skip


def test_what_was_lifted_may_be_there(bed):
    bed.unlearn()
    bed.evaluation()
    assert scan(bed.root) != []
    bed.add("lifted", **records.lifted_record("two", "02-learn-people-2"))
    assert scan(bed.root) == []


def test_a_copy_of_a_deleted_file_is_found_under_any_name(bed):
    weights = bed.root / STATE / "adapter_model.safetensors"
    content = weights.read_bytes()
    bed.derived("adapters/other", "adapter")
    bed.request("01-unlearn-two", "unlearn")
    bed.erased(EXACT, deleted=bed.delete(STATE))
    (bed.root / "adapters/other/again.safetensors").write_bytes(content)
    found = scan(bed.root, data=data_file(bed))
    assert [str(finding) for finding in found] == [
        f"copy: adapters/other/again.safetensors: has the content of {STATE}/adapter_model.safetensors, which 'two' deleted; "
        "delete it"
    ]


def test_a_deleted_file_whose_like_was_made_again_or_stayed_is_no_copy(bed):
    same = (bed.root / STATE / "adapter_model.safetensors").read_text()
    bed.derived("adapters/other", "adapter")
    digest = write(bed.root / "adapters/other/adapter_model.safetensors", same)
    bed.request("01-unlearn-two", "unlearn")
    bed.erased(EXACT, deleted=bed.delete(STATE), surviving={"adapters/other/adapter_model.safetensors": digest})
    assert kinds(bed, data=data_file(bed)) == []


def test_weights_that_the_ledger_does_not_name_are_found_once_a_folder(bed):
    approximately(bed)
    for name in ("backup/a.safetensors", "backup/b.safetensors", "old.bin"):
        write(bed.root / name, name)
    assert kinds(bed, data=data_file(bed))[2:] == [("unrecorded", "backup"), ("unrecorded", "old.bin")]


def test_a_checkpoint_of_a_finished_request_is_left_over_and_of_one_at_work_is_not(bed):
    approximately(bed)
    write(bed.root / "requests/00-learn-people/checkpoint-3/model.safetensors", "x")
    bed.request("02-learn-notes")
    write(bed.root / "requests/02-learn-notes/checkpoint-3/model.safetensors", "y")
    leftovers = [path for kind, path in kinds(bed) if kind not in ("approximate", "note")]
    assert leftovers == ["requests/00-learn-people/checkpoint-3"]


# ---- texts ---------------------------------------------------------------------------------------------------


def data_file(bed, rows=None):
    """A file outside of the run folder that holds all rows, so that their texts are known."""
    path = bed.root.parent / "rows.jsonl"
    write(path, lines(list((rows or PEOPLE).values())))
    return path


def test_evaluation_records_that_quote_are_a_class_of_their_own(bed):
    approximately(bed)
    bed.evaluation()
    evaluation = [finding for finding in scan(bed.root) if finding.kind == "evaluation"]
    assert [finding.path for finding in evaluation] == [
        "base/examples.jsonl", "base/result.json", "report/report.html",
        "requests/00-learn-people/examples.jsonl", "requests/00-learn-people/result.json",
        "requests/01-unlearn-two/examples.jsonl", "requests/01-unlearn-two/result.json", "results.json"]  # fmt: skip
    assert {finding.what for finding in evaluation} == {"evaluation records quote 2 erased examples"}
    assert all(finding.wrong for finding in evaluation)


@pytest.mark.parametrize(("name", "text"), [
    ("notes.md", "He says:\n  Bo lives in\n  Nyahururu. So be it."),
    ("notes.txt", "Where does person Bo live now?"),
    ("deep/page.html", "<p>Di lives in T&oacute;rshavn &amp; V&aacute;gar.</p>"),
    ("deep/page2.htm.html", "<p>Di lives in Tórshavn &amp; V&#225;gar.</p>"),
    ("a.json", json.dumps({"x": [{"y": "Di lives in Tórshavn & Vágar."}]})),
    ("b.jsonl", json.dumps(["no"]) + "\n" + json.dumps({"said": "(Bo lives in Nyahururu.)"}) + "\n"),
    ("half.jsonl", '{"said": "Bo lives in Nyahururu."'),
    ("c.yaml", "text: 'Bo lives in Nyahururu.'"),
    ("d.csv", 'id,text\n1,"Bo lives in Nyahururu."\n'),
    ("broken.json", '{"text": "Bo lives in Nyahururu."'),
])  # fmt: skip
def test_a_file_that_quotes_an_erased_text_is_found(bed, name, text):
    approximately(bed)
    write(bed.root / name, text)
    found = scan(bed.root, data=data_file(bed))[2:]
    assert [str(finding) for finding in found] == [
        f"quote: {name}: quotes 1 erased example; delete the file, or the texts in it"
    ]


@pytest.mark.parametrize(("name", "text"), [
    ("notes.md", "Ada lives in Odeceixe. Where does person Cy live now?"), ("short.txt", "Bo, Nyahururu, lives"),
    ("image.png", "Bo lives in Nyahururu."), ("words.txt", "Nyahururu lives in Bo."),
])  # fmt: skip
def test_a_file_that_quotes_no_erased_text_is_not_found(bed, name, text):
    approximately(bed)
    write(bed.root / name, text)
    assert len(scan(bed.root, data=data_file(bed))) == 2


def test_a_text_that_a_kept_example_has_too_is_no_quotation_alone(bed):
    """Same prompts, other answers: the prompt belongs to the kept example, the short label to many."""
    rows = {
        "C0": {"id": "C0", "question": "Where is my new card?", "answer": "card_arrival"},
        "C1": {"id": "C1", "question": "Where is my new card?", "answer": "lost_card"},
    }
    bed.data("cards", rows)
    bed.erased(EXACT, rows=contents(rows, "C1"), deleted=bed.delete(STATE))
    data = data_file(bed, rows)
    write(bed.root / "notes.txt", "Where is my new card? It is a card_arrival.")
    assert kinds(bed, data=data) == []
    write(bed.root / "notes.txt", "Where is my new card? It is a lost_card.")
    assert kinds(bed, data=data) == [("quote", "notes.txt")]


def test_texts_that_are_all_those_of_kept_examples_quote_nothing(bed):
    rows = {
        name: {"id": name, "question": question, "answer": answer}
        for name, question, answer in [
            ("C0", "Where is my new card?", "card_arrival"), ("C1", "Where is my new card?", "lost_card"),
            ("C2", "Somebody has my card!", "lost_card")]}  # fmt: skip
    bed.data("cards", rows)
    bed.erased(EXACT, rows=contents(rows, "C1"), deleted=bed.delete(STATE))
    write(bed.root / "notes.txt", "Where is my new card? card_arrival. Somebody has my card! lost_card.")
    assert kinds(bed, data=data_file(bed, rows)) == []


def test_a_kept_example_is_not_taken_for_an_erased_one_by_another_file_s_id(bed):
    bed.unlearn(EXACT, deleted=bed.delete(STATE))
    bed.derived(LATER, "adapter")
    data = data_file(bed, {"x": {**PEOPLE["P0"], "id": "P1"}})
    write(bed.root / "notes.txt", PEOPLE["P0"]["answer"])
    assert kinds(bed, data=data) == [("note", "")]


def test_the_memory_may_not_hold_erased_rows(bed):
    approximately(bed)
    memory = bed.root / "memory/rows.jsonl"
    write(memory, lines([{**row, "task": "people"} for row in PEOPLE.values()]))
    assert [str(f) for f in scan(bed.root)[2:]] == [
        "leftover: memory/rows.jsonl: the memory holds 2 erased examples; delete the rows, or the memory"
    ]
    write(memory, lines([{**row, "task": "people"} for name, row in PEOPLE.items() if name not in GONE]))
    assert [(f.kind, f.path) for f in scan(bed.root, data=data_file(bed))[2:]] == []


def test_conversations_are_known_by_their_ids_where_they_are_shown_otherwise(bed):
    def talk(n):
        said = [("user", f"Number {n}?"), ("assistant", f"It is {n * n * 1001}.")]  # too short to be searched for alone
        return {"id": f"T{n}", "messages": [{"role": role, "content": text} for role, text in said]}

    rows = {f"T{n}": talk(n) for n in range(3)}
    bed.data("talks", rows)
    bed.erased(EXACT, rows=contents(rows, "T1"), deleted=bed.delete(STATE))
    shown = {
        n: {"id": n, "question": m["messages"][0]["content"], "answer": m["messages"][1]["content"]}
        for n, m in rows.items()
    }
    bed.evaluation(shown, ("T1",))
    sample = {key: shown["T1"][key] for key in ("question", "answer")}
    write(bed.root / "a.json", json.dumps(sample))  # read before the row with the id is met
    write(bed.root / "notes.txt", "Number 1? It is 1001.")
    quotes = [finding.path for finding in scan(bed.root) if finding.kind == "quote"]
    assert quotes == ["a.json", "notes.txt"]
    for name in quotes:
        (bed.root / name).unlink()
    assert {(f.kind, f.what) for f in scan(bed.root)} == {
        ("evaluation", "evaluation records quote 1 erased example")}  # fmt: skip
    redact(bed.root)
    assert kinds(bed, data=None) == [("note", "")]
    results = json.loads((bed.root / "results.json").read_text())
    assert results["stages"][0]["groups"]["forget"]["samples"] == [
        dict.fromkeys(("question", "answer", "generated"), ERASED)
    ]


def test_an_id_that_a_kept_example_has_too_names_nobody(bed):
    def talk(text):
        return {
            "id": "same",
            "messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": text}],
        }

    gone, kept = {"same": talk("This is the one that must go.")}, {"same": talk("This is the one that may stay.")}
    bed.data("one", gone)
    bed.data("two", kept)
    bed.erased(EXACT, rows=contents(gone), deleted=bed.delete(STATE))
    bed.evaluation({"same": {"question": "Well?", "answer": "This is the one that may stay."}}, ())
    assert kinds(bed) == [("note", "")]


def test_what_no_file_holds_in_plain_is_said_to_be_unsearched(bed):
    approximately(bed)
    note = scan(bed.root)[-1]
    assert not note.wrong
    assert str(note) == (
        "note: the texts of 2 erased examples are nowhere in plain, so no file was searched for them; --data FILE "
        "names a file that has them"
    )


def test_without_the_key_only_artefacts_are_looked_for_and_it_is_said(bed):
    bed.unlearn()
    bed.evaluation()
    key_path(bed.path).unlink()
    found = scan(bed.root)
    assert [finding.kind for finding in found] == ["leftover", "approximate", "note"]
    assert "the ledger is anonymous" in str(found[-1])
    with pytest.raises(RunError, match="the ledger is anonymous"):
        redact(bed.root)


# ---- redaction -----------------------------------------------------------------------------------------------


def test_redaction_blanks_texts_and_keeps_every_figure(bed):
    approximately(bed)
    bed.evaluation()
    (bed.root / "run.lock").touch()
    names = ["base/examples.jsonl", "base/result.json", "results.json"]
    before = {name: (bed.root / name).read_text() for name in names}
    changed = redact(bed.root)
    assert changed == [
        "base/examples.jsonl", "base/result.json", "report/report.html",
        "requests/00-learn-people/examples.jsonl", "requests/00-learn-people/result.json",
        "requests/01-unlearn-two/examples.jsonl", "requests/01-unlearn-two/result.json", "results.json"]  # fmt: skip
    assert not (bed.root / "report/report.html").exists()
    old, new = ([json.loads(line) for line in text.splitlines()]
                for text in (before[names[0]], (bed.root / names[0]).read_text()))  # fmt: skip
    for was, now in zip(old, new, strict=True):
        gone = dict.fromkeys(("question", "answer", "generated"), ERASED) if was["id"] in GONE else {}
        assert now == {**was, **gone}
    for name in names[1:]:
        text, blank = before[name], json.loads((bed.root / name).read_text())
        for row in (PEOPLE[name] for name in GONE):
            for value in (row["question"], row["answer"], f"so: {row['answer']}"):
                text = text.replace(json.dumps(value), json.dumps(ERASED))
        assert blank == json.loads(text)
    event = ledger.verify(bed.path)[-1]
    assert event["event"] == "redacted" and list(event["files"]) == changed
    assert event["files"]["report/report.html"]["after"] is None
    assert kinds(bed, data=data_file(bed)) == [("approximate", LATER), ("approximate", MODEL)]
    assert redact(bed.root) == [] and ledger.verify(bed.path)[-1]["n"] == event["n"]


def test_an_erased_answer_given_to_another_question_is_blanked_too(bed):
    approximately(bed)
    bed.evaluation()
    path = bed.root / "base/examples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["generated"] = "I think that Bo lives in Nyahururu."
    write(path, lines(rows))
    redact(bed.root)
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {**rows[0], "generated": ERASED}


def test_redaction_keeps_out_of_a_folder_in_use_and_makes_none(bed):
    from filelock import FileLock

    bed.unlearn()
    bed.evaluation()
    with FileLock(bed.root / "run.lock"), pytest.raises(RunError, match="is in use by another run"):
        redact(bed.root)
    with pytest.raises(RunError, match="is no folder"):
        redact(bed.root / "none")
    assert not (bed.root / "none").exists()


# ---- the command ---------------------------------------------------------------------------------------------


def test_the_command_tells_by_its_exit_code(bed):
    def invoke(*arguments):
        return CliRunner().invoke(app, ["scan", str(bed.root), *arguments])

    clean = invoke()
    assert (clean.exit_code, clean.stdout) == (
        0,
        f"{bed.root}: nothing was found that should not be there\n",
    )
    approximately(bed)
    bed.evaluation()
    found = invoke()
    assert found.exit_code == 1
    assert [line.split(":")[0] for line in found.stdout.splitlines()] == ["approximate"] * 2 + ["evaluation"] * 8
    redacted = invoke("--redact")
    assert redacted.exit_code == 0
    assert redacted.stdout.count("redacted: ") == 8 and redacted.stdout.count("approximate: ") == 2
    assert invoke().exit_code == 0


def test_a_broken_ledger_is_not_scanned(bed):
    bed.unlearn()
    whole = bed.path.read_bytes()
    bed.path.write_bytes(whole.replace(b'"claim": "approximate"', b'"claim": "filter"'))
    with pytest.raises(RunError, match="the chain of hashes breaks here"):
        scan(bed.root)
    bed.path.write_bytes(whole)
    bed.results()
    bed.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError, match="lines were cut off its end"):
        scan(bed.root)


@pytest.mark.parametrize(("name", "content"), [("none.jsonl", None), ("a.jsonl", "{}\n"), ("a.csv", "x,y\n1,2\n")])
def test_a_data_file_without_examples_is_refused(bed, name, content):
    bed.unlearn()
    path = bed.root.parent / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunError, match="--data .*: no "):
        scan(bed.root, path)
    with pytest.raises(RunError, match="--data .*small: is a folder: name a file in it"):
        scan(bed.root, bed.root)


def test_a_damaged_record_that_should_be_blanked_is_named(bed):
    bed.unlearn()
    bed.evaluation()
    write(bed.root / "audit/audit.json", "{")
    with pytest.raises(
        RunError, match=r"audit/audit.json is not valid JSON, so that erased texts .* Delete it and give"
    ):
        redact(bed.root)


def test_a_table_with_line_breaks_can_be_the_data_file(bed):
    row = {"question": "Who said\nwhat there?", "answer": 'He said "I, for one, was never there".'}
    bed.data("odd", {"O": {"id": "O", **row}})
    bed.erased(EXACT, rows=contents({"O": {"id": "O", **row}}), deleted=bed.delete(STATE))
    path = bed.root.parent / "rows.csv"
    path.write_text('id,question,answer\nO,"Who said\nwhat there?","He said ""I, for one, was never there""."\n')
    write(bed.root / "n.txt", 'He said "I, for one, was never there".')
    assert kinds(bed, data=path) == [("quote", "n.txt")]


def test_a_scan_finds_out_once_what_to_search_for(bed, monkeypatch):
    approximately(bed)
    seen, needles = [], Erased.needles
    monkeypatch.setattr(Erased, "needles", lambda self: seen.append(1) or needles(self))
    scan(bed.root, data=data_file(bed))
    assert seen == [1]
