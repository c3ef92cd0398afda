#!/usr/bin/env bash
# One would expect a saved file of weights to have the mode that the umask gives, as every other file of a model's folder
# has, so that a colleague, a serving user or a container with another uid can read what was trained.
# safetensors 0.8.0 writes into a temporary file and renames it: under umask 022 the file has mode 0600, for its owner
# alone, also where it replaces one that everybody could read; safetensors 0.4.5 gave 0644. transformers and PEFT save
# by it, so model.safetensors and adapter_model.safetensors are unreadable beside a config.json that is not.
# source: safetensors on PyPI, 0.4.5 and 0.8.0, safetensors.numpy.save_file
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
umask 022
cat > save.py <<'PYTHON'
import os
from importlib.metadata import version

import numpy as np
from safetensors.numpy import save_file

open("config.json", "w").close()
for name in ("new.safetensors", "old.safetensors"):
    if name.startswith("old"):
        open(name, "w").close()
    save_file({"weight": np.ones(4, dtype=np.float32)}, name)
modes = {name: f"{os.stat(name).st_mode & 0o777:04o}" for name in ("config.json", "new.safetensors", "old.safetensors")}
print(version("safetensors"), *(f"{name} {mode}" for name, mode in modes.items()))
PYTHON
for version in 0.4.5 0.8.0; do
    python3 -m venv "venv-$version"
    "venv-$version/bin/pip" install --quiet --disable-pip-version-check "safetensors==$version" numpy==2.4.6 2> errors
    mkdir "saved-$version"
    (cd "saved-$version" && "../venv-$version/bin/python" ../save.py) | tee -a seen
done
grep --quiet '^0.4.5 config.json 0644 new.safetensors 0644 old.safetensors 0644$' seen
grep --quiet '^0.8.0 config.json 0644 new.safetensors 0600 old.safetensors 0600$' seen
