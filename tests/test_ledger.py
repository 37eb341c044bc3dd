"""The chain holds what was written, shows where it was changed, and survives a half-written line."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from hf_clmul.errors import RunError
from hf_clmul.ledger import chain as ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for n, name in enumerate(("first", "zweiter – ü", "third\u2028")):
        ledger.append(tmp_path / "ledger.jsonl", "finished", name=name, examples={"learn": n})
    return tmp_path / "ledger.jsonl"


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_each_line_holds_the_hash_of_the_one_before(path):
    records = [json.loads(line) for line in lines(path)]
    assert [record["n"] for record in records] == [0, 1, 2]
    assert [record["previous"] for record in records] == ["0" * 64, records[0]["hash"], records[1]["hash"]]
    for record, line in zip(records, lines(path), strict=True):
        written = line[: line.index(b', "hash": ')] + b"}"
        assert record["hash"] == sha256(written).hexdigest()


def test_verify_gives_the_events_back(path):
    events = ledger.verify(path)
    assert [(e["n"], e["event"], e["name"], e["examples"]) for e in events] == [
        (0, "finished", "first", {"learn": 0}), (1, "finished", "zweiter – ü", {"learn": 1}),
        (2, "finished", "third\u2028", {"learn": 2})]  # fmt: skip
    assert all("hash" not in event and "previous" not in event and event["time"].endswith("+00:00") for event in events)
    assert ledger.verify(path.with_name("none.jsonl")) == []


def swapped(old: list[bytes]) -> list[bytes]:
    return [old[1], old[0], old[2]]


@pytest.mark.parametrize(("change", "line"), [
    (lambda old: [old[0].replace(b"first", b"fjrst"), *old[1:]], 1),
    (lambda old: [old[0], old[1].replace(b'"learn": 1', b'"learn": 2'), old[2]], 2),
    (lambda old: [old[0], old[2]], 2), (lambda old: old[1:], 1), (swapped, 1),
    (lambda old: [*old[:2], old[1], old[2]], 3),
    (lambda old: [old[0], b"not json\n", old[2]], 2), (lambda old: [old[0], b"[1]\n", old[2]], 2),
    (lambda old: [old[0], b'{"n": 1}\n', old[2]], 2), (lambda old: [old[0], b"\n", *old[1:]], 2),
], ids=["word", "number", "removed", "first removed", "swapped", "repeated", "no json", "no record", "no hash", "empty"])  # fmt: skip
def test_a_changed_line_is_named(path, change, line):
    path.write_bytes(b"".join(change(lines(path))))
    with pytest.raises(RunError, match=rf"ledger\.jsonl:{line}: the chain of hashes breaks here"):
        ledger.verify(path)


def test_a_rewritten_event_with_a_right_hash_of_its_own_breaks_the_next_line(path):
    first, *rest = lines(path)
    record = json.loads(first) | {"name": "forged"}
    del record["hash"]
    forged = {**record, "hash": sha256(json.dumps(record).encode()).hexdigest()}
    path.write_bytes(json.dumps(forged).encode() + b"\n" + b"".join(rest))
    with pytest.raises(RunError, match=":2: "):
        ledger.verify(path)


def test_a_chain_with_other_numbers_is_broken(path):
    """Whole by its hashes, but not written by `append`."""
    record = {"n": 7, "time": "", "event": "finished", "previous": json.loads(lines(path)[-1])["hash"]}
    line = json.dumps(record).encode()
    seal = f', "hash": "{sha256(line).hexdigest()}"}}\n'.encode()
    path.write_bytes(path.read_bytes() + line[:-1] + seal)
    with pytest.raises(RunError, match=":4: the chain"):
        ledger.verify(path)


@pytest.mark.parametrize(
    "half", [b'{"n": 3, "time": "' + b"x" * 999, b'{"n": 3, "ti', b"{", '{"name": "ü'.encode()[:-1]]
)
def test_a_half_written_line_is_cut_off(path, half):
    whole = path.read_bytes()
    path.write_bytes(whole + half)
    assert len(ledger.verify(path)) == 3
    ledger.append(path, "finished", name="fourth")
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 4
    assert path.read_bytes().endswith(b'"}\n')
    assert [event["name"] for event in ledger.verify(path)][-1] == "fourth"


def test_a_kill_at_any_byte_of_a_line_loses_that_line_alone(path):
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        assert len(ledger.verify(path)) == ledger.head(path)["events"] == 2
        assert ledger.append(path, "finished", name="third again")["n"] == 2
        assert len(ledger.verify(path)) == 3


@pytest.mark.parametrize("added", [b"not json\n", b"[1]\n", b'{"n": 3}\n', b'{"n": 3} {'])
def test_nothing_is_added_to_a_broken_line(path, added):
    path.write_bytes(path.read_bytes() + added)
    before = path.read_bytes()
    with pytest.raises(RunError, match=":4: the chain"):
        ledger.append(path, "finished")
    assert path.read_bytes() == before


def noticed(path: Path, content: bytes, head: dict | None = None) -> bool:
    path.write_bytes(content)
    try:
        ledger.verify(path, head)
    except RunError:
        return True
    return False


def test_every_change_of_a_single_byte_is_noticed(path):
    whole = path.read_bytes()
    missed = []
    for i, byte in enumerate(whole):
        for other in {byte ^ 1 << i % 8, ord(" "), ord("\n")} - {byte}:  # a flipped bit, a space, a new line
            if not noticed(path, whole[:i] + bytes([other]) + whole[i + 1 :]):
                missed.append((i, other))
    assert missed == []


def test_every_byte_put_in_is_noticed(path):
    """But behind the last line: there it is the beginning of a line that a kill cut short."""
    whole = path.read_bytes()
    assert [i for i in range(len(whole)) for byte in b" \n" if not noticed(
        path, whole[:i] + bytes([byte]) + whole[i:])] == []  # fmt: skip


def test_every_byte_taken_out_is_noticed(path):
    """The last newline too, by the head: without it a kill could have done it."""
    whole, head = path.read_bytes(), ledger.head(path)
    assert [i for i in range(len(whole)) if not noticed(path, whole[:i] + whole[i + 1 :], head)] == []
    assert not noticed(path, whole[:-1])


def test_every_line_dropped_doubled_or_swapped_is_noticed(path):
    for n in range(4):
        ledger.append(path, "finished", name=f"more-{n}")
    old, head = lines(path), ledger.head(path)
    places = range(len(old))
    dropped = [old[:i] + old[i + 1 :] for i in places]
    doubled = [old[: i + 1] + old[i:] for i in places]
    swapped = [old[:i] + [old[j], *old[i + 1 : j], old[i]] + old[j + 1 :] for i in places for j in places if i < j]
    moved = [
        [*rest[:j], old[i], *rest[j:]] for i in places for j in places if i != j for rest in [old[:i] + old[i + 1 :]]
    ]
    for change in [*dropped, *doubled, *swapped, *moved]:
        assert noticed(path, b"".join(change), head), change
    # Only what is cut off the end needs the head.
    assert [i for i, change in enumerate(dropped) if not noticed(path, b"".join(change))] == [len(old) - 1]


def test_the_keys_of_a_line_cannot_change_places(path):
    first, *rest = lines(path)
    record = json.loads(first)
    moved = {"event": record["event"], **record}
    assert noticed(path, json.dumps(moved).encode() + b"\n" + b"".join(rest))


def test_a_head_notices_what_is_missing_at_the_end(path):
    old, head = lines(path), ledger.head(path)
    assert head == {"events": 3, "hash": json.loads(old[2])["hash"]}
    assert len(ledger.verify(path, head)) == 3
    path.write_bytes(b"".join(old[:2]))
    assert len(ledger.verify(path)) == 2
    with pytest.raises(RunError, match="ends after 2 events, but had 3 events before: lines were cut off its end"):
        ledger.verify(path, head)
    ledger.append(path, "finished", name="forged")
    with pytest.raises(RunError, match=":3: the chain"):
        ledger.verify(path, head)


def test_an_older_head_is_a_part_of_a_longer_ledger(path):
    head = ledger.head(path)
    ledger.append(path, "pushed", url="somewhere")
    assert len(ledger.verify(path, head)) == 4
    nothing = ledger.head(path.with_name("none.jsonl"))
    assert nothing == {"events": 0, "hash": ledger.START}
    assert len(ledger.verify(path, nothing)) == 4


def test_append_gives_the_event_back(path):
    event = ledger.append(path, "data", rows={"ü": (1, 2)})
    assert event == ledger.verify(path)[-1]
    assert (event["n"], event["event"], event["rows"]) == (3, "data", {"ü": [1, 2]})


@pytest.mark.parametrize("size", [0, 1, 65_000, 65_536, 300_000])
def test_long_lines_are_read_from_the_end(path, size):
    ledger.append(path, "data", text="x" * size)
    ledger.append(path, "finished", name="after it")
    assert [event["n"] for event in ledger.verify(path)] == [0, 1, 2, 3, 4]
    assert ledger.head(path)["events"] == 5


def test_append_does_not_read_what_lies_before_the_last_line(path):
    """So that the hundredth request costs what the first did: a broken beginning goes unseen until `verify`."""
    path.write_bytes(b"broken\n" + path.read_bytes())
    ledger.append(path, "finished")
    with pytest.raises(RunError, match=":1: the chain"):
        ledger.verify(path)


@pytest.mark.parametrize("name", ["n", "time", "previous", "hash"])
def test_no_detail_takes_the_place_of_the_chain(path, name):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="of its own; name the details of 'data' otherwise"):
        ledger.append(path, "data", **{name: 3})
    assert path.read_bytes() == before
