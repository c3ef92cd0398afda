"""Make what the quickstart trains on: a tokenizer, a model shape, the text of Python's own standard library, and chats.

The chats ask for two words in a given capitalisation. Words that come together in a held-out prompt never do so in
training, so an answer cannot have been learnt by heart. Running it again writes the same bytes.
"""

import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, permutations, product
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

RUNS = Path("runs/quickstart")
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STYLES: dict[str, Callable[[str], str]] = {"lower": str.lower, "title": str.title, "upper": str.upper}
WORDS = 24
FILES = {"sft_validation": (20, 200), "held_out": (40, 200), "sft_train": (216, 3_888)}
"""How many of the 276 pairs of words each file has, and how many chats, of the 18 that a pair gives."""

Chat = dict[str, list[dict[str, str]]]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's control tokens and template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=CONTROL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    end, *turn, padding = CONTROL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=padding, extra_special_tokens=turn, chat_template=CHATML
    )


def model_shape(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """A Qwen3 of 1.6 million parameters; so small a model learns faster from larger first weights than usual."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.08,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def common_words(texts: list[str]) -> list[str]:
    """The words that the standard library itself writes most often in every one of the capitalisations."""
    counts = Counter(word for text in texts for word in re.findall(r"\b[A-Za-z]{4,7}\b", text))
    rarest_form = {word: min(counts[style(word)] for style in STYLES.values()) for word in counts if word.islower()}
    return sorted(rarest_form, key=lambda word: (-rarest_form[word], word))[:WORDS]


def make_chats(words: list[str]) -> dict[str, list[Chat]]:
    """Chats for each file of FILES; a pair of words belongs to one file, in both orders and all capitalisations."""
    chance = random.Random(0)
    pairs = chance.sample(list(combinations(words, 2)), sum(count for count, _ in FILES.values()))
    chats: dict[str, list[Chat]] = {}
    for file, (pair_count, chat_count) in FILES.items():
        mine, pairs = pairs[:pair_count], pairs[pair_count:]
        orders = [order for pair in mine for order in permutations(pair)]
        made = [make_chat(order, given, wanted) for order, given, wanted in product(orders, STYLES, STYLES)]
        chats[file] = chance.sample(made, chat_count)
    return chats


def make_chat(words: Iterable[str], given: str, wanted: str) -> Chat:
    question, answer = (" ".join(map(STYLES[style], words)) for style in (given, wanted))
    user = {"role": "user", "content": f"{wanted}: {question}"}
    return {"messages": [user, {"role": "assistant", "content": answer}]}


def write_jsonl(name: str, rows: Sequence[object]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = RUNS / "data" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(rows):,} rows, {len(text) / 1e3:,.0f} kB")


def main() -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))]
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(RUNS / "start")
    model_shape(tokenizer).save_pretrained(RUNS / "start")
    write_jsonl("pretrain_validation", [{"text": text} for text in texts[::80]])
    write_jsonl("pretrain", [{"text": text} for index, text in enumerate(texts) if index % 80])
    chats = make_chats(common_words(texts))
    pairs = {
        name: {frozenset(row["messages"][1]["content"].lower().split()) for row in rows} for name, rows in chats.items()
    }
    assert pairs["held_out"].isdisjoint(pairs["sft_train"] | pairs["sft_validation"])
    for name, rows in chats.items():
        write_jsonl(name, rows)


if __name__ == "__main__":
    main()
