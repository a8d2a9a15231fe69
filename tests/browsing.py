"""Chromium by its DevTools protocol over a pipe: pages at any width, light or dark, measured and looked at."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--remote-debugging-pipe")  # fmt: skip

# Texts that a reader sees, with their boxes: those that lie on each other, and those cut by the page or by a panel.
BOXES = """(() => {
  const shown = (e) => e.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && !e.closest(".tip");
  const boxes = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || !shown(parent) || parent.closest("script, style, title, select")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const rects = parent.ownerSVGElement ? [parent.getBoundingClientRect()] : [...range.getClientRects()];
    for (const r of rects) {
      if (r.width < 1 || r.height < 1) continue;
      boxes.push({ text: node.data.trim().slice(0, 40), svg: parent.ownerSVGElement !== null,
                   scrolls: parent.closest(".scroll, .legend") !== null, turned: parent.hasAttribute("transform"),
                   frame: (parent.closest(".card, .top") ?? document.documentElement).getBoundingClientRect(),
                   l: r.left, t: r.top + scrollY, r: r.right, b: r.bottom + scrollY });
    }
  }
  const slack = 1.5, faults = [], room = document.documentElement.clientWidth;
  for (const a of boxes) {
    const left = Math.max(a.frame.left, 0), right = Math.min(a.frame.right, room);
    if (!a.scrolls && (a.r > right + slack || a.l < left - slack)) faults.push(`cut: ${a.text}`);
  }
  boxes.sort((a, b) => a.t - b.t);
  const over = (a, b) => Math.min(a.r, b.r) - Math.max(a.l, b.l) > slack && Math.min(a.b, b.b) - Math.max(a.t, b.t) > 3;
  for (let i = 0; i < boxes.length; i++)
    for (let j = i + 1; j < boxes.length && boxes[j].t < boxes[i].b; j++) {
      const [a, b] = [boxes[i], boxes[j]];
      if (a.turned && b.turned) continue;  // upright boxes around slanted texts overlap where these do not
      if (a.scrolls !== b.scrolls) continue;  // what a frame holds back is not seen
      if (over(a, b)) faults.push(`overlap: ${a.text} | ${b.text}`);
    }
  return { faults, texts: boxes.length, wide: document.documentElement.scrollWidth, room };
})()"""


class Browser:
    """One page of one browser.

    Args:
        home: a folder for its profile.
    """

    def __init__(self, program: str, home: Path) -> None:
        mine_in, its_out = os.pipe()
        its_in, mine_out = os.pipe()

        def hand_over() -> None:  # the browser reads on 3 and writes on 4
            for end, number in ((os.dup(its_in), 3), (os.dup(its_out), 4)):
                os.dup2(end, number)

        line = [program, *FLAGS, f"--user-data-dir={home}", "about:blank"]
        none = subprocess.DEVNULL
        self.process = subprocess.Popen(line, preexec_fn=hand_over, close_fds=False, stdout=none, stderr=none)
        os.close(its_in)
        os.close(its_out)
        self.reading, self.writing = os.fdopen(mine_in, "rb"), os.fdopen(mine_out, "wb", buffering=0)
        self.number, self.events, self.rest, self.session = 0, [], b"", None
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            block = os.read(self.reading.fileno(), 1 << 20)
            if not block:
                raise RuntimeError("the browser has gone")
            self.rest += block
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Answer to a command; events that come in between are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.writing.write(json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self.number:
                assert "error" not in found, found["error"]
                return found["result"]
            self.events.append(found)

    def open(self, url: str, width: int = 1280, *, dark: bool = False) -> None:
        """Load a page in a window of this width."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.resize(width)
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())

    def resize(self, width: int, height: int = 900) -> None:
        """Another width, in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def value(self, script: str) -> Any:
        """What an expression is in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console since the page was opened."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"]["text"])
            elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
                found.append(str(params["args"]))
        return found

    def asked(self) -> list[str]:
        """Addresses that the page asked for, itself left out."""
        events = [e["params"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [e["request"]["url"] for e in events if e["type"] != "Document"]

    def shoot(self, file: Path, height: int | None = None) -> None:
        """A picture of the whole page, or of its top."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], height or 1e9), "scale": 1}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        file.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browser(home: Path) -> Iterator[Browser | None]:
    """A running browser, ended after; None where there is no Chromium."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        yield None
        return
    found = Browser(program, home)
    try:
        yield found
    finally:
        with contextlib.suppress(RuntimeError, OSError):
            found.session = None
            found.call("Browser.close")
        found.process.wait(20)
        found.reading.close()
        found.writing.close()
