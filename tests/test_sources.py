"""Examples from the built-in set and from local files: filters, renamed columns, and what cannot be read."""

import json
from collections import Counter

import datasets
import pytest
from tiny import EOS_ID, tiny_tokenizer

from hf_clmul.data.sources import encode_dataset, exclude, load_examples, refusals, select
from hf_clmul.errors import RecipeError
from hf_clmul.recipe.schema import Data

PEOPLE = "builtin:invented_people"
GROUPS = {"a": 1, "b": 1, "c": 2, "d": 3}
ROWS = [{"question": f"Who is {c}?", "answer": c * 2, "group": group} for c, group in GROUPS.items()]
WRITERS = {
    "rows.jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "rows.csv": lambda path, rows: datasets.Dataset.from_list(rows).to_csv(path),
    "rows.CSV": lambda path, rows: datasets.Dataset.from_list(rows).to_csv(path),
    "rows.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def load(tmp_path):
    """Writes rows as a file and loads them as the data section `people`."""

    def written_and_loaded(rows=ROWS, file="rows.jsonl", **section):
        WRITERS[file](tmp_path / file, rows)
        return load_examples(Data(path=str(tmp_path / file), **section), "people")

    return written_and_loaded


def refused(call, *args, **kwargs):
    with pytest.raises(RecipeError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    return message


# ---- built-in data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "persons"), [(None, 32), ("train", 32), ("held_out", 8)])
def test_splits_of_the_invented_people(split, persons):
    rows = load_examples(Data(path=PEOPLE, split=split), "people")
    assert Counter(Counter(row["person"] for row in rows).values()) == {8: persons}
    assert {row["split"] for row in rows} == {split or "train"}


def test_every_invented_person_has_what_the_measures_need():
    rows = [
        *load_examples(Data(path=PEOPLE), "people"),
        *load_examples(Data(path=PEOPLE, split="held_out"), "p"),
    ]
    texts = ("question", "answer", "paraphrased_question", "paraphrased_answer")
    for row in rows:
        assert set(row) == {"id", "split", "person", "name", "perturbed_answers", *texts}
        assert all(isinstance(row[text], str) and row[text].strip() == row[text] != "" for text in texts)
        wrong = row["perturbed_answers"]
        assert len(set(wrong)) == len(wrong) == 3
        assert not {row["answer"], row["paraphrased_answer"]} & set(wrong)
        assert row["paraphrased_question"] != row["question"] and row["paraphrased_answer"] != row["answer"]
    for column in ("id", "question", "answer"):
        assert len({row[column] for row in rows}) == len(rows) == 320
    assert len({(row["person"], row["name"]) for row in rows}) == len({row["name"] for row in rows}) == 40


def test_persons_are_the_first_ones_and_whole():
    rows = load_examples(Data(path=PEOPLE, persons=3), "people")
    assert [row["id"] for row in rows] == [f"P0{p}-{i}" for p in (1, 2, 3) for i in range(1, 9)]


def test_refusals_are_distinct_sentences():
    texts = refusals()
    assert len(set(texts)) == len(texts) >= 16 and all(text.endswith((".", "?", "!")) for text in texts)


def test_built_in_data_without_persons_or_by_an_unknown_name():
    assert "has no persons" in refused(load_examples, Data(path="builtin:refusals", persons=2), "people")
    assert "invented_people" in refused(load_examples, Data(path="builtin:people"), "people")


# ---- local files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(load, file):
    assert load(file=file) == [{"id": f"people-{i}", **row} for i, row in enumerate(ROWS)]


def test_a_row_keeps_its_own_id_and_a_given_one_does_not_change_when_rows_are_dropped(load):
    assert [row["id"] for row in load([{"id": "x", **ROWS[0]}])] == ["x"]
    assert [row["id"] for row in load(exclude={"group": 1})] == ["people-2", "people-3"]


def test_lists_and_messages_come_back_as_they_were(load):
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}]
    assert load(rows)[0]["messages"] == rows[0]["messages"]


def test_where_and_exclude(load):
    assert [row["answer"] for row in load(where={"group": [1, 3]})] == ["aa", "bb", "dd"]
    assert [row["answer"] for row in load(where={"group": 1, "answer": ["bb", "cc"]})] == ["bb"]
    assert [row["answer"] for row in load(exclude={"group": [1, 3]})] == ["cc"]
    assert [row["answer"] for row in load(where={"group": 1}, exclude={"answer": "aa"})] == ["bb"]
    assert select(ROWS, None, "x") == exclude(ROWS, {}, "x") == ROWS


def test_equal_rows_are_excluded_together_and_only_when_they_match(load):
    assert exclude([ROWS[0], dict(ROWS[0]), ROWS[2]], {"group": 1}, "x") == [ROWS[2]]


def test_renamed_columns(load):
    rows = [{"query": "Who?", "reply": "Ada", "group": 1}]
    assert load(rows, columns={"question": "query", "answer": "reply"}, where={"group": 1}) == [
        {"id": "people-0", "question": "Who?", "answer": "Ada", "group": 1}
    ]


@pytest.mark.parametrize("names", [("query", "question"), ("question", "query")])
def test_a_renamed_column_takes_the_place_of_one_that_has_the_name_already(load, names):
    rows = [{**{name: name for name in names}, "answer": "Ada"}]
    (row,) = load(rows, columns={"question": "query"})
    assert row == {"id": "people-0", "question": "query", "answer": "Ada"}


def test_columns_can_be_swapped_and_used_twice(load):
    (row,) = load(ROWS[:1], columns={"question": "answer", "answer": "question"})
    assert (row["question"], row["answer"]) == ("aa", "Who is a?")
    (row,) = load([{"line": "x"}], columns={"prompt": "line", "completion": "line"})
    assert (row["prompt"], row["completion"]) == ("x", "x")


# ---- what cannot be used -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["where", "exclude"])
def test_a_value_or_column_that_is_not_there(load, what):
    assert refused(load, **{what: {"group": [1, 9]}}) == (
        f"data.people.{what}.group: no example has 9; values there: 1, 2, 3"
    )
    assert refused(load, **{what: {"person": "a"}}) == (
        f"data.people.{what}: no column 'person'; found id, question, answer, group."
    )
    assert refused(load, [{"text": "x", "tags": ["a"]}], **{what: {"tags": "a"}}) == (
        f"data.people.{what}: column 'tags' holds lists; choose rows by a column of single values."
    )


def test_many_values_are_not_all_shown():
    rows = [{"group": i} for i in range(20)]
    message = refused(select, rows, {"group": 99}, "data.people.where")
    assert message.endswith("values there: 0, 1, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, ...")


def test_nothing_left(load):
    message = refused(load, exclude={"group": [1, 2, 3]})
    assert message.startswith("data.people: no examples are left of ") and "exclude" in message


def test_a_renamed_column_that_is_not_there(load):
    message = refused(load, columns={"question": "query"})
    assert message.startswith("data.people.columns: no column 'query' in ")
    assert message.endswith("found question, answer, group.")


def test_no_usable_columns(load):
    message = refused(load, [{"query": "Who?"}])
    assert message.startswith("data.people: no usable columns.") and "Found: id, query." in message


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("bad.jsonl", '{"question": "a", "answer": \n', "JSON parse error"),
        ("bad.csv", 'a,b\n"x,1\n', "Error tokenizing data"),
        ("bad.parquet", "no parquet", "Parquet"),
        ("rows.csv", b"question,answer\n\xff\xfe,b\n", "codec can't decode"),
        ("head.csv", "question,answer\n", "corresponds to no data"),
        ("empty.jsonl", "", "is empty"),
        ("empty.csv", "", "is empty"),
        ("notes.txt", "text", "is of no known kind; expected .json, .jsonl, .csv, .parquet, or a Hub id"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, file, content, reason):
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(load_examples, Data(path=str(path)), "people")
    assert message.startswith("data.people") and str(path) in message and reason in message


def test_a_file_or_split_that_is_not_there(load, tmp_path):
    path = tmp_path / "none.jsonl"
    assert refused(load_examples, Data(path=str(path)), "people") == f"data.people.path: no file {path}."
    assert 'Unknown split "test"' in refused(load, split="test")


def test_a_hub_id_that_cannot_be_reached():
    message = refused(load_examples, Data(path="no-such-user/no-such-data"), "people")
    assert message.startswith("data.people: no-such-user/no-such-data could not be read: ")


# ---- encoding a data set -----------------------------------------------------------------------------------


TOKENIZER = tiny_tokenizer([], vocab=258, chat_template=None)


def test_lists_and_data_sets_are_encoded_alike():
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "aa", "completion": "b"}]
    a, b = 66, 67  # bytes after two special tokens
    expected = [
        {"input_ids": [a, b, EOS_ID], "labels": [-100, b, EOS_ID]},
        {"input_ids": [a, a, b, EOS_ID], "labels": [-100, -100, b, EOS_ID]},
    ]
    assert encode_dataset(rows, TOKENIZER, None, "learn") == expected
    assert encode_dataset(datasets.Dataset.from_list(rows), TOKENIZER, None, "learn") == expected
    # What is encoded already passes, from a data set too.
    assert encode_dataset(datasets.Dataset.from_list(expected), TOKENIZER, None, "learn") == expected
    assert encode_dataset([], TOKENIZER, None, "learn") == []


def test_an_example_that_cannot_be_encoded_is_named():
    def message(*rows):
        return refused(encode_dataset, [{"prompt": "a", "completion": "b"}, *rows], TOKENIZER, None, "forget")

    empty = {"prompt": "a", "completion": ""}
    assert message(empty).startswith("forget, example 1: an example has nothing to supervise")
    assert message({"id": "P01-2", **empty}).startswith("forget, example P01-2: ")
    assert message({"prompt": "a"}).startswith("forget, example 1: the data: no usable columns")
    assert refused(encode_dataset, [{"query": "x"}], TOKENIZER, None, "x").startswith("x: no usable")


def test_a_data_set_that_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="forget: a streaming data set cannot be counted"):
        encode_dataset(iter(ROWS), TOKENIZER, None, "forget")
