"""`finetune` against bare TRL: LoRA with assistant-only loss on one core, in real tokens per second and time to start.

Every program is a process of its own that writes a line for each step; this one notes when the line comes. All train
the same small Qwen3 on the same conversations. lacuna and TRL's default also take the same ones in each step, which
equal losses prove; grouping by length and packing put others together.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FIRST_CORE = min(os.sched_getaffinity(0))
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

LENGTH, BATCH, ACCUMULATION, SEED = 512, 8, 2, 42
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "TRL, its default": {"train_sampling_strategy": "sequential"},
    "TRL, grouped by length": {"train_sampling_strategy": "group_by_length"},
    "TRL, packed": {"packing": True},
}


def make_work(folder: Path, steps: int, layers: int) -> None:
    """A random Qwen3, of 8.4 M parameters in 8 layers, and conversations of log-normal lengths in two orders.

    rows.jsonl is what lacuna reads, ordered.jsonl the same rows in the order in which lacuna trains on them.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from fixtures import TRL_TEMPLATE, WORDS, make_tokenizer
    from lacuna.data.split import row_order

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": layers, "num_attention_heads": 4}
    tokens = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": 3, "vocab_size": 8192}
    config = Qwen3Config(num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, **shape, **tokens)
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    make_tokenizer(TRL_TEMPLATE).save_pretrained(folder / "model")
    generator = random.Random(0)
    rows = []
    for _ in range(steps * BATCH * ACCUMULATION):
        words = min(max(int(generator.lognormvariate(4, 0.8)), 8), 150)
        asked, said = generator.choices(WORDS, k=words // 3), generator.choices(WORDS, k=words)
        turns = [{"role": "user", "content": " ".join(asked)}, {"role": "assistant", "content": " ".join(said)}]
        rows.append(json.dumps({"messages": turns}) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows))
    (folder / "ordered.jsonl").write_text("".join(rows[index] for index in row_order(SEED, 0, len(rows))))


def train_lacuna(folder: Path, run: Path, precision: str, steps: int) -> None:
    """The command itself."""
    settings = {
        "model.path": folder / "model", "dataset.path": folder / "rows.jsonl", "dataset.validation_share": 0,
        "training.output_dir": run, "training.max_steps": steps, "training.batch_size": BATCH,
        "training.gradient_accumulation_steps": ACCUMULATION, "training.learning_rate": 1e-3,
        "training.lora_dropout": 0, "training.sequence_length": LENGTH, "training.logging_steps": 1,
        "training.precision": precision, "training.scheduler": "constant", "training.warmup_steps": 0,
        "training.save_steps": 1000, "training.seed": SEED, "device": "cpu",
    }  # fmt: skip
    (folder / "empty.yaml").write_text("trainer: finetune\n")
    from lacuna.cli.main import main_finetune

    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    sys.argv = ["finetune", "--config", str(folder / "empty.yaml"), *words]
    main_finetune()


def train_trl(folder: Path, run: Path, precision: str, steps: int, name: str) -> None:
    """As TRL's documentation does it."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Lines(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                line = {"step": state.global_step, "loss": logs["loss"], "tokens": logs["num_tokens"]}
                with (run / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")

    run.mkdir()
    settings = SFTConfig(
        output_dir=str(run), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-3,
        gradient_accumulation_steps=ACCUMULATION, max_length=LENGTH, assistant_only_loss=True, logging_steps=1,
        gradient_checkpointing=False, save_strategy="no", report_to="none", bf16=precision == "bf16", use_cpu=True,
        disable_tqdm=True, lr_scheduler_type="constant", weight_decay=0.01, seed=SEED,
        model_init_kwargs={"dtype": torch.bfloat16 if precision == "bf16" else torch.float32}, **TRL_SETTINGS[name],
    )  # fmt: skip
    adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    data = load_dataset("json", data_files=str(folder / "ordered.jsonl"), split="train", cache_dir=str(run / "cache"))
    SFTTrainer(
        model=str(folder / "model"), args=settings, train_dataset=data, peft_config=adapter, callbacks=[Lines()]
    ).train()


def measure(folder: Path, name: str, precision: str, steps: int) -> tuple[float, float, list[float]]:
    """Real tokens per second after the first step, seconds until the first step was done, losses."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        command = [sys.executable, __file__, "--one", name, str(folder), str(run), precision, str(steps)]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {FIRST_CORE}),
        )  # fmt: skip
        ends: list[float] = []
        lines: list[dict[str, Any]] = []
        while len(lines) < steps:
            if process.poll() is not None:
                raise SystemExit(f"{name}: {process.communicate()[1]}")
            path = run / "metrics.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            ends += [time.perf_counter()] * (len(lines) - len(ends))
            time.sleep(0.005)
        process.kill()
        process.communicate()
    tokens = lines[-1]["tokens"] - lines[0]["tokens"]
    return tokens / (ends[-1] - ends[0]), ends[0] - started, [line["loss"] for line in lines]


def compare(folder: Path, precision: str, rounds: int, steps: int) -> None:
    names = ["lacuna", *TRL_SETTINGS]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    starts: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name in names:
            speed, start, losses[name] = measure(folder, name, precision, steps)
            speeds[name].append(speed)
            starts[name].append(start)
    ours = statistics.median(speeds["lacuna"])
    default = "TRL, its default"
    difference = max(abs(a - b) for a, b in zip(losses["lacuna"], losses[default], strict=True))
    if precision == "fp32" and difference > 1e-4:
        raise SystemExit(f"lacuna and TRL do not do the same work: {losses['lacuna']} and {losses[default]}")
    for name in names:
        speed, start = statistics.median(speeds[name]), statistics.median(starts[name])
        print(f"| {precision} | {name} | {speed:.0f} | {ours / speed:.2f} | {start:.1f} |", flush=True)
    print(f"| {precision} | largest difference of a loss, lacuna to {default} | {difference:.1e} | | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--one", nargs=5, metavar=("NAME", "FOLDER", "RUN", "PRECISION", "STEPS"))
    arguments = parser.parse_args()
    if arguments.one:
        name, folder, run, precision, steps = arguments.one
        if name == "lacuna":
            train_lacuna(Path(folder), Path(run), precision, int(steps))
        else:
            train_trl(Path(folder), Path(run), precision, int(steps), name)
        return
    print(
        "| precision | program | real tok/s | lacuna's / its | seconds to the first step's end |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        make_work(Path(folder), arguments.steps, arguments.layers)
        for precision in arguments.precision:
            compare(Path(folder), precision, arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
