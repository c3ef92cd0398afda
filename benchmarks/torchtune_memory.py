"""The plan of torchtune's memory beside a trace of the real step, for families, methods, lengths and settings.

Run it with lacuna's Python where torchtune's environment can be found (`make torchtune`); it takes some minutes.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from lacuna.torchtune.environment import Environment, need_environment
from lacuna.torchtune.memory import CONTEXT, torchtune_memory
from lacuna.torchtune.model import RECIPES, TorchtuneModel, model_of

TRACE = Path(__file__).with_name("torchtune_trace.py")
MIB = 2**20
NUMBERS = ("vocab_size", "num_heads", "num_kv_heads", "embed_dim", "intermediate_dim", "head_dim")
SHAPES = {
    "llama3_2": (128256, 32, 8, 2048, 8192), "llama3_1": (128256, 32, 8, 4096, 14336), "llama2": (32000, 32, 32, 4096),
    "mistral": (32000, 32, 8, 4096, 14336), "qwen2": (151936, 14, 2, 896, 4864), "phi3": (32064, 32, 32, 3072, 8192),
    "gemma": (256000, 8, 1, 2048, 16384, 256), "gemma2": (256000, 8, 4, 2304, 9216, 256),
}  # fmt: skip
"""Component builder → its numbers, of the smallest model that torchtune ships."""
LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 16, "lora_alpha": 32}
ALL = {**LORA, "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"]}
ATTENTION = {**LORA, "apply_lora_to_mlp": False}
SHORT = {str(ALL["lora_attn_modules"]): "qkvo", str(LORA["lora_attn_modules"]): "qv"}
CHECKPOINTING = {"enable_activation_checkpointing": True}
CASES: list[tuple[str, dict[str, Any] | None, int, dict[str, Any]]] = [
    ("llama3_2", None, 512, {}),
    ("llama3_2", None, 2048, {}),
    ("llama3_2", None, 512, CHECKPOINTING),
    ("llama3_2", None, 4096, CHECKPOINTING),
    ("llama3_2", LORA, 1024, {}),
    ("llama3_2", LORA, 4096, CHECKPOINTING),
    ("llama3_2", ALL, 1024, {"batch_size": 8, "gradient_accumulation_steps": 2, **CHECKPOINTING}),
    ("llama3_2", None, 1024, {"optimizer_in_bwd": True, **CHECKPOINTING}),
    ("llama3_2", None, 1024, {"gradient_accumulation_steps": 2}),
    ("llama3_2", None, 1024, {"dtype": "fp32", **CHECKPOINTING}),
    ("llama3_2", LORA, 1024, {"loss": {"_component_": "torch.nn.CrossEntropyLoss"}}),
    ("llama3_2", None, 1024, {"optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-4, "momentum": 0.9}}),
    ("llama3_1", None, 2048, CHECKPOINTING),
    ("llama3_1", ALL, 4096, CHECKPOINTING),
    ("llama3_1", {**ALL, "quantize_base": True}, 512, CHECKPOINTING),
    ("llama3_1", {**ALL, "quantize_base": True}, 4096, CHECKPOINTING),
    ("llama3_1", {**ALL, "quantize_base": True}, 1024, {}),
    ("llama3_1", {**LORA, "use_dora": True}, 1024, CHECKPOINTING),
    ("llama3_1", {**LORA, "use_dora": True}, 1024, {}),
    ("llama2", None, 1024, {}),
    ("llama2", ATTENTION, 4096, CHECKPOINTING),
    ("llama2", LORA, 2048, {"dataset": {"packed": True}}),
    ("llama2", None, 4096, {"optimizer_in_bwd": True, **CHECKPOINTING}),
    ("mistral", ATTENTION, 1024, {}),
    ("mistral", {**LORA, "apply_lora_to_output": True}, 2048, CHECKPOINTING),
    ("qwen2", None, 2048, {}),
    ("qwen2", LORA, 2048, {"dataset": {"packed": True}}),
    ("gemma", None, 1024, CHECKPOINTING),
    ("gemma", LORA, 1024, {}),
    ("gemma2", None, 1024, {}),
    ("gemma2", LORA, 2048, {}),
    ("gemma2", LORA, 2048, CHECKPOINTING),
    ("phi3", None, 2048, {}),
    ("phi3", LORA, 2048, CHECKPOINTING),
    ("llama2", {**LORA, "use_dora": True}, 2048, CHECKPOINTING),
    ("llama2", {**LORA, "lora_dropout": 0.1}, 2048, CHECKPOINTING),
    ("phi3", {**ALL, "quantize_base": True}, 256, {}),
]  # fmt: skip
"""Component builder, adapters, length, and what differs from the usual settings."""


def config_of(builder: str, adapters: dict[str, Any] | None, length: int, settings: dict[str, Any]) -> dict[str, Any]:
    name = f"lora_{builder}" if adapters else builder
    tied = {"tie_word_embeddings": True} if builder == "qwen2" else {}
    shape = {**dict(zip(NUMBERS, SHAPES[builder], strict=False)), "num_layers": 4, "max_seq_len": 8192, **tied}
    return {
        "model": {"_component_": f"torchtune.models.{builder}.{name}", **shape, **(adapters or {})},
        "batch_size": 2,
        "length": length,
        "dtype": "bf16",
        "optimizer": {"_component_": "torch.optim.AdamW", "fused": True, "lr": 1e-4},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        **settings,
    }


def recipe_of(config: dict[str, Any]) -> str:
    return f"{'lora' if 'lora' in config['model']['_component_'] else 'full'}_finetune_single_device"


def planned(environment: Environment, config: dict[str, Any]) -> float:
    """Bytes, less the constant for what is no tensor."""
    model = model_of(config, recipe_of(config), environment)
    assert not isinstance(model, str), model
    memory = torchtune_memory(model, config, recipe_of(config), 1, config["length"])
    assert not isinstance(memory, str), memory
    return sum(memory.values()) - CONTEXT


def ask(environment: Environment, **request: list[Any]) -> dict[str, list[Any]]:
    words = [environment.python, str(TRACE)]
    answer = subprocess.run(words, input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, list[Any]] = json.loads(answer.stdout)
    return found


def builders(environment: Environment) -> list[tuple[str, dict[str, Any], TorchtuneModel]]:
    """Every model builder of a plain decoder, those with adapters twice, with arguments and what the plan reads."""
    found = []
    for file in sorted((environment.packages / "torchtune" / "models").glob("*/_model_builders.py")):
        for name in re.findall(r"^(?:def )?(\w+)(?:\(| = )", file.read_text(encoding="utf-8"), re.MULTILINE):
            few = {"lora_attn_modules": ["q_proj", "output_proj"]} if "lora" in name else {}
            few |= {"quantize_base": False} if name.startswith("qlora") else {}
            more = {**few, "apply_lora_to_mlp": True, "lora_rank": 24}
            for arguments in (few, more) if few else (few,):
                section = {"_component_": f"torchtune.models.{file.parent.name}.{name}", **arguments}
                model = model_of({"model": section}, RECIPES[2 if few else 0], environment)
                if isinstance(model, TorchtuneModel):
                    found.append((section["_component_"], arguments, model))
    return found


def main() -> None:
    environment = need_environment(None)
    configs = [config_of(*case) for case in CASES]
    built = builders(environment)
    counted = ask(environment, builds=[(component, arguments) for component, arguments, _ in built])["builds"]
    planned_counts = [[m.shape.parameters + m.adapter_parameters, m.trainable] for _, _, m in built]
    equal = sum(ours == theirs for ours, theirs in zip(planned_counts, counted, strict=True))
    print(f"{equal} of {len(built)} builds have the planned parameters, in all and trained.\n")
    print("| builder | adapters | tokens | settings | traced MiB | planned / traced |\n|---|---|---|---|---|---|")
    for case, config, truth in zip(CASES, configs, ask(environment, traces=configs)["traces"], strict=True):
        builder, adapters, length, settings = case
        tokens = f"{config['batch_size']} × {length}"
        share = planned(environment, config) / truth
        print(f"| {builder} | {spell(adapters)} | {tokens} | {spell(settings)} | {truth / MIB:.0f} | {share:.3f} |")


def spell(settings: dict[str, Any] | None) -> str:
    """`full` for no adapters; else the settings that are not the same everywhere."""
    if settings is None:
        return "full"
    names = {"lora_attn_modules": "attn", "apply_lora_to_mlp": "mlp", "apply_lora_to_output": "output"}
    kept = {key: value for key, value in settings.items() if key not in ("lora_rank", "lora_alpha", "batch_size")}
    return ", ".join(f"{names.get(key, key)} {SHORT.get(str(value), value)}" for key, value in kept.items())


if __name__ == "__main__":
    sys.exit(main())
