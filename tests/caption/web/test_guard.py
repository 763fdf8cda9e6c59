"""Who may talk to the page, and what it loads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser

import httpx
import pytest

from casa_train.caption.web.address import bind
from casa_train.caption.web.running import page as render_page
from casa_train.errors import UserError
from tests.helpers.caption_page import OWN, Page, StandIn, serving

FIELDS = '{"source": {"camera": true}}'


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with serving(StandIn()) as found:
        yield found


@pytest.fixture(scope="module")
def asking() -> Iterator[Page]:
    """One that other machines reach."""
    with serving(StandIn(), host="0.0.0.0") as found:
        yield found


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_name_of_somebody_elses_reaches_nothing(page: Page, host: str) -> None:
    # A website's own name that it lets resolve to 127.0.0.1.
    for path in ("/", "/state"):
        answer = page.client.get(path, headers={"Host": host})
        assert answer.status_code == 403, path
        assert "is not this server" in answer.json()["error"]


@pytest.mark.parametrize("host", ["localhost:1234", "127.0.0.1", "[::1]:9", "LOCALHOST"])
def test_this_machine_has_its_names_at_any_port(page: Page, host: str) -> None:
    # A tunnel ends at another port than the server's.
    assert page.client.get("/state", headers={"Host": host}).status_code == 200


def test_forms_and_scripts_of_other_sites_start_nothing(page: Page) -> None:
    plain = httpx.Client(base_url=page.url)
    assert plain.post("/streams", content=FIELDS).status_code == 403
    for origin in ("https://evil.example", "null", f"http://evil@{page.url[7:]}"):
        answer = plain.post("/streams", content=FIELDS, headers={**OWN, "Origin": origin})
        assert answer.status_code == 403, origin
    assert page.client.get("/state").json()["streams"] == []
    own = plain.post("/streams", content=FIELDS, headers={**OWN, "Origin": page.url})
    assert own.status_code == 201
    page.client.post(f"/streams/{own.json()['id']}/stop")


def test_behind_a_proxy_the_page_works_with_a_token() -> None:
    with serving(StandIn(), token="open-sesame-7") as page:
        # One that keeps the name by which it was called, and one that puts its own in its place.
        site = {"Origin": "https://lab.example", "Sec-Fetch-Site": "same-origin"}
        for host in ("lab.example", page.url[7:]):
            headers = {**OWN, **site, "Host": host}
            answer = httpx.post(
                f"{page.url}/streams?token=open-sesame-7", content=FIELDS, headers=headers
            )
            assert answer.status_code == 201, answer.text
            page.client.post(f"/streams/{answer.json()['id']}/stop?token=open-sesame-7")
            headers["Sec-Fetch-Site"] = "same-site"
            answer = httpx.post(
                f"{page.url}/streams?token=open-sesame-7", content=FIELDS, headers=headers
            )
            assert answer.status_code == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_may_link_to_the_page_and_embed_nothing(page: Page, site: str) -> None:
    header = {"Sec-Fetch-Site": site}
    assert page.client.get("/", headers=header).status_code == 200
    assert page.client.get("/state", headers=header).status_code == 403
    headers = page.client.get("/").headers
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in headers
    preflight = page.client.options("/streams", headers={"Origin": "https://evil.example"})
    assert preflight.status_code == 403


def test_nothing_is_answered_without_the_token(asking: Page) -> None:
    assert asking.token is not None and len(asking.token) >= 32
    wrong = ["", "?token=", "?token=" + asking.token[:-1], f"?token={asking.token}x", "?token=%FF"]
    for query in wrong:
        for path in ("/", "/state", "/videos/x", "/streams/x/events", "/no such"):
            assert asking.client.get(path + query).status_code == 401, path + query
        for path in ("/streams", "/uploads", "/streams/x/stop"):
            assert asking.client.post(path + query, content=b"x").status_code == 401
    cookies = {"Cookie": "casa_caption_00000000=" + asking.token}
    assert asking.client.get("/state", headers=cookies).status_code == 401


def test_the_printed_address_opens_the_page_and_then_a_cookie_does(asking: Page) -> None:
    with httpx.Client(base_url=asking.url) as browser:
        answer = browser.get("/", params={"token": asking.token or "", "more": "1"})
        assert (answer.status_code, answer.headers["Location"]) == (303, "/?more=1")
        cookie = answer.headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=lax" in cookie
        assert browser.get("/").status_code == 200
        assert browser.get("/state").status_code == 200
    # By any name: nobody else's page has the cookie.
    named = {"Host": "gpu-box.example:8765"}
    assert httpx.get(f"{asking.url}/state?token={asking.token}", headers=named).status_code == 200


def test_a_token_of_ones_own_is_asked_for_on_this_machine_too() -> None:
    with serving(StandIn(), token="open-sesame-7") as page:
        assert page.client.get("/state").status_code == 401
        assert page.client.get("/state?token=open-sesame-7").status_code == 200
    for token, found in (
        ("short", "5 characters"),
        ("mit Leerzeichen", "ASCII"),
        ("äöüäöüäöü", "ASCII"),
    ):
        with pytest.raises(UserError, match=found):
            bind("127.0.0.1", 0, token)


class Loaded(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "action", "data")]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    html = render_page()
    parser = Loaded()
    parser.feed(html)
    assert parser.found == ["data:,"]  # its icon, which is none
    assert set(re.findall(r"\w+://[^\s\"'`]*", html)) <= {"http://www.w3.org/2000/svg"}
    policy = re.findall('Content-Security-Policy" content="(.*?)">', html)[0]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data: 'self';")
    assert "connect-src 'self'; media-src 'self'; script-src 'sha256-" in policy
    assert "innerHTML" not in html
