"""Clients of others in Chromium, unmodified, against the real server: a WHIP publisher, and OpenAI's Agents SDK."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

HERE = Path(__file__).parent
AGENTS = HERE / "node_modules/@openai/agents-realtime/dist/bundle/openai-realtime-agents.umd.js"
SENTENCE = "it was the"  # comes again and again in the sample, which Chromium's microphone plays over and over

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture
def page(browser: Any, server: str) -> Iterator[Any]:
    """A page of the server's origin that is empty but for the client script of ``open_with``, and complains nowhere."""
    page, complaints, hosts = browser.new_page(), [], set()
    page.on("console", lambda said: said.type in ("error", "warning") and complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.set_default_timeout(30_000)
    yield page
    page.close()
    assert complaints == []
    assert hosts == {urlsplit(server).netloc}


def open_with(page: Any, address: str, script: Path) -> None:
    """Open the page with this script in it."""
    if not (HERE / "node_modules").is_dir():
        pytest.skip("needs the packages of the clients: npm ci --prefix tests/clients")
    html = '<!doctype html><link rel="icon" href="data:,"><script src="client.js"></script>'
    page.route(f"{address}/client/", lambda route: route.fulfill(body=html, content_type="text/html"))
    page.route(f"{address}/client/client.js", lambda route: route.fulfill(path=script))
    page.goto(f"{address}/client/")


@pytest.mark.parametrize("trickle", [True, False])
def test_a_whip_publisher_is_captioned(page: Any, server: str, tmp_path: Path, trickle: bool) -> None:
    esbuild, script = HERE / "node_modules/.bin/esbuild", tmp_path / "whip.js"
    if not esbuild.exists() or shutil.which("node") is None:
        pytest.skip("needs Node.js and its packages: npm ci --prefix tests/clients")
    command = [esbuild, "@eyevinn/whip-web-client", "--bundle", "--format=iife", "--global-name=whip"]
    subprocess.run([*command, f"--outfile={script}", "--log-level=warning"], cwd=HERE, check=True)
    patches: list[int] = []
    page.on("response", lambda got: got.request.method == "PATCH" and patches.append(got.status))
    open_with(page, server, script)
    resource = page.evaluate(
        """async (trickle) => {
        globalThis.heard = [];
        const connect = (configuration) => {
          const pc = new RTCPeerConnection(configuration);
          pc.createDataChannel('events').onmessage = ({ data }) => heard.push(JSON.parse(data));
          return pc;
        };
        const endpoint = new URL('/whip', location).href;
        const opts = { iceServers: [], noTrickleIce: !trickle };
        globalThis.client = new whip.WHIPClient({ endpoint, opts, peerConnectionFactory: connect });
        await client.ingest(await navigator.mediaDevices.getUserMedia({ audio: true }));
        return client.getResourceUrl(); }""",
        trickle,
    )
    page.wait_for_function(
        "said => heard.some(({ reply, text }) => reply === false && text.includes(said))", arg=SENTENCE
    )
    assert page.evaluate("client.getICEConnectionState()") == "connected"
    assert bool(patches) == trickle
    assert set(patches) <= {204}
    page.evaluate("client.destroy()")
    assert httpx.delete(resource).status_code == 404  # the client has ended it


def test_a_realtime_session_converses_over_webrtc(page: Any, server: str) -> None:
    open_with(page, server, AGENTS)
    page.evaluate(
        """async () => {
        const { RealtimeAgent, RealtimeSession, OpenAIRealtimeWebRTC } = OpenAIAgentsRealtime;
        globalThis.report = { errors: [], types: new Set(), understood: new Set(), history: [] };
        globalThis.player = new Audio();
        const transport = new OpenAIRealtimeWebRTC({
          baseUrl: new URL('/v1/realtime/calls', location).href, useInsecureApiKey: true, audioElement: player });
        globalThis.session = new RealtimeSession(new RealtimeAgent({ name: 'parrot' }), { transport });
        session.on('error', ({ error }) => report.errors.push(error?.message ?? JSON.stringify(error)));
        session.on('history_updated', (history) => (report.history = history));
        transport.on('*', ({ type }) => {
          report.types.add(type);
          if (type !== 'error') transport.once(type, () => report.understood.add(type));
        });
        await session.connect({ apiKey: 'unused' }); }"""
    )
    said = "({ role, content }) => role === '%s' && content[0]?.transcript?.includes('it was the')"
    for role in ("user", "assistant"):
        page.wait_for_function(f"() => report.history.some({said % role})")
    page.wait_for_function("() => report.understood.has('output_audio_buffer.started')")
    page.wait_for_function("() => player.currentTime > 1")
    energy = """async () => {
        for (const one of (await session.transport.connectionState.peerConnection.getStats()).values())
          if (one.type === 'inbound-rtp') return one.totalAudioEnergy; }"""
    assert page.evaluate(energy) > 0
    report = page.evaluate(
        """() => ({ ...report, types: [...report.types].sort(), understood: [...report.understood].sort() })"""
    )
    assert report["errors"] == []
    assert report["types"] == report["understood"]  # every message fits the client's schema of its type
    page.evaluate("session.close()")
