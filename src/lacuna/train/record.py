"""What a start of a run leaves in its folder before the first step: config.toml and provenance.json."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lacuna.config.training import PretrainConfig, TrainingConfig
from lacuna.data.loader import PackedRows
from lacuna.runs.folder import write_config
from lacuna.runs.identity import Identity, identity_of
from lacuna.runs.provenance import (
    add_facts,
    data_facts,
    hardware,
    model_facts,
    slurm_facts,
    template_sha256,
    tokenizer_facts,
    write_provenance,
)
from lacuna.train.kept import step_of
from lacuna.train.loop import Prepared


def record_start(
    config: TrainingConfig, prepared: Prepared, command: Sequence[str],
    given: Mapping[str, Any],
) -> None:  # fmt: skip
    """By the first process, once the data are read. given: see config_facts; they were hashed when they were read."""
    if not prepared.world.is_first:
        return
    execution, tokenizer = prepared.execution, prepared.tokenizer
    facts = {
        "trainer": config.model_dump()["trainer"],
        **given,
        "config_sha256": write_config(prepared.folder, config),
        **data_facts(config),
        "data_sha256": prepared.fingerprint,
        "data_preparation": prepared.identity["data preparation"]["version"],
        **tokenizer_facts(config, tokenizer.name_or_path),
        "chat_template_sha256": template_sha256(tokenizer.chat_template),
        "template_date": prepared.renderer.today.isoformat() if prepared.renderer.writes_the_date else None,
        **hardware(execution.device, prepared.world.size, torch.version.cuda),
        "precision": str(execution.dtype).removeprefix("torch."),
        "attention": execution.attention,
        "compile": execution.compile,
        "seed": config.seed,
        "total_steps": prepared.total_steps,
        "slurm": slurm_facts(os.environ),
        "resume": config.resume,
        "from_step": 0 if prepared.resume_from is None else step_of(prepared.resume_from),
    }
    write_provenance(prepared.folder, command, facts)


def identity_now(
    config: TrainingConfig, preparation: str, tokenizer: Any, validation_rows: PackedRows | None
) -> Identity:
    """Of what the run is made, as it is on the disk; the commit of a hub model is known once that was loaded."""
    is_streamed = isinstance(config, PretrainConfig) and config.streaming
    facts = {
        **(data_facts(config) if is_streamed else {}),
        **tokenizer_facts(config, tokenizer.name_or_path),
        **model_facts(config),
        "chat_template_sha256": template_sha256(tokenizer.chat_template),
        "data_preparation": preparation,
    }
    return identity_of(facts, None if validation_rows is None else validation_rows.fingerprint())


def record_model(config: TrainingConfig, prepared: Prepared, model: nn.Module, checkpointing: bool) -> None:
    """By the first process, once the model is there."""
    if not prepared.world.is_first:
        return
    facts = {
        **model_facts(config),
        "parameters": sum(_sizes(model)),
        "trained_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "activation_checkpointing": checkpointing,
    }
    add_facts(prepared.folder, facts)


def _sizes(model: nn.Module) -> list[int]:
    """Of every parameter; a quantised weight is stored in another shape than it has."""
    sizes: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            sizes[parameter] = parameter.numel()
            if isinstance(module, nn.Linear) and parameter is module.weight:
                sizes[parameter] = module.in_features * module.out_features
    return list(sizes.values())
