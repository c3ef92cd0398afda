"""Our full-weight SFT step against TRL's SFTTrainer and Hugging Face's Trainer: real tokens per second on one core.

Every program trains the same small Qwen3 on the same samples; a step takes all of them, so that each does the same
work, which equal losses at the first step prove. The programs take turns, so that a noisy machine is noisy for all.
"""

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import datasets
import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig as TRLConfig
from trl import SFTTrainer

from fixtures import TRL_TEMPLATE, WORDS, make_tokenizer
from lacuna.config.training import SFTConfig
from lacuna.data.chat import Renderer
from lacuna.data.formats import Conversation
from lacuna.data.loader import pack_samples
from lacuna.data.samples import Sample
from lacuna.runs.metrics import read_metrics
from lacuna.train.start import train

LENGTH = 512
Measure = Callable[[], tuple[float, float]]
"""Trains some steps; seconds a step (median without the first), loss of the first step."""


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        return statistics.median(b - a for a, b in pairwise(self.ends))


def conversation(generator: random.Random, renderer: Renderer, tokens: int) -> list[dict[str, str]]:
    """A question and an answer of exactly so many tokens: digits are one token each."""
    messages = [{"role": "user", "content": " ".join(generator.choices(WORDS, k=tokens // 8))}]
    messages.append({"role": "assistant", "content": " ".join(generator.choices(WORDS, k=tokens // 4))})
    short = tokens - len(rendered(renderer, messages).tokens)
    messages[1]["content"] += "7" * short
    assert len(rendered(renderer, messages).tokens) == tokens
    return messages


def rendered(renderer: Renderer, messages: list[dict[str, str]]) -> Sample:
    sample = renderer.conversations([Conversation(messages, None, "benchmark")])[0]
    assert isinstance(sample, Sample)
    return sample


def make_work(folder: Path, equal: bool) -> tuple[list[list[dict[str, str]]], list[Sample]]:
    """Four conversations of 512 tokens, or 12 of log-normal lengths; as messages and as samples."""
    generator = random.Random(0)
    renderer = Renderer(make_tokenizer(TRL_TEMPLATE))
    lengths = (
        [LENGTH] * 4 if equal else [min(max(int(generator.lognormvariate(5, 0.8)), 40), LENGTH) for _ in range(12)]
    )
    conversations = [conversation(generator, renderer, length) for length in lengths]
    lines = [json.dumps({"messages": messages}) for messages in conversations]
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n")
    return conversations, [rendered(renderer, messages) for messages in conversations]


def ours(folder: Path, rows: int, packed: bool, precision: str, steps: int) -> Measure:
    def measure() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as run, contextlib.redirect_stdout(io.StringIO()):
            config = SFTConfig(
                model_name=str(folder), dataset=str(folder / "chat.jsonl"), output_dir=run, steps=steps,
                batch_size=rows, micro_batch_size=rows, sequence_length=LENGTH, packing=packed, log_every=1,
                precision="bf16" if precision == "bf16" else "fp32", device="cpu",
            )  # fmt: skip
            train(config, ["benchmark"])
            lines = [line for line in read_metrics(Path(run)) if "loss" in line]
        per_step = [b["tokens"] - a["tokens"] for a, b in pairwise(lines)]
        seconds = [tokens / line["tokens_per_second"] for tokens, line in zip(per_step, lines[1:], strict=True)]
        return statistics.median(seconds), lines[0]["loss"]

    return measure


def trl(folder: Path, rows: int, packed: bool, precision: str, steps: int, work: Any) -> Measure:
    def measure() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as run, contextlib.redirect_stdout(io.StringIO()):
            settings = TRLConfig(
                output_dir=run, max_steps=steps, per_device_train_batch_size=rows, max_length=LENGTH, packing=packed,
                assistant_only_loss=True, gradient_checkpointing=False, logging_steps=1, save_strategy="no",
                report_to="none", bf16=precision == "bf16", use_cpu=True, disable_tqdm=True, learning_rate=2e-5,
                optim="adamw_torch_fused",
            )  # fmt: skip
            times = StepTimes()
            data = datasets.Dataset.from_list([{"messages": messages} for messages in work])
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            tokenizer = make_tokenizer(TRL_TEMPLATE)
            trainer = SFTTrainer(
                model=model, args=settings, train_dataset=data, callbacks=[times], processing_class=tokenizer
            )
            trainer.train()
            return times.median(), trainer.state.log_history[0]["loss"]

    return measure


def hugging_face(folder: Path, rows: int, packed: bool, precision: str, steps: int, work: list[Sample]) -> Measure:
    def measure() -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as run, contextlib.redirect_stdout(io.StringIO()):
            settings = TrainingArguments(
                output_dir=run, max_steps=steps, per_device_train_batch_size=len(work), logging_steps=1,
                save_strategy="no", report_to="none", bf16=precision == "bf16", use_cpu=True, disable_tqdm=True,
                learning_rate=2e-5, optim="adamw_torch_fused",
            )  # fmt: skip
            times = StepTimes()
            items = [
                {
                    "input_ids": sample.tokens.tolist(),
                    "labels": [
                        token if learned else -100
                        for token, learned in zip(sample.tokens.tolist(), sample.supervised.tolist(), strict=True)
                    ],
                }
                for sample in work
            ]
            if not packed:
                items = [{**item, "attention_mask": [1] * len(item["input_ids"])} for item in items]
            collator = DataCollatorWithFlattening() if packed else DataCollatorForSeq2Seq(make_tokenizer())
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            trainer = Trainer(
                model=model, args=settings, train_dataset=datasets.Dataset.from_list(items), callbacks=[times],
                data_collator=collator,
            )  # fmt: skip
            trainer.train()
            return times.median(), trainer.state.log_history[0]["loss"]

    return measure


def compare(folder: Path, case: str, precision: str, rounds: int, steps: int) -> str:
    """One row of the table."""
    conversations, samples = make_work(folder, equal=case == "equal lengths")
    packed = case == "packed"
    tokens = sum(len(sample.tokens) for sample in samples)
    rows = len(pack_samples(samples, LENGTH, packing=packed))
    measures = {
        "lacuna": ours(folder, rows, packed, precision, steps),
        "TRL": trl(folder, rows, packed, precision, steps, conversations),
        "HF": hugging_face(folder, rows, packed, precision, steps, samples),
    }
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    losses: dict[str, float] = {}
    for _ in range(rounds):
        for name, measure in measures.items():
            duration, losses[name] = measure()
            seconds[name].append(duration)
    tolerance = 5e-2 if precision == "bf16" else 1e-3
    for name, loss in losses.items():
        if abs(loss - losses["lacuna"]) > tolerance:
            raise SystemExit(f"{case}, {precision}: not the same work: losses at the first step {losses}")
        assert name in seconds
    speed = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    return (
        f"| {case} | {precision} | {tokens} | {speed['lacuna']:.0f} | {speed['TRL']:.0f} | {speed['HF']:.0f} "
        f"| {speed['lacuna'] / speed['TRL']:.2f} | {speed['lacuna'] / speed['HF']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--case", nargs="+", default=["equal lengths", "padded", "packed"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        config = Qwen3Config(
            vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=arguments.layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
            tie_word_embeddings=True, eos_token_id=0, pad_token_id=3, bos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(folder)
        make_tokenizer(TRL_TEMPLATE).save_pretrained(folder)
        print("| work | precision | tokens a step | lacuna tok/s | TRL tok/s | HF tok/s | lacuna/TRL | lacuna/HF |")
        print("|---|---|---|---|---|---|---|---|")
        for case in arguments.case:
            for precision in arguments.precision:
                print(compare(Path(folder), case, precision, arguments.rounds, arguments.steps), flush=True)


if __name__ == "__main__":
    main()
