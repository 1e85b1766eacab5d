"""A headless Chromium, spoken to over its debugging pipe: no driver and no port."""

import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
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
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """The browser to test with: POSTTRAIN_CHROMIUM, or one on the path, or None."""
    named = os.environ.get("POSTTRAIN_CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser. `problems` collects what the console and the network complained."""

    def __init__(self, program: str, profile: Path, timeout: float = 60) -> None:
        self.timeout, self.ids, self.events = timeout, itertools.count(1), []
        self.buffer, self.session = b"", None
        into, self.write_end = os.pipe()
        self.read_end, out = os.pipe()
        self.process = self._start([program, *FLAGS, f"--user-data-dir={profile}"], into, out)
        os.close(into)
        os.close(out)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    @staticmethod
    def _start(command: list[str], into: int, out: int) -> subprocess.Popen[bytes]:
        # Chromium reads commands from descriptor 3 and answers on 4; the shell puts ours there.
        for end in (into, out):
            os.set_inheritable(end, True)
        shell = ["/bin/sh", "-c", f'exec "$@" 3<&{into} 4>&{out}', "sh"]
        if max(into, out) > 9:  # POSIX shells redirect single digits only
            shell = ["bash", "-c", f'exec "$@" 3<&{into} 4>&{out}', "bash"]
        return subprocess.Popen(
            [*shell, *command],
            pass_fds=(into, out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        message = {"id": next(self.ids), "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        return self._until(lambda answer: answer.get("id") == message["id"], method)["result"]

    def _until(self, wanted: Any, what: str) -> dict[str, Any]:
        end = time.monotonic() + self.timeout
        while True:
            answer = self._receive(end, what)
            if "error" in answer:
                raise RuntimeError(f"{what}: {answer['error']}")
            if "method" in answer:
                self.events.append(answer)
            if wanted(answer):
                return answer

    def _receive(self, end: float, what: str) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_end], [], [], max(0, end - time.monotonic()))
            chunk = os.read(self.read_end, 1 << 20) if ready else b""
            if not chunk:
                raise TimeoutError(f"no answer from the browser to {what}")
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(
        self,
        page: Path,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        script: bool = True,
    ) -> None:
        """Load the file at an exact width in CSS pixels, in the light or dark scheme."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.call("Page.navigate", url=page.resolve().as_uri())
        if not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._until(lambda event: event.get("method") == "Page.loadEventFired", "load")

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    @property
    def problems(self) -> list[str]:
        """Console messages, exceptions, refused resources, and requests beyond the file itself."""
        self.evaluate("1")  # events that were under way arrive before its answer
        loud = [
            str(event["params"])
            for event in self.events
            if event["method"]
            in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        ]
        asked = [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return loud + asked[1:]

    def screenshot(self) -> bytes:
        import base64

        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])

    def close(self) -> None:
        try:
            self.session = None
            self.call("Browser.close")
            self.process.wait(10)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        finally:
            os.close(self.read_end)
            os.close(self.write_end)
