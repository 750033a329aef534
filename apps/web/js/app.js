// The demo page: joins the call, its devices and the panels.

import { Captions, save } from "./captions.js";
import { ask, Connection } from "./connection.js";
import { EventLog } from "./eventlog.js";
import { Latency } from "./latency.js";
import { camera, Ear, explain, list, loudness, microphone, screen } from "./media.js";
import { Pictures } from "./pictures.js";
import { Pipeline } from "./pipeline.js";
import { Statistics } from "./statistics.js";
import { Waves } from "./waves.js";

const TICK_MS = 40;
const DRAW_MS = 3000;
const STARTING_MS = 1000;
const STATES = {
  closed: "Not connected",
  connecting: "Connecting…",
  connected: "Connected",
  reconnecting: "Reconnecting…",
};

const $ = (id) => document.getElementById(id);
const connection = new Connection();
const captions = new Captions();
const latency = new Latency();
const statistics = new Statistics($("stats"));
const log = new EventLog();
const pictures = new Pictures();
const pipeline = new Pipeline($("pipeline"));
const waves = new Waves($("waves"));
let context = null; // AudioContext
let ears = null; // {you, reply}
let mic = null; // MediaStream
let picture = null; // {kind, stream}
let ticker = null;
let began = 0; // performance.now() at the start of the call
let heard = null; // {media, at}: seconds that the server had heard, and when, by performance.now()

// ------------------------------------------------------------------ time

const callSeconds = () => (performance.now() - began) / 1000;

const roundTrip = () => connection.rtt ?? 0;

/** When the server had heard this second of media, by performance.now(). */
function heardAt(media) {
  return heard ? heard.at + (media - heard.media) * 1000 : performance.now();
}

/** Where on the waves' axis this second of media was said. */
const onAxis = (media) => (heardAt(media) - roundTrip() / 2 - (statistics.jitter ?? 0) - began) / 1000;

// ------------------------------------------------------------------ the call

async function connect() {
  problem("");
  $("connect").disabled = true;
  try {
    mic = await microphone($("microphone").value);
    await hearDevices();
    forget();
    await connection.open(mic.getAudioTracks()[0]);
  } catch (error) {
    problem(explain(error));
    hangUp();
  } finally {
    $("connect").disabled = false;
  }
}

function forget() {
  began = performance.now();
  heard = null;
  for (const panel of [captions, latency, statistics, pictures, log, waves]) panel.clear();
  saveable();
}

function hangUp() {
  connection.close();
  for (const stream of [mic, picture?.stream]) stream?.getTracks().forEach((track) => track.stop());
  mic = picture = null;
  ears?.you.listen(null);
  ears?.reply.listen(null);
  clearInterval(ticker);
  ticker = null;
  showPicture();
  for (const meter of [$("level"), $("reply-level")]) meter.value = 0;
}

async function hearDevices() {
  context ??= new AudioContext();
  await context.resume();
  ears ??= { you: new Ear(context), reply: new Ear(context) };
  ears.you.listen(mic);
  await devices();
  ticker ??= setInterval(tick, TICK_MS);
}

function tick() {
  const you = ears.you.peak();
  const reply = ears.reply.peak();
  $("level").value = loudness(you);
  $("reply-level").value = loudness(reply);
  latency.reply(reply);
  if (connection.state !== "closed") waves.add(callSeconds(), you, reply);
}

connection.addEventListener("state", ({ detail: state }) => {
  $("state").dataset.state = state;
  $("state-text").textContent = STATES[state];
  const live = state !== "closed";
  $("connect").textContent = live ? "Hang up" : "Connect";
  $("connect").toggleAttribute("data-live", live);
  for (const id of ["mute", "camera", "screen"]) $(id).disabled = state !== "connected";
  heard = null; // until the server says so
  if (live) log.add("out", { type: state, ...(connection.call && { call: connection.call }) }, callSeconds());
  else if (mic) hangUp();
});
connection.addEventListener("problem", ({ detail }) => problem(detail));
connection.addEventListener("sent", ({ detail }) => log.add("out", detail, callSeconds()));
connection.addEventListener("report", ({ detail }) => {
  statistics.browser(detail);
  pictures.browser(detail);
});
connection.addEventListener("sound", ({ detail: stream }) => {
  $("player").srcObject = stream;
  ears.reply.listen(stream);
});
connection.addEventListener("message", ({ detail: message }) => {
  log.add("in", message, callSeconds());
  TAKE[message.type]?.(message);
});

const TAKE = {
  partial: (message) => captions.partial(message),
  final(message) {
    if (captions.final(message)) latency.final();
    saveable();
  },
  speech_start(message) {
    waves.begin("speech", onAxis(message.start));
    latency.speech();
  },
  speech_stop: (message) => waves.end("speech", onAxis(message.start)),
  turn_end(message) {
    const data = message.data ?? message;
    waves.end("speech", onAxis(message.start));
    waves.mark("turn", callSeconds(), data.reason);
    if (heard) {
      const [rtt, jitter] = [roundTrip(), statistics.jitter ?? 0];
      latency.turn({ heard: heardAt(message.start), waited: data.waited_ms ?? 0, rtt, jitter });
    }
  },
  interrupted: () => waves.mark("cut", callSeconds(), "interrupted"),
  error: (message) => problem(message.message ?? message.data?.message ?? "The server reported an error."),
  limit: () => problem("The server's time limit for one call is reached. Press Connect to start a new one."),
  pong: () => connection.rtt !== null && statistics.ping(connection.rtt),
  picture: (message) => pictures.seen(message.data),
  scene(message) {
    pictures.scene();
    waves.mark("cut", onAxis(message.start), "scene");
  },
  stats(message) {
    statistics.server(message);
    if (message.video) pictures.server(message.video);
    if (message.heard_seconds) heard = { media: message.heard_seconds, at: performance.now() - roundTrip() / 2 };
  },
};

// ------------------------------------------------------------------ devices

async function devices() {
  await list($("microphone"), "audioinput");
  await list($("speaker"), "audiooutput");
  $("speaker").disabled = !("setSinkId" in HTMLMediaElement.prototype);
}

$("microphone").addEventListener("change", async () => {
  if (!mic) return;
  try {
    const next = await microphone($("microphone").value);
    mic.getTracks().forEach((track) => track.stop());
    mic = next;
    mic.getAudioTracks()[0].enabled = !muted();
    ears.you.listen(mic);
    await connection.hear(mic.getAudioTracks()[0]);
  } catch (error) {
    problem(explain(error));
  }
});

$("speaker").addEventListener("change", () => $("player").setSinkId($("speaker").value).catch((error) => problem(explain(error))));

const muted = () => $("mute").getAttribute("aria-pressed") === "true";

function mute() {
  const next = !muted();
  $("mute").setAttribute("aria-pressed", next);
  $("mute").querySelector("span").textContent = next ? "Muted" : "Mute";
  mic?.getAudioTracks().forEach((track) => (track.enabled = !next));
}

async function show(kind, open) {
  const before = picture;
  before?.stream.getTracks().forEach((track) => track.stop());
  picture = null;
  try {
    if (before?.kind !== kind) {
      const stream = await open();
      const [track] = stream.getVideoTracks();
      if (await connection.show(track)) {
        picture = { kind, stream };
        track.addEventListener("ended", () => picture?.stream === stream && show(kind, open));
      } else {
        track.stop();
        problem("The graph that this server runs takes no pictures.");
      }
    }
    if (!picture) await connection.show(null);
  } catch (error) {
    problem(explain(error));
  }
  showPicture();
}

function showPicture() {
  pictures.show(picture?.stream ?? null);
  for (const id of ["camera", "screen"]) $(id).setAttribute("aria-pressed", picture?.kind === id);
}

// ------------------------------------------------------------------ the page

function problem(words) {
  $("problem").textContent = words;
  $("problem").hidden = !words;
}

function saveable() {
  for (const id of ["save-txt", "save-vtt"]) $(id).disabled = !captions.settled.length;
}

function number(count) {
  return count >= 1e9 ? `${(count / 1e9).toFixed(1)} billion` : count >= 1e6 ? `${Math.round(count / 1e6)} million` : count.toLocaleString("en");
}

async function introduce() {
  try {
    const info = await (await ask("/info")).json();
    statistics.limits(info);
    for (const id of ["camera", "screen", "pictures"]) $(id).hidden = !info.takes.includes("video");
    if (connection.state === "closed") $("connect").disabled = Boolean(info.starting);
    if (info.starting) {
      $("model").textContent = `The server is ${info.starting}…`;
      setTimeout(introduce, STARTING_MS);
      return;
    }
    const name = document.createElement("b");
    name.textContent = info.model;
    const size = info.parameters ? `${number(info.parameters)} parameters` : "";
    const rest = [size, info.device && `on ${info.device}`].filter(Boolean).join(" ");
    $("model").replaceChildren(name, rest ? ` · ${rest}` : "");
    if (info.name) $("pipeline-note").textContent = info.name;
  } catch (error) {
    $("model").textContent = "The model is not known.";
    problem(error.message);
  }
}

async function draw() {
  if (document.hidden) return;
  try {
    await pipeline.load(connection.state === "connected" ? connection.call : null);
    if (connection.state === "connected") statistics.limits(await (await ask("/info")).json());
  } catch (error) {
    $("pipeline-note").textContent = error.message;
  }
}

function dark() {
  return getComputedStyle(document.documentElement).colorScheme === "dark";
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  waves.restyle();
  pictures.draw();
  draw();
}

$("connect").addEventListener("click", () => (connection.state === "closed" ? connect() : hangUp()));
$("mute").addEventListener("click", mute);
$("camera").addEventListener("click", () => show("camera", camera));
$("screen").addEventListener("click", () => show("screen", screen));
$("theme").addEventListener("click", () => theme(dark() ? "light" : "dark"));
$("save-txt").addEventListener("click", () => save("captions.txt", "text/plain", captions.text()));
$("save-vtt").addEventListener("click", () => save("captions.vtt", "text/vtt", captions.vtt()));
$("filter").addEventListener("input", () => log.filter($("filter").value));
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(log.text());
    $("copy").textContent = "Copied";
  } catch {
    problem("The browser does not let this page write to the clipboard.");
  }
  setTimeout(() => ($("copy").textContent = "Copy"), 1200);
});
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "c" && !$("connect").disabled) $("connect").click();
  if (event.key === "m" && !$("mute").disabled) mute();
});
addEventListener("pagehide", hangUp);
navigator.mediaDevices?.addEventListener("devicechange", devices);

const system = matchMedia("(prefers-color-scheme: dark)");
system.addEventListener("change", () => theme(system.matches ? "dark" : "light"));
theme(system.matches ? "dark" : "light");
devices();
introduce();
setInterval(() => connection.state === "connected" && draw(), DRAW_MS);
