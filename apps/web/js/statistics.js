// Figures of the call: the browser's own (getStats), and what the server measures of the sound it gets.

const FIGURES = [
  ["rtt", "Round trip"],
  ["loss", "Lost on the way in"],
  ["concealed", "Concealed there"],
  ["buffer", "Server's jitter buffer"],
  ["fec", "Repaired by FEC"],
  ["calls", "Calls on the server"],
  ["replyBuffer", "Page's jitter buffer"],
  ["replyLoss", "Lost on the way back"],
  ["replyConcealed", "Concealed here"],
  ["codec", "Codec"],
  ["bitrate", "Sent, received"],
  ["depths", "Queues"],
];

export class Statistics {
  #cells = {};
  #before = null;
  #info = {};
  jitter = null; // milliseconds of the server's playout buffer

  constructor(list) {
    for (const [key, label] of FIGURES) {
      const cell = document.createElement("div");
      const term = document.createElement("dt");
      term.textContent = label;
      this.#cells[key] = document.createElement("dd");
      cell.className = key === "depths" ? "across" : "";
      cell.append(term, this.#cells[key]);
      list.append(cell);
    }
    this.clear();
  }

  clear() {
    for (const [key] of FIGURES) this.#set(key, "–");
    this.#before = this.jitter = null;
    this.limits(this.#info);
  }

  /** What GET /info says. */
  limits(info) {
    this.#info = info;
    if (Number.isFinite(info.calls)) this.#set("calls", info.calls, info.max_calls ? `of ${info.max_calls}` : "");
  }

  ping(milliseconds) {
    this.#set("rtt", milliseconds.toFixed(milliseconds < 10 ? 1 : 0), "ms");
  }

  /** The server's `stats` message. receiver: packets lost and received, samples decoded, concealed, repaired. */
  server({ receiver, sender, calls, depths }) {
    if (receiver) {
      const { lost, received, decoded, fec, concealed, silence } = receiver;
      this.jitter = receiver.delay_ms;
      this.#set("buffer", Math.round(this.jitter), "ms");
      this.#set("loss", ...share(lost, lost + received));
      const samples = decoded + fec + concealed + silence;
      this.#set("concealed", ...share(concealed, samples));
      this.#set("fec", ...share(fec, samples));
    }
    if (Number.isFinite(calls)) this.limits({ ...this.#info, calls });
    const queues = Object.entries(depths ?? {}).map(([name, depth]) => `${name} ${depth}`);
    if (sender) queues.push(`reply to send ${sender.queued_ms} ms`);
    this.#set("depths", queues.join(" · ") || "empty");
  }

  /** report: RTCStatsReport. */
  browser(report) {
    const all = [...report.values()];
    const inbound = all.find((one) => one.type === "inbound-rtp" && one.kind === "audio");
    const outbound = all.find((one) => one.type === "outbound-rtp" && one.kind === "audio");
    const before = this.#before;
    this.#before = { inbound, outbound, at: performance.now() };
    const codec = report.get(outbound?.codecId);
    if (codec) {
      const fec = /useinbandfec=1/.test(codec.sdpFmtpLine ?? "") ? " + FEC" : "";
      this.#set("codec", codec.mimeType.split("/")[1], `${codec.clockRate / 1000} kHz${fec}`);
    }
    if (inbound) {
      this.#set("replyLoss", ...share(inbound.packetsLost ?? 0, (inbound.packetsReceived ?? 0) + (inbound.packetsLost ?? 0)));
      this.#set("replyConcealed", ...share((inbound.concealedSamples ?? 0) - (inbound.silentConcealedSamples ?? 0), inbound.totalSamplesReceived ?? 0));
      const emitted = inbound.jitterBufferEmittedCount - (before?.inbound?.jitterBufferEmittedCount ?? 0);
      const delay = inbound.jitterBufferDelay - (before?.inbound?.jitterBufferDelay ?? 0);
      if (emitted > 0) this.#set("replyBuffer", Math.round((1000 * delay) / emitted), "ms");
    }
    if (before) {
      const rate = (now, then) => Math.max(0, Math.round((8 * ((now ?? 0) - (then ?? 0))) / (this.#before.at - before.at)));
      const sent = rate(outbound?.bytesSent, before.outbound?.bytesSent);
      const received = rate(inbound?.bytesReceived, before.inbound?.bytesReceived);
      this.#set("bitrate", `${sent}, ${received}`, "kb/s");
    }
  }

  #set(key, value, unit = "") {
    const small = document.createElement("small");
    small.textContent = unit;
    this.#cells[key].replaceChildren(String(value), unit ? small : "");
  }
}

function share(part, whole) {
  return [whole > 0 ? ((100 * Math.max(part, 0)) / whole).toFixed(1) : "0.0", "%"];
}
