"""The day that a chat template takes for today. Nothing here imports torch.

transformers gives templates a function of the clock, and nothing but data beside it: so the template gets a macro of
that name in front, which looks the parts of the date up.
"""

import re
from datetime import date
from typing import Any

NOW = "strftime_now"
"""# ref: https://huggingface.co/docs/transformers/chat_templating_writing"""
MACRO = (
    "{%- macro strftime_now(format) -%}{%- set written = namespace(text=format) -%}"
    "{%- for code, part in parts_of_the_date.items() -%}"
    "{%- set written.text = written.text.replace(code, part) -%}{%- endfor -%}{{- written.text -}}{%- endmacro -%}"
)


def with_date(template: str, today: date) -> dict[str, Any]:
    """What transformers renders a template by, so that it writes this day."""
    codes = sorted(set(re.findall(r"%-?[A-Za-z]", template)), key=len, reverse=True)
    return {"chat_template": MACRO + template, "parts_of_the_date": {code: today.strftime(code) for code in codes}}
