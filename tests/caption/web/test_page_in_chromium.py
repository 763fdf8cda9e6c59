"""The page in a real Chromium: a video that plays, one that it cannot play, an upload, a camera."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from casa_train.caption.web.limits import Limits
from tests.helpers.caption_page import Page, StandIn, serving, write_video
from tests.helpers.chromium import Browser, Tab, chromium, find_chromium

pytestmark = [pytest.mark.slow, pytest.mark.fresh]
STATUS = "document.getElementById('status').textContent"
SAID = "document.getElementById('captions').innerText"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Without it CI fails and anything else skips."""
    program = find_chromium()
    if program is None:
        reason = "chromium not found: install the package chromium"
        if os.environ.get("CI_REQUIRED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with chromium(program) as found:
        yield found


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    # VP8, which every Chromium plays, and MPEG-4 part 2 in an AVI, which none does.
    write_video(folder / "ball.webm", 8.0, "libvpx", (320, 180))
    write_video(folder / "old.avi", 8.0, "mpeg4", (320, 180))
    return folder


@pytest.fixture(scope="module")
def page(videos: Path) -> Iterator[Page]:
    limits = Limits(nobody=2.0, upload_bytes=1_000_000)
    with serving(StandIn(seconds=0.02), limits, videos) as found:
        yield found


@pytest.fixture
def tab(browser: Browser, page: Page) -> Iterator[Tab]:
    found = browser.tab(page.url)
    found.wait("document.querySelector('select[name=video]').options.length === 2")
    yield found
    found.call("Page.close")
    assert not found.complaints


def choose(tab: Tab, kind: str) -> None:
    tab.click(f"[name=kind][value={kind}]")


def play(tab: Tab, video: str, words: str) -> None:
    tab.run(f"document.querySelector('select[name=video]').value = '{video}'")
    tab.click("button.main")
    tab.wait(f"{STATUS}.startsWith('{video}') && {SAID}.includes('{words}')")


def another_viewer(browser: Browser, tab: Tab, page: Page) -> Tab:
    """A second tab on the stream that ``tab`` shows.

    Streams of the tests before may still be listed above it: one ends two seconds after its last
    viewer went.
    """
    other, stream = browser.tab(page.url), tab.run("location.hash")
    # In one go: the list is drawn anew every few seconds.
    link = f"document.querySelector('#streams a[href=\"{stream}\"]')"
    other.wait(f"(() => {{ const link = {link}; link?.click(); return link !== null; }})()")
    return other


def test_a_video_plays_with_its_captions_and_is_paused_and_stopped(tab: Tab) -> None:
    tab.run("document.querySelector('[name=prompt]').value = 'Say <b>what</b> rolls'")
    play(tab, "ball.webm", "a red ball")
    tab.wait("document.getElementById('overlay').innerText.includes('ball')")
    times = (
        "[document.getElementById('video').currentTime,"
        " parseFloat(document.getElementById('time').textContent.slice(2))]"
    )
    shown, clock = tab.run(times)
    assert shown > 0.5 and abs(shown - clock) < 1.2  # beside the clock
    tab.wait("document.querySelectorAll('#stage polyline').length === 3")
    for name in ("lag", "cache", "memory"):
        assert tab.run(f"document.getElementById('now-{name}').textContent") != "–"
    tab.run(  # what the clock says in the moment in which the page says that the stream is paused
        "window.stood = new Promise((done) => new MutationObserver((_, watch) => {"
        f" if ({STATUS} === 'ball.webm paused') {{ watch.disconnect(); done({times}[1]); }}"
        " }).observe(document.getElementById('status'), { childList: true })), null"
    )
    tab.click("#pause")
    tab.wait(f"{STATUS} === 'ball.webm paused' && document.getElementById('video').paused")
    shown, clock = tab.run(times)
    assert tab.run("window.stood") == clock
    tab.run("new Promise((done) => setTimeout(done, 700))")
    assert tab.run(times) == [shown, clock]
    tab.click("#pause")
    tab.wait("!document.getElementById('video').paused")
    tab.wait(f"{times}[0] > {shown} + 0.3")
    tab.click("#stop")
    tab.wait(f"{STATUS} === 'ball.webm stopped' && document.getElementById('video').paused")
    assert tab.run("document.getElementById('notice').hidden")


def test_a_second_viewer_joins_and_does_not_end_it(browser: Browser, tab: Tab, page: Page) -> None:
    play(tab, "ball.webm", "a red")
    other = another_viewer(browser, tab, page)
    other.wait(f"{SAID}.includes('a red ball rolls')")
    other.wait("document.getElementById('video').currentTime > 1")
    tab.wait("document.getElementById('now-viewers').textContent === '2'")
    other.call("Page.close")
    assert not other.complaints
    tab.wait("document.getElementById('now-viewers').textContent === '1'")
    tab.wait(f"{STATUS} === 'ball.webm over'")
    assert tab.run(SAID).split()[1:9] == "a red ball rolls to the left .".split()


def test_an_address_opens_a_stream_younger_than_the_page_and_says_if_it_is_over(
    tab: Tab, page: Page
) -> None:
    stream = page.start({"video": "ball.webm"})
    tab.run(f"location.hash = '{stream}'")
    tab.wait(f"{SAID}.includes('a red')")
    page.client.post(f"/streams/{stream}/stop")
    tab.wait(f"{STATUS} === 'ball.webm stopped'")
    tab.run("location.hash = '0123456789abcdef'")
    tab.wait("document.getElementById('notice').textContent.includes('is over')")
    assert tab.run("document.getElementById('stage').hidden && !location.hash")


def test_an_upload_that_the_browser_cannot_play_shows_its_frames(
    tab: Tab, page: Page, videos: Path, tmp_path: Path
) -> None:
    choose(tab, "upload")
    tab.click("button.main")
    tab.wait("document.getElementById('notice').textContent === 'Choose a file first.'")
    (tmp_path / "notes.mp4").write_text("no film\n" * 1000)
    tab.call("DOM.enable")
    tab.choose_file("[name=file]", tmp_path / "notes.mp4")
    tab.click("button.main")
    tab.wait("document.getElementById('notice').textContent.includes('no video by its content')")
    tab.complaints.clear()  # Chromium's own word on the answer 400
    (tmp_path / "large.mp4").write_bytes(bytes(1_000_001))
    tab.choose_file("[name=file]", tmp_path / "large.mp4")
    tab.click("button.main")
    tab.wait("document.getElementById('notice').textContent.includes('--max-upload')")
    tab.choose_file("[name=file]", videos / "old.avi")
    tab.click("button.main")
    tab.wait(f"{STATUS}.startsWith('old.avi') && {SAID}.includes('a red ball')")
    tab.wait("document.getElementById('video').hidden")
    tab.wait("document.getElementById('picture').naturalWidth > 0")
    assert tab.run("document.getElementById('notice').hidden")


def test_a_camera_is_captioned_and_another_viewer_sees_its_frames(
    browser: Browser, tab: Tab, page: Page
) -> None:
    choose(tab, "camera")
    tab.click("button.main")
    tab.wait(f"{STATUS} === 'camera plays' && {SAID}.includes('a red ball')")
    assert tab.run("document.getElementById('video').videoWidth") > 0
    other = another_viewer(browser, tab, page)
    other.wait("document.getElementById('picture').naturalWidth > 0")
    other.call("Page.close")
    tab.click("#stop")
    tab.wait(f"{STATUS} === 'camera stopped'")
    # Its light goes out.
    tracks = "document.getElementById('video').srcObject.getTracks()"
    tab.wait(f"{tracks}.length && {tracks}.every((track) => track.readyState === 'ended')")


def test_a_page_that_is_closed_ends_its_stream(browser: Browser, page: Page) -> None:
    tab = browser.tab(page.url)
    tab.wait("document.querySelector('select[name=video]').options.length === 2")
    play(tab, "ball.webm", "a red")
    assert page.client.get("/state").json()["streams"]
    tab.call("Page.close")
    other = browser.tab(page.url)
    other.wait("fetch('/state').then((a) => a.json()).then((s) => !s.streams.length)", 15)


def test_the_printed_address_with_a_token_opens_all_of_it(browser: Browser, videos: Path) -> None:
    with serving(StandIn(), videos=videos, host="0.0.0.0") as page:
        tab = browser.tab(f"{page.url}/?token={page.token}")
        tab.wait("document.querySelector('select[name=video]').options.length === 2")
        assert tab.run("location.search") == ""
        play(tab, "ball.webm", "a red")
        tab.wait("document.getElementById('video').currentTime > 0.3")
        assert not tab.complaints
        tab.call("Page.close")


@pytest.mark.parametrize("width, height", [(1280, 900), (360, 780)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(
    tab: Tab, width: int, height: int, scheme: str, tmp_path: Path
) -> None:
    tab.look(width, height, scheme)
    tab.click("summary")
    play(tab, "ball.webm", "a red")
    tab.wait("document.querySelectorAll('#stage polyline').length === 3")
    tab.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    # Words and what they stand on.
    colours = tab.run(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        ".map((c) => c.match(/\\d+/g).reduce((a, b) => a + Number(b), 0) / 765)"
    )
    assert abs(colours[0] - colours[1]) > 0.7
    assert (colours[1] < 0.5) == (scheme == "dark")
    tab.click("#stop")
