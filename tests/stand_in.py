"""A small process that stands for a program which a preloaded process runs in a fork
(tests/preloaded.py): it waits for it, hands signals on, and ends with its exit code

usage: python tests/stand_in.py (SCRIPT | -c CODE) [ARGUMENTS], instead of python ..."""

import array
import json
import os
import signal
import socket
import sys

NAME = "ASAP_PRELOADED"  # address of the preloaded process


def ask(kind, arguments):
    "The connection to a fork that has this process's folder, environment and standard streams"
    umask = os.umask(0o077)
    os.umask(umask)
    request = dict(
        kind=kind,
        umask=umask,
        arguments=arguments,
        folder=os.getcwd(),
        environment=dict(os.environ),
        path=sys.path,
    )
    text = json.dumps(request).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[NAME])
    streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    connection.sendmsg([len(text).to_bytes(8, "big")], streams)
    connection.sendall(text)
    return connection


def stand_in(kind, arguments):
    "Wait for the fork; if this process is killed, or the one that started it, so is the fork"
    connection, parent = ask(kind, arguments), os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: connection.sendall(bytes([n])))
    connection.settimeout(0.5)
    while os.getppid() == parent:
        try:
            code = connection.recv(1)
        except TimeoutError:
            continue
        end(code[0] if code else 1)
    os._exit(1)


def end(code):
    "As the fork ended: with an exit code, or by a signal"
    if 128 < code < 128 + signal.NSIG:
        if code - 128 in (signal.SIGINT, signal.SIGTERM):
            signal.signal(code - 128, signal.SIG_DFL)
        os.kill(os.getpid(), code - 128)
    os._exit(code)


if __name__ == "__main__":
    if NAME not in os.environ:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    if sys.argv[1] == "-c":
        sys.path[0] = ""
        stand_in("code", sys.argv[1:])
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[1]))
    stand_in("script", sys.argv[1:])
