"""The page in Chromium, against a server whose supervisor makes nothing: submit, progress, play, cancel,
reload, restart, phone, keyboard, keys; without an error in the console and under its content policy.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fronts import FakeSupervisor, add_key, client_of, listening, make_front

from chitu_diffusion.service.front import Front
from chitu_diffusion.service.jobs import JobCheckpoint

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

CHROMIUM = Path("/usr/bin/chromium")
LEFT_OUT = "LEFT OUT: tests of the page, for {} is missing; {}"
POLICY = "Refused to|Content Security Policy"
PATIENCE_MS = 10_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip(
        "playwright.sync_api", reason=LEFT_OUT.format("Playwright", "pip install playwright")
    )
    if not CHROMIUM.exists():
        pytest.skip(LEFT_OUT.format(CHROMIUM, "as root: apt-get install chromium"))
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield browser
        browser.close()


class Site:
    """A server that can end and come again at its address; its supervisor works when the test says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self.start()

    def start(self) -> None:
        self._stack = ExitStack()
        self.front: Front = make_front(self.folder)
        self.url = self._stack.enter_context(listening(self.front, port=self.port))
        self.port = int(self.url.rpartition(":")[2])
        self.supervisor = FakeSupervisor(self.front, clip())

    def stop(self) -> None:
        self._stack.close()
        self.front.store.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path / "data")
    yield site
    site.stop()


@pytest.fixture
def complaints() -> list[str]:
    """What the console said in warning, in error, and of exceptions."""
    return []


@pytest.fixture
def page(browser: Browser, site: Site, complaints: list[str]) -> Iterator[Page]:
    with opened(browser, site, complaints) as page:
        yield page


class opened:
    """A page that is ready for its user, closed at the end."""

    def __init__(self, browser: Browser, site: Site, complaints: list[str], **how: Any) -> None:
        self._page = browser.new_page(**how)
        self._page.set_default_timeout(PATIENCE_MS)
        self._page.on("pageerror", lambda error: complaints.append(str(error)))
        self._page.on(
            "console",
            lambda said: said.type in ("error", "warning") and complaints.append(f"{said.type}: {said.text}"),
        )
        self._page.goto(site.url)

    def __enter__(self) -> Page:
        return self._page

    def __exit__(self, *error: object) -> None:
        self._page.close()


def clip() -> bytes:
    """A second of H.264, as videos here are."""
    import av
    import numpy

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        for shade in range(0, 240, 30):
            picture = numpy.full((48, 64, 3), shade, numpy.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def ask(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Make video").click()
    page.locator("#queue, #live").get_by_text(prompt).wait_for()


def test_a_video_from_its_prompt_to_its_player(page: Page, site: Site, complaints: list[str]) -> None:
    page.get_by_label("Draft").check()
    page.locator("#estimate strong").wait_for()
    assert re.search(r"33 frames, 20 steps", page.locator("#estimate").inner_text())
    assert all(re.search(r"\d+ (s|min)", text) for text in page.locator("#presets small").all_inner_texts())
    page.get_by_role("button", name="Draw a seed").click()
    ask(page, "a red ball rolls")
    page.get_by_label("place 1 in the queue").wait_for()
    lease = site.supervisor.claim()
    site.front.store.leases.checkpoint(lease, JobCheckpoint("x", 5, "0" * 64, 1))
    site.front.store.leases.worker_lost(lease)
    lease = site.supervisor.claim()
    site.supervisor.step(lease, 7, 20)
    page.get_by_text("Step 7 of 20").wait_for()
    page.get_by_text("Resumed from step 5").wait_for()
    assert client_of(site.front).get(f"/v1/videos/{lease.job}").json()["resumed_from"] == 5
    assert page.get_by_role("progressbar").get_attribute("value") == "35"
    assert re.search(r"\d s left|almost", page.locator("#live").inner_text())
    site.supervisor.complete(lease)
    video = page.locator("#gallery video")
    video.scroll_into_view_if_needed()
    video.evaluate("video => video.play()")
    video.evaluate(
        "video => new Promise(played => video.ontimeupdate = () => video.currentTime > 0.2 && played())"
    )
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert Path(download.value.path()).read_bytes() == site.supervisor.video
    job = site.front.store.job(lease.job)
    assert (
        job.resolved["num_inference_steps"] == 20
        and str(job.seed) == page.get_by_label("Seed", exact=True).input_value()
    )
    assert complaints == []


def test_what_the_page_asks_the_interface_for(site: Site) -> None:
    client = client_of(site.front)
    model = client.get("/v1/models").json()["data"][0]
    assert "teacache" in model["caches"] and "wan-tiny-4step" in model["loras"]
    made = client.post("/v1/videos", json={"prompt": "a ball", "seed": 3, "flexcache": "teacache"}).json()
    assert made["request"] == {"prompt": "a ball", "seed": 3, "flexcache": "teacache"}
    lease = site.supervisor.claim()
    assert client.get(f"/v1/videos/{made['id']}").json()["preview_url"] is None
    for step in (8, 12):
        file = site.front.data / "jobs" / lease.job / str(lease.fence) / f"preview-{step}.webp"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"webp")
    url = client.get("/v1/videos").json()["data"][0]["preview_url"]
    assert url.endswith("step=12") and client.get(url).content == b"webp"


def test_the_policy_lets_the_pages_own_script_run_and_no_other(page: Page, complaints: list[str]) -> None:
    page.get_by_text("Nothing here yet").wait_for()
    assert complaints == []
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.bad = 1'}));"
        "document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))"
    )
    assert page.evaluate("window.bad === undefined && [...document.scripts].every(each => !each.src)")
    page.wait_for_timeout(100)
    assert len(complaints) == 2 and all(re.search(POLICY, said) for said in complaints)


def test_cancel_reload_restart_and_continue(page: Page, site: Site, complaints: list[str]) -> None:
    ask(page, "first")
    ask(page, "second")
    page.get_by_role("button", name="Move up: second").click()
    page.get_by_label("place 1 in the queue").locator("..").get_by_text("second").wait_for()
    page.get_by_role("button", name="Cancel: first").click()
    page.locator("#gallery").get_by_text("first").wait_for()
    lease = site.supervisor.claim()
    site.supervisor.step(lease, 1, 2)
    page.get_by_role("button", name="Cancel: second").click()
    page.get_by_role("button", name="Stopping").wait_for()
    site.front.store.leases.cancelled(lease)
    page.locator("#gallery").get_by_text("second").wait_for()
    page.get_by_label("Steps").fill("12")
    page.reload()
    page.locator("#gallery").get_by_text("second").wait_for()
    assert page.get_by_label("Steps").input_value() == "12"
    assert complaints == []
    site.stop()
    page.get_by_text("Reconnecting").wait_for()
    page.get_by_label("Prompt", exact=True).fill("third")
    page.get_by_role("button", name="Make video").click()
    page.get_by_role("button", name="Waiting for the server").wait_for()
    site.start()
    page.locator("#queue").get_by_text("third").wait_for()
    lease = site.supervisor.claim()
    site.supervisor.step(lease)
    site.front.store.leases.hold(lease)
    page.get_by_text("Held at step 1").wait_for()
    page.get_by_role("button", name="Continue: third").click()
    page.locator("#queue").get_by_text("third").wait_for()
    site.supervisor.make()
    page.locator("#gallery").get_by_text("third").wait_for()
    assert len(client_of(site.front).get("/v1/videos").json()["data"]) == 3


def test_what_is_typed_before_the_model_is_known_stays(page: Page, complaints: list[str]) -> None:
    page.locator("#estimate strong").wait_for()
    page.get_by_label("Steps").fill("12")
    asked: list[Route] = []
    page.route("**/v1/models", lambda route: asked.append(route))
    with page.expect_request("**/v1/models"):
        page.reload()
    page.get_by_label("Prompt", exact=True).fill("a boat")
    assert page.get_by_label("Draft").is_disabled() and complaints == []
    asked[0].continue_()
    page.locator("#estimate strong").wait_for()
    assert page.get_by_label("Prompt", exact=True).input_value() == "a boat"
    assert page.get_by_label("Steps").input_value() == "12" and complaints == []


def test_by_keyboard_alone(page: Page, site: Site, complaints: list[str]) -> None:
    page.locator("#estimate strong").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the videos"
    names = []
    while page.evaluate("document.activeElement.id") != "prompt":
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.getAttribute('aria-label') ?? ''"))
    assert "Colours: auto" in names
    page.keyboard.type("a boat")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    assert page.get_by_label("Balanced").is_checked()
    page.keyboard.press("Control+Enter")
    page.locator("#queue").get_by_text("a boat").wait_for()
    site.supervisor.make()
    page.locator("#gallery").get_by_text("a boat").wait_for()
    page.get_by_role("button", name="Remix: a boat").focus()
    page.keyboard.press("Enter")
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Control+A")
    page.keyboard.type("a blue boat")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#queue").get_by_text("a blue boat").wait_for()
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, a, input, select, textarea, video, progress')].filter(each =>"
        " each.checkVisibility() && !each.labels?.length && !each.textContent.trim()"
        " && !each.getAttribute('aria-label') && !each.getAttribute('aria-labelledby'))"
        ".map(each => each.outerHTML)"
    )
    assert unnamed == [] and complaints == []


def test_on_a_phone_with_settings_used_again_and_two_compared(
    browser: Browser, site: Site, complaints: list[str]
) -> None:
    client = client_of(site.front)
    for prompt in ("one", "two"):
        asked = {"prompt": prompt, "seed": 5, "flexcache": "teacache", "negative_prompt": "dark"}
        assert client.post("/v1/videos", json=asked).status_code == 200
        site.supervisor.make()
    with opened(browser, site, complaints, viewport={"width": 390, "height": 844}, has_touch=True) as page:
        page.get_by_role("button", name="Use these settings: one").tap()
        assert page.get_by_label("Cache").input_value() == "teacache"
        assert page.get_by_label("Negative prompt").input_value() == "dark"
        assert page.get_by_label("Seed", exact=True).input_value() == "5"
        page.get_by_role("button", name="Compare: one").tap()
        page.get_by_role("button", name="Compare: two").tap()
        page.get_by_label("Where the first").fill("20")
        assert "20%" in page.locator(".versus video").nth(1).evaluate("video => video.style.clipPath")
        page.get_by_role("button", name="Close").tap()
        wide = "document.documentElement.scrollWidth"
        assert page.evaluate(wide) == 390
        page.get_by_label("Colours").tap()
        page.get_by_label("Colours").tap()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert complaints == []


def test_a_video_to_start_from_goes_with_its_strength(page: Page, site: Site, complaints: list[str]) -> None:
    file = {"name": "mine.mp4", "mimeType": "video/mp4", "buffer": site.supervisor.video}
    page.get_by_label("Start from a video").set_input_files(file)  # type: ignore[arg-type]
    page.get_by_text("mine.mp4").wait_for()
    page.get_by_label("Strength").fill("0.5")
    ask(page, "a green ball")
    job = site.front.store.jobs("local").jobs[0]
    assert (job.resolved["strength"], job.resolved["video"]["frames"]) == (0.5, 8)
    page.get_by_role("button", name="Remove").click()
    page.get_by_text("Drop a video here").wait_for()
    assert complaints == []


def test_a_value_that_cannot_be_is_told_at_its_field(page: Page) -> None:
    page.locator("#estimate strong").wait_for()
    page.get_by_role("button", name="Make video").click()
    assert "prompt" in page.get_by_role("alert").inner_text()
    page.get_by_label("Seconds").fill("much")
    page.locator("#estimate .fault").wait_for()
    assert page.get_by_label("Seconds").get_attribute("aria-invalid") == "true"


def test_a_key_is_asked_for_and_becomes_a_session(
    browser: Browser, site: Site, complaints: list[str]
) -> None:
    key = add_key(site.front, "ann")
    with opened(browser, site, complaints) as page:
        page.get_by_label("Key", exact=True).fill("ck_no_key")
        page.get_by_role("button", name="Open").click()
        page.get_by_text("no such key").wait_for()
        page.get_by_label("Key", exact=True).fill(key)
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Sign out").wait_for()
        ask(page, "mine")
        assert site.front.store.jobs("ann").jobs and "ck_" not in page.evaluate("document.cookie")
        page.get_by_role("button", name="Sign out").click()
        page.get_by_label("Key", exact=True).wait_for()
        assert complaints and all("401" in said for said in complaints)
