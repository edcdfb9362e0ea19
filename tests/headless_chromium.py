"""A real Chromium without a screen, driven by chromedriver's HTTP interface. Debian: chromium, chromium-driver.

It has a profile of its own and no way to fetch anything but files: every host name resolves to nothing.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.free_ports import free_port

ARGUMENTS = (
    "--headless",
    "--no-sandbox",  # Chromium refuses to start as root otherwise
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def why_not() -> str | None:
    """The reason there is no browser here, or None."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{', '.join(missing)} not installed (apt-get install chromium chromium-driver)" if missing else None


class Browser:
    """`with Browser(folder) as browser: browser.open(path); browser.run("return document.title")`."""

    def __init__(self, folder: Path) -> None:
        self._port = free_port()
        self._profile = folder / "profile"
        self._log = folder / "chromedriver.log"

    def __enter__(self) -> Browser:
        driver = shutil.which("chromedriver")
        self._process = subprocess.Popen([driver, f"--port={self._port}", f"--log-path={self._log}"])
        try:
            self._wait_until_ready()
            options = {"binary": shutil.which("chromium"), "args": [*ARGUMENTS, f"--user-data-dir={self._profile}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            self._session = ""
            self._session = "/session/" + self._ask("/session", capabilities={"alwaysMatch": wanted})["sessionId"]
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        try:
            self._ask("", method="DELETE")  # ends Chromium
        finally:
            self._stop()

    def open(self, page: Path, *, width: int, height: int = 900) -> None:
        """Load a file at a size in CSS pixels, and forget what the console and the network said before."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._ask("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
        self._ask("/url", url="about:blank")
        self.console(), self.requests()
        self._ask("/url", url=page.resolve().as_uri())

    def run(self, script: str) -> Any:
        """What a script returns; it is the driver's own, which no policy of the page stops."""
        return self._ask("/execute/sync", script=script, args=[])

    def console(self) -> list[str]:
        """Errors and warnings since the last call."""
        return [entry["message"] for entry in self._ask("/se/log", type="browser")]

    def requests(self) -> list[str]:
        """Addresses asked for since the last call, by pages of any kind."""
        events = [json.loads(entry["message"])["message"] for entry in self._ask("/se/log", type="performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("/screenshot", method="GET")))

    def _ask(self, path: str, *, method: str = "POST", **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self._address(self._session + path), data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.read().decode()[:2000]}") from None

    def _address(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}{path}"

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(self._address("/status"), timeout=5) as answer:
                    if json.load(answer)["value"]["ready"]:
                        return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError(f"chromedriver does not answer; see {self._log}")

    def _stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
