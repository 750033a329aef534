// Two waveforms on one time axis, with bands where the server heard speech, turns' ends and interruptions.

const SPAN = 12; // seconds shown
const AXIS = 18; // pixels

export class Waves {
  #canvas;
  #peaks = []; // [seconds, you, reply]
  #bands = []; // {kind, start, end}: end null while it goes on
  #colours = {};
  #asked = 0;

  constructor(canvas) {
    this.#canvas = canvas;
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  clear() {
    this.#peaks = [];
    this.#bands = [];
    this.draw();
  }

  add(seconds, you, reply) {
    this.#peaks.push([seconds, you, reply]);
    while (this.#peaks.length && this.#peaks[0][0] < seconds - SPAN - 1) this.#peaks.shift();
    this.#bands = this.#bands.filter((band) => (band.end ?? seconds) > seconds - SPAN - 1);
    this.draw();
  }

  begin(kind, start) {
    this.#bands.push({ kind, start, end: null });
  }

  end(kind, end) {
    const band = this.#bands.findLast((one) => one.kind === kind && one.end === null);
    if (band) band.end = Math.max(end, band.start);
  }

  mark(kind, at, label = "") {
    this.#bands.push({ kind, start: at, end: at, label });
  }

  /** Colours and sizes are read anew: the theme has changed. */
  restyle() {
    this.#colours = {};
    this.draw();
  }

  draw() {
    if (!this.#asked) this.#asked = requestAnimationFrame(() => ((this.#asked = 0), this.#paint()));
  }

  #colour(name) {
    return (this.#colours[name] ??= getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  }

  #paint() {
    const canvas = this.#canvas;
    const scale = devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: full } = canvas;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(full * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(full * scale);
    }
    const g = canvas.getContext("2d");
    g.setTransform(scale, 0, 0, scale, 0, 0);
    g.clearRect(0, 0, width, full);
    const height = full - AXIS;
    const lane = height / 2;
    const now = Math.max(this.#peaks.at(-1)?.[0] ?? 0, SPAN);
    const x = (seconds) => width - (now - seconds) * (width / SPAN);

    for (const { kind, start, end } of this.#bands) {
      if (kind !== "speech") continue;
      const left = x(start);
      const right = x(end ?? now);
      g.fillStyle = this.#colour("you-band");
      g.beginPath();
      g.roundRect(left, 3, Math.max(right - left, 2), lane - 6, 5);
      g.fill();
    }
    this.#axis(g, x, now, width, height);
    this.#wave(g, x, 1, lane / 2, lane, this.#colour("you"));
    this.#wave(g, x, 2, lane * 1.5, lane, this.#colour("reply"));
    this.#marks(g, x, height, lane);
  }

  #axis(g, x, now, width, height) {
    g.strokeStyle = this.#colour("line");
    g.fillStyle = this.#colour("faint");
    g.lineWidth = 1;
    g.font = `11px ${this.#colour("sans")}`;
    g.textAlign = "center";
    g.beginPath();
    for (const y of [height / 4, height / 2, (height * 3) / 4, height]) {
      g.moveTo(0, Math.round(y) + 0.5);
      g.lineTo(width, Math.round(y) + 0.5);
    }
    for (let second = Math.max(0, Math.ceil(now - SPAN)); second <= now; second++) {
      const at = Math.round(x(second)) + 0.5;
      g.moveTo(at, height);
      g.lineTo(at, height + 4);
      if (second % 2 === 0 && at > 16 && at < width - 16) g.fillText(clock(second), at, height + 15);
    }
    g.stroke();
  }

  #wave(g, x, column, middle, lane, colour) {
    g.strokeStyle = colour;
    g.lineWidth = 2;
    g.lineCap = "round";
    g.beginPath();
    for (const peak of this.#peaks) {
      const half = Math.max(Math.sqrt(peak[column]) * (lane / 2 - 7), 0);
      if (half < 0.6) continue;
      const at = x(peak[0]);
      g.moveTo(at, middle - half);
      g.lineTo(at, middle + half);
    }
    g.stroke();
  }

  #marks(g, x, height, lane) {
    g.textAlign = "right";
    for (const { kind, start, label } of this.#bands) {
      if (kind === "speech") continue;
      const at = Math.round(x(start));
      g.fillStyle = this.#colour(kind);
      g.fillRect(at - 1, 2, 2, kind === "cut" ? height - 2 : lane - 4);
      if (label) g.fillText(label, at - 6, kind === "cut" ? height - 6 : 13);
    }
  }
}

export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
