"""Ask the pretrained model and every finished run of the experiment the held-out prompts, and count the answers that
are exactly right. Each run's share of them goes into its folder as evaluation.json, which `lacuna report` reads."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from lacuna.files import write_json
from lacuna.runs.folder import read_status
from lacuna.runs.mapping import read_mapping

RUNS = Path("runs/quickstart")
END_OF_TURN = "<|im_end|>"


@torch.inference_mode()
def answers(folder: Path, questions: list[str]) -> list[str]:
    """The model's most probable answers, up to the end of its turn; to all questions at once."""
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
    torch.set_num_threads(1)  # more would wait for each other: the models are that small
    lines = (RUNS / "data" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    questions, expected = ([chat[turn]["content"] for chat in chats] for turn in (0, 1))

    def accuracy(folder: Path) -> float:
        pairs = zip(answers(folder, questions), expected, strict=True)
        return sum(1 for said, wanted in pairs if said == wanted) / len(chats)

    mapping = read_mapping(RUNS / "configs")
    arms: dict[str, list[float]] = {}
    for index in range(len(mapping.items)):
        run = mapping.run(index)
        if (read_status(run.folder) or {}).get("state") != "finished":
            print(f"{run.id}: not finished, and so not evaluated")
            continue
        found = accuracy(run.folder / "final")
        write_json(run.folder / "evaluation.json", {"held_out_accuracy": found})
        arms.setdefault(run.varies, []).append(found)
    print(f"held-out accuracy: {accuracy(RUNS / 'base' / 'final'):.2f} (before)")
    for arm, found in arms.items():
        seeds = ", ".join(f"{share:.2f}" for share in found)
        print(f"held-out accuracy: {sum(found) / len(found):.2f} ({arm}; seeds: {seeds})")


if __name__ == "__main__":
    main()
