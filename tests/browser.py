"""A real headless Chromium, driven over the DevTools protocol: what a page does when it is opened, and how it lies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
_SECONDS = 60.0  # for a start or a page, on a busy machine
_HEIGHT = 900
PAPER = 718  # pixels between the margins of A4

# Waits for every picture, then says which did not load and which text leaves its box or the window. What scrolls by
# itself (.wide, pre) may be wider than it is shown, but not on paper.
_MEASURE = """
(async paper => {
  const broken = [];
  for (const image of document.images) {
    try { await image.decode(); } catch (error) {}
    if (!(image.naturalWidth > 0)) broken.push(image.alt || image.src.slice(0, 80));
  }
  const slack = 1, root = document.documentElement, overflowing = [];
  const scroller = element => paper ? null : element.closest('.wide, pre');
  const beyond = box => box.left < -slack || box.right > root.clientWidth + slack;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (!node.textContent.trim()) continue;
    let element = node.parentElement;
    while (getComputedStyle(element).display.startsWith('inline')) element = element.parentElement;
    const range = document.createRange();
    range.selectNodeContents(node);
    const text = range.getBoundingClientRect(), box = element.getBoundingClientRect();
    const out = text.left < box.left - slack || text.right > box.right + slack || text.bottom > box.bottom + slack;
    if ((out && scroller(element) !== element) || (beyond(text) && !scroller(element))) {
      overflowing.push(node.textContent.trim().slice(0, 80));
    }
  }
  for (const element of document.querySelectorAll('.wide, pre, img')) {
    if (beyond(element.getBoundingClientRect()) && !scroller(element.parentElement)) {
      overflowing.push(element.outerHTML.slice(0, 80));
    }
  }
  if (root.scrollWidth > root.clientWidth) overflowing.push(`the page: ${root.scrollWidth} px`);
  return {broken, overflowing, pictures: document.images.length, text: document.body.innerText};
})(%s)
"""


@dataclass
class Seen:
    """What Chromium found in a page, at one width."""

    errors: list[str] = field(default_factory=list)
    """Of scripts, the console and the content security policy."""
    requests: list[str] = field(default_factory=list)
    """Beyond the page itself and what it holds."""
    broken: list[str] = field(default_factory=list)
    """Pictures that did not load."""
    overflowing: list[str] = field(default_factory=list)
    """Text that leaves its box or the window."""
    pictures: int = 0
    text: str = ""

    @property
    def faults(self) -> list[str]:
        return [*self.errors, *self.requests, *self.broken, *self.overflowing]


class Browser:
    def __init__(self, address: str) -> None:
        self._address = address

    def look(self, page: Path, width: int, scheme: str = "light") -> Seen:
        """Opens a file in a window of so many pixels, in a light or dark scheme; of PAPER, as it is printed."""
        return asyncio.run(asyncio.wait_for(self._look(page, width, scheme), _SECONDS))

    async def _look(self, page: Path, width: int, scheme: str) -> Seen:
        async with self.tab() as tab:
            await tab.open(page, width, scheme)
            script = _MEASURE % json.dumps(width == PAPER)
            measured = await tab.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
            assert "exceptionDetails" not in measured, measured
            return Seen(errors=tab.errors, requests=tab.requests, **measured["result"]["value"])

    @contextlib.asynccontextmanager
    async def tab(self) -> AsyncIterator[Tab]:
        async with aiohttp.ClientSession() as session:
            async with session.put(f"{self._address}/json/new?about:blank") as answer:
                target = await answer.json()
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Tab(socket)
            async with session.get(f"{self._address}/json/close/{target['id']}"):
                pass


class Tab:
    """One page's end of the protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._socket, self._calls, self._loaded = socket, 0, False

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": parameters})
        while True:
            message = await self._next()
            if message.get("id") == self._calls:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    async def open(self, page: Path, width: int, scheme: str) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        metrics = {"width": width, "height": _HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        media = "print" if width == PAPER else "screen"
        await self.call("Emulation.setEmulatedMedia", media=media, features=features)
        await self.call("Page.navigate", url=page.resolve().as_uri())
        while not self._loaded:
            await self._next()

    async def _next(self) -> dict[str, Any]:
        message = json.loads(await self._socket.receive_str())
        values = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(values["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if values["type"] in ("error", "assert", "warning"):
                self.errors.append(json.dumps(values["args"]))
            case "Log.entryAdded" if values["entry"]["level"] in ("error", "warning"):
                self.errors.append(values["entry"]["text"])
            case "Network.requestWillBeSent" if not values["request"]["url"].startswith(("file:", "data:")):
                self.requests.append(values["request"]["url"])
        return message


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in a folder, ended with all its processes. Skips where there is none."""
    program = shutil.which("chromium") or pytest.skip("chromium is missing: setup.sh installs it")
    words = [program, *_FLAGS, f"--user-data-dir={folder}"]
    with open(folder / "said.txt", "wb") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said, start_new_session=True)
    try:
        yield Browser(f"http://127.0.0.1:{_port(process, folder)}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # nothing in its profile is kept
        process.wait()


def _port(process: subprocess.Popen[bytes], folder: Path) -> int:
    path, end = folder / "DevToolsActivePort", time.monotonic() + _SECONDS
    while not (path.is_file() and path.read_text().count("\n")):
        said = (folder / "said.txt").read_text(errors="replace")[-2000:]
        assert process.poll() is None, f"chromium has ended: {said}"
        assert time.monotonic() < end, f"chromium has not started within {_SECONDS:g} s: {said}"
        time.sleep(0.05)
    return int(path.read_text().splitlines()[0])
