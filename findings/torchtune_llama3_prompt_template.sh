#!/usr/bin/env bash
# One would expect a prompt template's texts to reach the model as they are written: torchtune.data.SummarizeTemplate
# says "Summarize this dialogue:\n" before a text and "\n---\nSummary:\n" behind it, and PromptTemplate puts just that
# around each message.
# torchtune 0.6.1's Llama 3 tokenizer strips the white space around every part of a message before it encodes it, and
# template and text are parts of their own: the line breaks between them are never seen by the model, while its Gemma
# tokenizer, with the same template, keeps them (and begins each part with a space). In 0.2.1 the template was part of the text, and only its ends were
# stripped.
# source: torchtune 0.6.1, models/llama3/_tokenizer.py (_tokenize_body), data/_prompt_templates.py
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
venv/bin/pip install --quiet --disable-pip-version-check torchtune==0.6.1 torchao==0.15.0 sentencepiece==0.2.1
cat > show.py <<'PYTHON'
import base64
from importlib.metadata import version

import sentencepiece
from torchtune.data import Message, SummarizeTemplate
from torchtune.models.gemma import gemma_tokenizer
from torchtune.models.llama3 import llama3_tokenizer

with open("bytes.model", "w") as file:  # a vocabulary of single bytes, in tiktoken's format
    file.writelines(f"{base64.b64encode(bytes([value])).decode()} {value}\n" for value in range(256))
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["hello summarize this dialogue: summary --- Summarize Summary"] * 50),
    model_prefix="pieces", vocab_size=300, byte_fallback=True, user_defined_symbols=["\n"], normalization_rule_name="identity",
    remove_extra_whitespaces=False, minloglevel=2, hard_vocab_limit=False,
)
template = "torchtune.data.SummarizeTemplate"
written = "".join(part["content"] for part in SummarizeTemplate()([Message(role="user", content="hello")])[0].content)
seen = {}
for name, tokenizer in (
    ("llama3", llama3_tokenizer("bytes.model", prompt_template=template)),
    ("gemma", gemma_tokenizer("pieces.model", prompt_template=template)),
):
    rows = {"messages": [Message(role="user", content="hello"), Message(role="assistant", content="hi")]}
    tokens = tokenizer(rows)["tokens"]
    known = [token for token in tokens if not (name == "llama3" and token > 255)]
    seen[name] = tokenizer.decode(known)
print(f"torch {version('torch')}, torchtune {version('torchtune')}, sentencepiece {version('sentencepiece')}")
print(f"the template writes  {written!r}")
for name, text in seen.items():
    print(f"{name:7} sees         {text!r}")
assert written == "Summarize this dialogue:\nhello\n---\nSummary:\n"
assert "Summarize this dialogue:hello---\nSummary:" in seen["llama3"], "llama3's tokenizer strips no longer"
line_breaks_kept = "Summarizethisdialogue:\nhello\n---\nSummary:\n"
assert line_breaks_kept in seen["gemma"].replace(" ", ""), "gemma's tokenizer strips now"
PYTHON
venv/bin/python show.py 2> errors || { cat errors >&2; exit 1; }
