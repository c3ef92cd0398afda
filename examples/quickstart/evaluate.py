"""Ask the model from before and from after SFT the held-out prompts, and count the answers that are exactly right."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

RUNS = Path("runs/quickstart")
END_OF_TURN = "<|im_end|>"


@torch.inference_mode()
def answers(folder: Path, questions: list[str]) -> list[str]:
    """The model's most probable answers, up to the end of its turn."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in questions
    ]
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=32, eos_token_id=end_of_turn)
    said = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    return [text.partition(END_OF_TURN)[0].strip() for text in said]


def main() -> None:
    logging.disable_progress_bar()
    lines = (RUNS / "data" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    questions, expected = ([chat[turn]["content"] for chat in chats] for turn in (0, 1))

    def accuracy(folder: Path) -> float:
        pairs = zip(answers(folder, questions), expected, strict=True)
        return sum(1 for said, wanted in pairs if said == wanted) / len(chats)

    before, after = accuracy(RUNS / "base" / "final"), accuracy(RUNS / "sft" / "final")
    print(f"held-out accuracy: {after:.2f} (before: {before:.2f})")


if __name__ == "__main__":
    main()
