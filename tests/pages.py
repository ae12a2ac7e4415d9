"Run one page from top to bottom, in a process forked from one that has loaded what most pages import"

import multiprocessing
import os
import sys

LOADED = [  # other people's libraries alone: a page brings its own modules
    "torch",
    "pandas",
    "scipy.ndimage",
    "sklearn.linear_model",
    "matplotlib.pyplot",
    "seaborn",
    "nibabel",
    "pydantic",
    "joblib",
    "einops",
    "tokenizers",
    "accelerate",
    "transformers.models.bert.modeling_bert",
    "transformers.models.auto",
    "monai.losses",
    "monai.metrics",
    "monai.transforms",
    "monai.networks.nets",
    "monai.inferers",
    "fastcore.test",
    "nbdev.test",
    "pages",
]
ALONE = {
    "02_train"
}  # what it shows of the memory allocator is true of a process that is nobody's child
multiprocessing.get_context("forkserver").set_forkserver_preload(LOADED)


def process(path, top, log):
    "The page as a process that has yet to be started"
    return multiprocessing.get_context("spawn" if path.stem in ALONE else "forkserver").Process(
        target=page, args=(path, top, log)
    )


def page(path, top, log):
    "Exit code 0 where every cell runs and every check holds"
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(top)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as in a kernel: a loader's workers know the page's classes
    from joblib.externals.loky import get_reusable_executor
    from nbdev.test import test_nb

    done = test_nb(path)[0]
    get_reusable_executor().shutdown(
        kill_workers=True
    )  # else this process, being nobody's main one, waits until they have been idle for five minutes
    sys.exit(0 if done else 1)
