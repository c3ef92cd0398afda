"""finetune, by the real command on real tiny models: what it trains, what it leaves, and resuming to the bit."""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MixtralConfig,
    Qwen2Config,
)

from conftest import Outcome, Run, spawn
from fixtures import WORDS, make_model, make_tokenizer, write_chat
from lacuna.data.chat import Renderer
from lacuna.data.formats import Conversation
from lacuna.data.packing import pack
from lacuna.data.samples import Sample
from lacuna.data.split import row_order
from lacuna.train.checkpoint import CheckpointWriter, TrainingState, restore, tensors_of
from lacuna.train.kept import best_first, regular_saves, superfluous
from lacuna.train.session import resume_command
from templates import CHATML_MARKED, MISTRAL

peft = pytest.importorskip("peft", reason="lacuna[finetune]")
steps = pytest.importorskip("lacuna.finetune.steps")

METHODS = {
    "lora": [],
    "qlora": ["training.method=qlora"],
    "qlora 8 bit": ["training.method=qlora", "training.quantization_bits=8"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for bitsandbytes, which quantises 64 weights at a time, and with a head as sure as a trained one's:
    it is frozen, and logits near zero could not be moved."""
    folder = make_model(tmp_path_factory.mktemp("base") / "tiny", hidden=64)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_output_embeddings().weight.data.mul_(20)
    model.save_pretrained(folder)
    return folder


def write_lookups(path: Path, rows: int = 160) -> Path:
    """Each word has one answer: held-out rows can be learnt."""
    generator = random.Random(0)
    answers = dict(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))
    with path.open("w") as file:
        for _ in range(rows):
            word = generator.choice(WORDS)
            turns = [("user", f"after {word}"), ("assistant", answers[word])]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    return path


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, base, write_lookups(tmp_path / "data.jsonl"))


def write_config(folder: Path, model: Path, data: Path) -> Path:
    text = {
        "model": {"path": str(model)},
        "dataset": {"path": str(data)},
        "training": {
            "output_dir": str(folder / "run"), "max_steps": 8, "learning_rate": 1e-2, "lora_r": 4, "logging_steps": 1,
            "sequence_length": 128, "save_steps": 4,
        },
        "device": "cpu",
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(json.dumps(text))
    return path


def words(config: Path, *settings: str) -> list[str]:
    return ["--config", str(config), *(word for setting in settings for word in ("--set", setting))]


def must(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.output
    return outcome.output


def metrics(folder: Path, name: str = "loss") -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "final" / "adapter_model.safetensors").read_bytes()


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def plain_loss(model: Any, renderer: Renderer, path: Path, chosen: list[int]) -> float:
    """Mean loss per supervised token by the model's own logits, one conversation at a time."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    total, count = 0.0, 0
    for index in chosen:
        (sample,) = renderer.conversations([Conversation(rows[index]["messages"], None, "x")])
        assert isinstance(sample, Sample)
        tokens = torch.from_numpy(sample.tokens).long()
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:], reduction="none")
        mask = torch.from_numpy(sample.supervised[1:])
        total, count = total + float(losses[mask].sum()), count + int(mask.sum())
    return total / count


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_moves_the_adapter_only(method: str, run: Run, config: Path, base: Path, tmp_path: Path) -> None:
    before = digest(base)
    more = ["training.max_steps=30", "training.learning_rate=3e-2", "training.save_steps=30"]
    output = must(run("finetune", *words(config, *METHODS[method], *more)))
    folder = tmp_path / "run"
    losses = metrics(folder, "validation_loss")
    assert losses[30] < 0.5 * losses[0]
    assert digest(base) == before
    (checkpoint,) = folder.glob("checkpoints/step-00000030/*.safetensors")
    weights = [name for name in load_file(checkpoint) if name.startswith("model.")]
    assert weights
    assert all(".lora_A." in name or ".lora_B." in name for name in weights)
    assert sorted(path.name for path in (folder / "final").glob("*.safetensors")) == ["adapter_model.safetensors"]
    final = load_file(folder / "final/adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in final.values())
    assert "adapter on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in output


def test_plain_peft_gives_the_loss_that_was_measured(run: Run, config: Path, base: Path, tmp_path: Path) -> None:
    """The validation loss of the log, from base and adapter as anybody would load them."""
    held_out = write_lookups(tmp_path / "held_out.jsonl", 12)
    must(run("finetune", *words(config, f"dataset.validation_path={held_out}")))
    folder = tmp_path / "run"
    renderer = Renderer(AutoTokenizer.from_pretrained(folder / "final"))
    model = AutoModelForCausalLM.from_pretrained(base)
    assert plain_loss(model, renderer, held_out, list(range(12))) == pytest.approx(
        metrics(folder, "validation_loss")[0], rel=1e-5
    )
    adapted = peft.PeftModel.from_pretrained(model, folder / "final")
    assert plain_loss(adapted, renderer, held_out, list(range(12))) == pytest.approx(
        metrics(folder, "validation_loss")[8], rel=1e-5
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_and_resumed_is_the_undisturbed_one_to_the_bit(method: str, config: Path, tmp_path: Path) -> None:
    """20 steps against 10, kill -9, and the rest: with dropout, over the end of an epoch, saved amid the steps."""
    more = [*METHODS[method], "training.max_steps=20", "training.save_steps=5", "training.lora_dropout=0.1"]
    for name in ("straight", "killed"):
        process = spawn("finetune", *words(config, *more, f"training.output_dir={tmp_path / name}"))
        if name == "killed":
            process.wait_until((tmp_path / name / "checkpoints/step-00000010").exists)
            process.stop(signal.SIGKILL)
            assert not (tmp_path / name / "final").exists()
            process = spawn("finetune", *words(config, *more), "--resume", tmp_path / name)
        output = process.wait()
        assert process.popen.returncode == 0, output
    assert "resuming from" in output
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")
    assert metrics(tmp_path / "killed", "validation_loss") == metrics(tmp_path / "straight", "validation_loss")
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "straight")


def test_a_cut_off_checkpoint_is_not_picked_up(run: Run, config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    must(run("finetune", *words(config, "training.keep_last=3", "training.save_steps=2")))
    finished = adapter_bytes(folder)
    shutil.rmtree(folder / "final")
    (newest,) = folder.glob("checkpoints/step-00000008/*.safetensors")
    newest.write_bytes(newest.read_bytes()[:-100])
    (folder / "checkpoints" / ".step-00000009.partial").mkdir()
    output = must(run("finetune", *words(config, "training.keep_last=3", "training.save_steps=2")))
    assert "step-00000008 is damaged" in output
    assert "resuming from" in output
    assert "step-00000006" in output
    assert adapter_bytes(folder) == finished


def test_a_kill_in_the_middle_of_a_save_loses_no_step_that_was_saved(run: Run, config: Path, tmp_path: Path) -> None:
    """Saves at every step, so that the kill meets one that is half written; a second one meets the resumed run."""
    more = ["training.max_steps=40", "training.save_steps=1", "dataset.validation_share=0"]
    must(run("finetune", *words(config, *more, f"training.output_dir={tmp_path / 'straight'}")))
    folder = tmp_path / "run"
    for later in (8, 20):
        process = spawn("finetune", *words(config, *more))
        process.wait_until((folder / f"checkpoints/step-{later:08d}").exists)
        process.wait_until(lambda: any(folder.glob("checkpoints/.step-*.partial")))
        process.stop(signal.SIGKILL)
        assert not (folder / "final").exists()
    assert "resuming from" in must(run("finetune", *words(config, *more)))
    assert metrics(folder) == metrics(tmp_path / "straight")
    assert adapter_bytes(folder) == adapter_bytes(tmp_path / "straight")
    assert not list(folder.glob("checkpoints/.*"))


def test_a_signal_saves_and_says_how_to_go_on(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = words(config, "training.max_steps=400", "training.save_steps=1000")
    process = spawn("finetune", *more)
    process.wait_until(lambda: (folder / "metrics.jsonl").exists() and len(metrics(folder)) > 3)
    output = process.stop(signal.SIGTERM)
    assert process.popen.returncode == 128 + signal.SIGTERM
    assert "which is saved; go on with: " in output
    assert f"--resume {folder}" in output
    assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
    step = json.loads((folder / "status.json").read_text())["step"]
    assert (folder / f"checkpoints/step-{len(metrics(folder)):08d}/manifest.json").is_file(), step


def test_a_finished_run_stays_as_it_is(run: Run, config: Path, tmp_path: Path) -> None:
    must(run("finetune", *words(config)))
    before = digest(tmp_path / "run" / "final")
    assert "already finished" in must(run("finetune", *words(config)))
    assert digest(tmp_path / "run" / "final") == before


def test_the_best_three_and_the_newest_are_kept(run: Run, config: Path, tmp_path: Path) -> None:
    """A learning rate that is far too high at first: the losses rise and fall."""
    more = ["training.max_steps=12", "training.save_steps=1", "training.learning_rate=0.3"]
    more.append("training.final_weights=best")
    output = must(run("finetune", *words(config, *more)))
    folder = tmp_path / "run"
    losses = metrics(folder, "validation_loss")
    del losses[0]
    best = sorted(losses, key=lambda step: losses[step])[:3]
    kept = {int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*")}
    assert kept == {*best, 12}
    assert f"final weights: {folder}/checkpoints/step-{best[0]:08d}" in output


def test_packing_changes_no_loss(run: Run, config: Path, tmp_path: Path) -> None:
    """The samples of a step share rows or not; the loss of each step is the same."""
    losses = []
    for packing in ("true", "false"):
        folder = tmp_path / packing
        more = [f"training.packing={packing}", "training.lora_dropout=0", f"training.output_dir={folder}"]
        must(run("finetune", *words(config, *more)))
        losses.append(list(metrics(folder).values()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_how_a_batch_is_made_up_changes_no_loss(run: Run, config: Path, tmp_path: Path) -> None:
    losses = []
    for rows, steps in ((8, 1), (1, 8)):
        folder = tmp_path / str(rows)
        more = [f"training.batch_size={rows}", f"training.gradient_accumulation_steps={steps}"]
        must(run("finetune", *words(config, *more, "training.lora_dropout=0", f"training.output_dir={folder}")))
        losses.append(list(metrics(folder).values()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_two_processes_are_one(config: Path, tmp_path: Path) -> None:
    """With accelerate's exchange of gradients the same losses, also where the last step has too few samples."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(data.read_text().splitlines()[:19]) + "\n")
    shared = ["training.lora_dropout=0", "training.max_steps=null", "training.num_epochs=1", "training.batch_size=2"]
    losses = []
    for processes, accumulation in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        more = [f"training.gradient_accumulation_steps={accumulation}", f"training.output_dir={folder}"]
        process = spawn("finetune", *words(config, *shared, *more, f"gpus={processes}", "device=cpu"))
        output = process.wait()
        assert process.popen.returncode == 0, output
        assert output.count("schema chat") == 1
        losses.append([*metrics(folder).values(), *metrics(folder, "validation_loss").values()])
    assert len(losses[0]) == 3 + 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_mistral_style_template_trains_on_the_answers(run: Run, base: Path, tmp_path: Path) -> None:
    """TRL refuses it: it has no marked copy of this template."""
    model = tmp_path / "mistral"
    shutil.copytree(base, model)
    tokenizer = make_tokenizer(MISTRAL, bos=True)
    tokenizer.save_pretrained(model)
    data = write_lookups(tmp_path / "data.jsonl")
    more = ["training.max_steps=30", "training.learning_rate=3e-2", "training.save_steps=30"]
    must(run("finetune", *words(write_config(tmp_path, model, data), *more)))
    losses = metrics(tmp_path / "run", "validation_loss")
    assert losses[30] < 0.5 * losses[0]
    sample = json.loads(data.read_text().splitlines()[0])["messages"]
    (rendered,) = Renderer(tokenizer).conversations([Conversation(sample, None, "x")])
    assert isinstance(rendered, Sample)
    learned = tokenizer.decode(rendered.tokens[rendered.supervised])
    assert learned.strip() == sample[1]["content"] + str(tokenizer.eos_token)


def test_gpt2s_layers_are_found(run: Run, tmp_path: Path) -> None:
    """They are no torch.nn.Linear and have other names."""
    torch.manual_seed(0)
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=256, n_embd=32, n_layer=2, n_head=2)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = write_config(tmp_path, folder, write_lookups(tmp_path / "data.jsonl"))
    assert "adapter on c_attn, c_fc, c_proj" in must(run("finetune", *words(config)))
    losses = metrics(tmp_path / "run")
    assert losses[8] < losses[1]


def test_the_run_folder_tells_what_was_done(run: Run, config: Path, tmp_path: Path) -> None:
    output = must(run("finetune", *words(config, "training.num_epochs=2", "training.max_steps=null")))
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        "config.toml", "provenance.json", "status.json", "metrics.jsonl", "checkpoints", "final",
    }  # fmt: skip
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    (start,) = json.loads((folder / "provenance.json").read_text())["starts"]
    assert {"peft", "trl", "bitsandbytes", "accelerate", "torch"} <= start["packages"].keys()
    left = {path.name for path in (folder / "final").iterdir()}
    assert {"adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= left
    assert "Epoch 1/2: [" in output
    assert "Epoch 2/2: [█████████████████] 100% | Loss: " in output
    tokens = list(metrics(folder, "tokens").values())
    assert len(tokens) == start["total_steps"] == 17  # an epoch of 135 rows: copies of held-out ones are held out too
    assert all(later > earlier for earlier, later in pairwise(tokens))


def test_the_config_in_the_run_folder_is_the_run(run: Run, config: Path, tmp_path: Path) -> None:
    must(run("finetune", *words(config, "training.lora_alpha=8")))
    again = tmp_path / "again"
    must(run("finetune", *words(tmp_path / "run" / "config.toml", f"training.output_dir={again}")))
    assert adapter_bytes(again) == adapter_bytes(tmp_path / "run")


def test_another_seed_is_another_run(run: Run, config: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        must(run("finetune", *words(config, f"training.seed={seed}", f"training.output_dir={tmp_path / str(seed)}")))
    first, second = (load_file(tmp_path / name / "final/adapter_model.safetensors") for name in "12")
    assert all(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_merged_model_says_what_base_and_adapter_say(
    method: str, run: Run, config: Path, base: Path, tmp_path: Path
) -> None:
    must(run("finetune", *words(config, *METHODS[method])))
    merged = tmp_path / "merged"
    output = must(run("lacuna", "merge", tmp_path / "run", output=merged))
    assert "its logits differ from base plus adapter by" in output
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "final")
    ids = torch.arange(20)[None] * 13 % 400
    with torch.no_grad():
        expected, found = (model.eval()(input_ids=ids).logits for model in (adapted, load(merged)))
        plain = load(base)(input_ids=ids).logits
    assert float((expected - found).abs().max()) < 1e-4 * float(expected.abs().max())
    assert float((plain - found).abs().max()) > 1e-2 * float(expected.abs().max())
    assert AutoTokenizer.from_pretrained(merged).chat_template


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 6), st.booleans())
def test_every_sample_of_a_step_is_laid_out_once(lengths: list[int], rows: int, packing: bool) -> None:
    samples = [Sample(np.full(n, i, dtype=np.int32), np.ones(n, dtype=np.bool_)) for i, n in enumerate(lengths)]
    passes = steps.lay_out(samples, rows, packing)
    placed = [int(sample.tokens[0]) for one in passes for row in one for sample in row]
    assert sorted(placed) == list(range(len(lengths)))
    assert all(len(one) <= rows for one in passes)
    assert all(sum(len(sample.tokens) for sample in row) <= max(lengths) for one in passes for row in one)
    expected = len(set(pack(np.array(lengths), max(lengths)).tolist())) if packing else len(lengths)
    assert sum(len(one) for one in passes) == expected


def bare_trl(model: Path, data: Path, folder: Path, order: list[int], batch: int) -> list[float]:
    """Losses of SFTTrainer, padded and with assistant-only loss, on the rows in this order."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    arguments = SFTConfig(
        output_dir=str(folder), max_steps=len(order) // batch, per_device_train_batch_size=batch, learning_rate=1e-2,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, logging_steps=1, max_length=128, bf16=False,
        use_cpu=True, gradient_checkpointing=False, assistant_only_loss=True, report_to="none", save_strategy="no",
        train_sampling_strategy="sequential", disable_tqdm=True, seed=42,
    )  # fmt: skip
    adapter = peft.LoraConfig(r=4, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    bare = SFTTrainer(
        model=str(model), args=arguments, peft_config=adapter, train_dataset=Dataset.from_list([rows[i] for i in order])
    )
    bare.train()
    return [line["loss"] for line in bare.state.log_history if "loss" in line]


def test_the_losses_are_bare_trls(run: Run, base: Path, tmp_path: Path) -> None:
    """On the same rows in the same order, with the same adapter drawn from the seed: padded there, packed here."""
    model = tmp_path / "marked"
    shutil.copytree(base, model)
    make_tokenizer(CHATML_MARKED).save_pretrained(model)
    data = write_chat(tmp_path / "chat.jsonl", 48)
    theirs = bare_trl(model, data, tmp_path / "trl", row_order(42, 0, 48).tolist(), batch=8)
    more = [
        "training.batch_size=8", "training.gradient_accumulation_steps=1", "training.lora_dropout=0",
        "training.scheduler=constant", "training.warmup_steps=0", "training.weight_decay=0", "training.lora_alpha=32",
        "training.max_steps=6", "dataset.validation_share=0",
    ]  # fmt: skip
    must(run("finetune", *words(write_config(tmp_path, model, data), *more)))
    ours = list(metrics(tmp_path / "run").values())
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0] - 0.05


def edited(folder: Path, **values: Any) -> Path:
    """A model's config.json with other values."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def shaped(folder: Path, config: Any) -> Path:
    """A random tiny model of another architecture, with the tests' tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


SMALL = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_biases_are_trained_in_either_precision(bias: str, precision: str, run: Run, tmp_path: Path) -> None:
    model = shaped(tmp_path / "qwen2", Qwen2Config(num_key_value_heads=2, pad_token_id=3, **SMALL))
    config = write_config(tmp_path, model, write_lookups(tmp_path / "data.jsonl"))
    must(run("finetune", *words(config, f"training.bias={bias}", f"training.precision={precision}")))
    saved = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    biases = {name: tensor for name, tensor in saved.items() if name.endswith(".bias")}
    assert len(biases) == 6
    assert all(tensor.abs().max() > 0 and tensor.dtype == torch.float32 for tensor in biases.values())


def test_without_sdpa_the_message_names_the_setting(run: Run, tmp_path: Path) -> None:
    model = shaped(tmp_path / "gemma2", Gemma2Config(num_key_value_heads=2, head_dim=32, pad_token_id=3, **SMALL))
    config = write_config(tmp_path, model, write_lookups(tmp_path / "data.jsonl"))
    outcome = run("finetune", *words(config))
    if outcome.code:
        assert "transformers has no sdpa attention for this model: pass training.attention eager" in outcome.output
        must(run("finetune", *words(config, "training.attention=eager")))


def test_experts_without_an_adapter_are_mentioned(run: Run, tmp_path: Path) -> None:
    shape = MixtralConfig(num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, pad_token_id=3, **SMALL)
    config = write_config(tmp_path, shaped(tmp_path / "moe", shape), write_lookups(tmp_path / "data.jsonl"))
    assert "the experts are no linear layers, and get none" in must(run("finetune", *words(config)))


def test_what_peft_cannot_adapt_ends_in_a_sentence(run: Run, tmp_path: Path) -> None:
    model = shaped(tmp_path / "mamba", MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4))
    config = write_config(tmp_path, model, write_lookups(tmp_path / "data.jsonl"))
    outcome = run("finetune", *words(config, "training.attention=eager"))
    assert outcome.code == 2
    assert "training.target_modules: PEFT cannot adapt this model so: " in outcome.output


def test_a_models_own_code_is_not_run(base: Path, run: Run, tmp_path: Path) -> None:
    """Not even asked about: a person at a terminal might say yes."""
    model = tmp_path / "remote"
    shutil.copytree(base, model)
    (model / "evil.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')\n")
    edited(model, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}, model_type="unheard")
    outcome = run("finetune", *words(write_config(tmp_path, model, write_lookups(tmp_path / "data.jsonl"))))
    assert outcome.code == 2
    assert "[y/N]" not in outcome.output
    assert not (tmp_path / "evil").exists()


def test_a_last_validation_that_a_signal_cut_short_is_made_up_for(run: Run, config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    more = ["training.final_weights=best", "training.save_steps=4"]
    must(run("finetune", *words(config, *more)))
    log, final = (folder / "metrics.jsonl").read_text(), adapter_bytes(folder)
    shutil.rmtree(folder / "final")
    last = [line for line in log.splitlines() if '"step": 8, "validation_loss"' in line]
    (folder / "metrics.jsonl").write_text(log.replace(last[0] + "\n", ""))
    must(run("finetune", *words(config, *more)))
    assert (folder / "metrics.jsonl").read_text() == log
    assert adapter_bytes(folder) == final


def test_what_a_signal_saved_is_not_among_the_best(tmp_path: Path) -> None:
    """Otherwise the best of a run would depend on when it was stopped."""
    losses = {4: 3.0, 5: 1.0, 8: 2.0}
    lines = [json.dumps({"step": step, "validation_loss": loss}) for step, loss in losses.items()]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    folder = tmp_path / "checkpoints"
    for step in losses:
        (folder / f"step-{step:08d}").mkdir(parents=True)
    regular = regular_saves(4, 10)
    assert [path.name for path in best_first(folder, regular)] == ["step-00000008", "step-00000004"]
    assert superfluous(folder, 1, 1, regular) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize(
    ("processes", "gpus", "expected"),
    [
        (None, 1, "python -m lacuna finetune --resume run"),
        ("2", 1, "torchrun --nproc-per-node 2 -m lacuna finetune --resume run"),
        ("2", 2, "lacuna finetune --resume run"),
    ],
)
def test_the_resume_command_is_what_was_typed(
    processes: str | None, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert resume_command(["/x/lacuna/__main__.py", "finetune"], gpus, "--resume", "run") == expected


def test_without_the_hub_the_models_own_tokenizer_serves(run: Run, config: Path) -> None:
    output = must(run("finetune", *words(config, "model.base_model=somebody/gpt2")))
    assert "warning: model.base_model somebody/gpt2: " in output
    assert "taking the tokenizer of model.path" in output


def test_a_large_adapter_merges_into_bf16_weights(run: Run, base: Path, tmp_path: Path) -> None:
    """Rounding changes the logits; how much is said, and what generation stops at is written."""
    model = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    config = write_config(tmp_path, model, write_lookups(tmp_path / "data.jsonl"))
    must(run("finetune", *words(config, "training.learning_rate=0.1")))
    output = must(run("lacuna", "merge", tmp_path / "run", output=tmp_path / "merged"))
    assert "of the largest, in bfloat16 by " in output
    merged = load(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    assert make_tokenizer().convert_tokens_to_ids("<|im_end|>") in merged.generation_config.eos_token_id


def test_merging_onto_a_full_disk_leaves_nothing(run: Run, config: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk's end."""
    must(run("finetune", *words(config)))
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
        "from lacuna.cli.main import main; main()"
    )
    arguments = ["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]
    outcome = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, check=False)
    assert outcome.returncode == 2, outcome.stderr
    assert "cannot be written" in outcome.stderr
    assert not list(tmp_path.glob("*merged*"))


@pytest.mark.filterwarnings("ignore:Paged optimizers:UserWarning")
def test_a_paged_optimizer_goes_on_to_the_bit(tmp_path: Path) -> None:
    """As QLoRA uses it on CUDA. On a CPU it keeps the same state, without the paging."""
    from bitsandbytes.optim.adamw import PagedAdamW32bit

    def start() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 8))
        model[0].weight.requires_grad_(False)
        matrices = {"params": [model[1].weight], "weight_decay": 0.01}
        vectors = {"params": [model[0].bias, model[1].bias], "weight_decay": 0.0}
        return model, PagedAdamW32bit([matrices, vectors], lr=1e-2)

    def take_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            model(torch.randn(4, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = start()
    take_steps(model, optimizer, range(3))
    folder = tmp_path / "checkpoints"
    writer = CheckpointWriter(folder, keep_last=1, keep_best=0, regular=regular_saves(1, 3))
    writer.save(tensors_of(model, optimizer), TrainingState(3, {}, 0, None, "", "", {}))
    writer.wait()
    take_steps(model, optimizer, range(3, 6))
    resumed, fresh = start()
    assert restore(folder / "step-00000003", resumed, fresh).step == 3
    take_steps(resumed, fresh, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
