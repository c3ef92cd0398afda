"""A small real run of each library that training is built on. Each imports its library when it is called.

A run returns what it did, or a check where there is more to say; it raises where the library does not work.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lacuna.machine.detect import choose_device
from lacuna.machine.quantised import quantised_product
from lacuna.preflight.check import Check


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_attention_heads=2, **size))


def transformers() -> str:
    import torch

    model, ids = tiny_model(), torch.arange(8)[None]
    return _finite(float(model(input_ids=ids, labels=ids).loss.detach()), "the loss of a tiny model")


def peft() -> str:
    import torch
    from peft import LoraConfig, get_peft_model

    layer = torch.nn.Linear(8, 8)
    wanted = layer(torch.ones(1, 8)).detach()
    adapted = get_peft_model(torch.nn.Sequential(layer), LoraConfig(target_modules=["0"]))
    if not torch.allclose(adapted(torch.ones(1, 8)), wanted):
        raise RuntimeError("a new adapter changes what its layer gives")
    return "a new adapter"


def accelerate() -> str:
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    layer = accelerator.prepare(torch.nn.Linear(8, 1))
    accelerator.backward(layer(torch.ones(1, 8)).sum())
    return "a backward pass"


def trl() -> str:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    rows = Dataset.from_dict({"input_ids": [[0, 1, 2]] * 4})
    with tempfile.TemporaryDirectory() as folder:
        quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "save_strategy": "no"}
        settings = SFTConfig(output_dir=folder, max_steps=1, use_cpu=True, bf16=False, **quiet)
        trainer = SFTTrainer(tiny_model(), settings, train_dataset=rows, processing_class=tokenizer)
        return _finite(float(trainer.train().training_loss), "a training step")


def bitsandbytes() -> str:
    device = choose_device("auto")
    for bits in (4, 8):
        if not quantised_product(bits, device.type):
            raise RuntimeError(f"the {bits}-bit product is not finite on {device.name}")
    return f"4-bit and 8-bit products on {device.name}"


def flash_attn() -> Check | str:
    import torch

    if not torch.cuda.is_available():
        return Check("flash-attn", "skipped", "it needs CUDA; attention is torch's own")
    from flash_attn import flash_attn_func

    heads = torch.ones(1, 8, 2, 64, device="cuda", dtype=torch.bfloat16)
    if not torch.equal(flash_attn_func(heads, heads, heads, causal=True), heads):
        raise RuntimeError("its attention over equal values is wrong")
    return "a forward pass"


def datasets() -> str:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    rows = Dataset.from_dict({"number": [1, 2]}).map(lambda row: {"number": row["number"] + 1})
    if list(rows["number"]) != [2, 3]:
        raise RuntimeError(f"[1, 2] + 1 gave {list(rows['number'])}")
    return "two rows mapped"


def tensorboard() -> str:
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            writer.add_scalar("loss", 1.0, 1)
        return f"an event of {sum(file.stat().st_size for file in Path(folder).iterdir())} bytes"


def wandb() -> str:
    import wandb

    with tempfile.TemporaryDirectory() as folder:
        with wandb.init(project="doctor", dir=folder, mode="offline", settings=wandb.Settings(silent=True)) as started:
            started.log({"loss": 1.0})
        if not any(Path(folder).glob("wandb/offline-run-*")):
            raise RuntimeError("an offline run left no files")
        return "an offline run"


def _finite(number: float, what: str) -> str:
    if abs(number) < 1e6:
        return what
    raise RuntimeError(f"{what} gave {number}")


LIBRARIES: dict[str, Callable[[], Check | str]] = {
    "transformers": transformers, "peft": peft, "accelerate": accelerate, "trl": trl, "bitsandbytes": bitsandbytes,
    "flash-attn": flash_attn, "datasets": datasets, "tensorboard": tensorboard, "wandb": wandb,
}  # fmt: skip
