"""Every command in README and docs is run, and what they show is what is printed."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import SCRIPTS
from fixtures import write_chat
from hub_contents import write_qwen
from hub_server import serve
from lacuna.cost.memory import step_memory
from lacuna.cost.shape import Adapter, ModelShape, Step
from lacuna.words import GIB

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PRETRAIN = "pretrain @ configs/pretrain_qwen.toml --model-name Qwen/Qwen2.5-0.5B --batch-size 4 --steps 100"
RUN_ELSEWHERE = {
    PRETRAIN: "commands/test_hub.py",
    f"uv run {PRETRAIN}": "commands/test_uv.py",
    "lacuna slurm examples/slurm.yaml --submit": "test_slurm.py in commands/ and long/, as the next four",
    "lacuna slurm configs --submit": "the same",
    "lacuna slurm configs/sft_qwen.toml --cluster cluster.yaml --submit": "the same",
    "lacuna status configs": "the same",
    "lacuna run examples/slurm.yaml --slurm": "the same",
    "lacuna run configs --slurm --only run_002 --cluster cluster.yaml": "commands/test_run.py, with a pretended SLURM",
    "lacuna run examples/learning_rate.yaml --jobs 2": "commands/test_run.py, tiny models of each trainer",
    "lacuna run configs --only run_003,run_005": "the same",
    "sbatch --nodes 2 --gpus-per-node 8 scripts/slurm.sh sft @ configs/sft_qwen.toml": "the same",
    "sft @ configs/sft_qwen.toml --gpus 8": "test_processes.py in commands/ and long/, as the next four",
    "finetune --config configs/training_config_h100.yaml --set gpus=8": "commands/test_finetune.py",
    "scripts/launch.sh 8 sft @ configs/sft_qwen.toml": "the same",
    "NODES=2 HEAD=node1:29500 scripts/launch.sh 8 sft @ configs/sft_qwen.toml": "the same",
    "torchrun --nproc-per-node 8 -m lacuna sft @ configs/sft_qwen.toml": "the same",
    "lacuna report configs": "commands/test_report.py, as the next one",
    "lacuna report configs --metric accuracy --html report.html --csv runs.csv": "the same",
    "make test": ".ci/run runs it, and this test with it",
    "make test-processors": "make test runs the same tests, as the processor at hand does them",
    "make lint": ".ci/run runs it",
    "make test-uv": ".ci/run runs it",
    "make test-long": ".ci/run runs it",
    "make torchtune": "make test begins with it",
    "make coverage": ".ci/run runs it",
    "make bench": "tests/commands/test_benchmarks.py runs its programs, with fewer steps",
    "make torchtune && lacuna recipes llama3_2/1B": "docs/test_experiments.py",
    "lacuna generate examples/lora_rank.yaml": "docs/test_experiments.py",
    "lacuna generate examples/learning_rate.yaml --output configs/learning_rate": "the same",
    "torchrun --nproc-per-node 2 -m lacuna finetune --config configs/finetune.yaml": "commands/test_finetune.py",
    "python benchmarks/scaling.py": "tests/docs/test_scaling.py",
    "lacuna doctor": "preflight/test_doctor.py",
    "lacuna doctor configs/training_config_h100.yaml": "preflight/test_doctor.py, with a tiny model",
    "lacuna presets": "machine/test_presets.py",
    "lacuna plan examples/learning_rate.yaml --device a100": "commands/test_plan.py, with a tiny model",
    "lacuna plan configs/learning_rate --device a100": "commands/test_plan.py",
    "lacuna plan configs/training_config_h100.yaml --device h100 --trace": "commands/test_plan.py",
    "finetune --config auto": "machine/test_presets.py",
    "scripts/setup_local.sh": "preflight/test_doctor.py",
    "conda env create --file environment-remote.yml && conda activate lacuna && lacuna doctor": "test_doctor.py",
    "chat": "commands/test_chat.py, as the next three",
    "chat --model runs/quickstart/run_003": "the same",
    "chat --model runs/quickstart/run_003 --temperature 0": "the same",
    "chat --base-url http://localhost:8000/v1 --model runs/quickstart/run_003/final": "the same",
    "make install": "make test, which runs this, begins with it",
}
COMPARISON = (
    "lacuna compare runs/quickstart/base runs/quickstart/run_003 --prompts runs/quickstart/data/held_out.jsonl "
    "--max-tokens 24 --output runs/answers.jsonl"
)
TALKS = {"echo 'upper: read string' | chat --model runs/quickstart/run_003 --temperature 0 --json", COMPARISON}
OF_AN_EXPERIMENT = (
    "lacuna generate examples/quickstart/experiment.yaml --output runs/quickstart/configs",
    "lacuna run runs/quickstart/configs --jobs 2",
    "lacuna report runs/quickstart/configs --metric held_out_accuracy --html runs/quickstart/report.html",
    "lacuna replay runs/quickstart/run_003",
    "lacuna replay runs/quickstart/run_003 --output again.yaml",
)
DRY_RUNS = {
    "finetune --config configs/training_config_h100.yaml --dry-run": "4096",
    "finetune --config configs/training_config_m4.yaml --dry-run": "2048",
    "finetune --config configs/training_config_h100.yaml --config configs/training_config_m4.yaml "
    "--set training.lora_r=32 --dry-run": "2048",
}


def blocks(language: str) -> list[str]:
    """What stands in fences of a language ("" for none) on any page."""
    parts = [page.read_text().split("```")[1::2] for page in PAGES]
    return [part.removeprefix(language + "\n") for page in parts for part in page if part.startswith(language + "\n")]


def commands() -> list[str]:
    lines = [line.partition(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git has, with this environment as their .venv, so that nothing is written into the real one."""
    folder = tmp_path_factory.mktemp("checkout")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    (folder / ".venv").symlink_to(SCRIPTS.parent)
    (folder / ".venv" / "installed").touch()
    return folder


def call(command: str, folder: Path, **environment: str) -> str:
    surroundings = {**os.environ, "PATH": f"{SCRIPTS}:{os.environ['PATH']}", **environment}
    outcome = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=surroundings, capture_output=True, text=True, timeout=600, check=False
    )
    assert outcome.returncode == 0, f"{command}\n{outcome.stdout}\n{outcome.stderr}"
    return outcome.stdout


@pytest.fixture(scope="module")
def quickstart(checkout: Path) -> tuple[Path, str]:
    """With one seed: three take six minutes of a core."""
    experiment = checkout / "examples" / "quickstart" / "experiment.yaml"
    experiment.write_text(re.sub(r"^seeds: .*$", "seeds: [1]", experiment.read_text(), flags=re.MULTILINE))
    return checkout, call("make quickstart", checkout)


@pytest.fixture(scope="module")
def hub_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("hub")
    write_qwen(root / "models" / "Qwen" / "Qwen2.5-0.5B-Instruct" / "main", seed=0)
    with serve(root) as hub:
        yield hub.endpoint


def test_the_quickstart_learns_what_the_readme_shows(quickstart: tuple[Path, str]) -> None:
    folder, output = quickstart
    found = re.findall(r"^held-out accuracy: (\d\.\d\d) \((?:learning_rate=)?([\w.]+)", output, re.MULTILINE)
    accuracy = {arm: float(share) for share, arm in found}
    assert accuracy.keys() == {"before", "0.0003", "0.003"}, output
    assert accuracy["before"] <= 0.05
    assert accuracy["0.0003"] <= 0.1
    assert accuracy["0.003"] >= 0.8
    loss = re.search(r"^validation loss: (\d+\.\d+) \(before: (\d+\.\d+)\)$", output, re.MULTILINE)
    assert loss is not None
    assert float(loss[1]) < float(loss[2]) - 1
    runs = folder / "runs" / "quickstart"
    for name, arm in (("run_000", "0.0003"), ("run_001", "0.003")):
        assert (runs / name / "final" / "model.safetensors").exists()
        evaluation = json.loads((runs / name / "evaluation.json").read_text())
        assert f"{evaluation['held_out_accuracy']:.2f}" == f"{accuracy[arm]:.2f}"
    assert "no winner can be named" in " ".join(output.split())
    assert "written: runs/quickstart/report.html\n" in output
    assert "held_out_accuracy" in (runs / "report.html").read_text()


def with_one_seed(command: str) -> str:
    """The first run of the better arm has another number where there is one seed."""
    return command.replace("run_003", "run_001")


def test_the_experiment_of_the_readme_is_done(quickstart: tuple[Path, str]) -> None:
    """Generated again it is the same, so that there is nothing to run; the report and the config are there again."""
    folder, _ = quickstart
    printed = [call(with_one_seed(command), folder) for command in OF_AN_EXPERIMENT]
    assert "Generated 2 configs in runs/quickstart/configs/" in printed[0]
    assert "already finished: 2 of 2 runs" in printed[1]
    assert "no winner can be named" in " ".join(printed[2].split())
    config = (folder / "runs" / "quickstart" / "configs" / "run_001.yaml").read_text()
    assert printed[3] == config == (folder / "again.yaml").read_text()


def test_the_quickstart_can_be_run_again(quickstart: tuple[Path, str]) -> None:
    """Prepared again, the data are the same bytes, so that there is nothing to train."""
    words = "python examples/quickstart/prepare.py && pretrain @ examples/quickstart/pretrain.toml"
    assert "already finished: runs/quickstart/base/final" in call(words, quickstart[0])


def test_every_command_is_run_somewhere() -> None:
    tested_here = {
        "make quickstart",
        "make install && . .venv/bin/activate",
        "lacuna data my_chats.jsonl --config configs/sft_qwen.toml",
        "lacuna plan configs/sft_qwen.toml --device h100",
        "lacuna plan examples/quickstart/sft.toml",
        "lacuna data --config examples/quickstart/sft.toml --show 1",
        "sft @ configs/sft_qwen.toml --dataset my_chats.jsonl",
        "lacuna explain configs/sft_qwen.toml --learning-rate 1e-4",
        "sft @ examples/quickstart/sft.toml --steps 24 --save-every 4 --output-dir runs/short",
        "finetune --config examples/quickstart/finetune.yaml",
        "lacuna merge runs/quickstart/qlora --output runs/quickstart/merged",
        "sft @ examples/quickstart/sft.toml --steps 24 --gpus 2 --device cpu --output-dir runs/two",
        "lacuna slurm examples/slurm.yaml",
        "lacuna status runs/quickstart",
        *OF_AN_EXPERIMENT,
        *TALKS,
        *DRY_RUNS,
    }
    assert set(commands()) == tested_here | RUN_ELSEWHERE.keys()


def test_install_leaves_an_environment_with_the_commands(checkout: Path) -> None:
    output = call("make install && . .venv/bin/activate && sft --help", checkout)
    assert "--learning-rate" in output


def test_explain_prints_the_lines_that_the_readme_shows(checkout: Path) -> None:
    printed = call("lacuna explain configs/sft_qwen.toml --learning-rate 1e-4", checkout)
    (shown,) = [block for block in blocks("") if block.startswith("learning_rate ")]
    for line in shown.splitlines():
        assert line.split() in [printed_line.split() for printed_line in printed.splitlines()]


def test_the_short_run_of_the_data_page(quickstart: tuple[Path, str]) -> None:
    folder, _ = quickstart
    command = "sft @ examples/quickstart/sft.toml --steps 24 --save-every 4 --output-dir runs/short"
    printed = call(command, folder)
    (shown,) = [block for block in blocks("") if "jsonl: schema chat" in block]
    assert shown.strip() in printed
    assert (folder / "runs" / "short" / "final").is_dir()


def test_the_look_at_the_data_of_the_data_page(quickstart: tuple[Path, str]) -> None:
    """The words that are drawn depend on Python's own library, and so on its version; the numbers of chats do not."""
    printed = call("lacuna data --config examples/quickstart/sft.toml --show 1", quickstart[0])
    (shown,) = [block for block in blocks("") if "(by its ending), schema chat" in block]
    assert printed.splitlines()[:3] == shown.splitlines()[:3]
    assert re.search(r"^⟦.+<\|im_end\|>⟧⏎$", printed, re.MULTILINE)


def test_two_processes_without_a_gpu_and_the_table_of_runs(quickstart: tuple[Path, str]) -> None:
    folder, _ = quickstart
    printed = call("sft @ examples/quickstart/sft.toml --steps 24 --gpus 2 --device cpu --output-dir runs/two", folder)
    assert "2 processes (full sharding)" in printed
    assert "model: runs/two/final" in printed
    table = call("lacuna status runs/quickstart", folder).splitlines()
    assert [line.split()[:2] for line in table[1:4]] == [[run, "finished"] for run in ("base", "run_000", "run_001")]


def test_the_quickstarts_model_answers_in_scripts_and_beside_its_base(quickstart: tuple[Path, str]) -> None:
    folder, _ = quickstart
    (command,) = TALKS - {COMPARISON}
    assert json.loads(call(with_one_seed(command), folder))["text"] == "READ STRING"
    assert "equal to the" in call(with_one_seed(COMPARISON), folder)
    answers = [json.loads(line) for line in (folder / "runs/answers.jsonl").read_text().splitlines()]
    said = [row["answers"]["runs/quickstart/run_001"]["text"] == row["reference"] for row in answers]
    assert len(said) == 200
    assert sum(said) >= 160


def test_the_cluster_example_on_a_machine_without_slurm(quickstart: tuple[Path, str]) -> None:
    folder, _ = quickstart
    page, example = ((folder / name).read_text() for name in ("docs/slurm.md", "examples/slurm.yaml"))
    assert f"```yaml\n{example}```" in page
    printed = call("lacuna slurm examples/slurm.yaml", folder)
    assert "slurm/learning_rates.sh: runs 0 to 5 of configs/run_mapping.yaml" in printed
    script = (folder / "slurm" / "learning_rates.sh").read_text()
    for line in ("--array=0-5%4", "--gpus-per-node=h100:1", "--signal=B:USR1@300", "--time=04:00:00", "--requeue"):
        assert f"#SBATCH {line}" in script


@pytest.fixture(scope="module")
def adapter(quickstart: tuple[Path, str]) -> tuple[Path, str]:
    folder, _ = quickstart
    return folder, call("finetune --config examples/quickstart/finetune.yaml", folder)


def test_the_quickstarts_model_learns_by_an_adapter(adapter: tuple[Path, str]) -> None:
    folder, printed = adapter
    loss = re.search(r"^validation loss: (\d+\.\d+) \(before: (\d+\.\d+)\)$", printed, re.MULTILINE)
    assert loss is not None
    assert float(loss[1]) < 0.5 * float(loss[2])
    merged = call("lacuna merge runs/quickstart/qlora --output runs/quickstart/merged", folder)
    assert "its logits differ from base plus adapter by" in merged
    assert (folder / "runs/quickstart/merged/model.safetensors").is_file()


def test_the_python_of_the_finetune_page_runs(adapter: tuple[Path, str]) -> None:
    folder, _ = adapter
    text = (folder / "docs" / "finetune.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        call(f"python - <<'END'\n{snippet}\nEND", folder)


@pytest.mark.parametrize("command", DRY_RUNS)
def test_the_presets_say_what_they_would_do_and_what_is_missing(command: str, checkout: Path) -> None:
    printed = call(f"{command} || test $? = 1", checkout)
    settings = {
        line.split()[0]: line.split()[1] for line in printed.splitlines() if line[:1].isalpha() and "  " in line
    }
    assert settings["training.sequence_length"] == DRY_RUNS[command]
    assert settings["training.lora_r"] == ("32" if "--set" in command else "16")
    assert "would stop: model.path mistralai/Mistral-7B-Instruct-v0.3" in printed
    assert "hf download mistralai/Mistral-7B-Instruct-v0.3" in printed
    assert "would stop: data/processed/train.jsonl: no such file" in printed


MISTRAL_7B = ModelShape("llama", 4096, 32, 14336, 32, 8, 128, 32768, tied=False)
ON: dict[str, dict[str, Any]] = {
    "H100, 80 GB": {"device": "cuda", "attention": "flash_attention_2"},
    "Mac, 32 GB": {"device": "mps", "attention": "eager"},
}


def cells(page: str, pattern: str) -> list[list[str]]:
    """Of the lines of tables that begin so."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines if re.match(pattern, line)]


def test_the_memory_of_the_presets_is_the_formulas() -> None:
    rows = cells("qlora.md", r"\| .*\| (\*\*)?q?lora")
    assert len(rows) == 10
    machine = ""
    for name, method, length, batch, checkpointing, weights, activations, everything in rows:
        machine = name or machine
        adapter = Adapter(16, bits=4 if method == "qlora" else None)
        step = Step(int(batch), int(length), True, checkpointing == "yes", adapter=adapter, **ON[machine])
        sizes = step_memory(MISTRAL_7B, step)
        found = [sizes["weights"], sizes["activations"], sum(sizes.values())]
        assert [f"{size / GIB:.1f}" for size in found] == [weights, activations, everything]


def test_the_worked_example_is_the_formulas() -> None:
    step = Step(4, 4096, True, True, attention="flash_attention_2", adapter=Adapter(16, bits=4))
    sizes = step_memory(MISTRAL_7B, step)
    shown = {
        row[0]: row[-1] for row in cells("memory.md", r"\| (weights|gradients|optimizer|inputs|frame|activ|logits|all)")
    }
    assert shown == {name: f"{size / GIB:.2f}" for name, size in {**sizes, "all": sum(sizes.values())}.items()}


def test_the_errors_that_the_readme_shows(tmp_path: Path) -> None:
    (shown,) = [block for block in blocks("") if block.startswith("error: ")]
    settings = "\n" * 11 + 'lerning_rate = 1e-4\n\nbatch_size = "4"\n'
    names = 'model_name = "m"\ndataset = "d"\noutput_dir = "o"\nsteps = 1\n'
    (tmp_path / "my.toml").write_text(settings + names)
    words = [str(SCRIPTS / "sft"), "@", "my.toml"]
    outcome = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert outcome.returncode == 2
    assert sorted(outcome.stderr.splitlines()) == sorted(shown.splitlines())


def test_your_own_data_with_a_hub_model(checkout: Path, hub_endpoint: str, tmp_path: Path) -> None:
    chats = write_chat(checkout / "my_chats.jsonl", rows=1500)
    assert json.loads(chats.read_text().splitlines()[0]).keys() == {"messages"}
    home = {"HF_ENDPOINT": hub_endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    seen = call("lacuna data my_chats.jsonl --config configs/sft_qwen.toml", checkout, **home)
    assert "documents  1,425" in seen
    assert "documents  75\n" in seen, "the share that the config keeps for validation, as the run does"
    planned = call("lacuna plan configs/sft_qwen.toml --device h100", checkout, **home)
    assert "at the peak of a step: fits" in planned
    printed = call("sft @ configs/sft_qwen.toml --dataset my_chats.jsonl", checkout, **home)
    assert "model: runs/sft_qwen/final" in printed
    folder = checkout / "runs" / "sft_qwen"
    (listed,) = [block for block in blocks("") if block.startswith("runs/sft_qwen/")]
    named = {line.split()[0].rstrip("/") for line in listed.splitlines()[1:]}
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == named
    again = call("sft @ runs/sft_qwen/config.toml --output-dir runs/again", checkout, **home)
    assert "model: runs/again/final" in again


def test_links_lead_to_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
