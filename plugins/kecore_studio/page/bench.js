// A store of benchmark results: tables, and curves over the number of edits.
import { send } from "./api.js";
import * as address from "./address.js";
import { alertOf, clearAlerts } from "./alerts.js";
import { $, count, h, replace, svg, table } from "./dom.js";

const COLOURS = 8;
let read = null; // path of the store that is shown

export async function open(fields) {
  const input = $("bench-form").elements.store;
  if (input.value === "" && fields.store) input.value = fields.store;
  if (read === null && fields.store) load();
  try {
    const { folder, stores } = await send("GET", "api/stores");
    replace($("stores"), stores.map((path) => h("option", { value: path })));
    $("bench-note").textContent = stores.length ? `${count(stores.length, "store")} below ${folder}` : `No store below ${folder}; kecore bench makes one, and the studio reads it while it grows.`;
    if (read === null && !fields.store) {
      replace($("bench-result"), stores.length ? h("ul", { class: "files" }, stores.slice(0, 12).map((path) => h("li", {}, h("button", { type: "button", class: "link", onclick: () => { input.value = path; load(); } }, path)))) : h("p", { class: "hero-note" }, "Methods side by side on your facts, and how well edits are kept as more are made, will stand here."));
    }
  } catch (error) {
    alertOf(error);
  }
}

async function load() {
  clearAlerts();
  const path = $("bench-form").elements.store.value.trim();
  try {
    const store = await send("GET", `api/store?path=${encodeURIComponent(path)}`);
    read = path;
    address.write({ store: path });
    show(store);
  } catch (error) {
    alertOf(error);
  }
}

function number(score) {
  if (score === undefined || score === null) return "–";
  const value = typeof score === "number" ? score : score.value;
  if (value === null || value === undefined) return "–";
  return Math.abs(value) <= 1 ? (value * 100).toFixed(1) : value.toPrecision(4);
}

function show(store) {
  const methods = [...new Set(store.tables.flatMap((item) => item.rows.map((row) => row.method)))];
  const parts = store.tables.map((item) => {
    const headings = ["method", { text: "records", class: "number" }, ...item.columns.map((column) => ({ text: column.heading, class: "number" })), { text: "s a fact", class: "number" }];
    const rows = item.rows.map((row) => [h("span", {}, h("span", { class: `dot c${methods.indexOf(row.method) % COLOURS}` }), row.method, row.note ? h("span", { class: "note" }, ` (${row.note})`) : null), String(row.records),
      ...item.columns.map((column) => number(row.scores[column.key])), row.seconds_per_fact === null ? "–" : row.seconds_per_fact.toFixed(2)]);
    return h("div", { class: "panel" }, h("h3", {}, item.title), table(headings, rows, item.title));
  });
  const curves = store.curves.map((curve) => chart(curve, methods));
  replace($("bench-result"), curves.length ? h("div", { class: "cards wide" }, curves) : null, parts,
    h("p", { class: "note" }, `Protocol ${store.protocol.hash}; scores times 100. kecore report makes tables and figures for a paper of it.`));
}

function chart(curve, methods) {
  const [width, height, left, top, bottom, right] = [420, 240, 36, 12, 30, 12];
  const most = Math.max(...curve.lines.flatMap((line) => line.points.map((point) => point.facts)));
  const least = Math.min(...curve.lines.flatMap((line) => line.points.map((point) => point.facts)));
  const x = (facts) => left + ((facts - least) / Math.max(1, most - least)) * (width - left - right);
  const y = (value) => top + (1 - value) * (height - top - bottom);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": `${curve.y} over the number of edited facts: ${curve.lines.map((line) => `${line.label} ends at ${number(line.points.at(-1))}`).join(", ")}` });
  for (const value of [0, 0.25, 0.5, 0.75, 1]) {
    picture.append(svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid" }));
    const label = svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end", class: "label" });
    label.textContent = value * 100;
    picture.append(label);
  }
  for (const facts of curve.ticks) {
    const label = svg("text", { x: x(facts), y: height - 10, "text-anchor": "middle", class: "label" });
    label.textContent = facts;
    picture.append(label);
  }
  for (const line of curve.lines) {
    const colour = `c${methods.indexOf(line.label) % COLOURS}`;
    const known = line.points.filter((point) => point.value !== null);
    picture.append(svg("polyline", { points: known.map((point) => `${x(point.facts)},${y(point.value)}`).join(" "), class: `line ${colour}` }));
    for (const point of known) {
      const dot = svg("circle", { cx: x(point.facts), cy: y(point.value), r: 3, class: `point ${colour}` });
      const title = svg("title");
      title.textContent = `${line.label}: ${number(point)} after ${point.facts} facts`;
      dot.append(title);
      picture.append(dot);
    }
  }
  const legend = h("p", { class: "legend" }, curve.lines.map((line) => h("span", {}, h("span", { class: `dot c${methods.indexOf(line.label) % COLOURS}` }), line.label)));
  return h("figure", { class: "panel" }, h("figcaption", {}, curve.y, " over the number of edited facts"), picture, legend);
}

export function start() {
  $("bench-form").addEventListener("submit", (event) => { event.preventDefault(); load(); });
}
