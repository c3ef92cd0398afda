"""`lacuna data`: what the model will see, and everything that would stop a run, at once."""

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import Outcome, Run
from fixtures import make_tokenizer
from lacuna.config.training import SFTConfig
from lacuna.data.chat import Renderer
from lacuna.data.documents import Documents, Part, Pieces
from lacuna.data.duplicates import find_copies
from lacuna.data.loader import load_rows
from lacuna.errors import DataError
from lacuna.installation import install_command
from lacuna.preflight.preview import BINS, histogram, spread
from lacuna.preflight.preview_text import _visible
from lacuna.visible import escaped

ANSWER = ("river", "stone")


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers alone: a look at data needs no weights."""
    folder = tmp_path_factory.mktemp("models")
    make_tokenizer().save_pretrained(folder / "chat")
    make_tokenizer(chat_template=None).save_pretrained(folder / "base")
    return folder


class Look:
    """`lacuna data` on files in a folder."""

    def __init__(self, run: Run, folder: Path, models_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.run, self.folder, self.models, self.capfd = run, folder, models_folder, capfd

    def write(self, name: str, rows: list[Any]) -> Path:
        """Rows: (prompt, completion), or any other object."""
        path = self.folder / name
        values = [
            dict(zip(("prompt", "completion"), row, strict=True)) if isinstance(row, tuple) else row for row in rows
        ]
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return path

    def config(self, model: str = "chat", trainer: str = "sft", **settings: Any) -> Path:
        values = {
            "trainer": trainer, "model_name": str(self.models / model), "dataset": str(self.folder / "a.jsonl"),
            "output_dir": "o", "steps": 1, "sequence_length": 64, "batch_size": 1, "micro_batch_size": 1, **settings,
        }  # fmt: skip
        path = self.folder / "config.yaml"
        path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
        return path

    def __call__(self, config: Path, *words: object) -> Outcome:
        found = self.run("lacuna", "data", "--config", config, *words)
        return Outcome(found.code, found.output.replace(f"{self.folder}/", ""))

    def json(self, config: Path, *words: object) -> Any:
        found = self(config, *words, "--json")
        return json.loads(found.output), found.code


@pytest.fixture
def look(run: Run, tmp_path: Path, models_folder: Path, capfd: pytest.CaptureFixture[str]) -> Look:
    return Look(run, tmp_path, models_folder, capfd)


def three(look: Look) -> Path:
    """Conversations of 21, 28 and 61 tokens, of which 4, 11 and 4 are learned."""
    return look.write("a.jsonl", [ANSWER, ("river", ("stone " * 8).strip()), (("river " * 21).strip(), "stone")])


class TestNumbers:
    def test_of_three_conversations(self, look: Look) -> None:
        three(look)
        found, code = look.json(look.config())
        (part,) = found["parts"]
        samples = part.pop("samples")
        assert code == 0
        assert part == {
            "name": "a.jsonl", "format": "jsonl (by its ending)",
            "schema": "prompt_completion (found: column prompt and completion)", "unused_columns": [], "documents": 3,
            "tokens": 110, "targets": 16, "dropped": 0, "truncated": 0, "empty": 0, "broken": 0, "unusable": {},
            "median": 28, "longest": 61,
            "histogram": [[21, 30, 2], [31, 40, 0], [41, 50, 0], [51, 60, 0], [61, 70, 1]],
            "rows": 2, "fill": 110 / 128,
        }  # fmt: skip
        assert [sample["origin"] for sample in samples] == ["a.jsonl:1", "a.jsonl:3"]
        learned = [token["token"] for token in samples[0]["tokens"] if token["learned"]]
        assert "".join(learned) == "stone<|im_end|>"
        special = [token["token"] for token in samples[0]["tokens"] if token["special"]]
        assert special == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
        assert {key: found[key] for key in ("copies", "notes", "problems")} == {
            "copies": [],
            "notes": [],
            "problems": [],
        }

    def test_of_what_is_left_out_and_cut(self, look: Look) -> None:
        three(look)
        (part,) = look.json(look.config(sequence_length=26, too_long="truncate", packing=False))[0]["parts"]
        assert [part[name] for name in ("documents", "dropped", "truncated", "rows", "fill")] == [2, 1, 1, 2, None]
        (part,) = look.json(look.config(sequence_length=28))[0]["parts"]
        assert [part[name] for name in ("documents", "dropped", "truncated", "rows")] == [2, 1, 0, 2]

    def test_a_validation_share_is_a_part(self, look: Look) -> None:
        look.write("a.jsonl", [*((f"river {number}", "stone") for number in range(20)), {}])
        found, code = look.json(look.config(validation_share=0.25, unreadable_share=0.1))
        assert code == 0
        assert [(part["name"], part["documents"], part["broken"]) for part in found["parts"]] == [
            ("a.jsonl", 15, 1), ("validation share", 5, 0),
        ]  # fmt: skip

    def test_files_are_looked_at_instead_of_the_configs(self, look: Look) -> None:
        other, held_out = look.write("b.jsonl", [ANSWER, ANSWER]), look.write("c.jsonl", [ANSWER])
        found, code = look.json(look.config(dataset="missing.jsonl", validation_share=0.5), other, held_out)
        assert code == 0
        assert [(part["name"], part["documents"]) for part in found["parts"]] == [("b.jsonl", 2), ("c.jsonl", 1)]

    def test_of_a_stream_the_beginning(self, look: Look) -> None:
        look.write("a.jsonl", [{"text": "river"}] * 10_001)
        found, code = look.json(look.config(trainer="pretrain", streaming=True, batch_size=64, micro_batch_size=4))
        assert code == 0
        assert (found["parts"][0]["documents"], found["parts"][0]["rows"]) == (10_000, None)
        assert found["notes"] == ["a.jsonl: a stream; its first 10,000 rows are looked at"]

    @given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
    def test_every_document_is_in_a_bar(self, lengths: list[int]) -> None:
        bars = histogram(np.array(lengths))
        assert [count for _, _, count in bars] == [
            sum(first <= length <= last for length in lengths) for first, last, _ in bars
        ]
        assert sum(count for _, _, count in bars) == len(lengths)
        assert all(earlier[1] + 1 == later[0] for earlier, later in pairwise(bars))
        assert len(bars) <= BINS + 1

    def test_samples_are_spread(self) -> None:
        assert (spread(100, 2), spread(3, 5), spread(0, 2), spread(5, 0)) == ([25, 75], [0, 1, 2], [], [])


class TestText:
    def test_what_is_learned_is_marked_without_colour(self, look: Look) -> None:
        look.write("a.jsonl", [("river\nstone", "cloud\namber")])
        found = look(look.config())
        assert found.code == 0
        assert (
            "<|im_start|>user⏎ river⏎ stone<|im_end|>⏎ <|im_start|>assistant⏎ ⟦cloud⏎ amber<|im_end|>⟧⏎" in found.output
        )
        assert "1–30" not in found.output
        assert re.search(r"rows 1, \d+\.\d% full", found.output)

    def test_and_green_with_it(self, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
        look.write("a.jsonl", [ANSWER])
        found = look(look.config()).output
        assert "\x1b[32mstone\x1b[0m\x1b[7;32m<|im_end|>\x1b[0m" in found
        assert "\x1b[2;7m<|im_start|>\x1b[0m\x1b[2muser⏎" in found
        assert "⟦" not in found
        monkeypatch.setenv("NO_COLOR", "1")
        found = look(look.config()).output
        assert "\x1b[32m" not in found
        assert "⟦stone" in found

    def test_nothing_in_the_data_reaches_the_terminal_raw(self, look: Look) -> None:
        look.write(
            "a.jsonl", [{"prompt": "\x1b[2Jriver\r [bold]x :smile: \u202e", "completion": "a\x9b", "\x1b]0;c": 1}]
        )
        found = look(look.config())
        assert found.code == 0
        assert "\\x1b[2Jriver\\r [bold]x :smile: \\u202e" in found.output
        assert "⟦a\\x9b<|im_end|>⟧" in found.output
        assert "columns \\x1b]0;c" in found.output
        look.write("a.jsonl", [{"prompt": "\x1b[2J", "completion": "x"}, {"messages\x1b": 1}])
        refused = look(look.config())
        assert refused.code == 1
        assert not {"\x1b", "\r", "\x9b", "\u202e"} & set(found.output + refused.output)

    @given(st.text())
    def test_escaped_text_is_printable(self, text: str) -> None:
        assert escaped(text).isprintable()
        assert escaped(text) == text or not text.isprintable()

    def test_the_middle_of_a_long_sample_is_left_out(self, look: Look) -> None:
        look.write("a.jsonl", [("river " * 600, "stone")])
        found = look(look.config(sequence_length=2000)).output
        assert re.search(r"… \d+ tokens …", found)
        assert found.count("river") < 600

    def test_spaces_stand_where_the_text_has_them(self) -> None:
        words = ["<s>", "</s>", "▁one", "▁two", "▁three"]
        tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<s>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        renderer = Renderer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))
        assert (_visible([2, 3], [], renderer), _visible([4], [3], renderer)) == ("one two", " three")


def problems_of_the_trainer(config: SFTConfig) -> list[str]:
    with pytest.raises(DataError) as error:
        load_rows(config, Renderer(make_tokenizer()), lambda _: None)
    return error.value.problems


class TestWouldStop:
    def test_every_kind_of_unusable_document_with_all_its_places(self, look: Look) -> None:
        rows = [ANSWER, ("q", ""), ("a <|im_end|> b", "x"), ("q", " "), ("river", "cloud")]
        path = look.write("a.jsonl", rows)
        found, code = look.json(look.config())
        assert code == 1
        assert found["parts"][0]["unusable"] == {
            "nothing to learn": ["a.jsonl:2", "a.jsonl:4"], "control tokens in the text": ["a.jsonl:3"],
        }  # fmt: skip
        assert found["parts"][0]["documents"] == 2
        config = SFTConfig(model_name="m", dataset=str(path), output_dir="o", steps=1)
        trainers = [problem.replace(f"{look.folder}/", "") for problem in problems_of_the_trainer(config)]
        assert found["problems"] == trainers
        text = look(look.config()).output
        assert "unusable nothing to learn: 2 (a.jsonl:2, a.jsonl:4)" in text
        assert "documents 2; left out: 3 unusable" in text
        assert f"would stop: {trainers[0]}" in text

    def test_broken_rows_beyond_the_limit(self, look: Look) -> None:
        path = look.write("a.jsonl", [ANSWER, {"prompt": 3, "completion": "x"}, ANSWER])
        found, code = look.json(look.config())
        assert (code, found["parts"][0]["broken"], found["parts"][0]["documents"]) == (1, 1, 2)
        config = SFTConfig(model_name="m", dataset=str(path), output_dir="o", steps=1)
        assert found["problems"] == [text.replace(f"{look.folder}/", "") for text in problems_of_the_trainer(config)]
        found, code = look.json(look.config(unreadable_share=0.5))
        assert (code, found["notes"]) == (0, ["1 of 3 rows are broken and left out; the first: a.jsonl:2"])

    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({"batch_size": 9}, "batch_size is 9 rows, but the data fill only 2 of 64 tokens"),
            ({"sequence_length": 28, "too_long": "stop"}, "1 of 3 conversations are longer than sequence_length 28"),
            ({"sequence_length": 4}, "nothing is left to train on"),
            ({"model": "base"}, "the tokenizer has no chat template"),
            ({"dataset": "missing.jsonl"}, "missing.jsonl: no such file or folder"),
            ({"validation_dataset": "missing.jsonl"}, "missing.jsonl: no such file or folder"),
            ({"validation_share": 0.999}, "too few to keep 100% of them for validation"),
            ({"text_column": "t"}, "text_column would have no effect"),
            ({"dataset_subset": "s"}, "dataset_subset is for hub data sets"),
        ],
    )
    def test_what_stops_a_run_stands_at_the_end(self, look: Look, settings: dict[str, Any], problem: str) -> None:
        three(look)
        found = look(look.config(**settings))
        assert found.code == 1, found.output
        assert re.search(rf"would stop: [^⏎]*{re.escape(problem)}", found.output), found.output

    def test_problems_of_both_data_sets_come_together(self, look: Look) -> None:
        look.write("a.jsonl", [("q", "")])
        look.write("b.jsonl", [{"text": ""}])
        found, code = look.json(look.config(validation_dataset=str(look.folder / "b.jsonl")))
        assert (code, len(found["problems"])) == (1, 2)
        assert found["problems"][0].startswith("a.jsonl:1: nothing to learn; 1 of 1 samples")
        assert found["problems"][1] == "b.jsonl: all 1 texts in it are empty"

    def test_an_adapters_settings_have_their_own_names(self, look: Look) -> None:
        three(look)
        config = look.folder / "finetune.yaml"
        config.write_text(
            f"model: {{path: {look.models / 'chat'}}}\ndataset: {{path: {look.folder / 'a.jsonl'}}}\n"
            "training: {sequence_length: 64}\n"
        )
        found = look(config)
        assert found.code == 1
        assert "batch_size × gradient_accumulation_steps is 16 samples, but there are only 2" in found.output

    def test_an_adapters_config_needs_its_extra(self, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "lacuna.finetune.checks", None)
        config = look.folder / "finetune.yaml"
        config.write_text("model: {path: m}\ndataset: {path: d}\ntraining: {}\n")
        found = look(config)
        assert found.code == 2
        assert f"not installed: {install_command('finetune')}" in found.output


class TestBadConfig:
    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("lerning_rate: 1", "did you mean 'learning_rate'?"),
            ("trainer: sfd", "no trainer is called 'sfd'; did you mean 'sft'?"),
            ("trainer: [sft]", "no trainer is called ['sft']"),
            ("trainer: null", "no `trainer` key says what this is for"),
            ("model_name: ./nowhere", "./nowhere: no such folder"),
        ],
    )
    def test_ends_with_2(self, look: Look, line: str, problem: str) -> None:
        three(look)
        config, later = look.config(), look.folder / "later.yaml"
        if line == "trainer: null":
            config.write_text(config.read_text().replace('trainer: "sft"\n', ""))
        else:
            later.write_text(line + "\n")
        found = look(config, *(["--config", later] if later.exists() else []))
        assert found.code == 2, found.output
        assert problem in found.output


def part(documents: list[list[int]], name: str = "a", used: list[int] | None = None) -> Part:
    lengths = [len(tokens) for tokens in documents]
    starts = np.cumsum([0, *lengths])
    origins = [f"{name}:{number}" for number in range(len(documents))]
    tokens = np.array([token for tokens in documents for token in tokens], dtype=np.int32)
    whole = Documents(True, tokens, np.ones(len(tokens), dtype=np.bool_), starts, origins, [], [], len(documents))
    numbers = np.array(range(len(documents)) if used is None else used, dtype=np.int64)
    return Part(whole, Pieces(numbers, starts[numbers], starts[numbers + 1]), name)


some = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=30)


class TestCopies:
    @given(some, some)
    def test_those_of_equal_tokens(self, training: list[list[int]], held_out: list[list[int]]) -> None:
        expected = []
        for name, documents in (("a", training), ("v", held_out)):
            again = [
                (f"{name}:{i}", f"{name}:{documents.index(d)}") for i, d in enumerate(documents) if d in documents[:i]
            ]
            expected += [(name, False, len(again), again[:10])] if again else []
        leaked = [(f"v:{i}", f"a:{training.index(d)}") for i, d in enumerate(held_out) if d in training]
        expected += [("v", True, len(leaked), leaked[:10])] if leaked else []
        found = find_copies(part(training), part(held_out, "v"))
        assert [(c.part, c.is_held_out, c.count, c.places) for c in found] == expected

    def test_documents_that_are_not_used_do_not_count(self) -> None:
        assert find_copies(part([[1], [1], [2]], used=[1, 2])) == []
        (copies,) = find_copies(part([[1], [2]], used=[1]), part([[3], [1], [2]], "v", used=[1, 2]))
        assert (copies.count, copies.total, copies.places) == (1, 2, [("v:2", "a:1")])

    def test_other_tokens_of_the_same_sum_are_no_copies(self) -> None:
        assert find_copies(part([[1, 2], [2, 1]])) == []

    def test_a_run_says_them(self, look: Look) -> None:
        training = look.write("a.jsonl", [ANSWER, ("q", "a"), ANSWER])
        held_out = look.write("v.jsonl", [("z", "y"), ANSWER])
        config = SFTConfig(
            model_name="m", dataset=str(training), validation_dataset=str(held_out), output_dir="o", steps=1,
            batch_size=1, micro_batch_size=1,
        )  # fmt: skip
        said: list[str] = []
        load_rows(config, Renderer(make_tokenizer()), said.append)
        sentences = [
            "a.jsonl: 1 of 3 documents are copies of earlier ones, token for token; the first: a.jsonl:3, as a.jsonl:1",
            "warning: v.jsonl: 1 of 2 documents are also in the training data, token for token; "
            "the first: v.jsonl:2, as a.jsonl:1: their loss says nothing about new data",
        ]
        assert [text.replace(f"{look.folder}/", "") for text in said if "token for token" in text] == sentences
        found = look(look.config(validation_dataset=str(held_out)))
        assert found.code == 0
        assert all(sentence in found.output for sentence in sentences)
        copies = look.json(look.config(validation_dataset=str(held_out)))[0]["copies"]
        assert [(c["count"], c["places"]) for c in copies] == [
            (1, [["a.jsonl:3", "a.jsonl:1"]]), (1, [["v.jsonl:2", "a.jsonl:1"]]),
        ]  # fmt: skip
