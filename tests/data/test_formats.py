"""Data files of every kind, and what their columns mean."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lacuna.data.find import find_files
from lacuna.data.formats import EXAMPLES, Broken, Conversation, Example, Row, Text, peek, read_file, within_limit
from lacuna.data.schemas import Schema, detect_schema, to_examples
from lacuna.errors import DataError

ENDINGS = ".jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet, .arrow, .txt, .md"


def rows_in(path: Path) -> list[Row | Broken]:
    """The rows of a file, the folder left out of their origins."""
    return [
        Row(row.values, row.origin.replace(f"{path.parent}/", ""))
        if isinstance(row, Row)
        else Broken(row.origin.replace(f"{path.parent}/", ""), row.reason)
        for row in read_file(path)
    ]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def file_error(path: Path) -> str:
    with pytest.raises(DataError) as error:
        list(read_file(path))
    return str(error.value).replace(f"{path.parent}/", "")


def find_error(dataset: str | Path, folder: Path) -> str:
    with pytest.raises(DataError) as error:
        find_files(str(dataset))
    return str(error.value).replace(f"{folder}/", "").replace(str(folder), "FOLDER")


def schema_of(*rows: dict[str, Any], wanted: str = "auto", text_column: str = "text") -> Schema:
    return detect_schema([Row(values, "x") for values in rows], wanted, text_column, "data.jsonl")


def example(values: dict[str, Any], wanted: str = "auto") -> Example | Broken:
    (found,) = to_examples([Row(values, "x:1")], schema_of(values, wanted=wanted))
    return found


def messages(values: dict[str, Any], wanted: str = "auto") -> list[dict[str, Any]]:
    found = example(values, wanted)
    assert isinstance(found, Conversation), found
    return found.messages


def reason(values: dict[str, Any], wanted: str = "auto") -> str:
    found = example(values, wanted)
    assert isinstance(found, Broken), found
    assert found.origin == "x:1"
    return found.reason


class TestFindFiles:
    def test_a_file_is_itself(self, tmp_path: Path) -> None:
        for ending in ENDINGS.split(", "):
            path = write(tmp_path / f"a{ending}", "")
            assert find_files(str(path)) == [path]

    def test_a_folder_is_its_files_sorted_without_hidden_ones(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / ".cache").mkdir()
        for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", ".d.jsonl", ".cache/e.jsonl", "notes.log"):
            write(tmp_path / name, "")
        assert find_files(str(tmp_path)) == [tmp_path / name for name in ("a.jsonl", "b.jsonl", "sub/c.jsonl")]

    def test_text_and_markdown_are_one_kind(self, tmp_path: Path) -> None:
        paths = [write(tmp_path / "a.md", ""), write(tmp_path / "b.txt", "")]
        assert find_files(str(tmp_path)) == paths

    def test_a_glob_is_its_matches_sorted(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        for name in ("b1.csv", "a1.csv", "a2.csv", "a3.jsonl", "sub/a4.csv"):
            write(tmp_path / name, "")
        assert find_files(f"{tmp_path}/a*.csv") == [tmp_path / "a1.csv", tmp_path / "a2.csv"]
        assert find_files(f"{tmp_path}/**/a?.csv") == [tmp_path / name for name in ("a1.csv", "a2.csv", "sub/a4.csv")]

    def test_a_file_whose_name_looks_like_a_glob_is_a_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a[1].jsonl", "")
        assert find_files(str(path)) == [path]

    @pytest.mark.parametrize("name", ["imdb", "HuggingFaceFW/fineweb-edu", "org/name_1.0"])
    def test_a_hub_name_is_recognised_as_such(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert find_files(name) is None

    def test_a_missing_file_names_the_one_that_was_meant(self, tmp_path: Path) -> None:
        write(tmp_path / "train.jsonl", "")
        assert find_error(tmp_path / "trian.jsonl", tmp_path) == (
            "trian.jsonl: no such file or folder; did you mean 'train.jsonl'?"
        )

    @pytest.mark.parametrize("name", ["nowhere.csv", "./nowhere", "a/b/c", "~/nowhere-at-all", "/nowhere/a.jsonl"])
    def test_what_cannot_be_a_hub_name_is_a_missing_file(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        told, _, download = find_error(name, tmp_path).partition("; to download data into it: ")
        assert told == f"{name}: no such file or folder"
        assert bool(download) == (not Path(name).suffix)
        assert not download or download.endswith(f" --repo-type dataset --local-dir {name}")

    def test_an_unknown_ending_lists_the_known_ones(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.xlsx", "")
        told = f"a.xlsx: unknown ending '.xlsx'; known: {ENDINGS}{EXAMPLES}"
        assert find_error(path, tmp_path) == told
        assert find_error(f"{tmp_path}/*.xlsx", tmp_path) == told

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        assert find_error(tmp_path, tmp_path) == f"FOLDER: the folder holds no {ENDINGS} files"

    def test_a_glob_without_matches_is_refused(self, tmp_path: Path) -> None:
        assert find_error(f"{tmp_path}/*.csv", tmp_path) == "*.csv: no file matches"

    def test_a_folder_of_several_kinds_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path / "a.jsonl", "")
        write(tmp_path / "b.md", "")
        assert find_error(tmp_path, tmp_path) == (
            "FOLDER: several kinds of files (jsonl, text); choose one with a glob such as *.jsonl"
        )

    def test_the_card_of_a_downloaded_data_set_is_no_data(self, tmp_path: Path) -> None:
        write(tmp_path / "README.md", "")
        path = write(tmp_path / "a.jsonl", "")
        assert find_files(str(tmp_path)) == [path]

    @pytest.mark.parametrize(
        ("names", "split", "chosen"),
        [
            (["train.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
            (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/validation.jsonl"], "train",
             ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]),
            (["train.jsonl", "val.jsonl"], "validation", ["val.jsonl"]),
            (["dev/a.jsonl", "train/a.jsonl"], "validation", ["dev/a.jsonl"]),
            (["easy.jsonl", "hard.jsonl"], "hard", ["hard.jsonl"]),
            (["a.jsonl", "b.jsonl"], "train", ["a.jsonl", "b.jsonl"]),
            (["trainer_notes.jsonl", "latest.jsonl"], "train", ["latest.jsonl", "trainer_notes.jsonl"]),
        ],
    )  # fmt: skip
    def test_a_folders_files_are_chosen_by_split(
        self, names: list[str], split: str, chosen: list[str], tmp_path: Path
    ) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            write(tmp_path / name, "")
        assert find_files(str(tmp_path), "auto", split) == [tmp_path / name for name in chosen]

    @pytest.mark.parametrize(("names", "split"), [(["test.jsonl"], "train"), (["a.jsonl"], "hard")])
    def test_a_split_that_no_file_is_named_for_is_refused(self, names: list[str], split: str, tmp_path: Path) -> None:
        for name in names:
            write(tmp_path / name, "")
        with pytest.raises(DataError, match=f"no file is named for the split '{split}'; there are: {names[0]}"):
            find_files(str(tmp_path), "auto", split)

    def test_a_given_format_overrides_the_ending(self, tmp_path: Path) -> None:
        path = write(tmp_path / "rows.data", '{"text": "one"}\n')
        assert find_files(str(path), "jsonl") == [path]
        assert [row.values for row in read_file(path, "jsonl")] == [{"text": "one"}]
        write(tmp_path / "a.csv", "text\ntwo\n")
        chosen = write(tmp_path / "b.jsonl", "")
        assert find_files(str(tmp_path), "jsonl") == [chosen]


class TestReadFile:
    def test_jsonl_rows_have_their_line_as_origin(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", '{"text": "one"}\n\n  \n{"text": "zwölf"}')
        assert rows_in(path) == [Row({"text": "one"}, "a.jsonl:1"), Row({"text": "zwölf"}, "a.jsonl:4")]

    def test_broken_jsonl_lines_are_named_and_the_others_kept(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n{"text": \n[1]\n{"text": "\xff"}\n{"text": "two"}\n')
        found = rows_in(path)
        assert found[0] == Row({"text": "one"}, "a.jsonl:1")
        assert found[1] == Broken("a.jsonl:2", "not valid JSON: Expecting value: line 2 column 1 (char 10)")
        assert found[2] == Broken("a.jsonl:3", "not a JSON object")
        assert isinstance(found[3], Broken)
        assert found[3].reason.startswith("not valid JSON: 'utf-8' codec can't decode byte 0xff")
        assert found[4] == Row({"text": "two"}, "a.jsonl:5")

    def test_half_a_character_is_a_broken_row(self, tmp_path: Path) -> None:
        """Tokenizers end with a TypeError on it."""
        path = write(tmp_path / "a.jsonl", '{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
        assert rows_in(path) == [
            Broken("a.jsonl:1", "'\\ud83d' is half a character (an unpaired surrogate)"),
            Row({"text": "😀"}, "a.jsonl:2"),
        ]
        path = write(tmp_path / "a.json", '[{"messages": [{"role": "user", "content": "\\ude00"}]}]')
        assert rows_in(path) == [Broken("a.json: item 1", "'\\ude00' is half a character (an unpaired surrogate)")]

    def test_json_nested_without_end_is_broken(self, tmp_path: Path) -> None:
        (row,) = rows_in(write(tmp_path / "a.jsonl", "[" * 100_000))
        assert isinstance(row, Broken)
        assert row.reason.startswith("not valid JSON: maximum recursion depth exceeded")
        assert file_error(write(tmp_path / "a.json", "[" * 100_000)) == "a.json: not readable: nested too deeply"

    def test_line_separators_inside_json_text_end_no_row(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", '{"text": "a\u2028b\x85c"}\n')
        assert rows_in(path) == [Row({"text": "a\u2028b\x85c"}, "a.jsonl:1")]

    def test_json_is_one_list_of_objects(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.json", '[{"text": "one"}, 3, {"text": "two"}]')
        assert rows_in(path) == [
            Row({"text": "one"}, "a.json: item 1"),
            Broken("a.json: item 2", "not a JSON object"),
            Row({"text": "two"}, "a.json: item 3"),
        ]

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ('[\n{"a": 1},\n{"a": }]', "a.json:3: not valid JSON: Expecting value"),
            ('{"a": 1}', "a.json: a .json data file is one list of objects, this is a dict"),
            (b'["\xff"]', "a.json: cannot be read: 'utf-8' codec can't decode byte 0xff in position 2"),
        ],
    )
    def test_a_broken_json_file_is_named(self, tmp_path: Path, text: str | bytes, error: str) -> None:
        assert file_error(write(tmp_path / "a.json", text)).startswith(error)

    def test_csv_rows_have_the_line_they_start_on(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.csv", 'prompt,completion\n"one\nline, two",1\n\n"say ""hi""",2\n')
        assert rows_in(path) == [
            Row({"prompt": "one\nline, two", "completion": "1"}, "a.csv:2"),
            Row({"prompt": 'say "hi"', "completion": "2"}, "a.csv:5"),
        ]

    def test_csv_rows_with_too_few_or_too_many_fields_are_broken(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.csv", "a,b\n1\n1,2\n1,2,3\n")
        assert rows_in(path) == [
            Broken("a.csv:2", "1 fields, but the header has 2"),
            Row({"a": "1", "b": "2"}, "a.csv:3"),
            Broken("a.csv:4", "3 fields, but the header has 2"),
        ]

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ('a,b\n1,2\n"1"x,2\n', "a.csv:3: not valid CSV: ',' expected after '\"'"),
            ('a,b\n1,"open\n\n', "a.csv:2: not valid CSV: unexpected end of data"),
            ("a,b,a\n1,2,3\n", "a.csv:1: the header has 'a' twice: keep one of them"),
            (b"a,b\n1,\xff\n", "a.csv: cannot be read: 'utf-8' codec can't decode byte 0xff"),
        ],
    )
    def test_a_broken_csv_file_is_named(self, tmp_path: Path, text: str | bytes, error: str) -> None:
        assert file_error(write(tmp_path / "a.csv", text)).startswith(error)

    def test_a_csv_field_may_be_long(self, tmp_path: Path) -> None:
        (row,) = rows_in(write(tmp_path / "a.csv", f"text\n{'x' * 200_000}\n"))
        assert isinstance(row, Row)
        assert len(row.values["text"]) == 200_000

    def test_parquet_rows_are_counted_from_one(self, tmp_path: Path) -> None:
        table = pa.table({"text": ["one", "two"], "messages": [[{"role": "user", "content": "x"}], None]})
        pq.write_table(table, tmp_path / "a.parquet")
        assert rows_in(tmp_path / "a.parquet") == [
            Row({"text": "one", "messages": [{"role": "user", "content": "x"}]}, "a.parquet: row 1"),
            Row({"text": "two", "messages": None}, "a.parquet: row 2"),
        ]

    def test_parquet_is_read_across_batches(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"n": list(range(2500))}), tmp_path / "a.parquet", row_group_size=700)
        found = rows_in(tmp_path / "a.parquet")
        assert [row.values["n"] for row in found if isinstance(row, Row)] == list(range(2500))
        assert found[-1].origin == "a.parquet: row 2500"

    def test_a_broken_parquet_file_is_named(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", "this is not parquet at all")
        assert file_error(path).startswith("a.parquet: not a readable parquet file: ")

    @pytest.mark.parametrize("ending", [".txt", ".md"])
    def test_a_text_file_is_one_row(self, tmp_path: Path, ending: str) -> None:
        path = write(tmp_path / f"a{ending}", "one\n\ntwo\n")
        assert rows_in(path) == [Row({"text": "one\n\ntwo\n"}, f"a{ending}")]

    def test_a_file_that_is_gone_cannot_be_read(self, tmp_path: Path) -> None:
        assert file_error(tmp_path / "a.txt").startswith("a.txt: cannot be read: [Errno 2] No such file")

    @pytest.mark.parametrize(
        ("name", "text"),
        [("a.jsonl", '{"text": "x"}'), ("a.json", '[{"text": "x"}]'), ("a.csv", "text\nx\n"), ("a.txt", "x")],
    )
    def test_a_byte_order_mark_is_no_part_of_the_data(self, tmp_path: Path, name: str, text: str) -> None:
        (row,) = rows_in(write(tmp_path / name, "\ufeff" + text))
        assert isinstance(row, Row)
        assert row.values == {"text": "x"}

    @pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
    def test_an_empty_file_has_no_rows(self, tmp_path: Path, name: str) -> None:
        assert rows_in(write(tmp_path / name, "")) == []


TEXTS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1), min_size=1, max_size=5)


@given(texts=TEXTS)
def test_every_kind_of_file_gives_back_the_texts_that_were_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    write(folder / "p.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    write(folder / "p.json", json.dumps([{"text": text} for text in texts], ensure_ascii=False))
    pq.write_table(pa.table({"text": texts}), folder / "p.parquet")
    with (folder / "p.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    for name in ("p.jsonl", "p.json", "p.parquet", "p.csv"):
        assert [row.values["text"] for row in read_file(folder / name) if isinstance(row, Row)] == texts, name


class TestWithinLimit:
    def outcome(self, broken: set[int], total: int, share: float, **more: int) -> tuple[list[int], list[str]]:
        """What is passed on, and what is reported or, after "stop", listed."""
        said: list[str] = []
        passed: list[int] = []
        rows: Iterable[int | Broken] = (Broken(f"a:{n}", "bad") if n in broken else n for n in range(total))
        try:
            passed.extend(within_limit(rows, share, said.append, **more))
        except DataError as error:
            said += ["stop", *error.problems]
        return passed, said

    def test_good_rows_pass_in_silence(self) -> None:
        assert self.outcome(set(), 3, 0.0) == ([0, 1, 2], [])

    def test_one_broken_row_stops_where_none_is_allowed(self) -> None:
        assert self.outcome({1}, 3, 0.0)[1] == [
            "stop",
            "a:1: bad",
            "1 of 3 rows cannot be used: mend them, or allow a share with --unreadable-share",
        ]

    def test_an_allowed_share_is_left_out_and_reported(self) -> None:
        assert self.outcome({1}, 4, 0.25) == ([0, 2, 3], ["1 of 4 rows are broken and left out; the first: a:1"])

    def test_more_than_the_allowed_share_stops(self) -> None:
        assert self.outcome({0, 1}, 4, 0.25)[1][-1].startswith("2 of 4 rows cannot be used")

    def test_ten_broken_rows_are_shown_and_the_rest_counted(self) -> None:
        said = self.outcome(set(range(12)), 20, 0.5)[1]
        assert said == [
            "stop",
            *(f"a:{n}: bad" for n in range(10)),
            "… and 2 more broken rows",
            "12 of 20 rows cannot be used: mend them, or allow a share with --unreadable-share",
        ]

    def test_a_hopeless_file_is_not_read_to_its_end(self) -> None:
        passed, said = self.outcome(set(range(0, 10**6, 2)), 10**6, 0.1)
        assert len(passed) == 499
        assert said[-1].startswith("500 of 1000 rows")

    def test_a_stream_stops_after_a_thousand_rows_also_for_one_broken_row(self) -> None:
        passed, said = self.outcome({5}, 10**6, 0.0, collected=0)
        assert len(passed) == 998
        assert said[-1].startswith("1 of 1000 rows")

    def test_a_stream_within_its_share_goes_on(self) -> None:
        passed, said = self.outcome({5}, 5000, 0.001, collected=0)
        assert len(passed) == 4999
        assert said == ["1 of 5000 rows are broken and left out; the first: a:5"]


class TestPeek:
    def test_the_first_good_rows_are_seen_and_nothing_is_lost(self) -> None:
        rows = [Row({"n": n}, f"a:{n}") for n in range(5)]
        seen, everything = peek(iter(rows), count=3)
        assert seen == rows[:3]
        assert list(everything) == rows

    def test_it_looks_on_until_there_is_a_good_row(self) -> None:
        rows = [*(Broken(f"a:{n}", "bad") for n in range(5)), Row({"n": 5}, "a:5"), Row({"n": 6}, "a:6")]
        seen, everything = peek(iter(rows), count=3)
        assert seen == [rows[5]]
        assert list(everything) == rows

    def test_no_rows_are_no_rows(self) -> None:
        seen, everything = peek(iter([]))
        assert (seen, list(everything)) == ([], [])


USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


class TestDetection:
    @pytest.mark.parametrize(
        ("row", "reason", "unused"),
        [
            ({"messages": [USER], "tools": [], "id": 1}, "chat (found: column messages)", ["id"]),
            ({"conversations": [USER]}, "chat (found: column conversations)", []),
            ({"conversations": [{"from": "human", "value": "q"}]}, "sharegpt (found: column conversations)", []),
            ({"conversations": [3]}, "sharegpt (found: column conversations)", []),
            ({"conversations": "text"}, "sharegpt (found: column conversations)", []),
            (
                {"prompt": "q", "completion": "a", "text": "qa"},
                "prompt_completion (found: column prompt and completion)",
                ["text"],
            ),
            (
                {"instruction": "q", "input": "", "output": "a", "system": "s"},
                "instruction (found: column instruction and output)",
                [],
            ),
            ({"text": "x", "url": "u"}, "text (found: column text)", ["url"]),
            ({"messages": [USER], "text": "x"}, "chat (found: column messages)", ["text"]),
        ],
    )
    def test_the_columns_decide_and_the_reason_is_said(
        self, row: dict[str, Any], reason: str, unused: list[str]
    ) -> None:
        schema = schema_of(row)
        assert (schema.reason, schema.unused_columns) == (reason, unused)
        assert schema.name == reason.split(" ")[0]

    def test_a_given_schema_is_taken_before_the_found_one(self) -> None:
        schema = schema_of({"messages": [USER], "text": "x"}, wanted="text")
        assert (schema.reason, schema.unused_columns) == ("text (given: column text)", ["messages"])

    def test_the_text_column_may_have_another_name(self) -> None:
        schema = schema_of({"body": "x"}, text_column="body")
        assert schema.reason == "text (found: column body)"
        assert list(to_examples([Row({"body": "x"}, "o")], schema)) == [Text("x", "o")]

    def test_columns_of_all_first_rows_count(self) -> None:
        assert schema_of({"prompt": "q"}, {"completion": "a"}).name == "prompt_completion"

    @pytest.mark.parametrize(
        ("wanted", "needs"),
        [
            (
                "auto",
                "chat: messages; or sharegpt: conversations; or prompt_completion: prompt and completion; "
                "or instruction: instruction and output; or text: text",
            ),
            ("instruction", "instruction: instruction and output"),
            ("sharegpt", "sharegpt: conversations"),
        ],
    )
    def test_wrong_columns_are_listed_with_what_is_needed(self, wanted: str, needs: str) -> None:
        with pytest.raises(DataError) as error:
            schema_of({"question": "q", "answer": "a"}, wanted=wanted)
        assert str(error.value) == f"data.jsonl: the columns are question, answer; needed are {needs}"

    def test_no_columns_are_said_to_be_none(self) -> None:
        with pytest.raises(DataError, match=r"the columns are \(none\); needed are"):
            schema_of({})


class TestChat:
    def test_all_roles_and_further_keys_are_kept(self) -> None:
        said = [
            {"role": "system", "content": "s"},
            {"role": "developer", "content": "d"},
            {"role": "user", "content": "q", "name": "Ann"},
            {"role": "assistant", "content": "a", "weight": 0},
            {"role": "tool", "content": "t", "tool_call_id": "1"},
        ]
        assert example({"messages": said}) == Conversation(said, None, "x:1")

    def test_empty_values_are_left_out(self) -> None:
        """Parquet gives every message every key."""
        assert messages({"messages": [{**USER, "name": None, "tool_calls": None}]}) == [USER]

    def test_arguments_of_calls_become_objects(self) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": [2]}'}}
        (message,) = messages({"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]})
        assert message["content"] == ""
        assert message["tool_calls"] == [{**call, "function": {"name": "f", "arguments": {"b": 1, "a": [2]}}}]
        assert call["function"] == {"name": "f", "arguments": '{"b": 1, "a": [2]}'}

    def test_arguments_that_are_objects_already_stay(self) -> None:
        call = {"function": {"name": "f", "arguments": {"a": 1}}}
        assert messages({"messages": [{**ASSISTANT, "tool_calls": [call]}]})[0]["tool_calls"] == [call]

    def test_text_parts_are_joined(self) -> None:
        parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
        assert messages({"messages": [{"role": "user", "content": parts}]})[0]["content"] == "one two"

    @pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
    def test_tools_are_a_list_or_its_json(self, tools: Any) -> None:
        found = example({"messages": [USER], "tools": tools})
        assert isinstance(found, Conversation)
        assert found.tools == [{"name": "f"}]

    @pytest.mark.parametrize("tools", [None, "", [], "[]"])
    def test_no_tools_are_none(self, tools: Any) -> None:
        found = example({"messages": [USER], "tools": tools})
        assert isinstance(found, Conversation)
        assert found.tools is None

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({"messages": "hi"}, "messages is not a list of messages, or is empty"),
            ({"messages": []}, "messages is not a list of messages, or is empty"),
            ({"messages": [USER, "hi"]}, "messages[1] is str, not an object with role and content"),
            (
                {"messages": [{"role": "bot", "content": "x"}]},
                "messages[0].role is 'bot'; known roles: system, developer, user, assistant, tool",
            ),
            (
                {"messages": [{"role": ["user"], "content": "x"}]},
                "messages[0].role is ['user']; known roles: system, developer, user, assistant, tool",
            ),
            (
                {"messages": [{"content": "x"}]},
                "messages[0].role is None; known roles: system, developer, user, assistant, tool",
            ),
            ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content is NoneType, not text"),
            ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content is int, not text"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                "messages[0].content has parts that are not text",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
                "messages[0].content is NoneType, not text",
            ),
            ({"messages": [{**ASSISTANT, "weight": 0.5}]}, "messages[0].weight is 0.5; it is 0 or 1"),
            ({"messages": [{**ASSISTANT, "tool_calls": 5}]}, "messages[0].tool_calls is int, not a list"),
            (
                {"messages": [{**ASSISTANT, "tool_calls": ["f"]}]},
                "messages[0].tool_calls has an entry without a function",
            ),
            (
                {"messages": [{**ASSISTANT, "tool_calls": [{"function": {"arguments": "{"}}]}]},
                "messages[0].tool_calls: the arguments are not valid JSON: "
                "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
            ),
            ({"messages": [USER], "tools": "[1"}, "tools is not valid JSON: "),
            ({"messages": [USER], "tools": "3"}, "tools is not a list of objects"),
            ({"messages": [USER], "tools": ["f"]}, "tools is not a list of objects"),
        ],
    )
    def test_what_is_no_conversation_is_broken(self, values: dict[str, Any], expected: str) -> None:
        assert reason(values).startswith(expected)


class TestOtherSchemas:
    def test_sharegpt_speakers_become_roles(self) -> None:
        turns = [
            ("human", "q"),
            ("gpt", "a"),
            ("user", "q2"),
            ("model", "a2"),
            ("observation", "t"),
            ("assistant", "z"),
        ]
        found = example(
            {"system": "s", "conversations": [{"from": who, "value": what} for who, what in turns], "tools": None}
        )
        assert isinstance(found, Conversation)
        assert [(m["role"], m["content"]) for m in found.messages] == [
            ("system", "s"),
            ("user", "q"),
            ("assistant", "a"),
            ("user", "q2"),
            ("assistant", "a2"),
            ("tool", "t"),
            ("assistant", "z"),
        ]

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({"conversations": []}, "conversations is not a list of turns, or is empty"),
            ({"conversations": "q"}, "conversations is not a list of turns, or is empty"),
            (
                {"conversations": [{"from": "robot", "value": "x"}]},
                "conversations[0].from is 'robot'; known: human, user",
            ),
            ({"conversations": [{"from": ["human"], "value": "x"}]}, "conversations[0].from is ['human']; known: "),
            ({"conversations": ["x"]}, "conversations[0].from is 'x'; known: "),
            ({"conversations": [{"from": "human"}]}, "conversations[0].value is NoneType, not text"),
            (
                {"conversations": [{"from": "human", "value": "x"}], "system": 3},
                "system is int, not text",
            ),
        ],
    )
    def test_what_is_no_sharegpt_is_broken(self, values: dict[str, Any], expected: str) -> None:
        assert reason(values).startswith(expected)

    def test_prompt_and_completion_as_text(self) -> None:
        assert messages({"prompt": "q", "completion": "a"}) == [USER, ASSISTANT]

    def test_prompt_and_completion_as_messages(self) -> None:
        prompt = [{"role": "system", "content": "s"}, USER]
        assert messages({"prompt": prompt, "completion": [ASSISTANT]}) == [*prompt, ASSISTANT]
        assert messages({"prompt": prompt, "completion": "a"}) == [*prompt, ASSISTANT]

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({"prompt": 3, "completion": "a"}, "prompt is int, not text"),
            ({"prompt": "q", "completion": []}, "completion is not a list of messages, or is empty"),
            ({"prompt": "q", "completion": None}, "completion is NoneType, not text"),
        ],
    )
    def test_what_is_no_prompt_and_completion_is_broken(self, values: dict[str, Any], expected: str) -> None:
        assert reason(values) == expected

    @pytest.mark.parametrize("more", [{}, {"input": ""}, {"input": None}])
    def test_an_instruction_without_input(self, more: dict[str, Any]) -> None:
        assert messages({"instruction": "q", "output": "a", **more}) == [USER, ASSISTANT]

    def test_an_instruction_with_input_and_system(self) -> None:
        assert messages({"instruction": "q", "input": "i", "output": "a", "system": "s"}) == [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q\n\ni"},
            ASSISTANT,
        ]

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({"instruction": 3, "output": "a"}, "instruction is int, not text"),
            ({"instruction": "q", "input": 3, "output": "a"}, "input is int, not text"),
            ({"instruction": "q", "output": None}, "output is NoneType, not text"),
        ],
    )
    def test_what_is_no_instruction_is_broken(self, values: dict[str, Any], expected: str) -> None:
        assert reason(values) == expected

    def test_text_is_text(self) -> None:
        assert example({"text": "x"}) == Text("x", "x:1")
        assert reason({"text": None}) == "text is NoneType, not text"

    def test_a_row_without_the_column_is_broken_and_broken_rows_stay(self) -> None:
        schema = schema_of({"text": "x"})
        rows = [Row({"text": "x"}, "a:1"), Row({"tekst": "y"}, "a:2"), Broken("a:3", "bad")]
        assert list(to_examples(rows, schema)) == [
            Text("x", "a:1"),
            Broken("a:2", "the column 'text' is missing"),
            Broken("a:3", "bad"),
        ]
