// The pictures of camera or screen: what is sent, what arrives and is looked at, and how much it changes.

const FIGURES = [
  ["sent", "Sent"],
  ["arrived", "Arrived"],
  ["looked", "Looked at"],
  ["skipped", "Overtaken by newer ones"],
  ["luma", "Brightness"],
  ["scenes", "Scene changes"],
];
const SHOWN = 60; // scores in the strip
const TOP = 0.5; // score that fills its height; a quarter of it fills half

export class Pictures {
  #preview = document.getElementById("preview");
  #off = document.getElementById("preview-off");
  #strip = document.getElementById("changes");
  #cells = {};
  #scores = []; // {change, scene}
  #scenes = 0;
  #arrived = null; // {frames, at}: the server's count, and when it came

  constructor() {
    for (const [key, label] of FIGURES) {
      const cell = document.createElement("div");
      const term = document.createElement("dt");
      term.textContent = label;
      this.#cells[key] = document.createElement("dd");
      cell.append(term, this.#cells[key]);
      document.getElementById("picture-figures").append(cell);
    }
    new ResizeObserver(() => this.draw()).observe(this.#strip);
    this.clear();
  }

  clear() {
    for (const [key] of FIGURES) this.#set(key, "–");
    this.#scores = [];
    this.#scenes = 0;
    this.#arrived = null;
    this.draw();
  }

  /** stream: the MediaStream being sent, or null. */
  show(stream) {
    this.#preview.srcObject = stream;
    this.#preview.hidden = !stream;
    this.#off.hidden = Boolean(stream);
    if (!stream) this.#set("sent", "nothing");
  }

  /** report: RTCStatsReport. */
  browser(report) {
    const video = [...report.values()].find((one) => one.type === "outbound-rtp" && one.kind === "video");
    if (video?.framesPerSecond && !this.#preview.hidden) {
      this.#set("sent", `${video.frameWidth}×${video.frameHeight}`, `${Math.round(video.framesPerSecond)}/s`);
    }
  }

  /** The server's count of what arrived: frames, skipped, undecoded, refused, width, height. */
  server({ frames, skipped, undecoded, refused, width, height }) {
    const now = { frames, at: performance.now() };
    const rate = this.#arrived ? (1000 * (frames - this.#arrived.frames)) / (now.at - this.#arrived.at) : 0;
    this.#arrived = now;
    if (!frames) return;
    const lost = undecoded + refused;
    this.#set("arrived", `${width}×${height}`, `${rate.toFixed(rate < 9.5 ? 1 : 0)}/s`);
    this.#set("skipped", skipped, lost ? `of ${frames}, ${lost} more not decoded` : `of ${frames}`);
  }

  /** An event `picture`. */
  seen({ width, height, number, luma, change }) {
    this.#set("looked", `${width}×${height}`, `no. ${number}`);
    this.#set("luma", Math.round(100 * luma), "%");
    this.#set("scenes", this.#scenes, `last score ${change.toFixed(2)}`);
    this.#scores.push({ change, scene: false });
    if (this.#scores.length > SHOWN) this.#scores.shift();
    this.draw();
  }

  /** An event `scene`, of the picture that was seen last. */
  scene() {
    this.#scenes += 1;
    if (this.#scores.length) this.#scores.at(-1).scene = true;
    this.draw();
  }

  draw() {
    const canvas = this.#strip;
    const scale = devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width) return;
    [canvas.width, canvas.height] = [width * scale, height * scale];
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const step = width / SHOWN;
    this.#scores.forEach(({ change, scene }, i) => {
      const tall = Math.max(2, Math.sqrt(Math.min(1, change / TOP)) * height);
      pen.fillStyle = colour(scene ? "cut" : "you");
      pen.fillRect(width - (this.#scores.length - i) * step + 1, height - tall, step - 2, tall);
    });
  }

  #set(key, value, unit = "") {
    const small = document.createElement("small");
    small.textContent = unit;
    this.#cells[key].replaceChildren(String(value), unit ? small : "");
  }
}
