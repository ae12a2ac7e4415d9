#!/usr/bin/env bash
# Install the pinned set into .venv and say how far it is; `make` calls it. uv installs where it is
# found, pip otherwise.
# Settings: PYTHON; TORCH_INDEX, where torch comes from; HASHES=1 checks the sha256 of each file.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
log=$venv/install.log
total=$(grep -c == constraints.txt)
extras='study,cluster,dev'
cpu=https://download.pytorch.org/whl/cpu
index=${TORCH_INDEX:-$cpu}
hashes=${HASHES:+--require-hashes}

fail() {
    tail -n 20 "$log" >&2
    echo "The install stopped; its log: $PWD/$log" >&2
    exit 1
}

progress() { # packages so far, of pip's lines: on one line of a terminal, each 50th elsewhere
    local n=0 word name
    while read -r word name _; do
        case "$word $name" in
        Collecting* | Processing*)
            n=$((n + 1))
            if [ -t 1 ]; then
                printf '\r    %d of about %d: %-40.40s' $n "$total" "${name##*/}"
            elif [ $((n % 50)) = 0 ]; then
                echo "    $n of about $total"
            fi
            ;;
        "Installing collected")
            [ ! -t 1 ] || echo
            echo "    all are here; unpacking takes a minute or two"
            ;;
        esac
    done
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@" 2>>"$log"; }

loud() { pip install --progress-bar off "$@" | tee -a "$log" | progress || fail; }

# The CPU build from a place that pip is set up for, where there is one; else from the index
torch() {
    echo "1/3 $(grep -o '^torch==[^ ]*' constraints.txt) from $index"
    [ "$index" = $cpu ] && pip install -q $hashes --no-deps --no-index -r "$venv/torch.txt" && return
    loud $hashes --no-deps --index-url "$index" -r "$venv/torch.txt"
}

rest() {
    echo "2/3 asap[$extras] and what it needs: about $total packages"
    local install=loud
    command -v uv >/dev/null && install="uv pip install --no-sources --python $venv/bin/python"
    if [ -n "$hashes" ]; then # a folder such as this one has no hash: what it needs comes first
        $install $hashes --no-deps -r "$venv/rest.txt"
        $install --no-deps -e .
    else
        $install -c constraints.txt -e ".[$extras]"
    fi
}

echo "Installing into $PWD/$venv: 3 GB and a few minutes, once"
[ -x $venv/bin/python ] || "${PYTHON:-python3}" -m venv $venv
: >"$log"
pins=constraints.txt
[ -z "$hashes" ] || pins=requirements.txt
awk -v out=$venv/torch.txt -v rest=$venv/rest.txt '
    /^torch==/ { torch = 1 }
    { print > (torch ? out : rest) }
    !/\\$/ { torch = 0 } # a pin goes on while its lines end in a backslash' "$pins"
torch
rest
echo "3/3 checking that the packages fit together"
pip check >>"$log" || fail
