"""The model of a torchtune config: its shape and its adapters, read from the source of torchtune's builders."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from lacuna.cost.shape import PROJECTIONS, ModelShape
from lacuna.torchtune.environment import Environment

FAMILIES = {
    "llama2": "llama", "llama3": "llama", "llama3_1": "llama", "llama3_2": "llama", "mistral": "llama",
    "phi3": "llama", "qwen2": "llama", "gemma": "gemma", "gemma2": "gemma2",
}  # fmt: skip
"""torchtune's component builders of plain decoders → how a layer is built."""
WIDE_ROPE = ("phi3", "qwen2")
"""Builders whose table of rotary angles is for the whole head, not for half of it."""
ONE_ROPE = ("llama3_1", "llama3_2")
"""Builders whose layers share that table with adapters too; in the others each layer has its own then."""
RECIPES = (
    "full_finetune_single_device", "full_finetune_distributed",
    "lora_finetune_single_device", "lora_finetune_distributed",
)  # fmt: skip
NUMBERS = ("vocab_size", "num_layers", "num_heads", "embed_dim", "max_seq_len")
ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
MLP = PROJECTIONS[4:]


@dataclass(frozen=True)
class TorchtuneModel:
    """A plain decoder, with what LoRA adds."""

    shape: ModelShape
    longest: int
    """Positions that the rotary embedding has angles for."""
    rope: int
    """Floats of a position in its table."""
    rope_tables: int = 1
    adapters: tuple[str, ...] = ()
    """Projections with one."""
    head_adapter: bool = False
    rank: int = 0
    dropout: bool = False
    dora: bool = False
    quantised: tuple[str, ...] = ()
    """Projections whose frozen weights are NF4."""

    @property
    def is_full(self) -> bool:
        """Whether every weight is trained."""
        return not (self.adapters or self.head_adapter)

    @property
    def adapter_parameters(self) -> int:
        shape = self.shape
        magnitudes = shape.layers * sum(shape.widths[name][1] for name in self.adapters) if self.dora else 0
        head = self.rank * (shape.hidden + shape.vocabulary) if self.head_adapter else 0
        head += shape.vocabulary if self.head_adapter and self.dora else 0
        return shape.adapter_parameters(self.rank, self.adapters) + magnitudes + head

    @property
    def trainable(self) -> int:
        """Parameters that have a gradient."""
        return self.shape.parameters if self.is_full else self.adapter_parameters


def model_of(config: Mapping[str, Any], recipe: str, environment: Environment) -> TorchtuneModel | str:
    """The model that a config builds, or, as a sentence, why its memory cannot be planned."""
    if recipe not in RECIPES:
        return f"the memory of {recipe} is not planned; it is of {', '.join(RECIPES)}"
    section = config.get("model")
    component = str(section.get("_component_")) if isinstance(section, Mapping) else "null"
    given = {key: value for key, value in (section or {}).items() if key != "_component_"}
    try:
        name, values = _resolve(_definitions(environment), component.rpartition(".")[2], given)
    except LookupError:
        name, values = "", {}
    builder = name.removeprefix("lora_")
    if not component.startswith("torchtune.models.") or builder not in FAMILIES:
        return f"{component} is none of torchtune's builders of plain decoders, whose memory is planned"
    wrong = [key for key in NUMBERS if type(values.get(key)) is not int]
    if wrong:
        return f"model: {', '.join(wrong)} should be given as whole numbers"
    return _model(builder, values, is_lora=name.startswith("lora_"))


def _model(builder: str, values: Mapping[str, Any], is_lora: bool) -> TorchtuneModel:
    hidden, heads = values["embed_dim"], values["num_heads"]
    dimension = values.get("head_dim") or hidden // heads
    shape = ModelShape(
        FAMILIES[builder], hidden, values["num_layers"], values.get("intermediate_dim") or _default_mlp(hidden), heads,
        values.get("num_kv_heads") or heads, dimension, values["vocab_size"],
        bool(values.get("tie_word_embeddings", builder.startswith("gemma"))),
        PROJECTIONS[:3] if builder == "qwen2" else (),
    )  # fmt: skip
    rope = dimension * (2 if builder in WIDE_ROPE else 1)
    if not is_lora:
        return TorchtuneModel(shape, values["max_seq_len"], rope)
    adapters = tuple(ATTENTION[name] for name in ATTENTION if name in values["lora_attn_modules"])
    adapters += MLP if values.get("apply_lora_to_mlp") else ()
    is_quantised = bool(values.get("quantize_base"))
    return TorchtuneModel(
        shape, values["max_seq_len"], rope, 1 if builder in ONE_ROPE else shape.layers, adapters,
        bool(values.get("apply_lora_to_output")), values["lora_rank"], values.get("lora_dropout", 0) > 0,
        bool(values.get("use_dora")), (adapters if builder == "qwen2" else PROJECTIONS) if is_quantised else (),
    )  # fmt: skip


def _default_mlp(hidden: int) -> int:
    """Two thirds of four times the width, rounded up to a multiple of 256."""
    return -(-4 * (2 * hidden // 3) // 256) * 256


@cache
def _definitions(environment: Environment) -> dict[str, ast.stmt]:
    """Every function and assigned name of torchtune's builders."""
    found: dict[str, ast.stmt] = {}
    for file in sorted((environment.packages / "torchtune" / "models").glob("*/_*_builders.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            match node:
                case ast.FunctionDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]):
                    found.setdefault(name, node)
    return found


def _resolve(definitions: Mapping[str, ast.stmt], name: str, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The component builder that a builder ends in, with its arguments.

    Raises LookupError where the builder does not exist, or does more than to hand plain values on.
    """
    match definitions[name]:
        case ast.FunctionDef(args=parameters) as function:
            values = _defaults(parameters) | given
            if name.removeprefix("lora_") in FAMILIES:
                return name, values
            match function.body[-1]:
                case ast.Return(value=ast.Call(func=ast.Name(id=inner), args=[], keywords=keywords)):
                    return _resolve(definitions, inner, {str(k.arg): _value(k.value, values) for k in keywords})
        case ast.Assign(value=ast.Call(func=ast.Name(id="partial"), args=[ast.Name(id=inner)], keywords=keywords)):
            return _resolve(definitions, inner, {str(k.arg): _value(k.value, {}) for k in keywords} | given)
        case ast.Assign(value=ast.Name(id=inner)):
            return _resolve(definitions, inner, given)
    raise LookupError(name)


def _defaults(parameters: ast.arguments) -> dict[str, Any]:
    """Of a function's parameters; those without one are left out."""
    positional = parameters.args[len(parameters.args) - len(parameters.defaults) :]
    pairs = [*zip(positional, parameters.defaults, strict=True)]
    pairs += [(name, value) for name, value in zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True) if value]
    return {parameter.arg: _value(value, {}) for parameter, value in pairs}


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Of a name or a literal. Raises LookupError for anything else, and for a name without a value."""
    if isinstance(node, ast.Name):
        return names[node.id]
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise LookupError(ast.unparse(node)) from error
