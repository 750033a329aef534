// A call over WebRTC: signalling, the `events` data channel, and coming back after the network went away.

const PING_MS = 2000;
const STATS_MS = 1000;
const LOST_MS = 3000; // that ICE may be "disconnected" before a new connection is made
const RETRIES_MS = [200, 800, 1500, 2500, 4000, 6000, 8000]; // within the 30 s that the server keeps a call
const GATHER_MS = 1000;
const OPEN_MS = 15000;
const PICTURES_PER_SECOND = 5;

export class CallRefused extends Error {}

const REFUSALS = {
  401: "The server wants a token: open the address that it printed when it started, with #token=… at its end.",
  403: "The server does not accept this page: the token does not fit, or the page comes from another site.",
  404: "This server has no WebRTC endpoint for this page.",
  410: "The server has closed this call. Press Connect to start a new one.",
  413: "The server finds the connection offer too large.",
  429: "Too many tries in a short time. Wait a moment, then press Connect.",
  503: "The server is full, or its model is still loading. Try again in a moment.",
};

export function token() {
  return new URLSearchParams(location.hash.slice(1)).get("token");
}

/** fetch() with the page's token; throws CallRefused in plain words. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (token()) headers.Authorization = `Bearer ${token()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new TypeError("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const refusal = new CallRefused(REFUSALS[response.status] ?? `The server refused (HTTP ${response.status}).`);
  refusal.status = response.status;
  throw refusal;
}

/**
 * Events: `state` (detail: connecting, connected, reconnecting, closed), `message` (from the server), `sent`,
 * `sound` (detail: the reply's MediaStream), `report` (detail: RTCStatsReport), `problem` (detail: words).
 */
export class Connection extends EventTarget {
  state = "closed";
  rtt = null; // milliseconds, of the last ping
  #pc = null;
  #lostOnes = []; // kept until the call goes on elsewhere: closing one tells the server that the call is over
  #channel = null;
  #resume = null;
  #last = 0;
  #timers = [];
  #attempt = 0;
  #track = null;
  #video = null;

  /** audio: the microphone's track. Resolves once connected; throws CallRefused or TypeError. */
  async open(audio, options = {}) {
    this.#track = audio;
    this.options = options;
    this.#resume = null;
    this.#last = 0;
    this.#attempt = 0;
    this.#become("connecting");
    try {
      await this.#connect();
    } catch (error) {
      this.#drop();
      this.#become("closed");
      throw error;
    }
  }

  close() {
    this.#resume = null;
    this.#video = null;
    this.#drop();
    this.#become("closed");
  }

  send(message) {
    if (this.#channel?.readyState !== "open") return false;
    this.#channel.send(JSON.stringify(message));
    if (message.type !== "ping" && message.type !== "stats") this.#tell("sent", message);
    return true;
  }

  /** Another microphone, without a new connection. */
  async hear(track) {
    this.#track = track;
    await this.#sender("audio")?.replaceTrack(track);
  }

  /** Send the pictures of this track (null: none). False where the server takes no pictures. */
  async show(track) {
    const transceiver = this.#pc?.getTransceivers().find((one) => one.sender.track === this.#video || one.mid === "1");
    if (!transceiver || !/send/.test(transceiver.currentDirection ?? "")) return false;
    this.#video = track;
    await transceiver.sender.replaceTrack(track);
    const parameters = transceiver.sender.getParameters(); // few pictures are looked at: better large than smooth
    parameters.degradationPreference = "maintain-resolution";
    for (const encoding of parameters.encodings) encoding.maxFramerate = PICTURES_PER_SECOND;
    await transceiver.sender.setParameters(parameters);
    return true;
  }

  #sender(kind) {
    return this.#pc?.getSenders().find((one) => one.track?.kind === kind);
  }

  async #connect() {
    const pc = (this.#pc = new RTCPeerConnection({ iceServers: [], bundlePolicy: "max-bundle" }));
    pc.addTransceiver(this.#track, { direction: "sendrecv" });
    pc.addTransceiver("video", { direction: "sendonly" });
    if (this.#video) await pc.getTransceivers()[1].sender.replaceTrack(this.#video);
    pc.addEventListener("track", ({ track }) => {
      if (track.kind === "audio") this.#tell("sound", new MediaStream([track]));
    });
    const channel = (this.#channel = pc.createDataChannel("events"));
    channel.addEventListener("message", ({ data }) => this.#take(data));
    channel.addEventListener("close", () => pc === this.#pc && this.#lost());
    pc.addEventListener("connectionstatechange", () => pc === this.#pc && this.#watch(pc));

    await pc.setLocalDescription();
    await gathered(pc);
    const body = { sdp: pc.localDescription.sdp, options: this.options };
    if (this.#resume) Object.assign(body, { resume: this.#resume, after: this.#last });
    const response = await ask("/rtc/offer", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    const answer = await response.json();
    if (pc !== this.#pc) return; // closed meanwhile
    this.#resume = answer.resume;
    this.call = answer.call;
    await pc.setRemoteDescription({ type: "answer", sdp: answer.sdp });
    await opened(channel);
    if (pc !== this.#pc) return;
    this.#attempt = 0;
    this.#bury();
    this.#every(PING_MS, () => this.send({ type: "ping", t: performance.now() }));
    this.#every(STATS_MS, async () => {
      this.send({ type: "stats" });
      this.#tell("report", await pc.getStats());
    });
    this.#become("connected");
  }

  #take(data) {
    let message;
    try {
      message = JSON.parse(data);
    } catch {
      this.#tell("problem", "The server sent something that is not JSON.");
      return;
    }
    if (Number.isInteger(message.id)) this.#last = Math.max(this.#last, message.id);
    if (message.type === "pong" && typeof message.t === "number") this.rtt = performance.now() - message.t;
    this.#tell("message", message);
  }

  #watch(pc) {
    if (pc.connectionState === "failed") this.#lost();
    if (pc.connectionState === "disconnected") {
      this.#timers.push(setTimeout(() => pc === this.#pc && pc.connectionState === "disconnected" && this.#lost(), LOST_MS));
    }
  }

  #lost() {
    if (this.state === "closed" || this.state === "connecting") return;
    if (this.#pc) this.#lostOnes.push(this.#pc);
    this.#forget();
    if (!this.#resume || this.#attempt >= RETRIES_MS.length) {
      this.close();
      this.#tell("problem", "The connection was lost and could not be made again. Press Connect to start a new call.");
      return;
    }
    this.#become("reconnecting");
    const wait = RETRIES_MS[this.#attempt++];
    this.#timers.push(
      setTimeout(async () => {
        try {
          await this.#connect();
        } catch (error) {
          if (this.state !== "reconnecting") return;
          if (error instanceof CallRefused && error.status !== 429 && error.status !== 503) {
            this.#drop();
            this.#become("closed");
            this.#tell("problem", error.message);
          } else {
            this.#lost();
          }
        }
      }, wait),
    );
  }

  #drop() {
    this.#pc?.close();
    this.#forget();
    this.#bury();
  }

  #forget() {
    for (const timer of this.#timers) clearTimeout(timer);
    this.#timers = [];
    this.#pc = this.#channel = null;
  }

  #bury() {
    for (const pc of this.#lostOnes.splice(0)) pc.close();
  }

  #every(milliseconds, action) {
    this.#timers.push(setInterval(action, milliseconds));
    action();
  }

  #become(state) {
    if (state === this.state) return;
    this.state = state;
    this.#tell("state", state);
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

function gathered(pc) {
  return new Promise((resolve) => {
    const done = () => pc.iceGatheringState === "complete" && resolve();
    pc.addEventListener("icegatheringstatechange", done);
    setTimeout(resolve, GATHER_MS);
    done();
  });
}

function opened(channel) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(
      () => reject(new TypeError("The server answered, but no sound path to it could be opened. Is a firewall blocking UDP?")),
      OPEN_MS,
    );
    channel.addEventListener("open", () => (clearTimeout(timer), resolve()));
    channel.addEventListener("close", () => (clearTimeout(timer), reject(new TypeError("The server closed the connection."))));
  });
}
