"""lacuna doctor in environments that are broken for real: packages that crash, disks that are full or read-only."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import Run
from core_only import CORE_ONLY, SITE_PACKAGES, SOURCE
from hub_server import serve
from lacuna.config.training import SFTConfig
from lacuna.errors import ModelError
from lacuna.preflight import services
from lacuna.preflight.check import Check, Examination, as_text
from lacuna.preflight.probes import reinstall
from lacuna.preflight.starts import check_start, check_weights
from lacuna.preflight.storage import output_folder

ROOT = Path(__file__).parents[2]
SECRETS = {"HF_TOKEN": "hf_0123456789abcdef", "WANDB_API_KEY": "0123456789fedcba9876"}
CAN_MOUNT = shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
NEEDS_MOUNT = pytest.mark.skipif(not CAN_MOUNT, reason="a file system of its own needs unshare -rm")
SHOW = 'from lacuna.preflight.storage import *; c = output_folder(Path("{}"), False); print(c.state, c.found)'
FINETUNE = """\
model: {path: tiny}
dataset: {path: chat.jsonl}
training: {method: qlora, output_dir: out, sequence_length: 96, max_steps: 2, tracker: tensorboard}
device: cpu
"""


def make_environment(folder: Path, stubs: dict[str, str]) -> Path:
    """A virtual environment with our core, and packages that hold nothing but some code; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (place,) = folder.glob("lib/python*/site-packages")
    for name in CORE_ONLY:
        if (SITE_PACKAGES / name).exists():
            (place / name).symlink_to(SITE_PACKAGES / name)
    (place / "lacuna").symlink_to(SOURCE / "lacuna")
    for name, code in stubs.items():
        (place / name).mkdir()
        (place / name / "__init__.py").write_text(code)
    return folder / "bin" / "python"


def doctor(python: Path, *words: str, cwd: Path, **environment: str) -> tuple[int, dict[str, Any]]:
    """Its exit code, and its checks by name; a list of them for the config."""
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-m", "lacuna", "doctor", "--json", *words]
    done = subprocess.run(command, cwd=cwd, env={**surroundings, **environment}, capture_output=True, text=True)
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS.values())
    assert done.stderr == ""
    examination = json.loads(done.stdout)
    assert examination["healthy"] == (done.returncode == 0)
    checks = {check["name"]: check for check in examination["checks"]}
    checks["config"] = [check for check in examination["checks"] if check["name"] == "config"]
    return done.returncode, checks


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("core") / "venv", {})


def test_without_torch_nothing_is_ready_and_what_installs_it_is_said(core: Path, tmp_path: Path) -> None:
    code, checks = doctor(core, cwd=tmp_path)
    assert code == 1
    torch = checks["torch"]
    assert (torch["state"], torch["found"], torch["needed"]) == ("failed", "not installed", True)
    assert torch["mend"] == "pip install 'lacuna[train]'"
    for name in ("peft", "trl", "bitsandbytes"):
        assert (checks[name]["state"], checks[name]["needed"]) == ("skipped", False)
        assert checks[name]["mend"] == "pip install 'lacuna[finetune]'"
    assert checks["Python"]["state"] == "ok"
    assert re.fullmatch(r".*: [\d.]+ GiB free, [\d,]+ MB/s.*", checks["output folder"]["found"])
    assert list(tmp_path.iterdir()) == []


def test_what_a_config_needs_fails_where_it_is_not_there(core: Path, tmp_path: Path) -> None:
    (tmp_path / "qlora.yaml").write_text(FINETUNE)
    code, checks = doctor(core, "qlora.yaml", cwd=tmp_path)
    assert code == 1
    failed = {name for name in checks if name != "config" and checks[name]["state"] == "failed"}
    assert failed == {
        "torch", "bf16", "transformers", "accelerate", "peft", "trl", "datasets", "bitsandbytes", "tensorboard"
    }  # fmt: skip
    assert (checks["wandb"]["state"], checks["wandb"]["needed"]) == ("skipped", False)
    assert [check["state"] for check in checks["config"]] == ["failed"]


def test_a_library_that_ends_its_process_is_a_failed_check_and_no_dead_doctor(tmp_path: Path) -> None:
    stubs = {
        "torch": "class cuda:\n    is_available = bool\nclass backends:\n    mps = cuda\n",
        "bitsandbytes": "import os\nos.kill(os.getpid(), 11)\n",
        "transformers": "import os\nprint('noise')\nraise ImportError('bad build for ' + os.environ['HF_TOKEN'])\n",
        "accelerate": "raise SystemExit(3)\n",
        "peft": "import os, sys\nprint('out of luck', file=sys.stderr)\nos._exit(7)\n",
        "datasets": "import no_such_module\n",
    }
    python = make_environment(tmp_path / "venv", stubs)
    code, checks = doctor(python, cwd=tmp_path, WANDB_MODE="online", **SECRETS)
    assert code == 1
    assert [name for name in checks if name != "config" and checks[name]["needed"]] == ["Python", "torch"]
    assert all(checks[name]["state"] == "failed" for name in stubs)
    assert re.search(r"^killed by SIGSEGV: File .*bitsandbytes/__init__.py\", line 2", checks["bitsandbytes"]["found"])
    assert checks["bitsandbytes"]["mend"] == "pip uninstall bitsandbytes && pip install 'lacuna[finetune]'"
    assert checks["transformers"]["found"] == "ImportError: bad build for ***"
    assert checks["accelerate"]["found"] == "SystemExit: 3"
    assert checks["peft"]["found"] == "ended with exit code 7: out of luck"
    assert checks["datasets"]["found"].startswith("ModuleNotFoundError: ")
    assert checks["W&B login"]["found"] == "WANDB_API_KEY is set"
    assert checks["tensorboard"]["state"] == checks["trl"]["state"] == checks["wandb"]["state"] == "skipped"


def test_here_everything_works_and_the_run_could_start(model_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    (tmp_path / "qlora.yaml").write_text(FINETUNE)
    (tmp_path / "tiny").symlink_to(model_folder)
    (tmp_path / "chat.jsonl").symlink_to(chat_file)
    code, checks = doctor(Path(sys.executable), "qlora.yaml", cwd=tmp_path, PYTHONPATH=str(SOURCE), **SECRETS)
    libraries = ("transformers", "accelerate", "peft", "trl", "bitsandbytes", "datasets", "tensorboard", "wandb")
    assert "cores" in checks["devices"]["found"]
    for name in ("torch", "bf16", "C compiler", "hub token", *libraries):
        assert checks[name]["state"] == "ok", checks[name]
    assert checks["peft"]["needed"]
    assert not checks["wandb"]["needed"]
    assert checks["flash-attn"]["state"] == "skipped"
    assert [check["state"] for check in checks["config"]] == ["ok"], checks["config"]
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl", "qlora.yaml", "tiny"]


def in_own_mounts(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    words = ["unshare", "-rm", "sh", "-c", script]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def test_what_broke_in_another_librarys_files_is_mended_there() -> None:
    assert reinstall("peft", "/env/site-packages/bitsandbytes/__init__.py").startswith("pip uninstall bitsandbytes &&")
    assert reinstall("peft", "/env/site-packages/torch/nn/modules/linear.py").startswith("pip uninstall peft &&")
    assert reinstall("bf16", "/work/lacuna/platform/probes.py") == ""


def test_weights_are_there_or_can_be_had(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(model: str | Path, **more: Any) -> SFTConfig:
        return SFTConfig(model_name=str(model), dataset="d.jsonl", output_dir="o", steps=1, **more)

    notes: list[str] = []
    check_weights(config(model_folder), notes)
    check_weights(config(tmp_path, initialise="random"), notes)
    assert notes == []
    with pytest.raises(ModelError, match=r"there are no safetensors in this folder"):
        check_weights(config(tmp_path), notes)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"not downloaded before, and the hub is out of reach.*: hf download me/none"):
        check_weights(config("me/none"), notes)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    check_weights(config("me/none"), notes)
    assert notes == ["the weights of me/none will be downloaded when the run starts: hf download does it before"]


def test_everything_that_would_stop_a_run_comes_at_once(model_folder: Path, tmp_path: Path) -> None:
    settings = {
        "model_name": str(model_folder), "dataset": "nowhere.jsonl", "output_dir": str(tmp_path / "out"), "steps": 1,
        "device": "cpu", "gpus": 2, "batch_size": 4, "sequence_length": 9999,
    }  # fmt: skip
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump({"trainer": "sft", **settings}))
    checks = check_start([str(tmp_path / "sft.yaml")])
    assert all((check.name, check.state, check.needed) == ("config", "failed", True) for check in checks)
    problems = "\n".join(check.found for check in checks)
    for words in ("nowhere.jsonl: no such file", "sequence_length 9999"):
        assert words in problems
    assert "gpus" not in problems


@pytest.mark.parametrize(
    ("mounted", "found"),
    [("-o size=8m", "the disk is full"), ("-o nr_inodes=1", "no inodes are left: too many files")],
)
@NEEDS_MOUNT
def test_a_full_disk_is_named_and_left_as_it_was(tmp_path: Path, mounted: str, found: str) -> None:
    (tmp_path / "disk").mkdir()
    script = (
        f"mount -t tmpfs {mounted} tmpfs disk && {sys.executable} -c '{SHOW.format('disk/runs/a')}'; ls -A disk >&2"
    )
    done = in_own_mounts(script, tmp_path)
    assert (done.stdout, done.stderr) == (f"failed {tmp_path / 'disk'}: {found}\n", "")


@NEEDS_MOUNT
def test_a_read_only_disk_ends_it_for_a_run_that_would_write_there(core: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    config = "trainer: sft\nmodel_name: m\ndataset: d.jsonl\noutput_dir: disk/runs/a\nsteps: 1\n"
    (tmp_path / "sft.yaml").write_text(config)
    done = in_own_mounts(f"mount -t tmpfs -o ro tmpfs disk && {core} -m lacuna doctor sft.yaml", tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(f"✗ output folder +{tmp_path / 'disk'}: the file system is read-only\n", done.stdout)
    assert re.search(r"\nnot ready: torch, .*output folder", done.stdout)
    assert "\x1b" not in done.stdout


def test_a_limit_on_files_is_named(tmp_path: Path) -> None:
    words = ["sh", "-c", 'ulimit -f 1000 && exec "$@"', "sh", sys.executable, "-c", SHOW.format(".")]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"failed {tmp_path}: files may not be that large\n"


def test_a_folder_that_is_not_there_yet_is_judged_by_the_one_above(tmp_path: Path) -> None:
    check = output_folder(tmp_path / "runs" / "a", needed=True)
    assert check.found.startswith(f"{tmp_path}: ")
    assert check.state in ("ok", "warning")
    assert list(tmp_path.iterdir()) == []


def test_the_hub_answers_or_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert services.hub().state == "skipped"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://user:password@127.0.0.1:9")
    closed = services.hub()
    assert closed.state == "warning"
    assert "127.0.0.1 does not answer" in closed.found
    assert "password" not in closed.found
    with serve(tmp_path) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        assert services.hub() == Check("hub", "ok", "127.0.0.1 answers")


def test_a_login_to_wandb_is_seen_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert services.wandb_login().mend == "wandb login"
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password sesame\n")
    logged_in = services.wandb_login()
    assert logged_in.state == "ok"
    assert "sesame" not in str(logged_in)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert services.wandb_login().state == "skipped"
    monkeypatch.setenv("WANDB_API_KEY", "open sesame")
    assert services.wandb_login().found == "WANDB_API_KEY is set"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert services.wandb_login().found.startswith("WANDB_MODE is offline")


@pytest.mark.parametrize(
    ("script", "state", "found"),
    [
        (
            "printf 'gpu*|up|4|mixed|gpu:h100:8\\ncpu|up|2|idle|(null)\\n'",
            "ok",
            "gpu* up, 4 mixed (gpu:h100:8); cpu up, 2 idle",
        ),
        ("printf 'gpu*|up|4|down*|gpu:h100:8\\n'", "warning", "gpu* up, 4 down* (gpu:h100:8)"),
        ("echo 'sinfo: error: no controller' >&2; exit 1", "warning", "sinfo: error: no controller"),
        ("true", "warning", "it has no partitions for this user"),
    ],
)
def test_slurms_partitions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, state: str, found: str
) -> None:
    (tmp_path / "sinfo").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    check = services.slurm()
    assert (check.state, check.found) == (state, found)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert services.slurm() == Check("SLURM", "skipped", "not on this machine")


def test_a_bad_config_ends_as_everywhere(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(FINETUNE.replace("qlora", "qlorra"))
    assert run("lacuna", "doctor", "bad.yaml").code == 2
    Path("what.yaml").write_text("seed: 1\n")
    outcome = run("lacuna", "doctor", "what.yaml")
    assert outcome.code == 2
    assert outcome.output.startswith(
        "error: what.yaml: no `trainer` key says what this is for: add trainer = 'pretrain'"
    )
    assert "no such config file" in run("lacuna", "doctor", "nowhere.yaml").output


def test_the_text_has_colours_marks_and_what_to_do() -> None:
    checks = [
        Check("torch", "ok", "2.13"),
        Check("trl", "failed", "broken", "pip install trl"),
        Check("peft", "skipped", "not installed"),
    ]
    text = as_text(Examination(True, checks))
    assert text.splitlines()[0] == "\x1b[32m✓\x1b[0m torch  2.13"
    assert "\x1b[33m✗\x1b[0m trl" in text
    assert "→ pip install trl" in text
    assert "ready, without trl" in text
    needed = [Check("trl", "failed", "broken", needed=True)]
    assert "\x1b[31m✗" in as_text(Examination(False, needed))
    assert "not ready: trl" in as_text(Examination(False, needed))


def test_the_conda_environment_installs_what_the_extras_name() -> None:
    environment = yaml.safe_load((ROOT / "environment-remote.yml").read_text())
    assert environment["name"] == "lacuna"
    python, pip, section = environment["dependencies"]
    assert (python, pip) == ("python=3.11", "pip")
    constraint, editable = section["pip"]
    assert (ROOT / constraint.removeprefix("--constraint ")).is_file()
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.fullmatch(r"--editable \.\[([\w,]+)\]", editable)
    assert named is not None
    assert set(named[1].split(",")) <= extras.keys()


@pytest.fixture
def laptop(tmp_path: Path) -> Path:
    """A checkout whose .venv is there already, with a doctor that is well."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "scripts/setup_local.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    write_program(tmp_path / ".venv/bin/lacuna", 'echo "called: $@"')
    (tmp_path / ".venv/installed").touch()
    return tmp_path


def write_program(file: Path, script: str) -> str:
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


def set_up(folder: Path, *words: str) -> tuple[int, str]:
    command = [str(folder / "scripts/setup_local.sh"), *words]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_setting_up_a_laptop_ends_with_the_doctor_and_can_be_repeated(laptop: Path) -> None:
    for _ in range(2):
        code, printed = set_up(laptop, sys.executable)
        assert (code, "\x1b" in printed) == (0, False)
        assert f"✓ Python {sys.version.split()[0]}" in printed
        assert "called: doctor" in printed
        assert printed.endswith("ready: . .venv/bin/activate && make quickstart\n")


def test_setting_up_a_laptop_says_what_is_missing(laptop: Path) -> None:
    code, printed = set_up(laptop, "python9")
    assert (code, "there is no 'python9' here: install Python 3.11 or newer" in printed) == (1, True)
    old = write_program(laptop / "old", 'case "$2" in *print*) echo 3.9.7;; *) exit 1;; esac')
    code, printed = set_up(laptop, old)
    assert (code, "is Python 3.9.7, lacuna needs 3.11 or newer" in printed) == (1, True)
    write_program(laptop / ".venv/bin/lacuna", "exit 1")
    code, printed = set_up(laptop, sys.executable)
    assert (code, "see the lines marked ✗ above" in printed) == (1, True)
