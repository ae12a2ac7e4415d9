"A headless Chromium, driven through its DevTools protocol"

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

CHROMIUM = os.environ.get("CHROMIUM") or next(
    (
        p
        for n in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
        if (p := shutil.which(n))
    ),
    None,
)
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
    "--window-size=1200,760",
]


class Tab:
    "One page; what it asked of a network and what its console said are kept"

    def __init__(self, address, process):
        import websocket

        self.process = psutil.Process(process.pid)
        self.socket, self.n, self.requests, self.complaints = (
            websocket.create_connection(address, timeout=60),
            0,
            [],
            [],
        )
        for domain in ("Network", "Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    def _note(self, m):
        what, p = m.get("method"), m.get("params", {})
        if what == "Network.requestWillBeSent":
            self.requests.append(p["request"]["url"])
        if what == "Runtime.exceptionThrown":
            self.complaints.append(
                p["exceptionDetails"].get("exception", {}).get("description")
                or p["exceptionDetails"]["text"]
            )
        if what == "Runtime.consoleAPICalled" and p["type"] in ("error", "assert"):
            self.complaints.append(str([a.get("value", a.get("description")) for a in p["args"]]))
        if what == "Log.entryAdded" and p["entry"]["level"] == "error":
            self.complaints.append(p["entry"]["text"])

    def call(self, method, **params):
        self.n += 1
        self.socket.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while (m := json.loads(self.socket.recv())).get("id") != self.n:
            self._note(m)
        if "error" in m:
            raise RuntimeError(f"{method}: {m['error']['message']}")
        return m["result"]

    def run(self, code):  # value of a JavaScript expression
        r = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in r:
            raise RuntimeError(r["exceptionDetails"]["exception"].get("description", str(r)))
        return r["result"].get("value")

    def open(self, url):
        self.call("Page.navigate", url=url)

    def until(self, code, seconds=60):  # a JavaScript expression becomes true
        end = time.monotonic() + seconds
        while not self.run(f"new Promise(r => requestAnimationFrame(() => r(Boolean({code}))))"):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{code} is not true after {seconds} s; "
                    f"the page says: {self.run('document.body.innerText.slice(0, 300)')!r}; "
                    f"its console: {self.complaints}"
                )

    def cpu_seconds(self) -> float:  # of all processes of the browser
        family = [self.process, *self.process.children(recursive=True)]
        return sum(t.user + t.system for t in (p.cpu_times() for p in family))

    def picture(self, selector=None) -> bytes:  # PNG
        clip = {}
        if selector:
            clip = dict(
                clip=self.run(
                    f"(r => ({{x: r.x, y: r.y, width: r.width, height: r.height, scale: 1}}))"
                    f"(document.querySelector({selector!r}).getBoundingClientRect())"
                )
            )
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"])


@contextlib.contextmanager
def tab(*flags):
    "An empty page in a browser with a profile of its own"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.Popen(
            [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port, end = Path(profile) / "DevToolsActivePort", time.monotonic() + 60
            while not (port.exists() and port.read_text().count("\n")):
                if time.monotonic() > end or done.poll() is not None:
                    raise RuntimeError(f"{CHROMIUM} does not start (exit code {done.poll()})")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    done.wait(0.05)
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port.read_text().split()[0]}/json/list"
            ) as r:
                pages = json.load(r)
            t = Tab(next(p for p in pages if p["type"] == "page")["webSocketDebuggerUrl"], done)
            try:
                yield t
            finally:
                t.socket.close()
        finally:
            done.terminate()
            try:
                done.wait(20)
            except subprocess.TimeoutExpired:
                done.kill()
                done.wait()
