"""Talking to models: on this machine, behind an endpoint, at a terminal, through a pipe, and to several at once."""

import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pexpect.fdpexpect import fdspawn
from rich.console import Console

from conftest import SCRIPTS, Run, flags
from fixtures import WORDS, make_model, make_tokenizer
from forked import COMMANDS
from lacuna.chat.answer import ask, without_oldest
from lacuna.chat.find import find_model
from lacuna.chat.local import LocalModel, Pieces, load
from lacuna.chat.prompt import chat_tokens, fitting_tokens, plain_tokens
from lacuna.chat.session import Session, Turn, obey
from lacuna.chat.settings import Settings
from lacuna.chat.terminal import Screen, blocks_of
from lacuna.data.chat import Renderer
from lacuna.data.formats import Conversation
from lacuna.data.samples import Sample
from lacuna.errors import LacunaError, ModelError

CHATS = {
    "colour?": "**amber** <b>\nand *silver*",
    "poem?": "- river\n- stone\n\n```\nx  =  1\n```\n\nthe end",
    "greet\nme": "wäter für 🙂 水 winter",
    "long?": " ".join(["stone"] * 60),
}
"""What the model is taught to say."""
GREEDY = Settings(temperature=0)
TOKENIZER = make_tokenizer()


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def nothing(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/talk, an sft run that has learnt CHATS, of the model beside it."""
    folder = tmp_path_factory.mktemp("talk")
    make_model(folder / "base", hidden=64)
    rows = [{"messages": [*user(asked), {"role": "assistant", "content": said}]} for asked, said in CHATS.items()]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 16))
    rates = {"learning_rate": 1e-2, "steps": 120, "batch_size": 4, "micro_batch_size": 4, "sequence_length": 128}
    names = {"model_name": folder / "base", "dataset": folder / "chats.jsonl", "output_dir": folder / "runs" / "talk"}
    with pytest.MonkeyPatch.context() as patch:
        assert execute(patch, "sft", *flags(**names, **rates)) == 0
    return folder


def execute(patch: pytest.MonkeyPatch, command: str, *words: object) -> int:
    """The exit code."""
    patch.setattr(sys, "argv", [str(SCRIPTS / command), *map(str, words)])
    try:
        COMMANDS[command]()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def model(place: Path) -> LocalModel:
    return load(find_model(str(place / "runs" / "talk")), nothing)


@dataclass
class Said:
    code: int
    out: str
    err: str

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Talk = Callable[..., Said]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Talk:
    """`chat` with these lines as its standard input."""

    def call(lines: str | bytes, *words: object) -> Said:
        (tmp_path / "lines").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
        capfd.readouterr()
        with (tmp_path / "lines").open(encoding="utf-8") as file:
            monkeypatch.setattr(sys, "stdin", file)
            code = execute(monkeypatch, "chat", *words)
        captured = capfd.readouterr()
        return Said(code, captured.out, captured.err)

    return call


# Through a pipe


def test_each_line_is_answered_as_a_conversation_of_its_own(talk: Talk, place: Path, monkeypatch: Any) -> None:
    """Without --model, it is the newest finished run below runs/."""
    monkeypatch.chdir(place)
    said = talk("poem?\n\ncolour?\n/help\n", "--temperature", 0, "--max-tokens", 90)
    assert said.code == 0
    assert said.out.startswith(f"{CHATS['poem?']}\n{CHATS['colour?']}\n")
    assert "runs/talk on CPU, float32" in said.err


def test_json_tells_tokens_times_seed_and_why_it_ended(talk: Talk, place: Path, model: LocalModel) -> None:
    said = talk(
        "colour?\nlong?\n", "--model", place / "runs/talk/final", "--json", "--temperature", 0, "--max-tokens", 30
    )
    colour, long = said.rows()
    count = len(model.renderer.tokenizer(CHATS["colour?"])["input_ids"])
    assert (colour["prompt"], colour["text"], colour["end"]) == ("colour?", CHATS["colour?"], "stop")
    assert (colour["answer_tokens"], colour["seed"], colour["left_out"]) == (count, 0, 0)
    assert colour["prompt_tokens"] == len(chat_tokens(model.renderer, user("colour?")))
    assert 0 < colour["first"] <= colour["seconds"]
    assert (long["end"], long["answer_tokens"]) == ("max_tokens", 30)
    assert "cut off" not in said.err
    plain = talk("long?\n", "--model", place / "runs/talk/final", "--temperature", 0, "--max-tokens", 30)
    assert "note: line 1: cut off after max_tokens" in plain.err


def test_the_same_seed_gives_the_same_answer(talk: Talk, place: Path) -> None:
    words = ("--model", place / "base", "--json", "--temperature", 2, "--max-tokens", 20)
    first, again, other = (talk("x\nx\n", *words, "--seed", seed).rows() for seed in (5, 5, 6))
    texts = [[row["text"] for row in rows] for rows in (first, again, other)]
    assert texts[0] == texts[1]
    assert texts[0][0] == texts[0][1]
    assert texts[0] != texts[2]


def test_what_is_wrong_ends_in_a_sentence(talk: Talk, place: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(place)
    cases = {
        ("--model", "runs/tolk"): "runs/tolk: no such folder; did you mean 'runs/talk'?",
        ("--model", "chats.jsonl"): "chats.jsonl: a file, not a folder",
        ("--model", "."): ".: no model in it",
        ("--model", "nobody/nothing"): "nobody/nothing: no such folder, not downloaded before",
        ("--adapter", "base"): "--adapter base: no adapter there",
        ("--temperature", "-1"): "'temperature' is '-1'",
        ("--top-p", "x"): "'top_p' is 'x'",
        ("--base-url", "http://localhost:1/v1"): "--base-url takes --model",
        ("--api-key-env", "KEY"): "--api-key-env is for an endpoint",
        ("--base-url", "localhost:1", "--model", "m"): "this is no URL such as http://localhost:8000/v1",
        ("--base-url", "http://me:secret@x/v1", "--model", "m"): "leave the name and the password out",
        ("--base-url", "http://x/v1", "--model", "m", "--api-key-env", "NO_SUCH"): "no such environment variable",
    }
    for words, expected in cases.items():
        said = talk("hello\n", *words)
        assert said.code == 2, words
        assert expected in " ".join(said.err.split()), said.err
        assert "Traceback" not in said.err
        assert "secret" not in said.err
    monkeypatch.chdir(tmp_path)
    assert "no finished run below runs/" in talk("hello\n").err
    bad = talk(b"colour?\n\xff\n", "--model", place / "runs/talk", "--temperature", 0)
    assert (bad.code, bad.out) == (2, CHATS["colour?"] + "\n")
    assert "line 2: not UTF-8" in bad.err
    full = talk("stone " * 600 + "\n", "--model", place / "runs/talk")
    assert full.code == 2
    assert re.search(r"line 1: the prompt has \d+ tokens, and the context of this model only 512", full.err)


# What the model sees


def test_without_a_chat_template_a_prompt_is_continued_as_plain_text(talk: Talk, tmp_path: Path) -> None:
    make_model(tmp_path / "plain")
    make_tokenizer(chat_template=None).save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    said = talk("river\n", "--model", tmp_path / "plain", "--json", "--max-tokens", 3)
    assert "no chat template: each prompt is continued as plain text" in said.err
    model = load(find_model(str(tmp_path / "plain")), nothing)
    tokens = model.renderer.tokenizer("river <|im_end|>", split_special_tokens=True)["input_ids"]
    assert plain_tokens(model.renderer, "river <|im_end|>") == tokens
    assert said.rows()[0]["prompt_tokens"] == len(plain_tokens(model.renderer, "river"))
    refused = talk("river\n", "--model", tmp_path / "plain", "--system", "be brief")
    assert refused.code == 2
    assert "has no chat template, and so no place for a system message" in refused.err


CONTROL = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "\u2045lacuna 0\u2046", "\u2045lacuna ", "<|im"]
)
TEXTS = st.lists(CONTROL | st.sampled_from([*WORDS, "\n", " ", "é"]), min_size=1, max_size=6).map("".join)


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_control_tokens_that_are_typed_stay_text(texts: list[str]) -> None:
    renderer = Renderer(TOKENIZER)
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    if len(messages) % 2 == 0:
        messages = messages[:-1]
    tokens = chat_tokens(renderer, messages)
    tokenizer = renderer.tokenizer
    assert tokenizer.decode(tokens) == renderer.render(messages, prompt=True)
    control = set(tokenizer.convert_tokens_to_ids(renderer.control_tokens))
    of_template = [*["<|im_start|>", "<|im_end|>"] * len(messages), "<|im_start|>"]
    assert [token for token in tokens if token in control] == tokenizer.convert_tokens_to_ids(of_template)


@given(st.lists(st.lists(st.sampled_from([*WORDS, "\n", " "]), min_size=1).map(" ".join), min_size=4, max_size=4))
def test_the_prompt_is_what_training_made_of_the_same_conversation(texts: list[str]) -> None:
    renderer = Renderer(TOKENIZER)
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": f"a{text}"} for role, text in zip(roles, texts, strict=True)]
    (sample,) = renderer.conversations([Conversation(messages, None, "here")])
    assert isinstance(sample, Sample)
    prompt = chat_tokens(renderer, messages[:3])
    assert sample.tokens.tolist()[: len(prompt)] == prompt
    assert sample.supervised.tolist()[len(prompt)]


def test_a_template_that_refuses_or_leaves_out_a_message_is_told() -> None:
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    deaf = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    messages = [{"role": "system", "content": "be brief"}, *user("hello")]
    with pytest.raises(ModelError, match="does not accept this conversation: no system"):
        chat_tokens(Renderer(make_tokenizer(chat_template=strict)), messages)
    with pytest.raises(ModelError, match="leaves out the system's words"):
        chat_tokens(Renderer(make_tokenizer(chat_template=deaf)), messages)


def test_where_the_context_is_full_the_oldest_turns_are_left_out() -> None:
    renderer = Renderer(TOKENIZER)
    turns = [
        message for number in range(4) for message in (*user(f"{number} river"), {"role": "assistant", "content": "ok"})
    ]
    messages = [{"role": "system", "content": "be brief"}, *turns, *user("last")]
    whole = len(chat_tokens(renderer, messages))
    assert fitting_tokens(renderer, messages, None, 100)[1] == 0
    assert fitting_tokens(renderer, messages, whole + 5, 5)[1] == 0
    tokens, left_out = fitting_tokens(renderer, messages, whole + 4, 5)
    assert left_out == 2
    assert tokens == chat_tokens(renderer, [messages[0], *messages[3:]])
    alone = len(chat_tokens(renderer, [messages[0], messages[-1]]))
    assert fitting_tokens(renderer, messages, alone + 1, 5) == (chat_tokens(renderer, [messages[0], messages[-1]]), 8)
    with pytest.raises(ModelError, match=f"the prompt has {alone} tokens, and the context of this model only {alone}"):
        fitting_tokens(renderer, messages, alone, 5)
    assert without_oldest(messages[:1] + user("x")) is None


def test_a_full_context_is_told(model: LocalModel, place: Path) -> None:
    turns = tuple(Turn("stone " * 30, "stone " * 30, 0) for _ in range(8))
    messages = [*Session(GREEDY, turns=turns).messages(), *user("long?")]
    answer = ask(model, messages, replace_settings(max_tokens=10_000), 0, nothing)
    assert answer.left_out == 8
    assert answer.notes()[0] == "the context is full: the oldest 8 messages were left out"
    base = load(find_model(str(place / "base")), nothing)
    endless = ask(base, user("stone " * 470), replace_settings(max_tokens=10_000), 0, nothing)
    assert endless.prompt_tokens is not None
    assert endless.answer_tokens == 512 - endless.prompt_tokens
    assert endless.notes() == ["cut off where the context is full"]


def replace_settings(**values: Any) -> Settings:
    return Settings(**{**GREEDY.model_dump(), **values})


# What the model says


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_streamed_text_is_the_text_generated_at_once(model: LocalModel, temperature: float) -> None:
    for asked in CHATS:
        pieces: list[str] = []
        answer = ask(model, user(asked), replace_settings(temperature=temperature, max_tokens=90), 3, pieces.append)
        ids = torch.tensor([chat_tokens(model.renderer, user(asked))])
        drawn = {"do_sample": temperature > 0, "top_k": 0} | ({"temperature": temperature} if temperature else {})
        torch.manual_seed(3)
        generated: Any = model.causal_lm.generate(ids, max_new_tokens=90, **drawn)  # type: ignore[operator]
        at_once = model.renderer.tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
        assert "".join(pieces) == answer.text == at_once
        assert len(pieces) > 2


def test_it_says_what_it_was_taught_and_stops(model: LocalModel) -> None:
    """Although the model's own config ends sequences, not turns."""
    for asked, said in CHATS.items():
        answer = ask(model, user(asked), replace_settings(max_tokens=200), 0, nothing)
        assert answer.text == said or asked == "long?"
        assert answer.end == "stop" or asked == "long?"
    assert set(model.stops) == {0, 2}


def test_a_template_without_an_end_of_turn_is_told(tmp_path: Path) -> None:
    """And a model without an end of sequence can still be talked to."""
    folder = make_model(tmp_path / "endless")
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, "eos_token_id": None}))
    said: list[str] = []
    model = load(find_model(str(folder)), said.append)
    assert said == ["its chat template writes no end of turn: answers go on to the end of sequence, or to max_tokens"]
    assert model.stops == []
    assert ask(model, user("river"), replace_settings(max_tokens=3), 0, nothing).answer_tokens == 3


@given(st.text(max_size=12), st.lists(st.integers(0, 399), max_size=12))
def test_pieces_make_up_the_text_and_no_character_is_cut(text: str, ids: list[int]) -> None:
    spelt = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for tokens in (spelt, [token for token in ids if token != 2]):
        said: list[str] = []
        pieces = Pieces(TOKENIZER, [2], said.append)
        pieces.put(torch.tensor([[7, 8]]))
        for token in [*tokens, 2]:
            pieces.put(torch.tensor([token]))
        pieces.end()
        assert "".join(said) == pieces.text == TOKENIZER.decode(tokens, skip_special_tokens=True)
        assert pieces.stopped
        assert pieces.tokens == tokens
        assert tokens is not spelt or "".join(said) == text


# Which model


def test_a_checkpoint_and_the_final_folder_of_a_run_say_the_same(model: LocalModel, place: Path) -> None:
    checkpoint = load(find_model(str(place / "runs/talk/checkpoints/step-00000120")), nothing)
    for mine, other in zip(model.causal_lm.parameters(), checkpoint.causal_lm.parameters(), strict=True):
        assert torch.equal(mine, other)
    answers = [ask(one, user("poem?"), replace_settings(max_tokens=90), 0, nothing).text for one in (model, checkpoint)]
    assert answers == [CHATS["poem?"]] * 2


def test_a_run_that_is_not_finished_gives_its_newest_checkpoint(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text('{"state": "running"}')
    with pytest.raises(LacunaError, match=r"the run \(running\) has no checkpoint yet"):
        find_model(str(run))
    for step in (40, 80):
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    found = find_model(str(run))
    assert found.checkpoint == run / "checkpoints" / "step-00000080"
    assert found.note == f"{run} is not finished (running): this is its newest checkpoint"
    (run / "checkpoints" / "step-00000080" / "state.json").touch()
    with pytest.raises(LacunaError, match=r"by its run's config\.toml, which is not two levels up"):
        find_model(str(found.checkpoint))
    (run / "config.toml").write_text((place / "runs/talk/config.toml").read_text())
    with pytest.raises(LacunaError, match="step-00000080: damaged"):
        load(find_model(str(run)), nothing)


@pytest.fixture(scope="module")
def adapter(place: Path) -> Path:
    """An adapter of plain PEFT on the sft run's model, far from doing nothing."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(place / "runs/talk/final")
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.save_pretrained(str(place / "adapter"))
    return place / "adapter"


def test_an_adapter_is_found_with_its_base(adapter: Path, place: Path, model: LocalModel) -> None:
    from peft import PeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(place / "runs/talk/final")
    expected = PeftModelForCausalLM.from_pretrained(base, str(adapter)).eval()
    ids = torch.arange(20).reshape(1, 20)
    found = [find_model(str(adapter)), find_model(None, str(adapter)), find_model(model.name, str(adapter))]
    for one in found:
        logits = load(one, nothing).causal_lm(input_ids=ids).logits
        assert torch.allclose(logits, expected(input_ids=ids).logits, atol=1e-5)
    assert not torch.allclose(logits, model.causal_lm(input_ids=ids).logits, atol=1e-2)
    with pytest.raises(LacunaError, match="an adapter goes over a whole model"):
        find_model(str(adapter), str(adapter))


def test_an_adapter_that_does_not_load_is_told(adapter: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = json.loads((adapter / "adapter_config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(LacunaError, match="broken: the adapter does not load"):
        load(find_model(str(broken)), nothing)
    (broken / "adapter_config.json").write_text("{}")
    with pytest.raises(LacunaError, match=r"adapter_config\.json: damaged: 'base_model_name_or_path'"):
        find_model(str(broken))
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    soft: Any = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, soft).save_pretrained(str(tmp_path / "soft"))
    with pytest.raises(LacunaError, match="an adapter of soft prompts"):
        load(find_model(str(tmp_path / "soft")), nothing)


def test_a_qlora_run_is_loaded_as_it_was_trained(run: Run, place: Path, tmp_path: Path) -> None:
    config = {
        "model": {"path": str(place / "base")},
        "dataset": {"path": str(place / "chats.jsonl")},
        "training": {
            "method": "qlora", "output_dir": str(tmp_path / "runs/qlora"), "max_steps": 2, "batch_size": 2,
            "gradient_accumulation_steps": 1, "sequence_length": 128, "learning_rate": 1e-2, "save_steps": 2,
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert run("finetune", "--config", tmp_path / "config.yaml").code == 0
    said: list[str] = []
    final = load(find_model(str(tmp_path / "runs/qlora")), said.append)
    assert said == ["the base is in 4 bits, as it was in training"]
    checkpoint = load(find_model(str(tmp_path / "runs/qlora/checkpoints/step-00000002")), nothing)
    ids = torch.arange(20).reshape(1, 20)
    logits = [one.causal_lm(input_ids=ids).logits for one in (final, checkpoint)]
    assert torch.equal(*logits)
    plain = load(find_model(str(place / "base"), str(tmp_path / "runs/qlora/final")), nothing)
    assert not torch.allclose(plain.causal_lm(input_ids=ids).logits, logits[0], atol=1e-4)


# The commands of a session


def after(session: Session, *lines: str) -> Session:
    for line in lines:
        session = obey(session, line).session
    return session


def test_commands_change_what_they_say_and_nothing_else() -> None:
    turns = (Turn("a", "b", 4), Turn("c", "d", 7))
    session = Session(Settings(seed=4), "be brief", turns)
    assert after(session, "/undo") == replace(session, turns=turns[:1])
    assert after(session, "/reset") == replace(session, turns=())
    assert after(session, "/system speak  up") == replace(session, system="speak  up")
    assert after(session, "/system") == replace(session, system=None)
    assert after(session, "/set temperature 0.3", "/set max_tokens 9", "/set seed 1").settings == Settings(
        temperature=0.3, max_tokens=9, seed=1
    )
    assert obey(session, "/set").told == "temperature 0.7, top_p 1.0, max_tokens 512, seed 4"
    assert obey(session, "/help").told.count("\n/") == 8
    assert obey(session, "/exit").leaves
    retry = obey(session, "/retry")
    assert (retry.prompt, retry.seed, retry.session.turns) == ("c", 8, turns[:1])
    asked = obey(session, " /usr/bin is what?")
    assert (asked.prompt, asked.seed, asked.session) == ("/usr/bin is what?", 4, session)
    assert session.messages()[0] == {"role": "system", "content": "be brief"}


def test_a_conversation_that_is_saved_is_loaded_again(tmp_path: Path) -> None:
    session = Session(GREEDY, "be brief", (Turn("a\nb", "<|im_end|> é", 0), Turn("", "d", 0)))
    file = tmp_path / "saved.jsonl"
    obey(session, f"/save {file}")
    assert json.loads(file.read_text()) == {"messages": session.messages()}
    assert after(Session(GREEDY), f"/load {file}") == session


def test_commands_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    empty, session = Session(GREEDY), Session(GREEDY, None, (Turn("a", "b", 0),))
    (tmp_path / "there").write_text("kept")
    (tmp_path / "two").write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 2)
    (tmp_path / "one").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    (tmp_path / "broken").write_text('{"messages": [{"role": "usr", "content": "a"}]}\n')
    (tmp_path / "no").write_text("nonsense\n")
    cases = {
        "/sett x": "/sett: no such command; did you mean 'set'?",
        "/undo": "there is nothing to take back",
        "/retry": "there is no answer yet",
        "/save": "name a file",
        f"/save {tmp_path}/x": "there is nothing to save yet",
        "/reset now": "/reset takes nothing behind it, not 'now'",
        "/set temprature 1": "unknown setting 'temprature'; did you mean 'temperature'?",
        "/set temperature": "/set temperature VALUE: say to what",
        "/set top_p 0": "'top_p' is '0'",
        "/set seed x": "'seed' is 'x'",
        f"/load {tmp_path}/missing": "cannot be read",
        f"/load {tmp_path}/two": "holds 2 conversations; one is wanted",
        f"/load {tmp_path}/one": "user and assistant must speak in turn",
        f"/load {tmp_path}/broken": "broken:1: messages[0].role is 'usr'",
        f"/load {tmp_path}/no": "no:1: not valid JSON",
    }
    for line, expected in cases.items():
        with pytest.raises(LacunaError, match=re.escape(expected)):
            obey(empty, line)
    for file, expected in (("there", "is there already"), ("none/x", "cannot be written")):
        with pytest.raises(LacunaError, match=expected):
            obey(session, f"/save {tmp_path}/{file}")
    assert (tmp_path / "there").read_text() == "kept"


# An endpoint


@pytest.fixture(scope="module")
def endpoint(place: Path) -> Iterator[str]:
    """`transformers serve`, as users start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(SCRIPTS / "transformers"), "serve", str(place / "runs/talk/final"), "--port", str(port)]
    with (place / "serve.log").open("w") as log, subprocess.Popen(words, stdout=log, stderr=log) as server:
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (place / "serve.log").read_text()
                assert time.monotonic() < end, (place / "serve.log").read_text()
                time.sleep(0.1)
        yield f"http://localhost:{port}/v1"
        server.terminate()


def test_a_real_endpoint_says_what_the_model_says_here(talk: Talk, endpoint: str, place: Path) -> None:
    folder = place / "runs/talk/final"
    words = ("--model", folder, "--temperature", 0, "--max-tokens", 50, "--json")
    there, here = (
        talk("colour?\npoem?\nlong?\n", "--base-url", endpoint, *words),
        talk("colour?\npoem?\nlong?\n", *words),
    )
    assert there.code == 0, there.err
    for one, other in zip(there.rows(), here.rows(), strict=True):
        assert [one[name] for name in ("text", "end", "prompt_tokens")] == [
            other[name] for name in ("text", "end", "prompt_tokens")
        ]
        assert 0 < one["first"] <= one["seconds"]


def test_an_endpoint_that_is_not_there_or_has_no_such_model_is_told(talk: Talk, endpoint: str, place: Path) -> None:
    down = talk("x\n", "--base-url", "http://localhost:9/v1", "--model", "m")
    assert down.code == 2
    assert "http://localhost:9/v1: no endpoint answers there, or it broke off; is it running? ([Errno 111]" in down.err
    other = talk("x\n", "--base-url", endpoint, "--model", "no/such")
    assert other.code == 2
    assert f"{endpoint}: the endpoint refused (status 400)" in other.err
    assert "no/such" in other.err


class Service(BaseHTTPRequestHandler):
    """What vLLM and OpenAI answer in cases that `transformers serve` does not have."""

    asked: list[Any] = []  # noqa: RUF012

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send(200, {"object": "list", "data": [{"id": "small", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((request, self.headers["Authorization"]))
        if request["model"] == "locked":
            self.send(401, {"error": {"message": f"Incorrect API key provided: {self.headers['Authorization']}"}})
        elif request["model"] == "smal":
            self.send(404, {"error": {"message": "The model `smal` does not exist."}})
        elif request["model"] == "tiny" or (request["model"] == "small" and len(request["messages"]) > 2):
            self.send(400, {"error": {"message": "This model's maximum context length is 10 tokens."}})
        else:
            choice = {"index": 0, "delta": {"content": "half"}, "finish_reason": None}
            chunks = (
                [choice] if request["model"] in ("broken", "cut") else [choice, {**choice, "finish_reason": "stop"}]
            )
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            if request["model"] == "cut":
                self.send_header("Content-Length", "1000000")
            self.end_headers()
            for number, one in enumerate(chunks):
                chunk = {"id": str(number), "object": "chat.completion.chunk", "created": 0, "choices": [one]}
                self.wfile.write(f"data: {json.dumps({**chunk, 'model': 'm'})}\n\n".encode())

    def send(self, status: int, data: Any) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_service_gets_the_key_and_nobody_else_sees_it(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other-secret")
    with service() as url:
        locked = talk("x\n", "--base-url", url, "--model", "locked", "--api-key-env", "MY_KEY")
        assert locked.code == 2
        assert f"{url}: the key is missing or refused; --api-key-env names the variable that holds it" in locked.err
        assert "secret" not in locked.err + locked.out
        assert Service.asked[-1][1] == "Bearer sk-very-secret"
        assert "Bearer none" in talk("x\n", "--base-url", url, "--model", "locked").err
        missing = talk("x\n", "--base-url", url, "--model", "smal")
        assert "no model 'smal', or nothing under this URL; did you mean 'small'?; it has small" in missing.err
        for name in ("broken", "cut"):
            broken = talk("x\n", "--base-url", url, "--model", name)
            assert broken.code == 2, name
            assert "broke off" in broken.err


def test_what_a_service_has_no_room_for_is_left_out() -> None:
    from lacuna.chat.endpoint import connect

    turns = tuple(Turn(f"{number}", "ok", 0) for number in range(3))
    session = Session(GREEDY, "be brief", turns)
    with service() as url:
        answer = ask(connect(url, "small", None), [*session.messages(), *user("last")], GREEDY, 3, nothing)
        assert (answer.text, answer.left_out, answer.answer_tokens) == ("halfhalf", 6, None)
        request = Service.asked[-1][0]
        assert request["messages"] == [{"role": "system", "content": "be brief"}, *user("last")]
        assert (request["temperature"], request["max_tokens"], request["seed"]) == (0, 512, 3)
        with pytest.raises(LacunaError, match=r"the endpoint refused \(status 400\) .*maximum context length"):
            ask(connect(url, "tiny", None), user("x"), GREEDY, 0, nothing)


# The terminal


READY = re.escape("\x1b[?2004h")
"""What prompt_toolkit writes when it waits for a line: the terminal shall mark what is pasted."""


class Terminal:
    """`chat` on a pseudo-terminal: as a user starts it, or forked, which costs no second import of torch."""

    def __init__(self, folder: Path, cache: Path, *words: str, forked: bool = False) -> None:
        names = {"XDG_CACHE_HOME": str(cache), "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.chat: Any
        if not forked:
            options: Any = {"cwd": folder, "env": {**os.environ, **names}, "dimensions": (24, 80)}
            self.chat = pexpect.spawn(str(SCRIPTS / "chat"), [*words], timeout=60, encoding="utf-8", **options)
            return
        process, terminal = pty.fork()
        if process == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            os.chdir(folder)
            os.environ.update(names)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            sys.argv = [str(SCRIPTS / "chat"), *words]
            try:
                COMMANDS["chat"]()
            finally:
                os._exit(1)
        self.chat = fdspawn(terminal, timeout=60, encoding="utf-8")

    def enter(self, text: str, *expected: str) -> None:
        """Type, once it waits for a line."""
        self.chat.expect(READY)
        self.chat.send(text)
        for pattern in expected:
            self.chat.expect(pattern)


def test_a_conversation_at_a_real_terminal(place: Path, tmp_path: Path) -> None:
    endless = Terminal(place, tmp_path / "other", "--model", "base", "--temperature", "0", forked=True)
    here = Terminal(place, tmp_path, "--temperature", "0")
    here.enter("colour?\r", "amber", r"<b>", "silver", r"\d+ tokens in")
    here.enter("/reset\r", "forgotten")
    here.enter("\x1b[200~greet\r\nme\x1b[201~\r", "wäter für 🙂 水 winter", r"\d+ tokens in")
    here.enter("/reset\r", "forgotten")
    here.enter("/sett\r", "error: /sett: no such command; did you mean 'set'")
    here.enter("/set temperature -1\r", "error: /set: 'temperature'")
    here.enter("half a line")
    here.chat.send("\x03")
    here.enter("colour?\r", r"\d+ tokens in")
    here.enter("/set max_tokens 2\r", "max_tokens 2")
    here.enter("/retry\r", "cut off after max_tokens; 2 tokens in")
    here.enter("/undo\r", "taken back: colour")
    here.enter("/set max_tokens 90\r", "max_tokens 90")
    here.enter("\x1b[A" * 5 + "\r", "amber", r"\d+ tokens in")
    here.enter(f"/save {tmp_path}/saved.jsonl\r", "saved: ")
    here.enter("\x04", pexpect.EOF)
    here.chat.close()
    assert here.chat.exitstatus == 0
    messages = json.loads((tmp_path / "saved.jsonl").read_text())["messages"]
    assert messages == [*user("colour?"), {"role": "assistant", "content": CHATS["colour?"]}]
    history = tmp_path / "lacuna" / "chat_history"
    assert "+colour?" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0
    for wait in (0.3, 0.6, 1.2, 2.4):  # on a busy machine the answer may not have begun, and Ctrl-C clears the line
        endless.enter("river\r")
        time.sleep(wait)
        endless.chat.send("\x03")
        if endless.chat.expect(["stopped", pexpect.TIMEOUT], timeout=5) == 0:
            break
    else:
        pytest.fail("Ctrl-C did not stop the answer")
    endless.enter("/set max_tokens 3\r", "max_tokens 3")
    endless.enter("river\r", "cut off after max_tokens; 3 tokens in")  # stopped before its first word, none is kept
    endless.enter("/exit\r")


MARKDOWN = st.lists(
    st.sampled_from(
        [
            "# head\n",
            "\n",
            "- one\n",
            "1. two\n",
            "```\n",
            "~~~~ python\n",
            "    ~~~~~\n",
            "~~~~~\n",
            "x  = <b>\n",
            "words & more\n",
            "a | b\n",
            "--|--\n",
            "> q\n",
            "***\n",
        ]
    ),
    max_size=14,
).map("".join)


def shown(pieces: list[str], height: int = 25) -> str:
    """What stands on the screen at the end; where it cannot be drawn anew, rich draws nothing twice."""
    console = Console(file=io.StringIO(), width=60, height=height, force_terminal=False)
    with Screen(console) as screen:
        for piece in pieces:
            screen.say(piece)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@given(MARKDOWN, st.integers(1, 7))
def test_markdown_that_comes_in_pieces_is_the_same_as_at_once(text: str, size: int) -> None:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert shown(pieces) == shown(pieces, height=3) == shown([text])
    assert "\n".join(blocks_of(text)) == text


def test_no_word_of_an_answer_is_lost_and_none_moves_the_cursor() -> None:
    text = "<think>\nhm\n</think>\n\nline one\nline two \x1b[2J\r [a](http://b.c) &\n\n[1]: http://d.e\n\n```python\nprint('<x>')\n```\n\nend"
    printed = shown([text])
    for words in (
        "<think>",
        "</think>",
        "line one\n",
        r"line two \x1b[2J\r a (http://b.c) &",
        "[1]: http://d.e",
        "print('<x>')",
        "end",
    ):
        assert words in re.sub(r" +\n", "\n", printed), printed
    assert "\x1b" not in printed


def test_a_long_block_is_cropped_while_it_comes_and_whole_at_the_end() -> None:
    console = Console(file=io.StringIO(), width=40, height=8, force_terminal=True, color_system=None)
    with Screen(console) as screen:
        for number in range(30):
            screen.say(f"- item {number}\n")
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    last = printed[printed.rindex("item 0\n") if "item 0\n" in printed else printed.rindex("item 0") :]
    assert [f"item {number}" in last for number in range(30)] == [True] * 30


# Several models beside each other


def test_models_are_compared_on_the_same_prompts(run: Run, place: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [*user("colour?"), {"role": "assistant", "content": CHATS["colour?"]}]},
        {"messages": user("poem?")},
        {"prompt": "greet\nme"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (place / "base", place / "runs/talk", "--max-tokens", 40, "--prompts")
    outcome = run("lacuna", "compare", *words, tmp_path / "prompts.jsonl", "--output", tmp_path / "out.jsonl")
    assert outcome.code == 0, outcome.output
    assert "0 of 1" in outcome.output
    assert "1 of 1" in outcome.output
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in answers] == [CHATS["colour?"], None, None]
    assert [row["messages"][-1]["content"] for row in answers] == ["colour?", "poem?", "greet\nme"]
    assert [row["answers"][str(place / "runs/talk")]["text"] for row in answers] == [*CHATS.values()][:3]
    assert {row["answers"][str(place / "base")]["end"] for row in answers} == {"max_tokens"}
    again = run("lacuna", "compare", *words, tmp_path / "prompts.jsonl", "--output", tmp_path / "out.jsonl")
    assert again.code == 2
    assert "is there already; name a new file" in again.output
    (tmp_path / "prompts.txt").write_text("colour?\n\npoem?\n")
    text = run("lacuna", "compare", *words, tmp_path / "prompts.txt")
    assert text.code == 0
    assert "reference" not in text.output


def test_prompts_that_cannot_be_asked_are_named(run: Run, place: Path, tmp_path: Path) -> None:
    rows = ['{"prompt": "a", "id": 1}', "{", '{"messages": [{"role": "system", "content": "a"}]}', '{"prompt": 3}']
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    (tmp_path / "empty.txt").write_text("\n")
    models = (place / "base", place / "runs/talk")
    cases = {
        (*models, "--prompts", tmp_path / "bad.jsonl"): [
            "bad.jsonl:1: its columns are prompt, id; wanted is messages or prompt, nothing else",
            "bad.jsonl:2: not valid JSON",
            "bad.jsonl:3: before the answer, the user must have the last word",
            "bad.jsonl:4: messages[0].content is int, not text",
        ],
        (*models, "--prompts", tmp_path / "empty.txt"): ["no prompt is in it"],
        (*models, "--prompts", tmp_path / "none.txt"): ["none.txt: No such file"],
        (*models, "--prompts", tmp_path / "x.csv"): ["ends in .jsonl (messages, or prompt) or .txt"],
        (*models, "--prompts", tmp_path / "empty.txt", "--output", tmp_path / "no/x"): ["--output", "no folder"],
        (models[0], models[0], "--prompts", tmp_path / "empty.txt"): ["two models or more, each once"],
        (models[0], "--prompts", tmp_path / "empty.txt"): ["two models or more, each once"],
    }
    for words, expected in cases.items():
        outcome = run("lacuna", "compare", *words)
        assert outcome.code == 2
        for part in expected:
            assert part in outcome.output, outcome.output
