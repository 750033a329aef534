"""The browser demo in Chromium against the real server: loads under its own security policy, hears, and captions.

The screenshot of the documentation is taken on the way where ANTIPHON_SCREENSHOT names a file for it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jiwer
import pytest

import antiphon

from ..conftest import SAMPLE

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SAID = (
    "it was the best of times it was the worst of times it was the age of wisdom it was the age of foolishness "
    "it was the epoch of belief it was the epoch of incredulity"
)
UNKNOWN = "\N{EN DASH}"  # a figure that has not come


class Visit:
    """A page that notes what must not happen."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.page = browser.new_page(viewport={"width": 1360, "height": 1080}, **options)
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        response = self.page.goto(address)
        self.policy = response.headers.get("content-security-policy", "")

    def shows(self, selector: str, seconds: float = 30) -> None:
        self.page.wait_for_selector(selector, timeout=1000 * seconds)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_loads_alone(browser: Any, parrot_server: str, scheme: str) -> None:
    visit = Visit(browser, parrot_server, color_scheme=scheme)
    page = visit.page
    page.wait_for_function("() => document.getElementById('model').textContent.includes('parameters')")
    page.wait_for_function("() => document.getElementById('pipeline').shadowRoot.querySelector('svg')")
    assert "default-src 'self'" in visit.policy
    assert "unsafe" not in visit.policy
    assert visit.complaints == []
    assert visit.hosts == {urlsplit(parrot_server).netloc}
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, select, input, meter, canvas, video')].filter(
        (one) => !(one.ariaLabel || one.textContent.trim() || one.labels?.length)).map((one) => one.outerHTML)"""
    )
    assert nameless == []
    page.close()


def test_a_call_is_captioned(browser: Any, parrot_server: str, tmp_path: Path) -> None:
    visit = Visit(browser, parrot_server, color_scheme="light")
    page = visit.page
    page.keyboard.press("c")
    visit.shows("#state[data-state=connected]")
    visit.shows(".turn-row", 60)
    page.wait_for_function(
        """(count) => [...document.querySelectorAll('#finals li:not(.said) > span')]
        .map((one) => one.textContent).join(' ').split(' ').length >= count""",
        arg=len(SAID.split()),
        timeout=60000,
    )
    heard = " ".join(page.locator("#finals li:not(.said) > span").all_inner_texts())
    words = heard.split()[: len(SAID.split())]
    finals = [caption for caption in antiphon.transcribe(SAMPLE) if isinstance(caption, antiphon.Final)]
    alone = [word.text for final in finals for word in final.words][: len(words)]
    # Four words of 36: the browser's clip begins anywhere in a block, and has been through Opus.
    assert jiwer.wer(SAID, " ".join(words)) <= jiwer.wer(SAID, " ".join(alone)) + 0.12
    assert page.locator("#problem").is_hidden()
    page.wait_for_function("() => document.getElementById('level').value > 0.3")
    page.wait_for_function("() => document.getElementById('reply-level').value > 0.3")
    assert UNKNOWN not in page.locator("#stats dd").all_inner_texts()
    if "ANTIPHON_SCREENSHOT" in os.environ:
        page.screenshot(path=os.environ["ANTIPHON_SCREENSHOT"])

    with page.expect_download() as saving:
        page.click("#save-vtt")
    saved = tmp_path / "captions.vtt"
    saving.value.save_as(saved)
    assert saved.read_text().startswith("WEBVTT\n\n1\n00:00:0")

    page.fill("#filter", "turn_end")
    assert page.locator("#log details:visible .type").first.inner_text() == "turn_end"
    assert set(page.locator("#log details:visible .type").all_inner_texts()) == {"turn_end"}

    page.click("#connect")
    visit.shows("#state[data-state=closed]")
    assert visit.complaints == []
    assert visit.hosts == {urlsplit(parrot_server).netloc}
    page.close()


def test_an_answer_counts_from_the_caption_to_its_first_sound(browser: Any, parrot_server: str) -> None:
    page = Visit(browser, parrot_server).page
    rows = page.evaluate(
        """async () => {
        const { Latency } = await import("/js/latency.js");
        const latency = new Latency();
        let now = 1000;
        performance.now = () => now;
        const rows = () => [...document.querySelectorAll(".turn-row")].map((row) => row.textContent);
        const turn = () => { latency.turn({ heard: now - 500, waited: 500, rtt: 0, jitter: 20 }); latency.final(); };
        latency.reply(0.5); // of an answer before
        turn();
        now += 100; latency.reply(0.5); // still that one
        now += 300; latency.reply(0); latency.reply(0.5);
        now += 300; latency.reply(0.5); // of the same answer
        turn(); latency.speech();
        now += 400; latency.reply(0.5); // no answer: who speaks now has interrupted
        return rows();
        }"""
    )
    assert rows == ["#1920 ms", "#2520 ms"]
    page.close()


def test_what_goes_wrong_is_said_in_plain_words(browser: Any, parrot_server: str) -> None:
    visit = Visit(browser, parrot_server)
    page = visit.page
    page.route("**/rtc/offer", lambda route: route.fulfill(status=503, body="{}"))
    page.click("#connect")
    visit.shows("#problem:not([hidden])")
    assert "full" in page.inner_text("#problem")
    assert page.get_attribute("#state", "data-state") == "closed"
    page.close()


def test_a_call_that_was_cut_comes_back(browser: Any, parrot_server: str) -> None:
    """The page closes a data channel that the network took, and goes on with the same call."""
    visit = Visit(browser, parrot_server)
    page = visit.page
    page.evaluate(
        """() => { const create = RTCPeerConnection.prototype.createDataChannel;
        RTCPeerConnection.prototype.createDataChannel = function (...given) {
          return (globalThis.channel = create.apply(this, given)); } }"""
    )
    answers: list[Any] = []
    page.on("response", lambda got: got.url.endswith("/rtc/offer") and answers.append(got))
    page.click("#connect")
    visit.shows("#state[data-state=connected]")
    visit.shows("#partial:not([hidden]), #finals li")
    page.evaluate("globalThis.first = channel, channel.dispatchEvent(new Event('close'))")
    page.wait_for_function(
        "() => globalThis.first !== globalThis.channel && channel.readyState === 'open'", timeout=20000
    )
    visit.shows("#state[data-state=connected]")
    assert [answer.status for answer in answers] == [201, 201]
    assert answers[0].json()["call"] == answers[1].json()["call"]
    assert page.locator("#problem").is_hidden()
    page.close()
