"""A project with one stage, `text`, and a run of it; the toy training of tests/test_launch.py and
tests/test_slurm.py"""

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque

from conftest import TOP

# Each pause ends when the stage is asked to stop: the request falls into that step
TRAIN = """
import time

import pandas as pd
import torch
from safetensors.torch import save_file

from asap.core import atomic_write, log_message, process_rank, project_root, write_json
from asap.preempt import stop_requested
from asap.train import discard, fit

class Points:
    def __len__(self):
        return 16
    def __getitem__(self, index):
        return torch.tensor([index[1] / 8 - 1])

def loss(model, x, step):
    log_message(f"step {step}")
    while str(step) in pauses.split(",") and not stop_requested():
        time.sleep(0.01)
    if fail and step == 5 and process_rank():
        raise ValueError("broken in the second process")
    return ((model(x) - 3 * x) ** 2).mean(), {}

torch.manual_seed(0)
root, model = project_root(), torch.nn.Linear(1, 1)
fit(model, loss, Points(), steps=int(steps), batch=8, lr=0.1, seed=0, folder=root / "run",
    save_every=10**9, precision_="no")
with atomic_write(root / "weights.safetensors") as path:
    save_file(model.state_dict(), path)
table = pd.read_csv(root / "run/log.csv")
write_json(dict(rank=process_rank(), loss=table.loss.tolist()), root / "out.json")
discard(root / "run")
"""


def write_project(folder, code=TRAIN):
    "The folder, with the notebook of the stage"
    first = dict(
        cell_type="code",
        id="a",
        metadata=dict(tags=["parameters"]),
        source="stage, steps, pauses, fail = '', '40', '', ''",
        outputs=[],
        execution_count=None,
    )
    cells = [first, dict(first, id="b", metadata={}, source=code)]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    notebook = dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)
    (folder / "nbs/stages").mkdir(parents=True)
    (folder / "nbs/stages/text.ipynb").write_text(json.dumps(notebook))
    return folder


class Run:
    "`asap stage text`, and what it has printed"

    def __init__(self, project, *given, env=os.environ, launcher="", processes=1):
        env = env | dict(ASAP_ROOT=str(project), ASAP_STAGES="1", OMP_NUM_THREADS="1")
        env |= dict(ASAP_LAUNCHER=launcher, ASAP_PROCESSES=str(processes))
        env["PYTHONPATH"] = os.pathsep.join([str(TOP), env.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "asap.cli", "stage", "text", *given]
        self.process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        self.said, self.unread = "", deque()
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        for line in self.process.stderr:
            self.said += line
            self.unread.append(line)

    def wait_for(self, text, seconds=300):
        "Until a line that has not been waited for has the text; the line"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while self.unread:
                if text in (line := self.unread.popleft()):
                    return line
            assert self.reader.is_alive(), self.said
            time.sleep(0.05)
        raise TimeoutError(f"no `{text}` in {self.said}")

    def code(self, seconds=300):
        code = self.process.wait(seconds)
        self.reader.join()
        return code
