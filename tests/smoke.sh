#!/usr/bin/env bash
# Copy this tree (tracked and new files) into FOLDER as a repository of its own, with the params of
# PARAMS, by default those of smoke scale. A second run copies edits and keeps the outputs in FOLDER.
# Without git, FOLDER is a plain folder, which `asap study` accepts too.
# usage: bash tests/smoke.sh FOLDER [PARAMS]
set -euo pipefail
cd "$(dirname "$0")/.."
to=${1:?usage: bash tests/smoke.sh FOLDER [PARAMS]}
params=${2:-params/smoke.yaml}
mkdir -p "$to"
keep=(--exclude=dvc.lock) # of the study at full scale; a run in FOLDER writes its own
[ -e "$to/data.dvc" ] && keep+=(--exclude=data.dvc)
python=${PYTHON:-python}
[ -x .venv/bin/python ] && python=.venv/bin/python
"$python" tests/project_files.py | tar "${keep[@]}" --null -T - -cf - | tar --no-same-owner -xf - -C "$to"
ASAP_ROOT=$PWD PYTHONPATH=$PWD "$python" -m asap.cli params "$params" --merged >"$to/params.yaml.new"
mv "$to/params.yaml.new" "$to/params.yaml"
[ -e "$to/.git" ] || git init -q "$to" 2>/dev/null || true
ASAP_ROOT=$PWD PYTHONPATH=$PWD "$python" -c 'import sys; from asap.run import set_up_git; set_up_git(sys.argv[1])' "$to"
