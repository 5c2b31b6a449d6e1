"""The live page in real Chromium."""

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.browser
AXE = Path(__file__).parent / "vendor" / "axe" / "axe.min.js"


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """The condition's value once it is true. An element that is missing or was just redrawn counts as false."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while True:
        try:
            if value := condition():
                return value
        except WebDriverException:
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


class Page:
    """What a person does with the page."""

    def __init__(self, browser: Any, service: Any) -> None:
        self.browser = browser
        browser.get(f"{service.url}/#token={service.token}")
        wait_until(lambda: "Live" in self.text("#connection"))

    def find(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def value(self, chart: str, series: str) -> float | None:
        raw = self.find(f"#chart-{chart} [data-series='{series}']").get_attribute("data-value")
        return float(raw) if raw else None

    def write(self, field: str, text: str) -> None:
        box = self.find(f"[name='{field}']")
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
        box.clear()
        box.send_keys(text)

    def press(self, selector: str) -> None:
        def pressed() -> bool:
            """A button that is redrawn or covered for a moment refuses the click."""
            button = self.find(selector)
            self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
            button.click()
            return True

        wait_until(pressed)

    def screenshot(self, path: Path) -> Path:
        """The whole page, beyond what the screen shows."""
        size = self.browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        screen = {"width": size["width"], "height": size["height"], "deviceScaleFactor": 1, "mobile": size["width"] < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)  # a screen as tall as the page
        shot = self.browser.execute_cdp_cmd("Page.captureScreenshot", {})
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def faults(self) -> list[str]:
        """Serious findings of axe."""
        self.browser.execute_script(AXE.read_text())
        result = self.browser.execute_async_script("const done = arguments[0]; axe.run().then(done)")
        return [
            f"{fault['id']}: {node['html']} {node['failureSummary']}"
            for fault in result["violations"]
            if fault["impact"] in ("serious", "critical")
            for node in fault["nodes"]
        ]


@pytest.fixture
def page(open_browser, service) -> Page:
    return Page(open_browser(), service)


def test_the_page_shows_the_values_of_the_step_records_and_of_metrics(page, service):
    service.add_step()
    last = service.get("/v1/steps?after=60").json()["steps"][-1]
    wait_until(lambda: page.value("length", "step") == 61)
    shown = {
        "length": ("length_mean", "length_p95", "length_max", "cap_tokens"),
        "ends": ("truncation", "loops"),
        "pressure": ("pressure",),
        "shares": ("lr_scale", "admission_quota", "loop_tail_weight"),
        "weights": ("golden_weight", "reference_kl_weight"),
        "tilt": ("stop_tilt_nats",),
        "speed": ("tokens_per_s",),
    }
    for chart, series in shown.items():
        for name in series:
            assert page.value(chart, name) == pytest.approx(last[name]), name
    assert page.value("eval", "eval_accuracy") == service.run.records[59]["eval_accuracy"]
    for bucket, nats in last["kl_by_position"].items():
        assert page.value("kl", f"kl:{bucket}") == pytest.approx(nats)
    service.run.show_in_metrics()
    families = text_string_to_metric_families(service.get("/metrics").text)
    cap = next(family.samples[0].value for family in families if family.name == "opd_governor_cap_tokens")
    assert page.value("length", "cap_tokens") == cap
    assert page.text("#phase") == "running"
    assert "step 61 of 100" in page.text("#progress-text")


def test_the_first_thing_to_see_is_the_newest_step_against_what_is_healthy(page, service):
    def tile(label: str) -> list[str]:
        tiles = {t.text.split("\n")[0]: t for t in page.browser.find_elements("css selector", "#now > div")}
        return [*tiles[label].text.split("\n")[1:], tiles[label].get_attribute("class")]

    service.add_step(truncation=0.051, loops=0.02)
    wait_until(lambda: tile("Truncated") == ["5.1 %", "▲ the teacher: 1.0 %", "beyond"])
    assert tile("Looping") == ["2.0 %", "healthy: at most 2.5 %", ""]
    assert tile("Mean length, tokens") == ["121", "p95 212, cap 195", ""]
    assert tile("Held-out accuracy") == ["100 %", "at step 60", ""]
    assert tile("Restarts") == ["0", "of actors", ""]
    service.run.restarts.labels("sums", "teacher").inc(2)
    wait_until(lambda: tile("Restarts") == ["2", "▲ teacher 2", "beyond"])


def test_a_knob_that_nobody_moved_takes_no_plot(page, service):
    assert page.find("#chart-tilt .plot").is_displayed()
    assert not page.find("#chart-weights .plot").is_displayed()
    assert page.value("weights", "golden_weight") == 0.1
    service.add_step(golden_weight=0.4)
    wait_until(lambda: page.find("#chart-weights .plot canvas").is_displayed())


def test_nothing_on_the_page_comes_from_elsewhere_and_nothing_fails(page, service):
    names = page.browser.execute_script("return performance.getEntriesByType('resource').map(({ name }) => name)")
    assert names
    assert all(name.startswith((service.url, "data:")) for name in names)
    assert [entry["message"] for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_token_leaves_the_address_and_is_asked_for_once_where_it_is_missing(open_browser, service):
    browser = open_browser()
    browser.get(service.url)
    entry = wait_until(lambda: browser.find_element("css selector", "#token-dialog[open] input"))
    entry.send_keys("wrong\n")
    wait_until(lambda: browser.find_element("id", "token-refused").is_displayed())
    entry.send_keys(service.token + "\n")
    wait_until(lambda: "Live" in browser.find_element("id", "connection").text)
    browser.refresh()
    wait_until(lambda: "Live" in browser.find_element("id", "connection").text)
    page = Page(browser, service)
    wait_until(lambda: service.token not in page.browser.current_url)


def test_a_change_is_shown_before_it_is_sent_and_arrives(page, service):
    page.write("rollout.max_new_tokens", "128")
    assert not page.find("#apply-button").is_enabled()
    page.press("#preview-button")
    wait_until(lambda: "rollout.max_new_tokens: 256 → 128" in page.text("#answer"))
    assert service.store.generation == 1
    page.press("#apply-button")
    wait_until(lambda: "Saved as generation 2" in page.text("#answer"))
    assert service.store.in_force()[1].rollout.max_new_tokens == 128
    wait_until(lambda: "waits for the next step border" in page.text("#generation"))
    service.store.observe(2)
    wait_until(lambda: "Generation 2, in force" in page.text("#generation"))


def test_an_emptied_field_returns_to_the_job_files_value(page, service):
    service.patch({"rollout": {"top_k": 9}})
    wait_until(lambda: page.find("[name='rollout.top_k']").get_attribute("value") == "9")
    page.write("rollout.top_k", "")
    page.press("#preview-button")
    wait_until(lambda: "rollout.top_k: 9 → 0" in page.text("#answer"))


def test_a_setting_is_found_in_a_folded_group(page):
    page.find("#find-setting").send_keys("false alarms governor")
    wait_until(lambda: page.find("[name='governor.false_alarm_steps']").is_displayed())
    assert not page.find("[name='rollout.top_k']").is_displayed()


def test_a_refused_value_is_explained_at_its_field(page, service):
    page.write("rollout.top_p", "7")
    page.press("#preview-button")
    wait_until(lambda: "less than or equal to 1" in page.text("#field-rollout-top_p-error"))
    assert page.find("[name='rollout.top_p']").get_attribute("aria-invalid") == "true"
    assert page.browser.switch_to.active_element.get_attribute("name") == "rollout.top_p"
    assert not page.find("#apply-button").is_enabled()


def test_a_second_tabs_stale_edit_is_refused_and_explained(page, service, open_browser):
    other = Page(open_browser(), service)
    page.write("rollout.temperature", "0.7")
    other.write("rollout.top_k", "20")
    page.press("#preview-button")
    wait_until(lambda: "1 → 0.7" in page.text("#answer"))
    page.press("#apply-button")
    wait_until(lambda: service.store.generation == 2)
    other.press("#preview-button")
    wait_until(lambda: "somebody else changed the settings" in other.text("#answer"))
    assert "rollout.temperature: 1 → 0.7 (generation 2" in other.text("#answer")
    assert service.store.in_force()[1].rollout.top_k == 0
    other.press("#rebase-button")
    wait_until(lambda: other.find("[name='rollout.temperature']").get_attribute("value") == "0.7")
    assert other.find("[name='rollout.top_k']").get_attribute("value") == "20"
    other.press("#preview-button")
    wait_until(lambda: "rollout.top_k: 0 → 20" in other.text("#answer"))
    other.press("#apply-button")
    wait_until(lambda: service.store.generation == 3)
    rollout = service.store.in_force()[1].rollout
    assert (rollout.temperature, rollout.top_k) == (0.7, 20)


def test_the_page_reconnects_after_the_run_restarts_and_reads_everything_again(page, service):
    wait_until(lambda: page.value("length", "step") == 60)
    service.stop()
    wait_until(lambda: "Connection lost" in page.text("#connection"))
    service.run.records = service.run.records[:40]
    service.add_step(length_mean=77.0)
    service.start()
    wait_until(lambda: "Live" in page.text("#connection"))
    wait_until(lambda: page.value("length", "step") == 41)
    assert page.value("length", "length_mean") == 77.0
    assert "step 41 of 100" in page.text("#progress-text")


def test_decisions_are_marks_with_their_sentence_for_pointer_and_keyboard_and_a_list(page):
    from selenium.webdriver import ActionChains

    sentence = "p95 is 114 tokens: pressure up"
    mark = wait_until(lambda: page.find("#chart-length .event[aria-label^='Step 12']"))
    assert mark.get_attribute("aria-label") == f"Step 12: tighten: {sentence}"
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", mark)
    ActionChains(page.browser).move_to_element(mark).perform()
    wait_until(lambda: page.text("#tip") == f"Step 12: tighten: {sentence}")
    ActionChains(page.browser).move_to_element(page.find("h1")).perform()
    wait_until(lambda: not page.find("#tip").is_displayed())
    page.browser.execute_script("arguments[0].focus()", mark)
    wait_until(lambda: sentence in page.text("#tip"))
    lines = [line.text for line in page.browser.find_elements("css selector", "#decisions li")]
    assert lines[0] == "Step 60: tighten. p95 is 210 tokens: pressure up"
    assert lines[-1] == "Steps 1 to 10: hold. all signals within their targets: pressure stays 0.00"


def test_an_actor_that_died_is_a_mark_and_what_the_run_waits_for_stands_beside_its_phase(page, service):
    texts = wait_until(
        lambda: [mark.get_attribute("aria-label") for mark in page.browser.find_elements("css selector", "#chart-length .event")]
    )
    assert "Step 5: restarted: learner (crash)" in texts
    service.run.waiting_for = "teacher t: no actor answers"
    wait_until(lambda: page.text("#phase") == "running, waiting: teacher t: no actor answers")
    service.run.waiting_for = None
    wait_until(lambda: page.text("#phase") == "running")


def test_the_arrow_keys_read_single_steps(page):
    wait_until(lambda: page.value("length", "step") == 60)
    plot = page.find("#chart-length .plot")
    plot.send_keys("\ue012")  # left
    wait_until(lambda: page.value("length", "step") == 59)
    assert page.value("length", "length_mean") == 119.0
    plot.send_keys("\ue011")  # home
    wait_until(lambda: page.value("length", "step") == 1)
    plot.send_keys("\ue00c")  # escape
    wait_until(lambda: page.value("length", "step") == 60)


def test_a_sample_has_its_loop_marked(page):
    assert wait_until(lambda: page.text("#sample-response mark")) == "so 3, so 3, so 3"
    page.press("#older-sample")
    assert page.text("#sample-response") == "3 + 4 = 7, 7 + 5 = 12"


def test_verbs_reach_the_run_and_dangerous_ones_ask_first(page, service):
    page.press("[data-verb=pause]")
    wait_until(lambda: service.run.requested == ["pause"])
    page.press("[data-verb=stop]")
    page.press("#ask[open] [value=no]")
    page.press("[data-verb=stop]")
    page.press("#ask[open] [value=yes]")
    wait_until(lambda: service.run.requested == ["pause", "stop"])
    wait_until(lambda: "Asked to stop" in page.text("#verb-answer"))


@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1280, 900), ("phone", 390, 844)])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_its_screen_and_axe_finds_no_serious_fault(open_browser, service, tmp_path, name, width, height, dark):
    service.patch({"rollout": {"top_k": 20}})
    service.add_step(config_generation=2)
    page = Page(open_browser(width, height, dark), service)
    wait_until(lambda: page.value("length", "step") == 61)
    page.write("rollout.max_new_tokens", "128")
    page.press("#preview-button")
    wait_until(lambda: "256 → 128" in page.text("#answer"))
    page.browser.execute_script("scrollTo(0, 0)")
    print(page.screenshot(tmp_path / f"page-{name}-{'dark' if dark else 'light'}.png"))
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.faults() == []
