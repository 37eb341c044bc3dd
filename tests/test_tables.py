"""Tables come back as they were written, or say why they cannot."""

import math

import pytest

from hf_clmul.errors import RunError
from hf_clmul.evaluation.tables import read_table, table_of, write_table

ROWS = [
    {"id": "a", "group": "forget", "logps": [-0.1, -math.inf, -1e-9], "hits": [True, False, True], "paraphrase_logps": None,
     "perturbed_logps": [[-1.5], [-2.0, -3.0]], "generated": "Ümläut", "answer": ""},
    {"id": "b", "group": "forget", "logps": [-0.25], "hits": [False], "paraphrase_logps": [-3.0], "perturbed_logps": None,
     "generated": "", "answer": "x"},
]  # fmt: skip


def test_rows_come_back_to_the_bit(tmp_path):
    write_table(ROWS, tmp_path / "sub" / "t.parquet")
    assert read_table(tmp_path / "sub" / "t.parquet", ["logps"]) == ROWS


def test_a_key_that_only_some_rows_have_is_none_in_the_others(tmp_path):
    write_table([{"id": "a"}, {"id": "b", "base_logps": [-1.0]}], tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet") == [{"id": "a", "base_logps": None}, {"id": "b", "base_logps": [-1.0]}]
    write_table([], tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet", ["id"]) == []


def test_nothing_stays_in_a_cache_of_the_library(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_table(ROWS, tmp_path / "t.parquet")
    read_table(tmp_path / "t.parquet")
    assert [path.name for path in tmp_path.rglob("*")] == ["t.parquet"]


def test_a_table_says_what_it_is_of(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(ROWS, path, "ab" * 32)
    assert table_of(path) == "ab" * 32 and read_table(path) == ROWS
    write_table(ROWS, path)
    assert table_of(path) is None
    path.write_bytes(b"no table")
    with pytest.raises(
        RunError, match=r"t.parquet cannot be read as a table of measured examples: .*\nDelete it and give"
    ):
        table_of(path)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_table_says_what_to_do(tmp_path, damage):
    path = tmp_path / "t.parquet"
    write_table(ROWS, path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b'{"id": "a"}\n'}[damage])
    with pytest.raises(
        RunError, match=r"t.parquet cannot be read as a table of measured examples: .*\nDelete it and give"
    ):
        read_table(path)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(RunError, match="there is no such table"):
        read_table(tmp_path / "none.parquet")
    write_table(ROWS, tmp_path / "t.parquet")
    with pytest.raises(RunError, match="has no column 'token_means': it was written by another version"):
        read_table(tmp_path / "t.parquet", ["logps", "token_means"])


def test_a_failed_write_leaves_the_old_table(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(ROWS, path)
    with pytest.raises(ValueError, match="no table can be made of these rows"):
        write_table([{"id": "a"}, {"id": [1]}], path)
    assert read_table(path) == ROWS
