// The server's drawing of its graph, put into a shadow tree. Its style sheet is adopted as an object: the page's
// security policy lets no <style> element apply.

import { ask } from "./connection.js";

const STYLE = /<style>([^<]*)<\/style>/g;

export class Pipeline {
  #root;
  #note = document.getElementById("pipeline-note");

  constructor(box) {
    this.#root = box.attachShadow({ mode: "open" });
  }

  /** Draw the graph, with the call's queues where a call is given. */
  async load(call = null) {
    const path = call ? `/graph.svg?call=${encodeURIComponent(call)}` : "/graph.svg";
    const drawing = await (await ask(path)).text();
    const styles = [...drawing.matchAll(STYLE)].map((found) => found[1]);
    const picture = new DOMParser().parseFromString(drawing.replace(STYLE, ""), "image/svg+xml").documentElement;
    if (picture.localName !== "svg") throw new Error("The server's drawing of the graph is not an SVG.");
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(themed(styles.join("\n")));
    picture.setAttribute("part", "graph");
    this.#root.adoptedStyleSheets = [sheet];
    this.#root.replaceChildren(document.importNode(picture, true));
    this.#note.textContent = call ? "live, with this call's queues" : "the graph this server runs";
  }
}

/** The drawing follows the system's light or dark; where the page has been switched, it follows the page. */
function themed(css) {
  const theme = document.documentElement.dataset.theme;
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const page = ":host svg { max-width: 100%; height: auto; } .page { fill: none !important; stroke: none !important; } .port { stroke: var(--card) !important; }";
  return css.replaceAll(/\(\s*prefers-color-scheme:\s*dark\s*\)/g, dark ? "all" : "not all") + page;
}
