"""Records hold hashes and no texts; tombstones hold until they are lifted; lineage follows what was made from what."""

import hmac
import json
from hashlib import sha256

import pytest
from ledger_bed import BASE, GONE, LATER, PEOPLE, STATE, Bed, content, contents

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.ledger import chain as ledger
from hf_clmul.ledger import records
from hf_clmul.ledger.key import key_path, keyed, make_key, merkle_root, read_key
from hf_clmul.ledger.lineage import Descendant, closure, descendants
from hf_clmul.report.claims import EXACT_BY_DELETION, EXACT_BY_RETRAINING


@pytest.fixture
def bed(tmp_path):
    made = Bed(tmp_path)
    made.run()
    return made


# ---- the key -------------------------------------------------------------------------------------------------


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path):
    path = tmp_path / "run" / "ledger.jsonl"
    assert read_key(path) is None
    key = make_key(path)
    assert len(key) == 32 and make_key(path) == key == read_key(path)
    assert key_path(path) == tmp_path / "run" / "ledger.key"
    assert key_path(path).stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["ledger.key"]
    assert make_key(tmp_path / "other.jsonl") != key


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_a_file_that_is_no_key_is_refused(tmp_path, content):
    (tmp_path / "ledger.key").write_bytes(content)
    with pytest.raises(RunError, match=rf"holds {len(content)} bytes and not 32"):
        make_key(tmp_path / "ledger.jsonl")
    assert (tmp_path / "ledger.key").read_bytes() == content


def test_keyed_is_hmac_sha256():
    # RFC 4231, test case 2
    assert keyed(b"Jefe", "what do ya want for nothing?") == (
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    )
    assert keyed(b"k", "a \ud800") != keyed(b"k", "a ")  # JSON can hold half a character


def test_merkle_root_is_that_of_rfc_6962():
    a, b, c = (sha256(text).hexdigest() for text in (b"a", b"b", b"c"))
    la, lb, lc = (sha256(b"\0" + bytes.fromhex(leaf)).digest() for leaf in (a, b, c))
    ab = sha256(b"\1" + la + lb).digest()
    assert merkle_root([]) == sha256(b"").hexdigest()
    assert merkle_root([a]) == la.hex()
    assert merkle_root([a, b]) == ab.hex()
    assert merkle_root([a, b, c]) == sha256(b"\1" + ab + lc).hexdigest()
    # RFC 6962 splits seven leaves into four and three
    leaves = [sha256(bytes([n])).hexdigest() for n in range(7)]
    left, right = (bytes.fromhex(merkle_root(part)) for part in (leaves[:4], leaves[4:]))
    assert merkle_root(leaves) == sha256(b"\1" + left + right).hexdigest()


def test_a_ledger_goes_on_with_the_key_it_was_begun_with(bed):
    events = ledger.verify(bed.path)
    assert records.open_key(bed.path, events) == bed.key
    key_path(bed.path).write_bytes(b"x" * 32)
    with pytest.raises(RunError, match="is not the key that this ledger was written with"):
        records.open_key(bed.path, events)
    key_path(bed.path).unlink()
    with pytest.raises(RunError, match="ledger.key is gone, so the ledger is anonymous"):
        records.open_key(bed.path, events)
    assert not key_path(bed.path).exists()
    assert len(records.open_key(bed.path, [])) == 32  # a ledger without events begins


# ---- records -------------------------------------------------------------------------------------------------


def test_a_data_record_holds_no_text_and_no_order(bed):
    record = records.data_record(bed.key, task="people", rows=contents(PEOPLE), source="builtin:people", split="train")
    hashes = {name: hmac.new(bed.key, content(row).encode(), sha256).hexdigest() for name, row in PEOPLE.items()}
    assert record["examples"] == sorted(hashes.values())
    by_hash = {digest: name for name, digest in hashes.items()}
    assert record["ids"] == [
        hmac.new(bed.key, f"id:{by_hash[example]}".encode(), sha256).hexdigest() for example in record["examples"]
    ]
    assert record["merkle_root"] == merkle_root(sorted(hashes.values()))
    assert (record["task"], record["source"], record["split"], record["count"]) == (
        "people",
        "builtin:people",
        "train",
        4,
    )
    backwards = dict(reversed(contents(PEOPLE).items()))
    assert record == records.data_record(bed.key, task="people", rows=backwards, source="builtin:people", split="train")
    written = json.dumps(record)
    assert not any(word in written for row in PEOPLE.values() for word in (row["question"], row["answer"], row["id"]))


def test_columns_of_the_law_are_kept_where_the_data_have_them(bed):
    rows = [
        {"id": "a", "text": "A", "subject": "Ada", "lawful_basis": "consent", "retention": "2030-01-01"},
        {"id": "b", "text": "B", "subject": "Bo", "lawful_basis": "consent", "retention": "2031-01-01"},
        {"id": "c", "text": "C"},
    ]
    columns = records.columns_of(rows)
    assert (
        columns["a"] == {"subject": "Ada", "lawful_basis": "consent", "retention": "2030-01-01"} and "c" not in columns
    )
    texts = {row["id"]: content(row) for row in rows}
    record = records.data_record(bed.key, task="t", rows=texts, source="s", columns=columns)
    order = sorted("abc", key=lambda name: keyed(bed.key, texts[name]))
    place = {name: order.index(name) for name in "abc"}
    assert record["subjects"][place["c"]] is None and "Ada" not in json.dumps(record)
    assert record["subjects"][place["a"]] == keyed(bed.key, "id:Ada")
    assert record["retention"][place["b"]] == "2031-01-01"
    two = records.data_record(bed.key, task="t", rows={n: texts[n] for n in "ab"}, source="s", columns=columns)
    assert two["lawful_basis"] == "consent"
    assert (
        not {"subjects", "lawful_basis", "retention"}
        & records.data_record(bed.key, task="t", rows={"c": texts["c"]}, source="s").keys()
    )


def test_every_record_can_be_written_and_read_back(bed):
    bed.learn()
    bed.unlearn()
    bed.add("lifted", **records.lifted_record("two", "02-learn-people-2"))
    events = ledger.verify(bed.path)
    assert [event["event"] for event in events] == [
        "run", "request", "data", "derived", "finished", "request", "derived", "finished", "erased", "lifted"]  # fmt: skip
    run, erased = events[0], events[8]
    assert run["base"]["weights_sha256"] == BASE and run["key"] == keyed(bed.key, "hf_clmul ledger key")[:16]
    assert (erased["request"], erased["claim"], erased["count"]) == ("two", "approximate", 2)
    assert erased["examples"] == sorted(keyed(bed.key, content(PEOPLE[name])) for name in GONE)


def test_the_operator_is_named_or_left_out(monkeypatch):
    monkeypatch.setenv("HF_CLMUL_OPERATOR", "Ms Example")
    assert records.operator() == "Ms Example"
    monkeypatch.setenv("HF_CLMUL_OPERATOR", "")
    assert records.operator() is None


@pytest.mark.parametrize(("changed", "message"), [
    ({"claim": "perfect"}, "a claim is one of exact by deletion"),
    ({"claim": EXACT_BY_DELETION, "base_after": "00" * 32}, "the base model changed"),
    ({"claim": EXACT_BY_RETRAINING, "base_after": "00" * 32}, "the base model changed"),
    ({"claim": "approximate", "deleted": {"a": "1"}, "surviving": {"a": "1"}}, "a cannot have been deleted and"),
])  # fmt: skip
def test_an_erasure_that_cannot_be_is_not_written(bed, changed, message):
    with pytest.raises(ValueError, match=message):
        bed.erased(changed.pop("claim"), **changed)
    assert len(ledger.verify(bed.path)) == 1


def test_an_artefact_of_an_unknown_kind_is_not_written():
    with pytest.raises(ValueError, match="an artefact is one of memory, adapter"):
        records.derived_record("model", "thing", None, [])


# ---- tombstones ----------------------------------------------------------------------------------------------


def test_tombstones_hold_until_they_are_lifted_by_name(bed):
    assert records.tombstones(ledger.verify(bed.path)) == {}
    bed.learn()
    bed.unlearn()
    bed.erased("exact by deletion", name="02-unlearn-one", request="one", rows=contents(PEOPLE, "P0"))
    stones = records.tombstones(ledger.verify(bed.path))
    hashes = {name: keyed(bed.key, content(PEOPLE[name])) for name in PEOPLE}
    assert stones == {hashes["P0"]: "one", hashes["P1"]: "two", hashes["P3"]: "two"}
    bed.add("lifted", **records.lifted_record("two", "03-learn-people-2"))
    assert records.tombstones(ledger.verify(bed.path)) == {hashes["P0"]: "one"}
    bed.erased("approximate", name="04-unlearn-again", request="again")
    assert records.tombstones(ledger.verify(bed.path))[hashes["P1"]] == "again"


def test_refused_rows_are_named_by_their_texts_not_their_ids(bed):
    bed.unlearn()
    stones = records.tombstones(ledger.verify(bed.path))
    rows = {
        "new-id": content(PEOPLE["P1"]),
        "P3": content({**PEOPLE["P3"], "answer": "another"}),
        **contents(PEOPLE, "P0"),
    }
    assert records.refused(rows, stones, bed.key) == {"new-id": "two"}
    assert records.refused(contents(PEOPLE), stones, b"x" * 32) == {}  # hence `open_key`
    with pytest.raises(
        RecipeError, match=r"^requests\.2\.learn: 1 of the 3 examples were erased by 'two', such as 'new-id'"
    ):
        records.check_refused(rows, stones, bed.key, "requests.2.learn")
    records.check_refused(contents(PEOPLE, "P0"), stones, bed.key, "requests.2.learn")


def test_without_the_key_nothing_is_taken_for_allowed(bed):
    bed.unlearn()
    assert records.refused(contents(PEOPLE), {}, None) == {}
    with pytest.raises(RunError, match="2 examples were erased in this run folder, and ledger.key is gone"):
        records.refused(contents(PEOPLE), records.tombstones(ledger.verify(bed.path)), None)


# ---- lineage -------------------------------------------------------------------------------------------------


def found(bed):
    return {found.artefact: found for found in descendants(ledger.verify(bed.path))}


def test_what_was_made_from_erased_rows_descends_from_them(bed):
    bed.learn()
    bed.derived("memory", "memory", "data/people")
    bed.derived("teacher", "teacher", STATE)
    bed.data("notes", {"N0": {"id": "N0", "text": "A note about nobody."}})
    bed.derived("adapters/notes", "adapter", "data/notes")
    assert found(bed) == {}  # nothing is erased yet
    bed.unlearn("approximate")
    assert found(bed) == {
        STATE: Descendant(STATE, "adapter", "two", "approximate", 2, False),
        "memory": Descendant("memory", "memory", "two", "approximate", 2, False),
        "teacher": Descendant("teacher", "teacher", "two", "approximate", 2, False),
        LATER: Descendant(LATER, "adapter", "two", "approximate", 2, True),
    }
    bed.derived("memory", "memory", "data/people")  # purged
    bed.export()
    assert "memory" not in found(bed) and found(bed)["model"].after


def test_a_task_that_learned_other_rows_later_still_descends_from_its_first(bed):
    bed.learn()
    bed.data("people", {"N0": {"id": "N0", "text": "A note about nobody."}})
    bed.derived("memory", "memory", "data/people")
    bed.unlearn("approximate")
    assert found(bed)["memory"].rows == 2


def test_parts_trained_again_after_the_request_began_do_not_descend(bed):
    """A kill between, and a second `request` event, change nothing."""
    bed.learn()
    bed.request("01-unlearn-two", "unlearn")
    bed.derived("adapters/people", "adapter", "data/people")
    bed.request("01-unlearn-two", "unlearn")
    bed.derived(LATER, "adapter", "data/people", "adapters/people")
    bed.erased("exact by partial retraining")
    assert list(found(bed)) == [STATE]


def test_what_is_lifted_and_learned_again_is_no_descendant(bed):
    bed.learn()
    bed.unlearn()
    bed.add("lifted", **records.lifted_record("two", "02-learn-people-2"))
    bed.data()
    bed.derived("adapters/again", "adapter", "data/people")
    assert found(bed) == {}
    bed.request("03-unlearn-again", "unlearn")
    bed.erased("exact by deletion", name="03-unlearn-again", request="again")
    assert {name: one.request for name, one in found(bed).items()} == {
        STATE: "again", LATER: "again", "adapters/again": "again"}  # fmt: skip


def test_a_request_done_again_begins_again(bed):
    """What was learned in between was learned before it."""
    bed.learn()
    bed.unlearn("exact by deletion")
    bed.add("lifted", **records.lifted_record("two", "02-learn-people-2"))
    bed.data()
    bed.derived("adapters/again", "adapter", "data/people")
    bed.unlearn("exact by deletion")
    assert set(found(bed)) == {STATE, "adapters/again"}


def test_each_request_is_told_apart(bed):
    bed.learn()
    bed.unlearn()
    bed.request("02-unlearn-one", "unlearn")
    bed.erased("exact by deletion", name="02-unlearn-one", request="one", rows=contents(PEOPLE, "P0"))
    rows = [(one.artefact, one.request, one.claim, one.rows, one.after) for one in descendants(ledger.verify(bed.path))]
    assert rows == [
        (STATE, "one", "exact by deletion", 1, False), (STATE, "two", "approximate", 2, False),
        (LATER, "one", "exact by deletion", 1, False), (LATER, "two", "approximate", 2, True)]  # fmt: skip


def test_the_closure_is_known_before_anything_is_erased_and_stays_the_same(bed):
    bed.learn()
    bed.derived("memory", "memory", "data/people")
    bed.data("notes", {"N0": {"id": "N0", "text": "A note about nobody."}})
    bed.derived("adapters/notes", "adapter", "data/notes")
    bed.derived("adapters/more", "adapter", "data/notes", "memory")  # learned with replay
    bed.export("adapters/notes", "adapters/more")
    hashes = [keyed(bed.key, content(PEOPLE[name])) for name in GONE]
    note = keyed(bed.key, content({"text": "A note about nobody."}))

    def found(*examples):
        return closure(ledger.verify(bed.path), examples, "01-unlearn-two")

    of_people = sorted([STATE, "memory", "adapters/more", "model"])
    assert found(*hashes) == found(hashes[0]) == of_people
    assert found(note) == ["adapters/more", "adapters/notes", "model"]
    assert found("00" * 32) == []
    bed.request("01-unlearn-two", "unlearn")
    bed.derived("adapters/more", "adapter", "data/notes")  # made again; then killed
    bed.request("01-unlearn-two", "unlearn")
    assert found(*hashes) == of_people
    bed.erased("exact by partial retraining")
    assert found(*hashes) == sorted([STATE, "memory", "model"])  # afterwards: what was not made again
