"Dockerfile, devcontainer, Binder and Zenodo name what the repository has; nothing is built here"

import json
import re
import tomllib

import yaml
from conftest import TOP


def test_the_image_starts_jupyterlab_on_the_tour():
    text = (TOP / "Dockerfile").read_text()
    assert re.search(r"^RUN make \.venv/done$", text, re.M)
    assert ".venv/done:" in (TOP / "Makefile").read_text()
    (page,) = re.findall(r'"(nbs/[^"]+)"', text)
    assert (TOP / page).exists() and '"jupyter", "lab"' in text
    ignored = (TOP / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "data", "build"} <= set(ignored)


def test_the_devcontainer_installs_the_same():
    found = json.loads((TOP / ".devcontainer/devcontainer.json").read_text())
    assert found["postCreateCommand"] == "make .venv/done"
    assert found["forwardPorts"] == [8888]


def test_binder_takes_the_pins_and_extras_of_the_project():
    lines = (TOP / ".binder/requirements.txt").read_text().splitlines()
    (pins,) = [line.split()[1] for line in lines if line.startswith("-c ")]
    assert (TOP / ".binder" / pins).resolve() == TOP / "constraints.txt"
    (own,) = [line for line in lines if line.startswith("-e ")]
    extras = set(own.split("[")[1].strip("]").split(","))
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    assert extras <= set(project["optional-dependencies"])
    python = (TOP / ".binder/runtime.txt").read_text().strip()
    assert python.startswith("python-3.")


def test_zenodo_and_citation_agree():
    zenodo = json.loads((TOP / ".zenodo.json").read_text())
    citation = yaml.safe_load((TOP / "CITATION.cff").read_text())
    assert {k: zenodo[k] for k in ("title", "version", "license")} == {
        k: str(citation[k]) for k in ("title", "version", "license")
    }
    assert [c["name"] for c in zenodo["creators"]] == [a["name"] for a in citation["authors"]]
    (paper,) = [i["value"] for i in citation["references"][0]["identifiers"]]
    assert [r["identifier"] for r in zenodo["related_identifiers"]] == [paper]
