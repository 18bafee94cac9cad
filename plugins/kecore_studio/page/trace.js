// A heat map of the states that carry a fact, with the layers that the edits change.
import { page, run } from "./api.js";
import * as address from "./address.js";
import { alertOf, clearAlerts } from "./alerts.js";
import { $, h, percent, replace, span, svg, visible } from "./dom.js";
import { state, watch } from "./state.js";

const KINDS = { hidden: "a hidden state", mlp: "feed-forward blocks", attention: "attentions" };
let shown = null;
const form = () => $("trace-form");

export function open(fields) {
  const { prompt, subject } = form().elements;
  const [fact] = state.stack.at(-1)?.facts ?? [];
  if (prompt.value === "") prompt.value = fields.prompt ?? fact?.prompt ?? "";
  if (subject.value === "") {
    const own = state.stack.flatMap((item) => item.facts).find((item) => item.prompt === prompt.value);
    subject.value = fields.subject ?? own?.subject ?? "";
  }
  if (shown === null) replace($("trace-result"), h("p", { class: "hero-note" }, "The heat map will stand here: tokens down, layers across, and a mark over the layers that an edit changes."));
}

async function trace(event) {
  event.preventDefault();
  clearAlerts();
  const { prompt, subject, edited, samples } = form().elements;
  address.write({ prompt: prompt.value, subject: subject.value });
  try {
    await run("POST", "api/trace", { prompt: prompt.value, subject: subject.value, edited: edited.checked, samples: Number(samples.value), page });
  } catch (error) {
    alertOf(error);
  }
}

// Every page shows the last trace, also one that was loaded anew while it ran.
export function onJob(job) {
  if (job.kind !== "trace" || job.state !== "done" || !job.result) return;
  shown = job.result;
  show();
}

function show() {
  const edited = [...new Set(state.stack.filter((item) => item.on).flatMap((item) => item.layers))].sort((a, b) => a - b);
  const which = shown.edited ? "The edited model" : "The unedited model";
  replace($("trace-result"),
    h("div", { class: "panel" },
      h("p", {}, `${which} answers `, h("code", {}, visible(shown.answer)), ` with ${percent(shown.clean)}; with noise on the subject, ${percent(shown.corrupted)}. `,
        h("strong", {}, `Feed-forward blocks around layer ${shown.best_layer} count most`), ` (${span(shown.suggested_layers)} nearly as much).`,
        edited.length ? ` The edits that are on change ${edited.length === 1 ? "layer" : "layers"} ${span(edited)}.` : ""),
      h("div", { class: "maps" }, Object.keys(KINDS).filter((kind) => shown.effects[kind]).map((kind) => map(kind, edited))),
      h("p", { class: "note" }, `Stronger colour: the answer is likelier with that state restored; mean over ${shown.samples} noise samples. Blocks and attentions are restored ${shown.window} layers at a time, centred at the column.`)));
}

function map(kind, edited) {
  const effects = shown.effects[kind];
  const layers = effects[0].length;
  const [cell, row, left, top] = [14, 20, 108, 22];
  const width = left + layers * cell + 8;
  const height = top + effects.length * row + 26;
  const most = Math.max(0.001, ...effects.flat());
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: `map ${kind}`, role: "img", "aria-label": summary(kind, effects) });
  effects.forEach((values, index) => {
    const [first, last] = shown.subject_tokens;
    const subject = index >= first && index <= last;
    const label = svg("text", { x: left - 6, y: top + index * row + 14, "text-anchor": "end", class: subject ? "label subject" : "label" });
    const text = visible(shown.tokens[index]);
    label.textContent = (text.length > 14 ? `${text.slice(0, 13)}…` : text) + (subject ? "*" : "");
    picture.append(label);
    values.forEach((value, layer) => {
      const box = svg("rect", { x: left + layer * cell + 0.5, y: top + index * row + 0.5, width: cell - 1, height: row - 1, rx: 2, "fill-opacity": Math.max(0.04, value / most).toFixed(3), class: "cell" });
      const title = svg("title");
      title.textContent = `${shown.tokens[index].trim()}, layer ${layer}: +${percent(Math.max(0, value))}`;
      box.append(title);
      picture.append(box);
    });
  });
  for (let layer = 0; layer < layers; layer += 5) {
    const tick = svg("text", { x: left + layer * cell + cell / 2, y: height - 8, "text-anchor": "middle", class: "label" });
    tick.textContent = layer;
    picture.append(tick);
  }
  for (const [first, last] of runs(edited)) {
    picture.append(svg("rect", { x: left + first * cell, y: top - 2, width: (last - first + 1) * cell, height: effects.length * row + 4, rx: 3, class: "edited" }));
    const note = svg("text", { x: left + ((first + last + 1) / 2) * cell, y: 14, "text-anchor": "middle", class: "label edited-label" });
    note.textContent = "edited";
    picture.append(note);
  }
  return h("figure", {}, h("figcaption", {}, `Restoring ${KINDS[kind]}`), picture);
}

// Runs of layers without gaps, each as its first and last layer.
function runs(layers) {
  const found = [];
  for (const layer of layers) {
    if (found.at(-1)?.[1] === layer - 1) found.at(-1)[1] = layer;
    else found.push([layer, layer]);
  }
  return found;
}

function summary(kind, effects) {
  let best = [0, 0];
  effects.forEach((values, token) => values.forEach((value, layer) => { if (value > effects[best[0]][best[1]]) best = [token, layer]; }));
  return `Restoring ${KINDS[kind]} helps most at the token ${shown.tokens[best[0]].trim()}, layer ${best[1]}: plus ${percent(effects[best[0]][best[1]])}`;
}

export function start() {
  form().addEventListener("submit", trace);
  watch(() => { if (shown !== null) show(); });
}
