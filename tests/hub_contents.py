"""A tiny model and tiny data sets under the names and in the layout that they have on the hub."""

import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from fixtures import make_tokenizer, sentence, write_chat

MODEL, TEXTS, CHATS = "Qwen/Qwen2.5-0.5B", "HuggingFaceFW/fineweb-edu", "someone/chats"


def write_qwen(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    shape = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 32768}
    ends = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": 3}
    Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **shape, **heads, **ends)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def write_subset(folder: Path, subset: str, files: int, rows: int, words: int, seed: int) -> None:
    """Parquet files laid out and declared as FineWeb-Edu's."""
    generator = random.Random(seed)
    path = folder / "sample" / subset.removeprefix("sample-")
    path.mkdir(parents=True)
    for number in range(files):
        texts = [" ".join(sentence(generator, 1) for _ in range(words)) for _ in range(rows)]
        table = pyarrow.table({"text": texts, "id": [f"<urn:uuid:{row}>" for row in range(rows)]})
        pyarrow.parquet.write_table(table, path / f"{number:03}_00000.parquet", row_group_size=10)
    with (folder / "README.md").open("a") as card:
        card.write(
            f"- config_name: {subset}\n  data_files:\n  - split: train\n    path: {path.relative_to(folder)}/*\n"
        )


def write_fineweb(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: odc-by\nconfigs:\n")
    write_subset(folder, "sample-100BT", files=1, rows=1, words=1, seed=seed)
    write_subset(folder, "sample-10BT", files=3, rows=50, words=1100, seed=seed)
    write_subset(folder, "sample-tiny", files=3, rows=30, words=20, seed=seed)
    with (folder / "README.md").open("a") as card:
        card.write("---\n# FineWeb-Edu\n")


def write_chats(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    write_chat(folder / "data" / "train_sft-00000-of-00001.jsonl", rows=40, seed=1)
    write_chat(folder / "data" / "test_sft-00000-of-00001.jsonl", rows=10, seed=2)
    files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train_sft", "test_sft"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n# Chats\n")
