"METEOR's Java program: below any path, and where it ends early"

import os
import shutil
import subprocess
import sys
from ast import literal_eval
from urllib.parse import quote

import numpy as np
import pytest
from conftest import TOP

PAIRS = (["there is a nodule", "no effusion"], ["a nodule is seen", "no effusion"])
CODE = """
import sys
from pycocoevalcap.meteor import meteor as package
package.__file__ = sys.argv[1] or package.__file__
from asap.text.scores import meteor
print(meteor(*{pairs}))
"""


def run(place="", **env):
    "In a process of its own: a lock that is kept would stop this one"
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(pairs=PAIRS), place],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=TOP,
        env=dict(os.environ, **env),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def link(source, target):
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_a_path_with_a_blank_and_an_umlaut(tmp_path):
    from pycocoevalcap.meteor import meteor as package

    there = tmp_path / "a b/ä/meteor"
    shutil.copytree(os.path.dirname(package.__file__), there, copy_function=link)
    scores = run()
    assert "array" in scores
    assert run(str(there / "meteor.py")) == scores


def test_a_program_that_ends_early(tmp_path):
    java = tmp_path / "java"
    java.write_text('#!/bin/sh\n[ "$1" = -version ]\n')
    java.chmod(0o755)
    found = run(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    scores, why = literal_eval(found)
    assert scores is None
    assert why.startswith("METEOR is left out: the output of its Java program cannot be read (")


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
@pytest.mark.skipif(quote(sys.prefix) != sys.prefix, reason="the package fails below such a path")
def test_the_scores_are_those_of_the_package():
    from pycocoevalcap.meteor.meteor import Meteor

    from asap.text.scores import meteor

    texts, references = PAIRS
    of = Meteor().compute_score(
        {i: [t] for i, t in enumerate(references)}, {i: [s] for i, s in enumerate(texts)}
    )
    np.testing.assert_array_equal(meteor(*PAIRS)[0], of[1])
