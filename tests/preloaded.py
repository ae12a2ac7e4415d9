"""A process that has imported the large libraries, and forks a child for each request

torch, MONAI and transformers take ten seconds of a core to import, more than most stages and
scripts of a test compute. A fork of this process has them, and nothing of this project. In all
else it is like a process of its own: folder, environment, arguments, streams, signals, exit code.
The small process in its place is tests/stand_in.py. Where there is no fork (macOS, Windows),
programs are started as usual."""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
from pathlib import Path

from stand_in import NAME

# jsonschema, which MONAI imports, would take three seconds to load a check of addresses
sys.modules.setdefault("rfc3987_syntax", None)

LOADED = [  # other people's libraries alone: a child brings its own modules
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
    "PIL.Image",
]
INSTRUCTIONS = dict(  # of every check: newer ones round differently, and stored outputs with them
    ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2"
)
MEMORY = dict(  # glibc: keep what is freed, up to half a gigabyte, in place of fresh pages
    MALLOC_MMAP_THRESHOLD_=str(2**28), MALLOC_TRIM_THRESHOLD_=str(2**29)
)
PR_SET_PDEATHSIG = 1  # of prctl(2)
KERNEL = ["ipykernel.kernelapp", "ipykernel.ipkernel", "matplotlib_inline.backend_inline"]
STAGE = ["papermill", "papermill.execute", "psutil"]  # what `asap stage` starts a kernel with
DVC = ["dvc.cli", "dvc.repo", "dvc.commands.repro"]


# What a fork does


def start_kernel():
    import numpy as np
    import pandas as pd
    from ipykernel import kernelapp

    np.random.seed()
    pd.set_option("display.max_columns", 20)  # as pandas sets it where a kernel imports it
    kernelapp.launch_new_instance()


def start_script():
    runpy.run_path(sys.argv[0], run_name="__main__")


def start_code():
    code = sys.argv.pop(1)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)


def start_module():
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


START = {
    "kernel": start_kernel,
    "script": start_script,
    "code": start_code,
    "module": start_module,
}


def become(request, streams):
    "Folder, environment, arguments and streams of a request; the fork ends with its parent"
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv, sys.path[:] = request["arguments"], request["path"]
    warnings._processoptions(filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")))
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(request, streams):
    "Run the program of a request, and end as an interpreter does"
    code = 0
    try:
        become(request, streams)
        START[request["kind"]]()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    os._exit(code)


# The process that forks


class Preloaded:
    "Forks until the process that started it ends"

    def __init__(self, address):
        self.listen = socket.socket(socket.AF_UNIX)
        self.listen.bind(address)
        self.listen.listen(64)
        self.children = {}  # process -> handle of its end, connection to its stand-in
        self.wait = selectors.DefaultSelector()
        self.wait.register(self.listen, selectors.EVENT_READ, self.accept)
        self.wait.register(0, selectors.EVENT_READ, self.end)  # standard input closes then

    def serve(self):
        while True:
            for key, _ in self.wait.select():
                key.data()

    def end(self):
        for child in self.children:
            os.kill(child, signal.SIGKILL)
        os._exit(0)

    def accept(self):
        connection, _ = self.listen.accept()
        length, streams, _, _ = socket.recv_fds(connection, 8, 3)
        with connection.makefile("rb") as file:
            request = json.loads(file.read(int.from_bytes(length, "big")))
        child = os.fork()
        if not child:
            self.close(connection)
            run(request, streams)
        for stream in streams:
            os.close(stream)
        ended = os.pidfd_open(child)
        self.children[child] = (ended, connection)
        self.wait.register(ended, selectors.EVENT_READ, lambda: self.reap(child))
        self.wait.register(connection, selectors.EVENT_READ, lambda: self.signal(child))

    def close(self, connection):
        "In a fork: what belongs to this process"
        self.wait.close()
        self.listen.close()
        connection.close()
        for ended, other in self.children.values():
            os.close(ended)
            other.close()

    def signal(self, child):
        "Hand a signal on; the end of the stand-in is the end of the fork"
        if child not in self.children:
            return
        connection, number = self.children[child][1], b""
        with contextlib.suppress(ConnectionError):
            number = connection.recv(1)
        if not number:
            self.wait.unregister(connection)
        os.kill(child, number[0] if number else signal.SIGKILL)

    def reap(self, child):
        ended, connection = self.children.pop(child)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(OSError):
            connection.sendall(bytes([code if code >= 0 else 128 - code]))
        for one in (ended, connection):
            with contextlib.suppress(KeyError):
                self.wait.unregister(one)
        os.close(ended)
        connection.close()


# Its start


@contextlib.contextmanager
def preloaded():
    "Environment of programs that are to be forks, while the block runs"
    if sys.platform != "linux" or NAME in os.environ:
        yield dict(os.environ)
        return
    with tempfile.TemporaryDirectory(prefix="preloaded-") as folder:
        address = os.path.join(folder, "socket")
        own = dict(PYTHONHASHSEED="0", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", **MEMORY)
        own["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        process = subprocess.Popen(
            [sys.executable, __file__, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "MPLBACKEND": "Agg", **own},
        )
        try:
            assert process.stdout.readline() == b"listens\n"
            yield {**os.environ, NAME: address}
        finally:
            process.stdin.close()
            process.wait(20)


def kernels(env):
    "The environment in which notebooks' kernels are forks as well"
    folder = str(Path(__file__).parent / "kernels")
    return {**env, "PYTHONPATH": os.pathsep.join([folder, env.get("PYTHONPATH", "")]).strip(":")}


def main(address):
    server = Preloaded(address)  # requests wait until all is imported
    print("listens", flush=True)
    for name in [*LOADED, *KERNEL, *STAGE, *DVC]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server.serve()


if __name__ == "__main__":
    main(sys.argv[1])
