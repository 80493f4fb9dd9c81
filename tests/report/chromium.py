"""A headless Chromium, driven through pipes by the Chrome DevTools protocol: messages of JSON, each ended by a NUL."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ANSWER_SECONDS = 240  # a machine that other work shares needs some
KEYS = {"Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
KEYS |= {"ArrowDown": 40, "Tab": 9}


def find_chromium() -> str | None:
    """The browser's program, None where there is none. CPO_FAST_CHROMIUM names another."""
    named = os.environ.get("CPO_FAST_CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One browser. `open` gives a page, `close` ends it."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        flags += [
            "--remote-debugging-pipe",
            "--no-first-run",
            "--disable-extensions",
            "--disable-background-networking",
        ]
        flags += [
            "--disable-component-update",
            "--force-color-profile=srgb",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        # the protocol's descriptors are 3 and 4, which a shell can make of any
        command = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", command, program, *flags],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number, self._rest = 0, b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """The answer to one command. What happens meanwhile goes into `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        raw = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while raw:
            raw = raw[os.write(self._write, raw) :]
        number = self._number
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            answer = self._receive(deadline)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
        raise TimeoutError(method)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("the browser does not answer")
            piece = os.read(self._read, 1 << 20)
            assert piece, f"the browser has ended with code {self._process.poll()}"
            self._rest += piece
        raw, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, file: Path, width: int = 1440, height: int = 900, dark: bool = False) -> "Page":
        """A file as a page of its own, loaded, its charts drawn."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.show(width, height, dark)
        page.call("Page.navigate", url=file.resolve().as_uri())
        deadline = time.monotonic() + ANSWER_SECONDS
        while not page.happened("Page.loadEventFired"):
            self._receive(deadline)
        page.settle()
        return page

    def close(self) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(30)
        except (OSError, AssertionError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)


class Page:
    """One tab."""

    def __init__(self, browser: Chromium, session: str, target: str) -> None:
        self.browser, self.session, self.target = browser, session, target

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def happened(self, method: str) -> list[dict[str, Any]]:
        """The parameters of every event of this kind so far."""
        return [
            event["params"]
            for event in self.browser.events
            if event["method"] == method and event.get("sessionId") == self.session
        ]

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript, of a promise what it becomes."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def settle(self) -> None:
        """Let two frames pass: observers and drawing have run."""
        self.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 0))))"
        )

    def show(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Another size of the window, light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call(
            "Emulation.setEmulatedMedia", features=[scheme, {"name": "prefers-reduced-motion", "value": "reduce"}]
        )

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key, where the focus is. `modifiers` 8: with Shift."""
        text = {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
        values = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", modifiers=modifiers, text=text, **values)
        self.call("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **values)

    def click(self, selector: str) -> None:
        """The middle of an element, by the mouse."""
        name = json.dumps(selector)
        self.evaluate(f"document.querySelector({name}).scrollIntoView({{block: 'center'}})")
        box = self.evaluate(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
                            f"(document.querySelector({name}).getBoundingClientRect())")  # fmt: skip
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            count = 0 if kind == "mouseMoved" else 1
            button = "left" if count else "none"
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button=button, clickCount=count)

    def errors(self) -> list[str]:
        """What the console was told as an error, and exceptions. Refusals of the content-security policy are errors."""
        found = [
            entry["entry"]["text"] for entry in self.happened("Log.entryAdded") if entry["entry"]["level"] == "error"
        ]
        found += [str(each["exceptionDetails"]) for each in self.happened("Runtime.exceptionThrown")]
        calls = self.happened("Runtime.consoleAPICalled")
        return found + [str(each["args"]) for each in calls if each["type"] in ("error", "warning", "assert")]

    def requests(self) -> list[str]:
        """Every address that was asked for, but for data inside the page."""
        urls = [each["request"]["url"] for each in self.happened("Network.requestWillBeSent")]
        return [url for url in urls if not url.startswith("data:")]

    def screenshot(self, file: Path, whole: bool = True) -> None:
        parameters: dict[str, Any] = {"format": "png"}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            parameters |= {"captureBeyondViewport": True, "clip": {**size, "x": 0, "y": 0, "scale": 1}}
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **parameters)["data"]))

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
