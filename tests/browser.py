"""A headless Chromium, driven by its own protocol: pages as a person sees them after their scripts have run."""

import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
)
PATIENCE_S = 60.0


def dump_dom(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What a page has become after its scripts have run, once, as HTML on standard output."""
    command = [str(CHROMIUM), *OPTIONS.split(), "--virtual-time-budget=3000", "--dump-dom", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


class Browser:
    """One page. With RETUNE_SCREENSHOTS=FOLDER `picture` keeps what it shows there."""

    def __init__(self, profile: Path) -> None:
        window = ["--window-size=1280,1000", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        command = [str(CHROMIUM), *OPTIONS.split(), *window, "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        said = (re.search(r"ws://([^/]+)/devtools/browser", line) for line in self._process.stderr)
        address = next(found[1] for found in said if found)
        with urllib.request.urlopen(f"http://{address}/json", timeout=10) as answer:
            [page] = [each for each in json.load(answer) if each["type"] == "page"]
        self._socket = connect(page["webSocketDebuggerUrl"], max_size=None)
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self._socket.recv(timeout=PATIENCE_S))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def evaluate(self, script: str) -> Any:
        return self._call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def click(self, text: str) -> None:
        """Press the mouse on the first thing that says exactly `text`."""
        self.see(text)
        x, y = self.evaluate(
            f"""(() => {{
              const all = [...document.querySelectorAll("body *")];
              const found = all.filter(e => e.innerText?.trim() === {json.dumps(text)});
              const box = found.find(e => ![...e.children].some(c => found.includes(c))).getBoundingClientRect();
              return [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def scroll_down(self) -> None:
        time.sleep(1)
        self.evaluate("document.querySelectorAll('*').forEach(e => { e.scrollTop = e.scrollHeight })")

    def see(self, *words: str) -> str:
        """Wait until the page's text has all of `words`, and return it; fail with what it shows instead."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            text = str(self.evaluate("document.body ? document.body.innerText : ''"))
            missing = [word for word in words if word not in text]
            if not missing:
                return text
            assert time.monotonic() < deadline, f"{missing} not on the page:\n{text}"
            time.sleep(0.2)

    def picture(self, name: str) -> None:
        if folder := os.environ.get("RETUNE_SCREENSHOTS"):
            time.sleep(3)  # until what appears slowly has appeared
            data = self._call("Page.captureScreenshot", format="png")["data"]
            (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(data))
