// Captions: one line that may still change, and the settled ones; saved as plain text or WebVTT.

import { clock } from "./waves.js";


export class Captions {
  #finals = [];
  #list = document.getElementById("finals");
  #partial = document.getElementById("partial");
  #empty = document.getElementById("captions-empty");
  #box = document.getElementById("captions");

  get settled() {
    return this.#finals;
  }

  clear() {
    this.#finals = [];
    this.#list.replaceChildren();
    this.#partial.hidden = true;
    this.#empty.hidden = false;
  }

  /** message: {text, start, end, words: [{text, start, end}]}, times in seconds of media. */
  partial(message) {
    if (message.reply) return;
    this.#partial.hidden = !message.text;
    if (!message.text) return;
    this.#empty.hidden = true;
    this.#partial.replaceChildren(...line(message));
    this.#follow();
  }

  /** Whether it was a caption; else it is what the reply says. */
  final(message) {
    const { reply } = message;
    if (!reply) this.#partial.hidden = true;
    if (!message.text?.trim()) return !reply;
    this.#empty.hidden = true;
    if (!reply) this.#finals.push(message);
    const item = document.createElement("li");
    if (reply) item.className = "said";
    item.append(...line(reply ? { text: message.text } : message));
    this.#list.append(item);
    this.#follow();
    return !reply;
  }

  text() {
    return this.#finals.map((one) => one.text.trim()).join("\n") + "\n";
  }

  vtt() {
    const cues = this.#finals.map((one, i) => {
      const text = one.text.trim().replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
      return `${i + 1}\n${stamp(one.start ?? 0)} --> ${stamp(one.end ?? one.start ?? 0)}\n${text}\n`;
    });
    return `WEBVTT\n\n${cues.join("\n")}`;
  }

  #follow() {
    this.#box.scrollTop = this.#box.scrollHeight;
  }
}

function line(message) {
  const time = document.createElement("time");
  time.textContent = message.start === undefined ? "" : clock(message.words?.[0]?.start ?? message.start);
  const text = document.createElement("span");
  if (message.words?.length) {
    for (const [i, word] of message.words.entries()) {
      const span = document.createElement("span");
      span.className = "word";
      span.dataset.time = `${word.start.toFixed(2)} – ${word.end.toFixed(2)} s`;
      span.textContent = word.text.trim();
      text.append(i ? " " : "", span);
    }
  } else {
    text.textContent = message.text.trim();
  }
  return [time, text];
}

function stamp(seconds) {
  const ms = Math.round(seconds * 1000);
  const part = (value, width = 2) => String(Math.floor(value)).padStart(width, "0");
  return `${part(ms / 3600000)}:${part((ms / 60000) % 60)}:${part((ms / 1000) % 60)}.${part(ms % 1000, 3)}`;
}

export function save(name, type, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 0);
}
