#!/usr/bin/env bash
# Copy this tree (what git tracks and what is new) into FOLDER as a repository of its own, at smoke scale.
# Run again, it brings edits over and leaves there what was already made.  usage: bash tests/smoke.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
to=${1:?usage: bash tests/smoke.sh FOLDER}
mkdir -p "$to"
keep=(--exclude=dvc.lock) # of the study at full size; here the runs write their own
[ -e "$to/data.dvc" ] && keep+=(--exclude=data.dvc)
git ls-files -co --exclude-standard -z | while IFS= read -r -d '' f; do [ -e "$f" ] && printf '%s\0' "$f"; done \
  | tar "${keep[@]}" --null -T - -cf - | tar -xf - -C "$to"
cp params/smoke.yaml "$to/params.yaml"
[ -d "$to/.git" ] || git init -q "$to"
