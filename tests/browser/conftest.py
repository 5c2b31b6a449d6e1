"""Real Chromium on a service whose run is a fake. Debian's chromium and chromium-driver, selenium from PyPI."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from opd_governor.services.control.app import create_app
from opd_governor.services.control.server import ControlServer, bind
from opd_governor.services.job.tunables import ConfigStore
from tests.services.control.fake_run import FakeRun, make_job, make_step

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Service:
    """A fake run with its server, which can go away and come back on the same port."""

    token = "browser-token"

    def __init__(self, folder: Path) -> None:
        self.run = FakeRun(num_steps=60)
        self.store = ConfigStore(make_job(), folder / "config.jsonl")
        self._server: ControlServer | None = None
        self._port = 0
        self.start()

    def start(self) -> None:
        app = create_app(self.run, self.store, self.run.registry, self.token)
        self._server = ControlServer(app, bind("127.0.0.1", self._port, self.token))
        self._server.start()
        self._port = self._server.port
        self.url = self._server.url

    def stop(self) -> None:
        assert self._server is not None
        self._server.stop()

    def add_step(self, **values: Any) -> None:
        self.run.records.append(make_step(len(self.run.records) + 1) | values)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers={"authorization": f"Bearer {self.token}"}, trust_env=False)

    def patch(self, patch: dict[str, Any]) -> None:
        self.store.change(patch, expected=None, source="somebody else")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    service.stop()


@pytest.fixture
def open_browser(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a Chromium of its own, with a new profile: `open_browser(width=390, height=844, dark=True)`."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromium-driver are not installed (Debian: apt-get install chromium chromium-driver)")
    browsers: list[Any] = []

    def start(width: int = 1280, height: int = 900, dark: bool = False) -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={tmp_path / f'profile-{len(browsers)}'}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        browsers.append(browser)
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        return browser

    yield start
    for browser in browsers:
        browser.quit()
