"""Debian's Chromium without a window, driven through its DevTools protocol over a pair of pipes: no library is needed.

`Chromium` is one browser, `Tab` one page of it: it loads a file, evaluates scripts, moves the mouse, presses keys, and
keeps what the page reported: console errors, exceptions, violations of the policy, and every request.
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

KEYS = {"Enter": ("\r", 13), " ": (" ", 32), "Tab": ("", 9), "ArrowDown": ("", 40), "ArrowUp": ("", 38)}
KEYS |= {"ArrowLeft": ("", 37), "ArrowRight": ("", 39), "Home": ("", 36), "End": ("", 35)}
FLAGS = """--headless --no-sandbox --remote-debugging-pipe --disable-gpu --disable-dev-shm-usage --no-first-run
--disable-background-networking --disable-component-update --disable-extensions --disable-sync --hide-scrollbars
--force-color-profile=srgb --mute-audio""".split()
PATIENCE_SECONDS = 300  # beside eight other programs on two cores a start was seen to take thirty


class Chromium:
    """A running browser. Its profile is a temporary folder. `close` ends it."""

    def __init__(self) -> None:
        program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
        if program is None:
            raise FileNotFoundError("no chromium: apt-get install chromium, or set CHROMIUM to the program")
        self.folder = tempfile.mkdtemp(prefix="chromium-")
        # the browser reads commands at descriptor 3 and answers at 4
        (their_in, self._out), (self._in, their_out) = os.pipe(), os.pipe()
        their_in, their_out = (fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 10) for one in (their_in, their_out))
        log = (os.POSIX_SPAWN_OPEN, 2, f"{self.folder}/stderr", os.O_WRONLY | os.O_CREAT, 0o600)
        actions = [(os.POSIX_SPAWN_DUP2, their_in, 3), (os.POSIX_SPAWN_DUP2, their_out, 4), log]
        self.pid = os.posix_spawn(
            program, [program, *FLAGS, f"--user-data-dir={self.folder}", "about:blank"], os.environ, file_actions=actions
        )
        os.close(their_in)
        os.close(their_out)
        self._numbers, self._buffer = itertools.count(1), b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result. AssertionError with the browser's words where it refuses."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        answer: dict[str, Any] = {}
        while answer.get("id") != number:
            answer = self.receive(PATIENCE_SECONDS)
            if "id" not in answer:
                self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next message. TimeoutError if none comes."""
        until = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no word from the browser in {seconds} s")
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise EOFError(f"the browser ended: {Path(self.folder, 'stderr').read_text()[-2000:]}")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def close(self) -> None:
        """End the browser and remove its profile."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self.folder, ignore_errors=True)


class Tab:
    """A page in a browser context of its own."""

    def __init__(self, browser: Chromium, width: int = 1440, height: int = 900, dark: bool = False) -> None:
        self.browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """As `Chromium.call`, in this page."""
        return self.browser.call(method, self.session, **parameters)

    def open(self, path: Path) -> None:
        """Load a file and wait until it has."""
        self.browser.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def js(self, expression: str) -> Any:
        """The value of an expression, a promise's included. AssertionError where it throws."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, expression: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.02)

    def click(self, selector: str, at: tuple[float, float] | None = None) -> None:
        """Press the mouse in the middle of an element, or `at` pixels from its upper left corner."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{found}.scrollIntoView({{block: 'center'}})")
        left, top, width, height = self.js(f"(r => [r.x, r.y, r.width, r.height])({found}.getBoundingClientRect())")
        x, y = (left + width / 2, top + height / 2) if at is None else (left + at[0], top + at[1])
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, *keys: str) -> None:
        """Press keys one after the other, by the names of `KeyboardEvent.key`."""
        for key in keys:
            text, code = KEYS.get(key, (key, ord(key.upper()[0])))
            common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
            self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Put text in at the focus."""
        self.call("Input.insertText", text=text)

    def complaints(self) -> list[str]:
        """Console errors and warnings, exceptions, and requests for anything but the file itself, since `open`."""
        self.js("1")  # what came before it has been read
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            method, parameters = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                found.append(f"exception: {parameters['exceptionDetails']['exception'].get('description')}")
            elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                found.append(f"console: {parameters['args']}")
            elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                found.append(f"log: {parameters['entry']}")
            elif method == "Network.requestWillBeSent" and parameters["type"] != "Document":
                found.append(f"request: {parameters['request']['url']}")
        return found

    def picture(self, path: Path, whole: bool = False) -> None:
        """Save a screenshot as PNG, of the whole page if asked for."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """Close the page."""
        self.call("Page.close")
