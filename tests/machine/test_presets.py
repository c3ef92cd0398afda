"""The shipped presets: that they are listed and found everywhere, and which one a machine gets."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import Run
from core_only import CORE_ONLY, SITE_PACKAGES
from lacuna.config.layers import load_finetune
from lacuna.cost.advice import fits
from lacuna.cost.shape import Adapter, ModelShape, Step
from lacuna.errors import ConfigError
from lacuna.machine.detect import GIB, Device, named_device
from lacuna.machine.presets import BY_DEVICE, FOLDER, choose_preset, list_presets, replace_auto

ROOT = Path(__file__).parents[2]
MISTRAL_7B = ModelShape("llama", 4096, 32, 14336, 32, 8, 128, 32768, tied=False)


def test_every_shipped_config_is_listed_with_its_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    presets = {preset.file: preset for preset in list_presets()}
    assert set(presets) == {str(file.relative_to(ROOT)) for file in (ROOT / "configs").iterdir()}
    h100 = presets["configs/training_config_h100.yaml"]
    assert (h100.trainer, h100.purpose) == ("finetune", "QLoRA of Mistral-7B-Instruct on one H100 with 80 GB")
    assert presets["configs/pretrain_qwen.toml"].purpose == "Pretraining a Qwen2.5-shaped model on one H100"
    for file, preset in presets.items():
        first = Path(file).read_text().splitlines()[0]
        assert first.startswith(f"# {preset.purpose}")


@pytest.mark.parametrize(
    ("device", "chosen"),
    [
        ("h100", "training_config_h100.yaml"),
        ("4090", "training_config_h100.yaml"),
        ("m4-32gb", "training_config_m4.yaml"),
        ("m1-16gb", "training_config_m4.yaml"),
        ("l4", "training_config_h100.yaml"),
        ("v100-32gb", None),
        ("m1-8gb", None),
    ],
)
def test_the_machine_decides(device: str, chosen: str | None) -> None:
    found = named_device(device)
    choice = choose_preset([found, found])
    assert (choice.file and Path(choice.file).name) == chosen
    assert choice.reason.startswith(f"{found.name} has ")


@pytest.mark.parametrize("kind", BY_DEVICE)
def test_the_memory_that_a_preset_wants_is_that_of_its_step(kind: str) -> None:
    name, needed = BY_DEVICE[kind]
    config, _ = load_finetune([str(FOLDER / name)], {})
    adapter = Adapter(config.lora_r, bits=4)
    attention = {"cuda": "sdpa", "mps": "eager"}[kind]
    step = Step(config.micro_batch_size, config.sequence_length, True, True, kind, attention=attention, adapter=adapter)
    assert fits(MISTRAL_7B, step, needed)
    assert not fits(MISTRAL_7B, step, needed - 2 * GIB)


def test_auto_is_replaced_where_it_stands() -> None:
    files, why = replace_auto(["a.yaml", "auto", "b.yaml"], [named_device("h100")])
    assert [Path(file).name for file in files] == ["a.yaml", "training_config_h100.yaml", "b.yaml"]
    assert why.endswith("training_config_h100.yaml (NVIDIA H100 80GB HBM3 has 79.1 GiB for it, and it takes 17)")
    with pytest.raises(ConfigError, match=r"--config auto: no preset fits this machine: NVIDIA A2 has 14.6 GiB"):
        replace_auto(["auto"], [Device("cuda", "NVIDIA A2", int(14.6 * GIB))])


def test_auto_on_a_machine_without_a_gpu_says_what_to_do(run: Run) -> None:
    outcome = run("finetune", "--config", "auto", "--set", "training.lora_r=8")
    assert outcome.code == 2
    assert outcome.output.startswith("error: --config auto: no preset fits this machine: there is no GPU here.")
    assert "finetune.yaml" in outcome.output


def test_presets_say_what_auto_would_take(run: Run) -> None:
    listed = json.loads(run("lacuna", "presets", "--json").output)
    assert len(listed["presets"]) == len(list_presets())
    assert listed["auto"]["file"] is None
    printed = run("lacuna", "presets").output
    assert "QLoRA of Mistral-7B-Instruct on a Mac with an M4 and 32 GB" in printed
    assert "finetune --config auto takes none of them here: there is no GPU here." in printed


def test_an_installed_wheel_has_them_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "configs"):
        left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=left_out)
    words = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        ".",
        "./source",
    ]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packages = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(packages)
    for name in CORE_ONLY:
        if (SITE_PACKAGES / name).exists():
            (packages / name).symlink_to(SITE_PACKAGES / name)
    words = [sys.executable, "-S", "-m", "lacuna", "presets"]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    printed = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert len(printed.splitlines()) == len(list_presets()) + 2
    assert "installed/lacuna/configs/training_config_h100.yaml  finetune  QLoRA" in printed
    assert "takes none of them here: this command needs 'torch', which is not installed" in printed
