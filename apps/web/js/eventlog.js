// What the page and the server told each other: newest last, filtered, each message's JSON on demand.

const KEPT = 500;
const QUIET = new Set(["pong", "stats", "picture"]); // they come every second, and have panels of their own

export class EventLog {
  #box = document.getElementById("log");
  #empty = this.#box.firstElementChild;
  #entries = [];
  #filter = "";

  add(way, message, seconds) {
    if (QUIET.has(message.type)) return;
    this.#empty.remove();
    const entry = { way, message, seconds, json: JSON.stringify(message) };
    const last = this.#entries.at(-1);
    if (way === "in" && message.type === "partial" && last?.message.type === "partial") {
      this.#entries.pop().element.remove(); // a partial takes the place of the one before
    }
    const below = this.#box.scrollHeight - this.#box.scrollTop - this.#box.clientHeight < 30;
    entry.element = this.#row(entry);
    this.#entries.push(entry);
    this.#box.append(entry.element);
    if (this.#entries.length > KEPT) this.#entries.shift().element.remove();
    if (below) this.#box.scrollTop = this.#box.scrollHeight;
  }

  clear() {
    this.#entries = [];
    this.#box.replaceChildren(this.#empty);
  }

  filter(words) {
    this.#filter = words.trim().toLowerCase();
    for (const entry of this.#entries) entry.element.hidden = !this.#fits(entry);
  }

  /** What is shown, a JSON object a line. */
  text() {
    return this.#entries
      .filter((entry) => this.#fits(entry))
      .map(({ way, message, seconds }) => JSON.stringify({ at: +seconds.toFixed(3), way, ...message }))
      .join("\n");
  }

  #fits(entry) {
    return entry.json.toLowerCase().includes(this.#filter);
  }

  #row(entry) {
    const { way, message, seconds, json } = entry;
    const element = document.createElement("details");
    element.className = way;
    element.dataset.type = message.type;
    element.hidden = !this.#fits(entry);
    const summary = document.createElement("summary");
    const { type, id, ...rest } = message;
    const line = document.createElement("span");
    line.append(span("type", type), " ", span("rest", rest.text ?? brief(rest.data ?? rest)));
    summary.append(span("when", seconds.toFixed(2)), span("way", way === "in" ? "←" : "→"), line);
    summary.setAttribute("aria-label", `${way === "in" ? "From the server" : "To the server"}: ${type}`);
    element.append(summary);
    element.addEventListener("toggle", () => {
      if (!element.open || element.querySelector("pre")) return;
      const whole = document.createElement("pre");
      whole.textContent = JSON.stringify(JSON.parse(json), null, 2);
      element.append(whole);
    });
    return element;
  }
}

function brief(data) {
  return Object.entries(data ?? {})
    .map(([key, value]) => `${key} ${typeof value === "number" ? +value.toFixed(3) : typeof value === "object" ? "…" : value}`)
    .join(", ");
}

function span(name, text) {
  const element = document.createElement("span");
  element.className = name;
  element.textContent = text;
  return element;
}
