// The latency of each turn, from the end of speech to the settled caption, by the stages that it was spent in: the
// network there and back, the server's playout buffer, and from when the server had heard the end of speech, the wait to
// be sure of it and the rest, which the recogniser took. Where an answer is heard after that: the time to its first sound.

export const STAGES = ["network", "jitter", "endpoint", "recognition", "answer"];
const SHOWN = 7;
const PATIENCE_MS = 4000; // for the caption of a turn that has ended
const ANSWER_MS = 10000; // for the first sound of its answer
const LOUD = 0.01;
const QUIET_MS = 250; // after which a sound is a new one

export class Latency {
  #box = document.getElementById("latency");
  #figures = document.getElementById("latency-figures");
  #empty = this.#box.firstElementChild;
  #turns = [];
  #open = null; // the turn that waits for its caption
  #final = null; // when the last caption came that no turn has claimed
  #unanswered = null; // the last turn, and when it had its caption
  #loud = -Infinity; // when the reply was last loud

  clear() {
    this.#turns = [];
    this.#open = this.#final = this.#unanswered = null;
    this.#box.replaceChildren(this.#empty);
    this.#figures.textContent = "";
  }

  speech() {
    this.#open = this.#final = this.#unanswered = null;
  }

  /** heard: when the server had heard the end of speech, by this page's clock; waited, rtt, jitter: milliseconds. */
  turn({ heard, waited, rtt, jitter }) {
    this.#open = { heard, waited, rtt, jitter, ended: performance.now() };
    if (this.#final !== null && this.#final > heard) this.#close(Math.max(this.#final, heard + waited));
  }

  final() {
    const now = performance.now();
    if (this.#open && now - this.#open.ended < PATIENCE_MS) this.#close(now);
    else this.#final = now;
  }

  /** peak: of what is heard of the reply now, 0 to 1. */
  reply(peak) {
    if (peak < LOUD) return;
    const now = performance.now();
    const begins = now - this.#loud > QUIET_MS;
    this.#loud = now;
    if (!begins || !this.#unanswered) return;
    const { turn, settled } = this.#unanswered;
    this.#unanswered = null;
    if (now - settled > ANSWER_MS) return;
    turn.answer = now - settled;
    turn.total += turn.answer;
    this.#show();
  }

  #close(now) {
    const { heard, waited, rtt, jitter } = this.#open;
    this.#open = this.#final = null;
    const served = now - rtt / 2 - heard; // on the server, from the end of speech
    const stages = { network: rtt, jitter, endpoint: waited, recognition: Math.max(0, served - waited), answer: 0 };
    const total = STAGES.reduce((sum, stage) => sum + stages[stage], 0);
    const turn = { ...stages, total, number: this.#turns.length + 1 };
    this.#turns.push(turn);
    this.#unanswered = { turn, settled: performance.now() };
    this.#show();
  }

  #show() {
    const shown = this.#turns.slice(-SHOWN);
    const most = Math.max(...shown.map((turn) => turn.total), 1);
    this.#box.replaceChildren(...shown.map((turn) => row(turn, most)));
    const totals = this.#turns.map((turn) => turn.total).sort((a, b) => a - b);
    const figure = (q) => `${Math.round(quantile(totals, q))} ms`;
    const [p50, p95] = [bold(figure(0.5)), bold(figure(0.95))];
    this.#figures.replaceChildren("p50 ", p50, " · p95 ", p95, ` · ${totals.length} ${totals.length === 1 ? "turn" : "turns"}`);
  }
}

/** Linear between the two nearest, as numpy's default. */
export function quantile(sorted, q) {
  const at = (sorted.length - 1) * q;
  const low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

function row(turn, most) {
  const element = document.createElement("div");
  element.className = "turn-row";
  const stack = document.createElement("div");
  stack.className = "stack";
  stack.setAttribute("role", "img");
  const words = STAGES.filter((stage) => stage !== "answer" || turn.answer).map((stage) => `${stage} ${Math.round(turn[stage])} ms`).join(", ");
  stack.setAttribute("aria-label", `Turn ${turn.number}: ${words}`);
  stack.title = words;
  for (const stage of STAGES) {
    const part = document.createElement("i");
    part.className = `bar-${stage}`;
    part.style.width = `${(100 * turn[stage]) / most}%`;
    stack.append(part);
  }
  const number = document.createElement("span");
  number.textContent = `#${turn.number}`;
  element.append(number, stack, bold(`${Math.round(turn.total)} ms`));
  return element;
}

function bold(text) {
  const element = document.createElement("b");
  element.textContent = text;
  return element;
}
