// What the edits did beside their facts: drift, perplexity, and the edited matrices.
import { run } from "./api.js";
import { alertOf, clearAlerts } from "./alerts.js";
import { $, h, percent, replace, table } from "./dom.js";
import { state, watch } from "./state.js";

const NAMES = {
  perplexity: ["Perplexity", "of held-out text; lower is better", (value) => value.toFixed(2)],
  drift: ["Drift", "mean KL divergence of the next token after unrelated prompts, in nats", (value) => value.toFixed(4)],
  agreement: ["Agreement", "share of unrelated prompts whose most probable next token is the same", (value) => percent(value)],
};
let shown = null; // the result

export function open() {
  if (shown === null) replace($("health-result"), h("p", { class: "hero-note" }, state.stack.length ? "Examine the model to see how far the edits moved it." : "Edit the model first; then this page says what else moved."));
}

async function examine(event) {
  event.preventDefault();
  clearAlerts();
  const passages = Number($("health-form").elements.passages.value);
  try {
    await run("POST", "api/health", { passages });
  } catch (error) {
    alertOf(error);
  }
}

export function onJob(job) {
  if (job.kind !== "health" || job.state !== "done" || !job.result) return;
  shown = job.result;
  show();
}

function show() {
  const cards = Object.entries(shown.changes).map(([name, change]) => {
    const [title, meaning, format] = NAMES[name] ?? [name, "", (value) => value.toFixed(3)];
    const number = (value) => (value === null ? "not finite" : format(value));
    const interval = change.half_width === null ? "" : ` ± ${format(change.half_width)}`;
    return h("div", { class: "panel figure" }, h("h3", {}, title),
      h("p", { class: "big" }, name === "perplexity" ? `${number(change.before)} → ${number(change.after)}` : number(change.after)),
      h("p", { class: "note" }, meaning, name === "perplexity" && change.difference !== null ? `; ${change.difference >= 0 ? "+" : ""}${change.difference.toFixed(3)}${interval}` : interval));
  });
  const most = Math.max(...shown.matrices.map((matrix) => matrix.change), 1e-12);
  const pair = ([before, after]) => (before === null || after === null ? "not finite" : `${before.toPrecision(4)} → ${after.toPrecision(4)}`);
  const rows = shown.matrices.map((matrix) => {
    const fill = h("span", { class: "fill after" });
    fill.style.inlineSize = `${(matrix.change / most) * 100}%`;
    return [h("code", {}, matrix.name.replace(/\.weight$/, "")), h("span", { class: "bar-cell" }, h("span", { class: "track" }, fill), percentOf(matrix.change)), pair(matrix.norm), pair(matrix.spectral), pair(matrix.condition), pair(matrix.stable_rank)];
  });
  replace($("health-result"),
    shown.revision === state.revision ? null : h("p", { class: "note stops" }, "The edits have changed since; examine again."),
    h("div", { class: "cards" }, cards),
    rows.length ? h("div", { class: "panel" }, h("h3", {}, "Edited matrices"),
      table(["matrix", "relative change", { text: "norm", class: "number" }, { text: "largest singular value", class: "number" }, { text: "condition", class: "number" }, { text: "stable rank", class: "number" }], rows, "Edited matrices"),
      h("p", { class: "note" }, `Frobenius norm of the change over that of the matrix. From ${shown.passages} passages of held-out text of up to 128 tokens.`))
      : h("p", { class: "hero-note" }, "No weights are changed: the edits act beside the model, or none is on."));
}

const percentOf = (value) => `${(value * 100).toPrecision(2)} %`;

export function start() {
  $("health-form").addEventListener("submit", examine);
  watch(() => { if (shown !== null) show(); });
}
