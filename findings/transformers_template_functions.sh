#!/usr/bin/env bash
# One would expect that what is passed to apply_chat_template beside the messages reaches the template as it is, as the
# documentation says of any variable: so that a template which calls strftime_now, as Llama 3.2's does, could be given a
# clock that stands still, and the same data would be the same tokens tomorrow.
# What happens with transformers 5.23.0: whatever is no plain data is replaced by a text that names its type, so a function
# arrives as "<builtin_function_or_method>" and the call of it fails; without it the template writes the day on which it is rendered.
# A template may be given a macro of that name in front of it instead, and the parts of the date as data.
# Source: transformers/utils/chat_template_utils.py, _plain_template_data
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 jinja2==3.1.6
"$folder/venv/bin/python" - <<'PYTHON'
import datetime

import jinja2
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

print(f"transformers {transformers.__version__}, jinja2 {jinja2.__version__}")
day = datetime.date(2024, 7, 26)
template = "{{ strftime_now('%d %b %Y') }}"
messages = [[{"role": "user", "content": "hi"}]]


def rendered(template, **more):
    return render_jinja_template(conversations=messages, chat_template=template, **more)[0][0]


print("as it is:", rendered(template))
print("what arrives of a function:", rendered("{{ given }}", given=day.strftime))
try:
    print("with a clock of ours:", rendered(template, strftime_now=day.strftime))
    fails = False
except TypeError as error:
    print("with a clock of ours:", error)
    fails = True
macro = "{%- macro strftime_now(format) -%}{{ day }}{%- endmacro -%}"
by_macro = rendered(macro + template, day="26 Jul 2024")
print("with a macro in front:", by_macro)
today = datetime.date.today().strftime("%d %b %Y")
assert rendered(template) == today, "the template does not write the day of rendering any more"
assert fails, "a function reaches the template now"
assert by_macro == "26 Jul 2024"
PYTHON
