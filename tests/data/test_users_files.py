"""Files as people have them: each is read right, or refused by name. The learned text is what decides."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fixtures import CHATML, make_tokenizer
from lacuna.data.chat import Renderer
from lacuna.data.documents import Source, open_source
from lacuna.data.find import find_files, left_out
from lacuna.data.formats import Broken, Conversation
from lacuna.data.samples import Sample
from lacuna.data.schemas import to_examples
from lacuna.errors import DataError

Rows = list[dict[str, Any]]
WITH_CALLS = "{%- if tools %}{{ 'TOOLS' + tools | tojson + '\n' }}{%- endif %}" + CHATML.replace(
    "message['content'] + '<|im_end|>",
    "message['content'] + (message.tool_calls | map(attribute='function') | list | tojson "
    "if message.tool_calls else '') + '<|im_end|>",
)
"""ChatML that writes tools and calls."""


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(make_tokenizer(WITH_CALLS))


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples_of(path: Path, said: list[str] | None = None) -> list[Any]:
    source = Source(str(path), "train", "auto", None, "auto", "text", 0.0)
    schema, rows = open_source(source, (said if said is not None else []).append)
    return list(to_examples(rows, schema))


def conversation(path: Path) -> Conversation:
    """The first one. What is wrong with it is raised."""
    example = examples_of(path)[0]
    if isinstance(example, Broken):
        raise DataError(example.reason)
    assert isinstance(example, Conversation)
    return example


def learned(renderer: Renderer, path: Path) -> list[str]:
    """What the first conversation teaches, turn by turn."""
    (sample,) = renderer.examples([conversation(path)])
    assert isinstance(sample, Sample), sample
    tokens = [int(token) if kept else -1 for token, kept in zip(sample.tokens, sample.supervised, strict=True)]
    turns: list[list[int]] = [[]]
    for token in tokens:
        if token >= 0:
            turns[-1].append(token)
        elif turns[-1]:
            turns.append([])
    return [renderer.tokenizer.decode(turn) for turn in turns if turn]


def call(arguments: Any, name: str = "get_weather") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(arguments: Any) -> Rows:
    messages = [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": None, "tool_calls": [call(arguments)]},
        {"role": "tool", "content": "-3"},
        {"role": "assistant", "content": "cold"},
    ]
    return [{"messages": messages}]


CALL = '[{"name": "get_weather", "arguments": {"city": "Oslo"}}]<|im_end|>'
TALK = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "GOOD"}]


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}', json.dumps(json.dumps({"city": "Oslo"}))])
def test_arguments_are_an_object_however_often_they_were_encoded(
    renderer: Renderer, tmp_path: Path, arguments: Any
) -> None:
    assert learned(renderer, write(tmp_path / "a.jsonl", calling(arguments))) == [CALL, "cold<|im_end|>"]


def test_arguments_that_are_none_are_empty_and_what_is_no_object_is_refused(renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for nothing in (None, "", {}):
        assert learned(renderer, write(path, calling(nothing)))[0].startswith(
            '[{"name": "get_weather", "arguments": {}}]'
        )
    for wrong, kind in (("[1, 2]", "list"), (3, "int")):
        with pytest.raises(DataError, match=f"the arguments are {kind}, not an object"):
            conversation(write(path, calling(wrong)))


def test_what_a_parquet_struct_adds_is_not_learned(renderer: Renderer, tmp_path: Path) -> None:
    """Two rows that call different tools: every struct has the keys of both."""
    import pyarrow
    from pyarrow import parquet

    rows: Rows = [*calling({"city": "Oslo"}), *calling({"expr": "1+1"})]
    for row, name in zip(rows, ("city", "expr"), strict=True):
        row["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {name: {"type": "string"}}}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = conversation(tmp_path / "a.parquet")
    assert found.messages[1]["tool_calls"] == [call({"city": "Oslo"})]
    assert found.tools == rows[0]["tools"]
    assert learned(renderer, tmp_path / "a.parquet")[0] == CALL


def test_what_hugging_faces_datasets_write_is_read(renderer: Renderer, tmp_path: Path) -> None:
    """As parquet, where messages are JSON by Arrow's extension type, and as folders of save_to_disk."""
    from datasets import Dataset, DatasetDict

    rows: Rows = [*calling({"city": "Oslo"}), *calling({"expr": "1+1"})]
    data = Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "splits")
    for place in ("a.parquet", "saved", "splits"):
        assert learned(renderer, tmp_path / place) == [CALL, "cold<|im_end|>"], place
    assert [len(examples_of(tmp_path / place)) for place in ("saved", "splits")] == [2, 2]
    with pytest.raises(DataError, match="no split 'validation'; there are: train, test"):
        find_files(str(tmp_path / "splits"), split="validation")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"cut")
    with pytest.raises(DataError, match="not a readable Arrow file"):
        examples_of(tmp_path / "saved")


def test_of_a_completion_nothing_of_the_prompt_is_learned(renderer: Renderer, tmp_path: Path) -> None:
    shot = [*TALK[:1], {"role": "assistant", "content": "SHOT"}, {"role": "user", "content": "two"}]
    rows = [{"prompt": shot, "completion": TALK[1:]}]
    assert learned(renderer, write(tmp_path / "a.jsonl", rows)) == ["GOOD<|im_end|>"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"prompt": "one", "completion": "GOOD"},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "GOOD"}]},
        {"instruction": "one", "output": "GOOD"},
    ],
)
def test_a_system_column_stands_before_every_conversation(tmp_path: Path, row: dict[str, Any]) -> None:
    said: list[str] = []
    path = write(tmp_path / "a.jsonl", [{"system": "You are a pirate.", **row}])
    (found,) = examples_of(path, said)
    assert found.messages[0] == {"role": "system", "content": "You are a pirate."}
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant"]
    assert "not used" not in "".join(said)


def test_a_system_column_may_repeat_the_first_message_but_not_contradict_it(tmp_path: Path) -> None:
    own = {"role": "system", "content": "You are a pirate."}
    path = write(tmp_path / "a.jsonl", [{"system": "You are a pirate.", "messages": [own, *TALK]}])
    assert conversation(path).messages == [own, *TALK]
    with pytest.raises(DataError, match="the column system says something else than the first message"):
        conversation(write(path, [{"system": "You are a sailor.", "messages": [own, *TALK]}]))


def turns(style: str, flag: dict[str, Any]) -> Rows:
    if style == "chat":
        said = [("user", "one", {}), ("assistant", "BAD", flag), ("user", "two", {}), ("assistant", "GOOD", {})]
        return [{"messages": [{"role": role, "content": text, **more} for role, text, more in said]}]
    said = [("human", "one", {}), ("gpt", "BAD", flag), ("human", "two", {}), ("gpt", "GOOD", {})]
    return [{"conversations": [{"from": role, "value": text, **more} for role, text, more in said]}]


@pytest.mark.parametrize("style", ["chat", "sharegpt"])
@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0, "train": False}])
def test_what_says_that_a_turn_is_not_learned_is_obeyed(
    renderer: Renderer, tmp_path: Path, style: str, flag: dict[str, Any]
) -> None:
    assert learned(renderer, write(tmp_path / "a.jsonl", turns(style, flag))) == ["GOOD<|im_end|>"]


@pytest.mark.parametrize("style", ["chat", "sharegpt"])
@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ({"mask": True}, r"\[1\].mask: programs disagree on what it means: write weight 0 or 1"),
        ({"label": 1}, r"\[1\].label: programs disagree"),
        ({"weight": 2}, r"\[1\].weight is 2; it is 0 or 1"),
        ({"train": "no"}, r"\[1\].train is 'no'; it is 0 or 1"),
        ({"weight": 1, "train": False}, r"\[1\]: weight and train disagree on whether the turn is learned"),
    ],
)
def test_what_may_say_so_is_refused(tmp_path: Path, style: str, flag: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        conversation(write(tmp_path / "a.jsonl", turns(style, flag)))


def test_keys_of_a_turn_that_nothing_reads_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    rows = [{"conversations": [{"from": "human", "value": "a", "id": 7}, {"from": "gpt", "value": "b", "source": "x"}]}]
    examples_of(write(tmp_path / "a.jsonl", rows), said)
    source = Source(str(tmp_path / "a.jsonl"), "train", "auto", None, "auto", "text", 0.0)
    schema, _ = open_source(source, said.append)
    assert schema.unused_columns == ["conversations[].id", "conversations[].source"]


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_turn_among_others_is_not_learned(renderer: Renderer, tmp_path: Path, empty: str) -> None:
    rows = [{"messages": [TALK[0], {"role": "assistant", "content": empty}, *TALK]}]
    assert learned(renderer, write(tmp_path / "a.jsonl", rows)) == ["GOOD<|im_end|>"]
    sharegpt = [("human", "one"), ("gpt", empty), ("human", "two"), ("gpt", "GOOD")]
    rows = [{"conversations": [{"from": speaker, "value": value} for speaker, value in sharegpt]}]
    assert learned(renderer, write(tmp_path / "a.jsonl", rows)) == ["GOOD<|im_end|>"]


def test_calls_in_older_forms_are_calls(renderer: Renderer, tmp_path: Path) -> None:
    """OpenAI's function_call with a role function, and LLaMA-Factory's speakers function_call and observation."""
    said = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    messages = [
        TALK[0],
        {"role": "assistant", "content": None, "function_call": said},
        {"role": "function", "name": "get_weather", "content": "-3"},
        TALK[1],
    ]
    older = write(tmp_path / "a.jsonl", [{"messages": messages}])
    assert learned(renderer, older) == [CALL, "GOOD<|im_end|>"]
    assert conversation(older).messages[2]["role"] == "tool"
    spoken = [("human", "one"), ("function_call", json.dumps(said)), ("observation", "-3"), ("gpt", "GOOD")]
    rows = [{"conversations": [{"from": speaker, "value": value} for speaker, value in spoken], "tools": "[]"}]
    assert learned(renderer, write(tmp_path / "b.jsonl", rows)) == [CALL, "GOOD<|im_end|>"]
    rows[0]["conversations"][1]["value"] = json.dumps([said, said])
    assert len(conversation(write(tmp_path / "b.jsonl", rows)).messages[1]["tool_calls"]) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"messages": json.dumps(TALK)},
        {"messages": [json.dumps(message) for message in TALK]},
        {"conversations": [{"role": turn["role"], "value": turn["content"]} for turn in TALK]},
        {"conversations": json.dumps([{"from": "human", "value": "one"}, {"from": "gpt", "value": "GOOD"}])},
        {"conversations": TALK},
    ],
)
def test_conversations_in_other_spellings(renderer: Renderer, tmp_path: Path, row: dict[str, Any]) -> None:
    assert learned(renderer, write(tmp_path / "a.jsonl", [row])) == ["GOOD<|im_end|>"]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.csv", ",")])
def test_tables_with_other_separators(renderer: Renderer, tmp_path: Path, name: str, separator: str) -> None:
    (tmp_path / name).write_text(f'prompt{separator}completion\none{separator}"GOOD"\n')
    assert learned(renderer, tmp_path / name) == ["GOOD<|im_end|>"]


def test_compressed_lines_are_read_and_a_broken_file_is_named(renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"messages": TALK}).encode()))
    assert find_files(str(path)) == [path]
    assert learned(renderer, path) == ["GOOD<|im_end|>"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read: Compressed file ended"):
        examples_of(path)


def test_split_words_among_other_names_say_nothing_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    def found(folder: str, *names: str) -> list[str]:
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).parent.mkdir(exist_ok=True)
            write(tmp_path / folder / name, [{"messages": TALK}])
        return [str(file.relative_to(tmp_path / folder)) for file in find_files(str(tmp_path / folder)) or ()]

    topics = ["cardio.jsonl", "nutrition.jsonl", "strength_training.jsonl"]
    assert found("topics", *topics) == topics
    docs = ["api_docs.jsonl", "dev_docs.jsonl", "user_docs.jsonl"]
    assert found("docs", *docs) == docs
    assert found("mixed", "train.jsonl", "extra_chats.jsonl", "synthetic.jsonl", "test.jsonl") == ["train.jsonl"]
    assert found("named", "chats_train.jsonl", "chats_test.jsonl") == ["chats_train.jsonl"]
    assert found("shards", "data/train-00000-of-00002.jsonl", "data/other.jsonl") == ["data/train-00000-of-00002.jsonl"]
    assert found("inner", "train/a.jsonl", "test/a.jsonl", "b.jsonl") == ["train/a.jsonl"]
    said: list[str] = []
    examples_of(tmp_path / "mixed", said)
    folder = tmp_path / "mixed"
    assert said == [
        f"{folder}: of another split, or beside it, and not read: extra_chats.jsonl, synthetic.jsonl, test.jsonl"
    ]
    assert left_out(str(tmp_path / "topics"), "auto", "train") == []
    assert left_out(str(folder / "train.jsonl"), "auto", "train") == []
