"""The commands as a person types them, each in a process of its own."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core_only import CORE_ONLY, SITE_PACKAGES, SOURCE
from lacuna.cli.main import lacuna
from lacuna.config.files import flag_name
from lacuna.config.training import FLAT as TRAINERS

BIN = Path(sys.executable).parent
TORCH_FREE = [
    "lacuna.chat.answer", "lacuna.chat.find", "lacuna.chat.session", "lacuna.chat.settings", "lacuna.cli.chat",
    "lacuna.cli.data", "lacuna.cli.flags", "lacuna.cli.main", "lacuna.cli.platform", "lacuna.cli.replay",
    "lacuna.cli.report", "lacuna.cli.run", "lacuna.config.files", "lacuna.config.finetune",
    "lacuna.config.layers", "lacuna.config.names", "lacuna.config.slurm", "lacuna.config.trainers",
    "lacuna.config.training", "lacuna.config.trees", "lacuna.config.yaml_format", "lacuna.cost.advice",
    "lacuna.cost.flops", "lacuna.cost.known_models", "lacuna.cost.memory", "lacuna.cost.shape",
    "lacuna.data.find", "lacuna.data.formats", "lacuna.data.messages", "lacuna.data.packing", "lacuna.data.schemas",
    "lacuna.errors",
    "lacuna.experiment.base", "lacuna.experiment.checks", "lacuna.experiment.confounds",
    "lacuna.experiment.design", "lacuna.experiment.folder", "lacuna.experiment.generator",
    "lacuna.experiment.schema", "lacuna.experiment.sweep", "lacuna.files", "lacuna.installation",
    "lacuna.launch.batch_script", "lacuna.launch.devices", "lacuna.launch.lease", "lacuna.launch.nodes",
    "lacuna.launch.selection", "lacuna.launch.slurm", "lacuna.launch.start", "lacuna.machine.detect",
    "lacuna.machine.presets", "lacuna.preflight.check", "lacuna.preflight.command", "lacuna.preflight.count",
    "lacuna.preflight.doctor", "lacuna.preflight.dry_run", "lacuna.preflight.libraries", "lacuna.preflight.plan",
    "lacuna.preflight.probes", "lacuna.preflight.read", "lacuna.preflight.ready", "lacuna.preflight.recipes",
    "lacuna.preflight.services", "lacuna.preflight.show", "lacuna.preflight.starts", "lacuna.preflight.storage",
    "lacuna.processes", "lacuna.reports.collect", "lacuna.reports.curves", "lacuna.reports.make",
    "lacuna.reports.metric", "lacuna.reports.notes", "lacuna.reports.numbers", "lacuna.reports.page",
    "lacuna.reports.replay", "lacuna.reports.results", "lacuna.reports.statistics", "lacuna.reports.table",
    "lacuna.reports.verdict", "lacuna.runs.card", "lacuna.runs.final", "lacuna.runs.folder",
    "lacuna.runs.identity", "lacuna.runs.jobs", "lacuna.runs.logs", "lacuna.runs.mapping", "lacuna.runs.metrics",
    "lacuna.runs.provenance", "lacuna.runs.queue", "lacuna.runs.same", "lacuna.runs.status",
    "lacuna.torchtune.checks", "lacuna.torchtune.dataset", "lacuna.torchtune.environment", "lacuna.torchtune.facts",
    "lacuna.torchtune.inside_checks", "lacuna.torchtune.inside_counts", "lacuna.torchtune.log",
    "lacuna.torchtune.memory", "lacuna.torchtune.model", "lacuna.torchtune.recipe", "lacuna.torchtune.run",
    "lacuna.torchtune.steps", "lacuna.torchtune.templates", "torchtune_config_writer",
    "torchtune_config_writer.builder",
    "lacuna.train.weights",
    "lacuna.data.written", "lacuna.data.template_date",
]  # fmt: skip
FOREIGN_TO_TRAINING = ("cli", "launch", "preflight", "chat", "reports", "experiment", "torchtune")
NOT_TORCH_FREE = {"preflight/trace.py": "the real step", "reports/text.py": "rich"}
GOOD = 'trainer = "sft"\nmodel_name = "m"\ndataset = "d.jsonl"\noutput_dir = "o"\nsteps = 5\n'


def run(*words: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / words[0]), *map(str, words[1:])]
    without_debug = {name: value for name, value in os.environ.items() if name != "LACUNA_DEBUG"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**without_debug, **environment})


def message(result: subprocess.CompletedProcess[str]) -> str:
    """Standard error of a command that ended as bad input must."""
    assert result.returncode == 2, result
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "good.toml").write_text(GOOD)
    return tmp_path


@pytest.fixture(scope="session")
def core_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages in which nothing but the core is installed."""
    packages = tmp_path_factory.mktemp("core")
    for name in CORE_ONLY:
        if (SITE_PACKAGES / name).exists():
            (packages / name).symlink_to(SITE_PACKAGES / name)
    (packages / "lacuna").symlink_to(SOURCE / "lacuna")
    return packages


def test_training_loads_nothing_of_the_rooms_around_it() -> None:
    program = "import sys, lacuna.train.start; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    rooms = {name.split(".")[1] for name in loaded if name.startswith("lacuna.")}
    assert "train" in rooms
    assert rooms.isdisjoint(FOREIGN_TO_TRAINING)


@pytest.mark.parametrize("trainer", ["pretrain", "sft"])
def test_help_lists_every_setting_with_its_words_and_default(trainer: str) -> None:
    result = run(trainer, "--help")
    assert result.returncode == 0
    text = re.sub(r"-\s+", "-", re.sub(r"\s+", " ", result.stdout))
    for name, field in TRAINERS[trainer].model_fields.items():
        if name == "trainer":
            assert " --trainer " not in text
            continue
        shown = {"None": "none", "True": "true", "False": "false"}.get(str(field.default), str(field.default))
        words = f"{field.description} [{'required' if field.is_required() else f'default: {shown}'}]"
        found = re.search(rf" {flag_name(name)} (?:\[[\w|]+\]|INTEGER|NUMBER|TEXT) (.*?\])(?= --|$)", text)
        assert found, name
        assert found[1].replace(" ", "") == re.sub(r"-\s+", "-", words).replace(" ", "")


def test_the_list_of_commands_has_whole_sentences() -> None:
    listed = run("lacuna", "--help").stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == sorted(lacuna.commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_help_names_numbers_choices_and_booleans_as_such() -> None:
    text = re.sub(r"\s+", " ", run("pretrain", "--help").stdout)
    for expected in (
        "--learning-rate NUMBER",
        "--validation-share NUMBER",
        "--unreadable-share NUMBER",
        "--steps INTEGER",
        "--model-name TEXT",
        "--resume TEXT",
        "--packing [true|false]",
        "--compile [auto|true|false]",
        "--precision [auto|bf16|fp32]",
    ):
        assert expected in text


@pytest.mark.parametrize("words", [("sft", "--help"), ("pretrain", "--help"), ("lacuna", "--help")])
def test_help_answers_in_a_fifth_of_a_second(words: tuple[str, ...]) -> None:
    """Processor time, and often enough that a busy machine does not decide.

    On a machine where the libraries alone take most of it, no more than as much again.
    """

    def seconds(command: Callable[[], object]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def libraries() -> None:
        code = "import click, yaml\nfrom pydantic import BaseModel, TypeAdapter"
        subprocess.run([sys.executable, "-c", code], check=True)

    helps, floors = [], []
    for _ in range(20):
        helps.append(seconds(lambda: run(*words).check_returncode()))
        if min(helps) < 0.2:
            return
        floors.append(seconds(libraries))
    assert min(helps) < 2 * min(floors)


def test_the_torch_free_half_imports_no_torch() -> None:
    heavy = {"torch", "transformers", "datasets", "tokenizers", "jinja2", "pyarrow", "rich"}
    code = f"import sys, {', '.join(TORCH_FREE)}\nprint([m for m in sys.modules if m.split('.')[0] in {heavy}])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


def test_the_garbage_collector_rests_while_the_trainer_is_imported_and_no_longer() -> None:
    code = (
        "import gc\nfrom lacuna.cli.main import fast_imports\nresting = []\n"
        "with fast_imports(): resting.append(gc.isenabled())\n"
        "print(resting, gc.isenabled(), gc.get_freeze_count() > 0)\n"
        "try:\n    with fast_imports(): import nothing_of_this_name\n"
        "except ModuleNotFoundError: print(gc.isenabled())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "[False] True True\nTrue\n"), result.stderr


def test_the_list_of_the_torch_free_half_is_complete() -> None:
    found = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for part in ("config", "experiment", "runs", "platform", "plan", "reports")
        for path in (SOURCE / "lacuna" / part).glob("*.py")
        if path.stem != "__init__" and path.relative_to(SOURCE / "lacuna").as_posix() not in NOT_TORCH_FREE
    }
    assert found <= set(TORCH_FREE)


def in_core_only(
    packages: Path, command: str, *words: str | Path, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    code = f"import sys, lacuna.cli.main as cli\nsys.argv[0] = '{command}'\n"
    code += {"lacuna": "cli.main()", "sft": "cli.main_sft()", "pretrain": "cli.main_pretrain()"}[command]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    arguments = [sys.executable, "-S", "-c", code, *map(str, words)]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=cwd)


def test_explain_works_where_only_the_core_is_installed(core_only: Path, folder: Path) -> None:
    result = in_core_only(core_only, "lacuna", "explain", folder / "good.toml")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", ["sft", "lacuna sft"])
def test_training_without_its_extra_names_the_install_command(core_only: Path, folder: Path, command: str) -> None:
    first, *more = command.split()
    result = in_core_only(core_only, first, *more, "@", folder / "good.toml")
    assert re.fullmatch(
        r"error: this command needs '\w+', which is not installed: pip install 'lacuna\[train\]'\n",
        message(result),
    )


def test_a_look_at_data_without_its_extra_names_the_install_command(core_only: Path, folder: Path) -> None:
    result = in_core_only(core_only, "lacuna", "data", "--config", folder / "good.toml")
    assert "pip install 'lacuna[train]'" in message(result)


def test_a_report_without_its_extra_names_the_install_command(core_only: Path, folder: Path) -> None:
    result = in_core_only(core_only, "lacuna", "report", folder)
    assert "this command needs 'scipy', which is not installed: pip install 'lacuna[report]'" in message(result)


@pytest.mark.parametrize("words", [["chat"], ["compare", ".", "runs/a", "--prompts", "x.txt"]])
def test_talking_without_its_extra_names_the_install_command(core_only: Path, folder: Path, words: list[str]) -> None:
    (folder / "config.json").touch()
    (folder / "runs" / "a" / "final").mkdir(parents=True)
    (folder / "runs" / "a" / "status.json").write_text('{"state": "finished"}')
    (folder / "runs" / "a" / "final" / "config.json").touch()
    result = in_core_only(core_only, "lacuna", *words, cwd=folder)
    assert "pip install 'lacuna[chat]'" in message(result)


def test_parquet_without_its_extra_names_the_install_command(core_only: Path) -> None:
    code = "import sys, pathlib\nfrom lacuna.data.formats import read_file\nlist(read_file(pathlib.Path('a.parquet')))"
    environment = {**os.environ, "PYTHONPATH": str(core_only)}
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment)
    assert "MissingExtraError: this command needs 'pyarrow', which is not installed: pip install" in result.stderr


def test_generate_works_where_only_the_core_is_installed(core_only: Path, folder: Path) -> None:
    experiment = "experiment_name: e\nbase_config_file: good.toml\nvariables: {learning_rate: [1e-5, 2e-5]}\n"
    (folder / "experiment.yaml").write_text(experiment)
    words = ["generate", folder / "experiment.yaml", "--output", folder / "configs"]
    result = in_core_only(core_only, "lacuna", *words)
    assert result.returncode == 0, result.stderr
    assert (folder / "configs" / "run_001.yaml").exists()


def explained(*words: str | Path, cwd: Path) -> dict[str, tuple[str, str]]:
    """setting → (value, origin)"""
    result = run("lacuna", "explain", *words, cwd=cwd)
    assert result.returncode == 0, result.stderr
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()]
    return {row[0]: (row[1], row[2]) for row in rows}


def test_explain_shows_every_value_and_where_it_came_from(folder: Path) -> None:
    (folder / "later.yaml").write_text("# one\nseed: 7\nepochs: 2\nkeep_best: 0\nvalidation_share: 1e-1\n")
    rows = explained("@", "good.toml", "@later.yaml", "--learning-rate", "3e-4", "--packing", "false", cwd=folder)
    assert list(rows) == list(TRAINERS["sft"].model_fields)
    assert rows["model_name"] == ("m", "good.toml:2")
    assert rows["seed"] == ("7", "later.yaml:2")
    assert rows["epochs"] == ("2", "later.yaml:3")
    assert rows["steps"] == ("none", "default")
    assert rows["keep_best"] == ("0", "later.yaml:4")
    assert rows["validation_share"] == ("0.1", "later.yaml:5")
    assert rows["learning_rate"] == ("0.0003", "--learning-rate")
    assert rows["packing"] == ("false", "--packing")
    assert rows["final_learning_rate_share"] == ("0.0", "default")
    assert rows["keep_last"] == ("2", "default")
    assert rows["compile"] == ("auto", "default")


def test_of_two_files_and_a_flag_the_last_wins(folder: Path) -> None:
    (folder / "b.toml").write_text("seed = 1\n")
    (folder / "c.toml").write_text("\nseed = 2\n")
    assert explained("good.toml", "b.toml", "c.toml", cwd=folder)["seed"] == ("2", "c.toml:2")
    assert explained("good.toml", "c.toml", "b.toml", cwd=folder)["seed"] == ("1", "b.toml:1")
    assert explained("good.toml", "c.toml", "--seed", "3", cwd=folder)["seed"] == ("3", "--seed")
    assert explained("good.toml", "--epochs", "3", cwd=folder)["steps"] == ("none", "default")


def test_a_flag_can_unset_an_optional_setting(folder: Path) -> None:
    (folder / "a.toml").write_text(GOOD + "validation_share = 0.5\n")
    assert explained("a.toml", "--validation-share", "none", cwd=folder)["validation_share"] == (
        "none",
        "--validation-share",
    )


def test_explain_takes_the_trainer_by_flag_where_no_file_says_it(folder: Path) -> None:
    (folder / "a.toml").write_text(GOOD.replace('trainer = "sft"\n', ""))
    assert message(run("lacuna", "explain", "a.toml", cwd=folder)) == (
        "error: a.toml: no `trainer` key says what this is for; pass --trainer pretrain, sft, finetune\n"
    )
    assert explained("a.toml", "--trainer", "pretrain", cwd=folder)["learning_rate"] == ("0.0003", "default")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--steps", "5"], "error: explain needs a config file, and files come before flags\n"),
        (["good.toml", "--steps", "5", "b.toml"], "error: 'b.toml': files come before flags\n"),
        (
            ["good.toml", "--trainer", "pretrain"],
            "error: good.toml:1: this is a config for 'sft': use `lacuna sft`\n",
        ),
        (["nowhere.toml"], "error: nowhere.toml: no such config file\n"),
        (["god.toml"], "error: god.toml: no such config file; did you mean 'good.toml'?\n"),
    ],
)
def test_explain_refuses_what_it_cannot_explain(folder: Path, words: list[str], error: str) -> None:
    assert message(run("lacuna", "explain", *words, cwd=folder)) == error


def test_explain_refuses_a_trainer_that_is_no_name(folder: Path) -> None:
    (folder / "a.toml").write_text(GOOD.replace('"sft"', '["sft"]'))
    assert message(run("lacuna", "explain", "a.toml", "--trainer", "sft", cwd=folder)) == (
        "error: a.toml:1: 'trainer' is ['sft'] (list): should be 'sft'\n"
    )


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["good.toml"], "error: 'good.toml' is not a flag; a config file is given as '@ good.toml'\n"),
        (["@", "good.toml", "again"], "error: 'again' is not a flag; a config file is given as '@ again'\n"),
        (["@", "good.toml", "@"], "error: a config file must follow '@'\n"),
        (["@", "god.toml"], "error: god.toml: no such config file; did you mean 'good.toml'?\n"),
        (["@", "good.json"], "error: good.json: a config file ends in .toml, .yaml or .yml\n"),
        (
            ["@", "good.toml", "--steps", "many"],
            "error: --steps 'many': should be a valid integer, unable to parse string as an integer\n",
        ),
        (
            ["@", "good.toml", "--steps", "1.5", "--precision", "fp16"],
            "error: --steps '1.5': should be a valid integer, unable to parse string as an integer\n"
            "error: --precision 'fp16': should be 'auto', 'bf16' or 'fp32'\n",
        ),
        (
            ["@", "good.toml", "--batch-size", "-4"],
            "error: the command line: 'batch_size' is -4 (int): should be greater than 0\n",
        ),
        (
            ["@", "good.toml", "--learning-rate", "nan"],
            "error: the command line: 'learning_rate' is nan (float): should be a finite number\n",
        ),
        (["@", "good.toml", "--epochs", "1", "--steps", "1"], "error: give epochs or steps, not both\n"),
        (
            [],
            "error: the config: 'model_name' is missing: add it, or pass --model-name\n"
            "error: the config: 'dataset' is missing: add it, or pass --dataset\n"
            "error: the config: 'output_dir' is missing: add it, or pass --output-dir\n",
        ),
    ],
)
def test_bad_input_ends_in_one_message_and_exit_code_2(folder: Path, words: list[str], error: str) -> None:
    result = run("sft", *words, cwd=folder)
    assert message(result) == error
    assert result.stdout == ""
    assert [path.name for path in folder.iterdir()] == ["good.toml"]


def test_an_unknown_flag_names_the_one_that_was_meant(folder: Path) -> None:
    for words in (["sft", "@", "good.toml"], ["lacuna", "sft"], ["lacuna", "explain", "good.toml"]):
        error = message(run(*words, "--lerning-rate", "1", cwd=folder))
        assert re.search(r"No such option:? '?--lerning-rate'?.*Did you mean.*--learning-rate\b", error)
    assert "No such command 'sftt'" in message(run("lacuna", "sftt"))


@pytest.mark.parametrize("words", [("pretrain",), ("lacuna", "pretrain")])
def test_another_trainers_file_is_refused_by_line(folder: Path, words: tuple[str, ...]) -> None:
    assert message(run(*words, "@", "good.toml", cwd=folder)) == (
        "error: good.toml:1: this is a config for 'sft': use `lacuna sft`\n"
    )


def test_problems_of_a_file_are_named_by_line(folder: Path) -> None:
    (folder / "bad.toml").write_text(GOOD + "\nlerning_rate = 1\nseed = true\n")
    assert message(run("sft", "@", "bad.toml", cwd=folder)) == (
        "error: bad.toml:8: 'seed' is True (bool): should be a valid integer\n"
        "error: bad.toml:7: unknown setting 'lerning_rate'; did you mean 'learning_rate'?\n"
    )


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["sft", "@", "y.yaml", "--verbose"], {}),
        (["sft", "@", "y.yaml"], {"LACUNA_DEBUG": "1"}),
        (["lacuna", "--verbose", "sft", "@", "y.yaml"], {}),
        (["lacuna", "explain", "y.yaml", "--verbose"], {}),
    ],
)
def test_a_traceback_is_shown_on_request(folder: Path, words: list[str], environment: dict[str, str]) -> None:
    result = run(*words, cwd=folder, **environment)
    assert result.returncode == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: y.yaml: no such config file\n")


def test_debug_is_asked_for_by_one_only(folder: Path) -> None:
    message(run("sft", "@", "y.yaml", cwd=folder, LACUNA_DEBUG="0"))


def test_the_version_is_shown() -> None:
    from lacuna import __version__

    assert run("lacuna", "--version").stdout == f"lacuna, version {__version__}\n"
