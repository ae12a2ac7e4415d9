#!/usr/bin/env bash
# Copy this tree (tracked and new files) into FOLDER as a repository of its own, with the params of
# PARAMS, by default those of smoke scale. A second run copies edits and keeps the outputs in FOLDER.
# usage: bash tests/smoke.sh FOLDER [PARAMS]
set -euo pipefail
cd "$(dirname "$0")/.."
to=${1:?usage: bash tests/smoke.sh FOLDER [PARAMS]}
params=${2:-params/smoke.yaml}
mkdir -p "$to"
keep=(--exclude=dvc.lock) # of the study at full scale; a run in FOLDER writes its own
[ -e "$to/data.dvc" ] && keep+=(--exclude=data.dvc)
git ls-files -co --exclude-standard -z | while IFS= read -r -d '' f; do [ -e "$f" ] && printf '%s\0' "$f"; done \
  | tar "${keep[@]}" --null -T - -cf - | tar -xf - -C "$to"
python=${PYTHON:-python}
[ -x .venv/bin/python ] && python=.venv/bin/python
ASAP_ROOT=$PWD PYTHONPATH=$PWD "$python" -m asap.cli params "$params" --merged >"$to/params.yaml.new"
mv "$to/params.yaml.new" "$to/params.yaml"
[ -d "$to/.git" ] || git init -q "$to"
