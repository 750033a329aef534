"""Camera and screen of the page in Chromium: pictures of the right size, and what is in them, reach the graph."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import uvicorn

from antiphon.apps.serve.app import create_app
from antiphon.apps.serve.server import configure
from antiphon.pipelines.chunk import Chunk, Event
from antiphon.pipelines.graph import Graph
from antiphon.pipelines.stage import Context, Inlet, Input, stage
from antiphon.pipelines.stages.scenes import Scenes
from antiphon.transport.guard import Rules
from antiphon.transport.service import Service
from antiphon.transport.webrtc.peer import PICTURE_SIDE

from .running import chromium

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CAMERA = (640, 360)
FRAMES_A_SECOND = 5
DARK, BRIGHT = 40, 220  # luma of the camera's two scenes, each two seconds long
TITLE = "Antiphon"


@stage(name="web_video_test_hears")
async def hears(ctx: Context, audio: Input) -> AsyncIterator[Chunk]:
    """Says when it first hears something."""
    async for chunk in audio:
        if chunk.start == 0:
            yield Event(name="heard", rate=chunk.rate)


def deaf_to_pictures(options: Mapping[str, Any]) -> Graph:
    return Inlet().named("audio") >> hears()


def looking(options: Mapping[str, Any]) -> Graph:
    return deaf_to_pictures(options) | (Inlet().named("video") >> Scenes())


class NoEngine:
    """The stages here need no model."""

    def metrics_text(self) -> str:
        return ""


@contextmanager
def serving(graph: Callable[[Mapping[str, Any]], Graph]) -> Iterator[str]:
    """The whole application in a thread; its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    app = create_app(Service(graph, NoEngine(), name="looking"), Rules(rate=1000, burst=1000), info={"model": "none"})
    server = uvicorn.Server(configure(app, host="127.0.0.1", port=port))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the camera sees: two seconds of dark, two of bright, over and over."""
    path = tmp_path_factory.mktemp("film") / "film.y4m"
    with av.open(str(path), "w", format="yuv4mpegpipe") as sink:
        stream: Any = sink.add_stream("wrapped_avframe", rate=FRAMES_A_SECOND)
        stream.width, stream.height = CAMERA
        stream.pix_fmt = "yuv420p"
        for number in range(4 * FRAMES_A_SECOND):
            luma = DARK if number < 2 * FRAMES_A_SECOND else BRIGHT
            frame = av.VideoFrame.from_ndarray(np.full((*CAMERA[::-1], 3), luma, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FRAMES_A_SECOND)
            sink.mux(stream.encode(frame))
        sink.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module", name="chromium")
def with_a_film(film: Path) -> Iterator[Any]:
    title = f"--auto-select-tab-capture-source-by-title={TITLE}"
    with chromium(title, f"--use-file-for-fake-video-capture={film}") as browser:
        yield browser


class Figures:
    """The picture's figures on the page."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def until(self, label: str, holds: str) -> None:
        """Wait until ``holds``, JavaScript about ``text``, is true of a figure without its unit."""
        self.page.wait_for_function(
            f"""() => {{ const cell = [...document.querySelectorAll('#picture-figures div')]
            .find((one) => one.querySelector('dt').textContent === '{label}').querySelector('dd');
            const text = cell.firstChild.textContent; return {holds}; }}""",
            timeout=30000,
        )

    def until_size(self, label: str, width: int, height: int) -> None:
        """Wait for a picture's size."""
        self.until(label, f"text === '{width}\N{MULTIPLICATION SIGN}{height}'")


def test_pictures_of_camera_and_screen_arrive(chromium: Any) -> None:
    with serving(looking) as address:
        page = chromium.new_page(viewport={"width": 1280, "height": 1100})
        figures = Figures(page)
        complaints: list[str] = []
        page.on("console", lambda said: said.type in ("error", "warning") and complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#camera:not([hidden])")
        page.click("#connect")
        page.wait_for_selector("#state[data-state=connected]")

        page.click("#camera")
        for label in ("Sent", "Arrived", "Looked at"):
            figures.until_size(label, *CAMERA)
        assert page.evaluate("[preview.videoWidth, preview.videoHeight]") == list(CAMERA)
        assert page.get_attribute("#camera", "aria-pressed") == "true"
        for luma in (DARK, BRIGHT):  # what is in them arrives too
            figures.until("Brightness", f"Math.abs(text / 100 - {luma} / 255) < 0.05")
        figures.until("Scene changes", "text >= 2")

        page.click("#screen")
        page.wait_for_function(f"() => preview.videoWidth > 0 && preview.videoWidth !== {CAMERA[0]}", timeout=30000)
        shared = page.evaluate("[preview.videoWidth, preview.videoHeight]")
        scale = min(1, PICTURE_SIDE / max(shared))
        figures.until_size("Arrived", *shared)
        figures.until_size("Looked at", *(round(side * scale) for side in shared))
        assert page.get_attribute("#camera", "aria-pressed") == "false"
        assert page.get_attribute("#screen", "aria-pressed") == "true"

        page.click("#screen")
        figures.until("Sent", "text === 'nothing'")
        assert page.is_hidden("#preview")
        assert page.is_hidden("#problem")
        assert complaints == []
        page.close()


def test_where_the_graph_takes_no_pictures_none_are_offered(chromium: Any) -> None:
    with serving(deaf_to_pictures) as address:
        page = chromium.new_page()
        page.goto(address)
        page.wait_for_function("() => document.getElementById('model').textContent.includes('none')")
        for selector in ("#camera", "#screen", "#pictures"):
            assert page.is_hidden(selector)
        page.close()
