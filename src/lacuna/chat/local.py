"""A model on this machine that answers, token by token."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lacuna.chat.answer import Answer, End, Say
from lacuna.chat.find import FoundModel
from lacuna.chat.prompt import check_room, fitting_tokens, plain_tokens
from lacuna.chat.settings import Settings
from lacuna.config.finetune import FinetuneConfig
from lacuna.config.trainers import load_trainer_config
from lacuna.config.training import SFTConfig
from lacuna.data.chat import Renderer
from lacuna.data.formats import Message
from lacuna.errors import ModelError, needs_extra
from lacuna.machine.detect import choose_device
from lacuna.runs.identity import first_day_of
from lacuna.train.checkpoint import restore_weights
from lacuna.train.loading import check_loaded, load_model, load_model_config, load_tokenizer, load_weights
from lacuna.train.model import Execution, resolve_execution, stop_at_end_of_turn
from lacuna.words import Tell

UNUSED = "./unused"
"""What a training config must name, and loading does not look at."""
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class LocalModel:
    name: str
    causal_lm: PreTrainedModel
    renderer: Renderer
    execution: Execution
    stops: Sequence[int]
    """The tokens that end an answer."""

    @property
    def is_chat(self) -> bool:
        return self.renderer.tokenizer.chat_template is not None

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may have together, where the model has a limit."""
        longest: int | None = getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        return longest

    def answer(self, messages: Sequence[Message], settings: Settings, seed: int, say: Say) -> Answer:
        """Drawn from the seed. Raises ModelError where there is no room for an answer, or no place for a message."""
        tokens, left_out = self.prompt(messages, settings.max_tokens)
        room = settings.max_tokens if self.context is None else min(settings.max_tokens, self.context - len(tokens))
        pieces = Pieces(self.renderer.tokenizer, self.stops, say)
        is_greedy = settings.temperature == 0
        drawn = {} if is_greedy else {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        ids = torch.tensor([tokens], device=self.causal_lm.device)
        torch.manual_seed(seed)
        cast(Any, self.causal_lm).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(max_new_tokens=room, do_sample=not is_greedy, **drawn),
            streamer=pieces,
        )
        cut_off: End = "max_tokens" if room == settings.max_tokens else "context"
        return Answer(pieces.text, "stop" if pieces.stopped else cut_off, len(tokens), len(pieces.tokens), left_out)

    def prompt(self, messages: Sequence[Message], longest: int) -> tuple[list[int], int]:
        """The tokens to continue, and how many of the oldest messages were left out.

        Without a chat template the last message is continued as plain text.
        """
        if self.is_chat:
            return fitting_tokens(self.renderer, messages, self.context, longest)
        if any(message["role"] != "user" for message in messages[:1]):
            raise ModelError(f"{self.name} has no chat template, and so no place for a system message")
        tokens = plain_tokens(self.renderer, messages[-1]["content"])
        check_room(tokens, self.context)
        return tokens, 0


class Pieces(BaseStreamer):
    """Takes tokens from `generate`, and says their text as soon as its characters are whole.

    tokens: those of the answer, without the one that ended it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], say: Say) -> None:
        self.tokenizer, self.stops, self.say = tokenizer, stops, say
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._is_prompt = True
        self._start = self._said = 0

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            if token in self.stops:
                self.stopped = True
            else:
                self.tokens.append(token)
                self._say(is_last=False)

    def end(self) -> None:
        self._say(is_last=True)

    def _say(self, is_last: bool) -> None:
        """Decode what is new behind some tokens that were said before: they decide on spaces."""
        before = self._decode(self.tokens[self._start : self._said])
        now = self._decode(self.tokens[self._start :])
        if len(now) > len(before) and (is_last or not now.endswith(INCOMPLETE)):
            self._start, self._said = self._said, len(self.tokens)
            self.text += now[len(before) :]
            self.say(now[len(before) :])

    def _decode(self, tokens: list[int]) -> str:
        decode = self.tokenizer.decode
        return str(decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@contextmanager
def _needing_peft() -> Iterator[None]:
    with needs_extra("finetune", "peft"):
        yield


def load(found: FoundModel, tell: Tell) -> LocalModel:
    """On the best device, in the precision that training has there. Raises LacunaError."""
    if found.checkpoint is not None:
        causal_lm, tokenizer, execution = _of_checkpoint(found, tell)
    else:
        try:
            causal_lm, tokenizer, execution = _of_folder(found, tell)
        except ModelError as error:
            problems = [problem.replace("model_name ", "").replace("model.path ", "") for problem in error.problems]
            raise ModelError(problems) from error
    renderer = Renderer(tokenizer, today=first_day_of(found.run or Path(found.model).parent, "auto"))
    stop: Any = tokenizer.eos_token
    if tokenizer.chat_template is not None:
        try:
            stop = renderer.stop_token
        except ModelError:
            tell("its chat template writes no end of turn: answers go on to the end of sequence, or to max_tokens")
    if stop is not None:
        stop_at_end_of_turn(causal_lm, tokenizer, stop)
    ends = causal_lm.generation_config.eos_token_id
    stops = [ends] if isinstance(ends, int) else list(ends or [])
    causal_lm.generation_config = GenerationConfig(eos_token_id=stops or None, pad_token_id=tokenizer.pad_token_id)
    return LocalModel(found.name, causal_lm.eval(), renderer, execution, stops)


def _of_folder(found: FoundModel, tell: Tell) -> tuple[Any, Any, Execution]:
    """A whole model, with an adapter over it where there is one; an adapter's base is quantised as its run had it."""
    config = SFTConfig(
        model_name=found.model, model_revision=found.revision, dataset=UNUSED, output_dir=UNUSED, steps=1, compile=False
    )
    execution = resolve_execution(config, choose_device("auto"), tell)
    run = load_trainer_config([str(found.run / "config.toml")]) if found.run is not None else None
    has_tokenizer = found.adapter is not None and (found.adapter / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(found.adapter) if has_tokenizer else load_tokenizer(config)
    if isinstance(run, FinetuneConfig) and run.method == "qlora":
        base = run.model_copy(update={"model_name": found.model, "model_revision": found.revision})
        causal_lm: Any = _frozen(base, execution, tokenizer)
        tell(f"the base is in {run.quantization_bits} bits, as it was in training")
    else:
        settings = {"dtype": execution.dtype, "attn_implementation": execution.attention}
        causal_lm, missing = load_weights(config, settings)
        check_loaded(config, causal_lm, missing, tokenizer)
        is_quantised = hasattr(causal_lm.config, "quantization_config")
        causal_lm = causal_lm if is_quantised else causal_lm.to(execution.device.type)
    if found.adapter is not None:
        causal_lm = _with_adapter(causal_lm, found.adapter)
    return causal_lm, tokenizer, execution


def _with_adapter(causal_lm: Any, adapter: Path) -> Any:
    with _needing_peft():
        from peft import PeftModelForCausalLM
    try:
        model = PeftModelForCausalLM.from_pretrained(causal_lm, str(adapter))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{adapter}: the adapter does not load: {str(error).splitlines()[0]}") from error
    if model.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"{adapter}: an adapter of soft prompts ({model.active_peft_config.peft_type.value}), not of weights"
        )
    return model.get_base_model()


def _of_checkpoint(found: FoundModel, tell: Tell) -> tuple[Any, Any, Execution]:
    """The weights of a step, in the model and with the tokenizer that the run's config names."""
    assert found.run is not None
    assert found.checkpoint is not None
    config = load_trainer_config([str(found.run / "config.toml")])
    config = config.model_copy(
        update={"initialise": "random", "attention": "auto", "precision": "auto", "compile": False}
    )
    execution = resolve_execution(config, choose_device("auto"), tell)
    model_config = load_model_config(config)
    if isinstance(config, FinetuneConfig):
        tokenizer = load_tokenizer(config.model_copy(update={"model_name": config.base_model or config.model_name}))
        trained, causal_lm = _new_adapter(config, execution, tokenizer)
    else:
        tokenizer = load_tokenizer(config)
        trained = causal_lm = load_model(config, model_config, tokenizer, execution)
    try:
        restore_weights(found.checkpoint, trained)
    except (OSError, ValueError, RuntimeError, SafetensorError, CheckpointException) as error:
        raise ModelError(f"{found.checkpoint}: damaged: {str(error).strip().splitlines()[-1]}") from error
    return causal_lm if trained is not causal_lm else causal_lm.to(execution.dtype), tokenizer, execution


def _new_adapter(config: FinetuneConfig, execution: Execution, tokenizer: Any) -> tuple[Any, Any]:
    """With the model that it is in."""
    with _needing_peft():
        from lacuna.finetune.adapters import add_adapter
    model = add_adapter(_frozen(config, execution, tokenizer), config, execution.dtype)
    return model, model.causal_lm


def _frozen(config: FinetuneConfig, execution: Execution, tokenizer: Any) -> Any:
    """The base as the run had it."""
    with _needing_peft():
        from lacuna.finetune.adapters import check_quantisation, load_frozen
    check_quantisation(config, execution.device)
    return load_frozen(config, execution, tokenizer)


def free_memory() -> None:
    """After the last reference to a model is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
