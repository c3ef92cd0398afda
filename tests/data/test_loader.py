"""From data settings to batches that restart exactly, and to the arrays of a forward pass."""

import json
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures import make_tokenizer, write_chat
from lacuna.config.training import PretrainConfig, SFTConfig
from lacuna.data.chat import Renderer
from lacuna.data.collate import collate
from lacuna.data.documents import pieces
from lacuna.data.loader import (
    Batch,
    PackedRows,
    Position,
    batches,
    check_data_settings,
    load_rows,
    pack_samples,
)
from lacuna.data.samples import Sample
from lacuna.data.split import row_order
from lacuna.data.stream import check_stream, stream
from lacuna.errors import DataError

NAMES = {"model_name": "m", "output_dir": "o"}


@cache
def renderer() -> Renderer:
    return Renderer(make_tokenizer())


def numbered(count: int) -> PackedRows:
    """Rows 0, 1, … of one document of one token, its number."""
    return pack_samples([document([number]) for number in range(count)], 8, packing=False)


def document(tokens: list[int], supervised: list[int] | None = None) -> Sample:
    mask = np.array(supervised if supervised is not None else [1] * len(tokens), dtype=np.bool_)
    return Sample(np.array(tokens, dtype=np.int32), mask)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=8), max_size=40), st.booleans(), st.sampled_from([1, 60]))
def test_rows_are_counted_as_they_are_built(masks: list[list[bool]], packing: bool, times: int) -> None:
    rows = pack_samples([document([7] * len(mask), [int(x) for x in mask]) for mask in masks * times], 8, packing)
    built = [rows.row(index) for index in range(len(rows))]
    assert rows.lengths.tolist() == [sum(len(sample.tokens) for sample in row) for row in built]
    assert rows.targets.tolist() == [sum(int(sample.supervised[1:].sum()) for sample in row) for row in built]


def numbers(batch: Batch) -> list[int]:
    return [int(row[0].tokens[0]) for row in batch.rows]


def everything(rows: PackedRows) -> list[str]:
    """The text of every document, in the order of the data."""
    return [
        renderer().tokenizer.decode(rows.tokens[start:end].tolist())
        for start, end in zip(rows.starts[:-1], rows.starts[1:], strict=True)
    ]


def contents(batch: Batch) -> list[list[list[int]]]:
    return [[sample.tokens.tolist() for sample in row] for row in batch.rows]


def through_json(position: Position) -> Any:
    """As a checkpoint keeps it."""
    return json.loads(json.dumps(position))


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


class TestRows:
    @pytest.mark.parametrize(
        ("packing", "expected"),
        [
            (True, [[[5, 5, 5, 5]], [[1, 1, 1], [2]], [[3, 3], [4, 4]]]),
            (False, [[[1, 1, 1]], [[2]], [[3, 3]], [[4, 4]], [[5, 5, 5, 5]]]),
        ],
    )
    def test_documents_share_rows_only_when_packed(self, packing: bool, expected: list[list[list[int]]]) -> None:
        documents = [document([n] * length) for n, length in [(1, 3), (2, 1), (3, 2), (4, 2), (5, 4)]]
        rows = pack_samples(documents, 4, packing)
        assert [[sample.tokens.tolist() for sample in rows.row(index)] for index in range(len(rows))] == expected

    def test_a_mask_stays_with_its_document(self) -> None:
        rows = pack_samples([document([1, 2], [0, 1]), document([3, 4, 5], [0, 0, 1])], 8, packing=True)
        assert [(s.tokens.tolist(), s.supervised.tolist()) for s in rows.row(0)] == [
            ([1, 2], [False, True]),
            ([3, 4, 5], [False, False, True]),
        ]

    def test_no_documents_are_no_rows(self) -> None:
        assert len(pack_samples([], 8, packing=True)) == 0
        assert len(pack_samples([], 8, packing=False)) == 0

    def test_the_fingerprint_is_of_tokens_mask_and_packing(self) -> None:
        same = [pack_samples([document([1, 2]), document([3])], 8, packing=True).fingerprint() for _ in range(2)]
        others = [
            pack_samples([document([1, 2]), document([4])], 8, packing=True),
            pack_samples([document([1, 2], [0, 1]), document([3])], 8, packing=True),
            pack_samples([document([1]), document([2, 3])], 8, packing=True),
            pack_samples([document([1, 2]), document([3])], 8, packing=False),
        ]
        assert same[0] == same[1]
        assert len({same[0], *(rows.fingerprint() for rows in others)}) == 5


class TestBatches:
    def test_the_order_is_a_pure_function_of_seed_and_epoch(self) -> None:
        rows = numbered(50)
        first, second = (list(islice(batches(rows, 50, 7, None), 2)) for _ in range(2))
        assert [numbers(batch) for batch in first] == [numbers(batch) for batch in second]
        assert [numbers(batch) for batch in first] == [row_order(7, epoch, 50).tolist() for epoch in (0, 1)]
        orders = {tuple(row_order(seed, epoch, 50).tolist()) for seed in (7, 8) for epoch in (0, 1)}
        assert len(orders) == 4

    def test_each_row_comes_once_an_epoch(self) -> None:
        seen = [n for batch in islice(batches(numbered(7), 3, 0, None), 7) for n in numbers(batch)]
        for epoch in range(3):
            assert sorted(seen[7 * epoch : 7 * epoch + 7]) == list(range(7))

    @pytest.mark.parametrize(
        ("rows", "batch_size", "total", "sizes"),
        [
            (5, 2, 10, [2, 2, 2, 2, 2]),
            (5, 3, 10, [3, 3, 3, 1]),
            (5, 5, 5, [5]),
            (5, 2, 5, [2, 2, 1]),
            (5, 2, 3, [2, 1]),
            (5, 2, 4, [2, 2]),
            (5, 2, 8, [2, 2, 2, 2]),
            (2, 5, 6, [5, 1]),
        ],
    )
    def test_the_last_batch_of_all_rows_may_be_short(
        self, rows: int, batch_size: int, total: int, sizes: list[int]
    ) -> None:
        found = list(batches(numbered(rows), batch_size, 0, None, total))
        assert [len(batch.rows) for batch in found] == sizes

    def test_without_a_total_there_is_no_end(self) -> None:
        assert all(len(batch.rows) == 4 for batch in islice(batches(numbered(3), 4, 0, None), 100))

    @given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 3), st.integers(0, 3))
    def test_every_position_restarts_the_same_continuation(
        self, count: int, batch_size: int, epochs: int, seed: int
    ) -> None:
        rows = numbered(count)
        straight = list(batches(rows, batch_size, seed, None, epochs * count))
        assert sorted(n for batch in straight for n in numbers(batch)) == sorted(list(range(count)) * epochs)
        for done, batch in enumerate(straight, 1):
            rest = list(batches(rows, batch_size, seed, through_json(batch.position), epochs * count))
            assert [(numbers(b), b.position) for b in rest] == [(numbers(b), b.position) for b in straight[done:]]


def pretrain(dataset: Path | str, **more: Any) -> PretrainConfig:
    length = {} if {"steps", "epochs"} & set(more) else {"steps": 1}
    sizes = {"sequence_length": 64, "batch_size": 1, "micro_batch_size": 1}
    return PretrainConfig(**{**NAMES, **sizes, **length, "dataset": str(dataset), **more})


def sft(dataset: Path | str, **more: Any) -> SFTConfig:
    sizes = {"sequence_length": 64, "batch_size": 1, "micro_batch_size": 1}
    return SFTConfig(**{**NAMES, **sizes, "steps": 1, "dataset": str(dataset), **more})


def load(config: PretrainConfig | SFTConfig) -> tuple[PackedRows, PackedRows | None, list[str]]:
    said: list[str] = []
    rows, validation = load_rows(config, renderer(), said.append)
    return rows, validation, said


def load_error(config: PretrainConfig | SFTConfig) -> list[str]:
    """The problems for which the data are refused, without the folder's name."""
    with pytest.raises(DataError) as error:
        load(config)
    return [problem.replace(f"{Path(config.dataset).parent}/", "") for problem in error.value.problems]


class TestLoadRows:
    def test_texts_become_rows_and_what_was_found_is_said(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "river stone", "url": "u"}\n{"text": "cloud", "url": "v"}\n')
        rows, validation, said = load(pretrain(path))
        assert everything(rows) == ["river stone<|endoftext|>", "cloud<|endoftext|>"]
        assert validation is None
        tokens = len(rows.tokens)
        assert said == [
            f"{path}: schema text (given: column text); columns not used: url",
            f"{path}: 2 documents, {tokens} tokens (100% learned), 1 rows of 64 ({tokens / 64:.1%} full)",
        ]

    def test_a_folder_is_read_file_after_file(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "b.jsonl", ["two"])
        write_lines(tmp_path / "a.jsonl", ["one"])
        assert everything(load(pretrain(tmp_path))[0]) == ["one<|endoftext|>", "two<|endoftext|>"]

    def test_a_validation_share_is_disjoint_and_of_the_right_size(self, tmp_path: Path) -> None:
        texts = [f"number {n}" for n in range(20)]
        path = write_lines(tmp_path / "a.jsonl", texts)
        rows, validation, said = load(pretrain(path, validation_share=0.25, packing=False))
        assert validation is not None
        assert (len(rows), len(validation)) == (15, 5)
        kept, held_out = everything(rows), everything(validation)
        assert sorted(kept + held_out) == sorted(f"{text}<|endoftext|>" for text in texts)
        assert said[-1].startswith("validation share: 5 documents")

    def test_a_long_text_is_on_one_side_of_the_split(self, tmp_path: Path) -> None:
        """Twelve texts of one letter each, cut into three pieces or more."""
        path = write_lines(tmp_path / "a.jsonl", [letter * 180 for letter in "abcdefghijkl"])
        rows, validation, _ = load(pretrain(path, validation_share=0.25, packing=False))
        assert validation is not None
        kept, held_out = ({text[0] for text in everything(part)} for part in (rows, validation))
        assert (len(kept), len(held_out), len(kept | held_out)) == (9, 3, 12)
        assert len(rows) > 2 * 9

    def test_the_validation_share_is_the_same_whatever_varies_but_its_own_seed(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", [f"number {n}" for n in range(20)])

        def held_out(**settings: Any) -> list[str]:
            validation = load(pretrain(path, **{"validation_share": 0.25, **settings}))[1]
            assert validation is not None
            return everything(validation)

        usual = held_out()
        assert held_out(seed=1) == held_out(seed=2) == usual
        assert held_out(split_seed=1) == held_out(split_seed=1) != usual
        assert set(usual) < set(held_out(validation_share=0.5))

    def test_of_conversations_that_are_too_long_for_one_run_the_others_are_held_out_as_before(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "a.jsonl"
        rows = [{"prompt": f"number {n}", "completion": "river " * (n % 8 // 7 * 40 + 1)} for n in range(40)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

        def held_out(length: int) -> set[str]:
            validation = load(sft(path, validation_share=0.25, sequence_length=length))[1]
            assert validation is not None
            return set(everything(validation))

        all_of_them, short_ones = held_out(256), held_out(32)
        fitting = {text for text in all_of_them if "river river" not in text}
        assert (len(all_of_them), len(short_ones)) == (10, 9)
        assert fitting < all_of_them
        assert short_ones <= fitting or fitting <= short_ones

    @given(st.lists(st.integers(0, 8), min_size=4, max_size=60), st.integers(0, 5), st.floats(0.05, 0.9))
    def test_copies_are_on_one_side_of_the_split(self, numbers: list[int], seed: int, share: float) -> None:
        with TemporaryDirectory() as folder:
            path = write_lines(Path(folder) / "a.jsonl", [f"number {n}" for n in numbers])
            config = pretrain(path, validation_share=share, split_seed=seed, packing=False)
            distinct, count = len(set(numbers)), max(round(share * len(set(numbers))), 1)
            if count >= distinct:
                assert "too few" in load_error(config)[0]
                return
            rows, validation, said = load(config)
        assert validation is not None
        kept, held_out = everything(rows), everything(validation)
        assert sorted(kept + held_out) == sorted(f"number {n}<|endoftext|>" for n in numbers)
        assert set(kept).isdisjoint(held_out)
        assert len(set(held_out)) == count
        assert not any("also in the training data" in line for line in said)

    def test_a_small_validation_share_is_at_least_one_document(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", ["one", "two", "three"])
        validation = load(pretrain(path, validation_share=0.01))[1]
        assert validation is not None
        assert len(everything(validation)) == 1

    def test_too_few_documents_for_a_validation_share_are_refused(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", ["one"])
        assert load_error(pretrain(path, validation_share=0.5)) == [
            "a.jsonl: 1 distinct documents are too few to keep 50% of them for validation: "
            "give --validation-dataset, or no validation"
        ]

    def test_validation_has_a_file_of_its_own(self, tmp_path: Path) -> None:
        path, other = write_lines(tmp_path / "a.jsonl", ["one"]), write_lines(tmp_path / "b.jsonl", ["two", "three"])
        rows, validation, _ = load(pretrain(path, validation_dataset=str(other)))
        assert validation is not None
        assert everything(rows) == ["one<|endoftext|>"]
        assert everything(validation) == ["two<|endoftext|>", "three<|endoftext|>"]

    @pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
    def test_an_empty_data_set_is_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("[]" if name == "a.json" else "")
        assert load_error(pretrain(tmp_path / name)) == [f"{name}: there are no rows in it"]
        assert load_error(sft(tmp_path / name)) == [f"{name}: there are no rows in it"]

    def test_an_empty_validation_data_set_is_refused(self, tmp_path: Path) -> None:
        path, empty = write_lines(tmp_path / "a.jsonl", ["one"]), write_lines(tmp_path / "b.jsonl", [])
        assert load_error(pretrain(path, validation_dataset=str(empty))) == ["b.jsonl: there are no rows in it"]

    def test_empty_texts_are_left_out_and_counted(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", ["one", "", "two", ""])
        rows, _, said = load(pretrain(path))
        assert everything(rows) == ["one<|endoftext|>", "two<|endoftext|>"]
        assert f"2 of 4 texts are empty and left out; the first: {path}:2" in said
        path = write_lines(tmp_path / "b.jsonl", ["", ""])
        assert load_error(pretrain(path)) == ["b.jsonl: all 2 texts in it are empty"]

    def test_a_batch_larger_than_the_data_is_refused(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", ["one", "two"])
        assert load_error(pretrain(path, batch_size=3, packing=False)) == [
            "a.jsonl: batch_size is 3 samples, but there are only 2: lower --batch-size"
        ]
        assert load_error(pretrain(path, batch_size=3)) == [
            "a.jsonl: batch_size is 3 rows, but the data fill only 1 of 64 tokens: "
            "lower --batch-size or --sequence-length"
        ]
        assert len(load(pretrain(path, batch_size=2, packing=False))[0]) == 2

    def test_broken_rows_are_named_by_line(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "one"}\n{"text": 3}\n{"tekst": "two"}\n')
        assert load_error(pretrain(path)) == [
            "a.jsonl:2: text is int, not text",
            "a.jsonl:3: the column 'text' is missing",
            "2 of 3 rows cannot be used: mend them, or allow a share with --unreadable-share",
        ]
        rows, _, said = load(pretrain(path, unreadable_share=0.7))
        assert everything(rows) == ["one<|endoftext|>"]
        assert f"2 of 3 rows are broken and left out; the first: {path}:2" in said

    def test_good_rows_after_many_broken_ones_are_used(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("broken\n" * 150 + '{"text": "one"}\n')
        assert everything(load(pretrain(path, unreadable_share=0.999))[0]) == ["one<|endoftext|>"]

    def test_wrong_columns_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"prompt": "q", "completion": "a"}\n')
        assert load_error(pretrain(path)) == ["a.jsonl: the columns are prompt, completion; needed are text: text"]
        assert load_error(sft(path, dataset_schema="chat")) == [
            "a.jsonl: the columns are prompt, completion; needed are chat: messages"
        ]

    def test_conversations_learn_the_assistants_words(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"prompt": "river", "completion": "stone"}\n')
        rows, _, said = load(sft(path))
        assert everything(rows) == ["<|im_start|>user\nriver<|im_end|>\n<|im_start|>assistant\nstone<|im_end|>\n"]
        assert renderer().tokenizer.decode(rows.tokens[rows.supervised].tolist()) == "stone<|im_end|>"
        assert said[0] == f"{path}: schema prompt_completion (found: column prompt and completion)"

    def test_conversations_that_teach_the_wrong_thing_stop_the_run(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"prompt": "q", "completion": "a"}\n{"prompt": "q", "completion": ""}\n')
        (problem,) = load_error(sft(path))
        assert problem.startswith("a.jsonl:2: nothing to learn; 1 of 2 samples: ")

    def test_more_rows_than_one_chunk_are_all_read(self, tmp_path: Path) -> None:
        path = write_chat(tmp_path / "a.jsonl", rows=2100)
        assert len(everything(load(sft(path, sequence_length=256))[0])) == 2100


class TestTooLong:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        """Conversations of 21, 28 and 61 tokens, whose answers begin at token 17, 17 and 57."""
        rows = [("river", "stone"), ("river", "stone " * 8), ("river " * 21, "stone")]
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"prompt": q.strip(), "completion": a.strip()}) + "\n" for q, a in rows))
        return path

    def lengths(self, rows: PackedRows) -> list[int]:
        return np.diff(rows.starts).tolist()

    def test_what_fits_is_left_alone(self, path: Path) -> None:
        rows, _, said = load(sft(path))
        assert self.lengths(rows) == [21, 28, 61]
        assert not [line for line in said if "longer than" in line]

    def test_drop_leaves_long_ones_out_and_counts_them(self, path: Path) -> None:
        rows, _, said = load(sft(path, sequence_length=28))
        assert self.lengths(rows) == [21, 28]
        found = f"{path}: 1 of 3 conversations are longer than sequence_length 28"
        assert f"{found} (the longest has 61 tokens): left out (too_long = 'drop')" in said

    def test_truncate_cuts_and_leaves_out_what_has_nothing_to_learn_any_more(self, path: Path) -> None:
        rows, _, said = load(sft(path, sequence_length=26, too_long="truncate"))
        assert self.lengths(rows) == [21, 26]
        assert any(line.endswith("cut off; 1 of them had nothing left to learn and are left out") for line in said)

    def test_stop_stops(self, path: Path) -> None:
        assert load_error(sft(path, sequence_length=21, too_long="stop")) == [
            "a.jsonl: 2 of 3 conversations are longer than sequence_length 21 "
            "(the longest has 61 tokens): raise --sequence-length, or choose --too-long drop or truncate"
        ]

    @pytest.mark.parametrize("choice", ["drop", "truncate"])
    def test_nothing_left_is_refused(self, path: Path, choice: str) -> None:
        (problem,) = load_error(sft(path, sequence_length=5, too_long=choice))
        assert problem.startswith("a.jsonl: 3 of 3 conversations are longer than sequence_length 5 ")
        assert problem.endswith("nothing is left to train on; raise --sequence-length")

    @pytest.mark.parametrize(
        ("length", "expected"),
        [(6, [[0, 1, 2], [3, 4, 5]]), (5, [[0, 1, 2], [3, 4]]), (4, [[0, 1, 2]]), (2, [[0, 1]]), (1, [])],
    )
    def test_a_text_is_cut_into_pieces(self, length: int, expected: list[list[int]]) -> None:
        whole = document(list(range(length)), [n % 2 for n in range(length)])
        found = pieces(whole, 3)
        assert [piece.tokens.tolist() for piece in found] == expected
        assert [piece.supervised.tolist() for piece in found] == [[n % 2 == 1 for n in part] for part in expected]

    def test_long_texts_are_cut_also_in_sft(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", ["river " * 30])
        for config in (pretrain(path, sequence_length=8), sft(path, sequence_length=8)):
            rows = load(config)[0]
            assert max(self.lengths(rows)) == 8
            assert len(everything(rows)) > 3


def streamed(config: PretrainConfig, position: Position | None, count: int) -> list[Batch]:
    source = stream(config, renderer(), lambda _: None, position)
    assert isinstance(source, Iterator)
    found = list(islice(source, count))
    source.close()  # type: ignore[attr-defined]
    return found


def streaming(dataset: Path | str, **more: Any) -> PretrainConfig:
    return pretrain(dataset, streaming=True, **{"sequence_length": 16, "streaming_window": 2, **more})


class TestStream:
    def test_every_document_comes_once_an_epoch(self, tmp_path: Path) -> None:
        """200 documents in two files: several windows of 64 documents, and borders of files and epochs."""
        texts = [f"number {n}" for n in range(200)]
        write_lines(tmp_path / "a.jsonl", texts[:90])
        write_lines(tmp_path / "b.jsonl", texts[90:])
        found = streamed(streaming(tmp_path, packing=False), None, 400)
        documents = [renderer().tokenizer.decode(row[0].tokens.tolist()) for batch in found for row in batch.rows]
        expected = sorted(f"{text}<|endoftext|>" for text in texts)
        assert sorted(documents[:200]) == expected
        assert sorted(documents[200:]) == expected
        assert documents[:200] != documents[200:]
        assert {batch.position["epoch"] for batch in found} == {0, 1}
        assert len({batch.position["window"] for batch in found}) > 4

    def test_the_order_depends_on_the_seed_alone(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", [f"number {n}" for n in range(70)])

        def order(seed: int) -> list[list[list[list[int]]]]:
            return [contents(batch) for batch in streamed(streaming(path, seed=seed), None, 20)]

        assert order(1) == order(1)
        assert order(1) != order(2)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        documents=st.integers(1, 150),
        files=st.integers(1, 3),
        batch_size=st.integers(1, 9),
        window=st.integers(1, 40),
        packing=st.booleans(),
    )
    def test_every_position_restarts_the_same_continuation(
        self, tmp_path: Path, documents: int, files: int, batch_size: int, window: int, packing: bool
    ) -> None:
        folder = tmp_path / f"{documents}-{files}-{batch_size}-{window}-{packing}"
        folder.mkdir(exist_ok=True)
        texts = [f"number {n} " + "river " * (n * 7 % 23) for n in range(documents)]
        for index in range(files):
            write_lines(folder / f"{index}.jsonl", texts[index::files])
        config = streaming(folder, batch_size=batch_size, streaming_window=window, packing=packing)
        straight = streamed(config, None, 40)
        assert all(len(batch.rows) == batch_size for batch in straight)
        for done in {1, 2, 3, 7, 13, 19, 20, 31}:
            rest = streamed(config, through_json(straight[done - 1].position), 40 - done)
            assert [contents(batch) for batch in rest] == [contents(batch) for batch in straight[done:]]
            assert [batch.position for batch in rest] == [batch.position for batch in straight[done:]]

    def test_a_broken_row_stops_at_the_end_of_the_data(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "one"}\n{"text": \n{"text": "two"}\n')
        with pytest.raises(DataError) as error:
            streamed(streaming(path), None, 50)
        assert [problem.replace(f"{tmp_path}/", "").split(": ")[0] for problem in error.value.problems] == [
            "a.jsonl:2",
            "1 of 3 rows cannot be used",
        ]

    def test_a_broken_row_stops_a_long_stream_after_a_thousand_rows(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", [f"number {n}" for n in range(4000)])
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*lines[:10], "broken\n", *lines[10:]]))
        with pytest.raises(DataError, match="1 of 1000 rows cannot be used"):
            streamed(streaming(path, batch_size=100), None, 30)

    def test_an_allowed_share_of_broken_rows_is_left_out_and_said(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "one"}\n{"tekst": "x"}\n{"text": "two"}\n')
        said: list[str] = []
        config = streaming(path, unreadable_share=0.5, packing=False)
        source = stream(config, renderer(), said.append, None)
        documents = [renderer().tokenizer.decode(b.rows[0][0].tokens.tolist()) for b in islice(source, 6)]
        assert sorted(documents) == sorted(["one<|endoftext|>", "two<|endoftext|>"] * 3)
        assert said[0] == f"1 of 3 rows are broken and left out; the first: {path}:2"

    def test_empty_texts_are_left_out_and_said(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", ["one", "", "two"])
        said: list[str] = []
        source = stream(streaming(path, packing=False), renderer(), said.append, None)
        assert len(list(islice(source, 4))) == 4
        assert said[0] == "1 texts are empty and left out"

    @pytest.mark.parametrize("texts", [[], ["", ""]])
    def test_a_stream_without_text_is_refused(self, tmp_path: Path, texts: list[str]) -> None:
        path = write_lines(tmp_path / "a.jsonl", texts)
        with pytest.raises(DataError, match=r"a\.jsonl: there is no text in it"):
            streamed(streaming(path), None, 1)

    def test_a_stream_that_cannot_be_read_is_refused_before_it_starts(self, tmp_path: Path) -> None:
        empty = write_lines(tmp_path / "a.jsonl", [])
        with pytest.raises(DataError, match=r"a\.jsonl: there is no text in it"):
            check_stream(streaming(empty), lambda _: None)
        wrong = tmp_path / "b.jsonl"
        wrong.write_text('{"body": "x"}\n')
        with pytest.raises(DataError, match="the columns are body; needed are text: text"):
            check_stream(streaming(wrong), lambda _: None)
        check_stream(streaming(write_lines(tmp_path / "c.jsonl", ["one"])), lambda _: None)
        check_stream(pretrain(empty), lambda _: None)


class TestDataSettings:
    def problems(self, config: PretrainConfig | SFTConfig) -> list[str]:
        with pytest.raises(DataError) as error:
            check_data_settings(config)
        return error.value.problems

    def test_what_only_hub_data_sets_read_is_refused_for_files(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", ["one"])
        config = pretrain(
            path, dataset_subset="s", dataset_split="test", validation_dataset=str(path), validation_split="test"
        )
        assert self.problems(config) == [
            f"dataset_subset is for hub data sets, but {path} is a file or folder",
            f"dataset_split is for hub data sets and folders, but {path} is a file",
            f"validation_split is for hub data sets and folders, but {path} is a file",
        ]

    def test_a_format_is_refused_for_hub_data_sets(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert self.problems(pretrain("org/a", dataset_format="csv")) == [
            "dataset_format is for files, but org/a is a hub data set"
        ]

    def test_hub_data_sets_may_have_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        check_data_settings(
            pretrain("org/a", dataset_subset="s", dataset_split="x", validation_dataset="b", validation_split="y")
        )

    def test_files_at_their_defaults_are_taken(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", ["one"])
        check_data_settings(pretrain(path, dataset_split="train", validation_dataset=str(path)))

    def test_missing_files_are_all_named(self, tmp_path: Path) -> None:
        config = pretrain(tmp_path / "a.jsonl", validation_dataset=str(tmp_path / "b.jsonl"))
        assert self.problems(config) == [f"{tmp_path}/{name}.jsonl: no such file or folder" for name in ("a", "b")]


class TestCollate:
    def test_rows_stand_side_by_side_and_documents_stay_apart(self) -> None:
        rows = [
            [document([11, 12, 13], [0, 1, 1]), document([21, 22], [1, 1])],
            [document([31, 32], [0, 1])],
        ]
        found = collate(rows, padding_token=9, length=None, flatten=False)
        assert found.input_ids.tolist() == [[11, 12, 13, 21, 22], [31, 32, 9, 9, 9]]
        assert found.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
        assert found.predicting.tolist() == [0, 1, 3, 5]
        assert found.targets.tolist() == [12, 13, 22, 32]
        assert (found.tokens, found.attention_pairs) == (7, 6 + 3 + 3)

    def test_rows_are_padded_to_a_given_length(self) -> None:
        found = collate([[document([1, 2])], [document([3])]], padding_token=0, length=4, flatten=False)
        assert found.input_ids.tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]]
        assert found.position_ids.tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
        assert (found.predicting.tolist(), found.targets.tolist()) == ([0], [2])
        assert (found.tokens, found.attention_pairs) == (3, 4)

    def test_flattened_rows_are_one_row_padded_at_its_end_alone(self) -> None:
        rows = [[document([1, 2]), document([3])], [document([4, 5])]]
        found = collate(rows, padding_token=0, length=4, flatten=True)
        assert found.input_ids.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
        assert found.position_ids.tolist() == [[0, 1, 0, 0, 1, 0, 1, 2]]
        assert (found.predicting.tolist(), found.targets.tolist()) == ([0, 3], [2, 5])
        assert collate(rows, padding_token=0, length=None, flatten=True).input_ids.tolist() == [[1, 2, 3, 4, 5]]

    def test_arrays_are_64_bit_integers(self) -> None:
        found = collate([[document([1, 2])]], padding_token=0, length=None, flatten=False)
        for array in (found.input_ids, found.position_ids, found.predicting, found.targets):
            assert array.dtype == np.int64

    @given(
        rows=st.lists(
            st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=3), min_size=1, max_size=4
        ),
        flatten=st.booleans(),
    )
    def test_each_target_follows_in_the_same_document_and_is_supervised(
        self, rows: list[list[list[bool]]], flatten: bool
    ) -> None:
        """Tokens are numbered through, so that a border shows as a gap in the numbers."""
        number = 0
        made, expected = [], []
        for row in rows:
            made.append([])
            for mask in row:
                tokens = list(range(number, number + len(mask)))
                made[-1].append(document(tokens, [int(m) for m in mask]))
                expected += [token for token, learn in zip(tokens[1:], mask[1:], strict=True) if learn]
                number += len(mask) + 5
        found = collate(made, padding_token=99999, length=None, flatten=flatten)
        assert found.targets.tolist() == expected
        assert found.input_ids.reshape(-1)[found.predicting].tolist() == [token - 1 for token in expected]
