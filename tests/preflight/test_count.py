"""What `lacuna plan` counts is what the trainers load."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures import TRL_TEMPLATE, make_tokenizer, write_chat, write_texts
from lacuna.config.finetune import FinetuneConfig
from lacuna.config.training import PretrainConfig, SFTConfig, TrainingConfig
from lacuna.data.chat import Renderer
from lacuna.data.collate import collate
from lacuna.data.loader import load_rows
from lacuna.data.packing import count_rows, pack
from lacuna.errors import LacunaError
from lacuna.preflight.count import Counts, count
from lacuna.train.optimizer import count_steps

SMALL = {"output_dir": "o", "batch_size": 2, "micro_batch_size": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer alone: weights are not needed to count."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    texts = write_texts(folder / "texts.jsonl", 60)
    texts.write_text(texts.read_text() + '{"text": ""}\n')
    chats = {name: str(write_chat(folder / f"{name}.jsonl", 60, seed)) for seed, name in enumerate(("chat", "held"))}
    return {"texts": str(texts), **chats}


def as_loaded(config: TrainingConfig) -> Counts | str:
    """The same numbers from what the trainer gets, without those of what is left out."""
    renderer = Renderer(make_tokenizer())
    try:
        rows, validation = load_rows(config, renderer, lambda _: None)
    except LacunaError as error:
        return "; ".join(error.problems)
    documents = [sample for index in range(len(rows)) for sample in rows.row(index)]
    steps = count_steps(config, len(rows))
    return Counts(
        documents=0,
        tokens=sum(len(sample.tokens) for sample in documents),
        targets=sum(int(sample.supervised[1:].sum()) for sample in documents),
        rows=len(rows),
        fill=len(rows.tokens) / (len(rows) * config.sequence_length) if config.packing else None,
        attention_pairs=collate([documents], 0, None, False).attention_pairs,
        longest=int(np.diff(rows.starts).max()),
        steps=steps,
        epochs=config.epochs or steps * config.batch_size / len(rows),
        dropped=0,
        truncated=0,
        empty=0,
        validation_documents=0,
        validation_rows=len(validation or ()),
        validation_tokens=len(validation.tokens) if validation is not None else 0,
    )


def without_what_is_left_out(counts: Counts | str) -> Counts | str:
    if isinstance(counts, str):
        return counts
    unseen = {"documents": 0, "dropped": 0, "truncated": 0, "empty": 0, "validation_documents": 0}
    return Counts(**{**vars(counts), **unseen})


lengths = st.sampled_from([{"epochs": 1}, {"epochs": 3}, {"steps": 7}])
shared = {
    "sequence_length": st.sampled_from([2, 3, 16, 40, 64, 512]),
    "packing": st.booleans(),
    "batch_size": st.sampled_from([1, 3, 8]),
    "seed": st.integers(0, 3),
}
held_out = st.sampled_from([{}, {"validation_share": 0.2}, {"validation_share": 0.999}, {"validation_dataset": "held"}])


@given(st.lists(st.tuples(st.booleans(), st.fixed_dictionaries(shared), lengths, held_out,
                          st.sampled_from(["drop", "truncate", "stop"])), min_size=1, max_size=6))  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_run_is_counted_as_it_is_loaded(model: str, files: dict[str, str], drawn: list[Any]) -> None:
    configs: dict[str, TrainingConfig] = {}
    for number, (is_chat, sizes, length, validation, too_long) in enumerate(drawn):
        settings = {**SMALL, **sizes, **length, **validation, "model_name": model}
        if "validation_dataset" in validation:
            settings["validation_dataset"] = files["held" if is_chat else "texts"]
        kind: Any = SFTConfig if is_chat else PretrainConfig
        chat_only = {"too_long": too_long} if is_chat else {}
        configs[str(number)] = kind(dataset=files["chat" if is_chat else "texts"], **settings, **chat_only)
    counted = count(configs, lambda _: None)
    assert list(counted) == list(configs)
    for name, config in configs.items():
        assert without_what_is_left_out(counted[name]) == as_loaded(config)


def write_pairs(path: Path) -> Path:
    """Conversations of 21, 28 and 61 tokens, whose answers begin at token 17, 17 and 57."""
    pairs = [("river", "stone"), ("river", "stone " * 8), ("river " * 21, "stone")]
    path.write_text("".join(json.dumps({"prompt": q.strip(), "completion": a.strip()}) + "\n" for q, a in pairs))
    return path


def sft(model: str, dataset: object, **more: Any) -> SFTConfig:
    length = {} if "epochs" in more else {"steps": 4}
    return SFTConfig(**{**SMALL, **length, "model_name": model, "dataset": str(dataset), "sequence_length": 64, **more})


def counts(config: TrainingConfig) -> Counts:
    found = count({"a": config}, lambda _: None)["a"]
    assert isinstance(found, Counts), found
    return found


def test_the_numbers_of_three_conversations(model: str, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl")
    assert counts(sft(model, path, batch_size=1, epochs=3)) == Counts(
        documents=3, tokens=110, targets=4 + 11 + 4 - 3, rows=2, fill=110 / 128,
        attention_pairs=21 * 11 + 14 * 29 + 61 * 31, longest=61, steps=6, epochs=3, dropped=0, truncated=0, empty=0,
        validation_documents=0, validation_rows=0, validation_tokens=0,
    )  # fmt: skip


def test_what_is_left_out_is_counted(model: str, files: dict[str, str], tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl")
    found = counts(sft(model, path, sequence_length=28))
    assert (found.documents, found.dropped, found.truncated, found.longest) == (2, 1, 0, 28)
    found = counts(sft(model, path, sequence_length=26, too_long="truncate", packing=False))
    assert (found.documents, found.dropped, found.truncated, found.longest) == (2, 1, 1, 26)
    assert (found.rows, found.fill, found.steps, found.epochs) == (2, None, 4, 4.0)
    split = counts(sft(model, files["chat"], sequence_length=40, validation_share=0.25, seed=3))
    assert split.dropped + split.documents + split.validation_documents == 60
    assert split.dropped > 0
    assert (
        counts(PretrainConfig(**SMALL, model_name=model, dataset=files["texts"], epochs=1, sequence_length=64)).empty
        == 1
    )


def test_each_data_set_is_read_once_and_a_thousand_runs_cost_little(
    model: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Runs differ in everything that does not change the tokens; another tokenizer of the same tokens is no other."""
    path = write_chat(tmp_path / "chat.jsonl", 300)
    copy = tmp_path_factory.mktemp("copy")
    make_tokenizer().save_pretrained(copy)
    configs = {
        f"{seed} {length} {too_long}": sft(
            name, path, seed=seed, split_seed=seed, sequence_length=length, too_long=too_long, validation_share=0.1
        )
        for seed in range(10)
        for length in (64, 128, 256)
        for too_long in ("drop", "truncate")
        for name in (model, str(copy))
    }
    said: list[str] = []
    found = count(configs, said.append)
    assert said == [f"{path}: schema chat (found: column messages)"]
    assert len({str(counts) for counts in found.values()}) > 30


def test_another_template_is_another_reading(model: str, tmp_path: Path) -> None:
    path, template = write_pairs(tmp_path / "a.jsonl"), tmp_path / "t.jinja"
    template.write_text(TRL_TEMPLATE.replace("|im_start|>'", "|im_start|>' + '> '", 1))
    said: list[str] = []
    found = count({"a": sft(model, path), "b": sft(model, path, chat_template=str(template))}, said.append)
    assert len(said) == 2
    assert found["a"] != found["b"]


class TestReasons:
    """Runs whose data are not known, beside one whose data are."""

    def reason(self, config: TrainingConfig, model: str, tmp_path: Path) -> str:
        good = sft(model, write_pairs(tmp_path / "good.jsonl"))
        found = count({"bad": config, "good": good, "bad again": config}, lambda _: None)
        assert isinstance(found["good"], Counts)
        assert found["bad"] == found["bad again"]
        assert isinstance(found["bad"], str)
        return found["bad"].replace(f"{tmp_path}/", "")

    def test_a_missing_file(self, model: str, tmp_path: Path) -> None:
        assert self.reason(sft(model, tmp_path / "x.jsonl"), model, tmp_path).startswith("x.jsonl: no such file")

    def test_a_hub_out_of_reach(self, model: str, tmp_path: Path) -> None:
        found = self.reason(sft(model, "owner/name"), model, tmp_path)
        assert found.startswith("owner/name: cannot be loaded from the hub")

    def test_a_model_that_is_not_there(self, model: str, tmp_path: Path) -> None:
        config = sft("owner/name", write_pairs(tmp_path / "a.jsonl"))
        assert "not downloaded before" in self.reason(config, model, tmp_path)

    def test_a_stream(self, model: str, files: dict[str, str], tmp_path: Path) -> None:
        stream = PretrainConfig(**SMALL, model_name=model, dataset=files["texts"], steps=5, streaming=True)
        assert self.reason(stream, model, tmp_path) == (
            f"{files['texts']}: streaming reads the data while it trains, so they are not counted"
        )

    def test_a_setting_that_such_data_do_not_read(self, model: str, files: dict[str, str], tmp_path: Path) -> None:
        reads, does_not = (sft(model, files["texts"], **more) for more in ({}, {"too_long": "truncate"}))
        assert isinstance(count({"a": reads}, lambda _: None)["a"], Counts)
        assert "too_long would have no effect" in self.reason(does_not, model, tmp_path)

    def test_a_batch_larger_than_the_data(self, model: str, tmp_path: Path) -> None:
        config = sft(model, write_pairs(tmp_path / "a.jsonl"), batch_size=9)
        assert self.reason(config, model, tmp_path).startswith(
            "a.jsonl: batch_size is 9 rows, but the data fill only 2"
        )

    def test_conversations_that_must_not_be_too_long(self, model: str, tmp_path: Path) -> None:
        path = write_pairs(tmp_path / "a.jsonl")
        short, long = (sft(model, path, sequence_length=length, too_long="stop") for length in (28, 64))
        assert isinstance(count({"a": long}, lambda _: None)["a"], Counts)
        assert "1 of 3 conversations are longer than" in self.reason(short, model, tmp_path)


def test_adapter_runs_count_samples(model: str, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl")
    config = FinetuneConfig(
        model_name=model, dataset=str(path), validation_share=0.0, micro_batch_size=2, gradient_accumulation_steps=1,
        epochs=2, sequence_length=64,
    )  # fmt: skip
    found = counts(config)
    assert (found.rows, found.fill, found.steps, found.longest) == (3, None, 3, 61)


@given(st.data())
def test_rows_are_counted_as_pack_fills_them(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 60))
    documents = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=200)), dtype=np.int64)
    expected = int(pack(documents, capacity).max(initial=-1)) + 1
    assert count_rows(documents, capacity) == expected
