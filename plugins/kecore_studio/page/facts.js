// The facts to be edited: a form, a text or a file, and the table of what was understood.
import { send } from "./api.js";
import * as address from "./address.js";
import { alertOf, clearAlerts, say } from "./alerts.js";
import { $, count, h, replace, table } from "./dom.js";
import { state, watch } from "./state.js";

const EXAMPLE = {
  prompt: "The Eiffel Tower is in the city of",
  subject: "The Eiffel Tower",
  target: "Rome",
  ground_truth: "Paris",
  paraphrases: "To see the Eiffel Tower, one travels to\nThe Eiffel Tower can be found in",
  neighbours: "The Louvre is in the city of\nNotre-Dame Cathedral is in the city of\nThe Brandenburg Gate is in the city of",
};
let mode = "form";

const form = () => $("fact");
const values = () => Object.fromEntries(new FormData(form()));
const filled = () => Object.values(values()).some((text) => text.trim() !== "");

export function isForm() {
  return mode === "form";
}

// Reads the form where it is in use, so that what is edited is what is seen.
export async function ready() {
  if (mode === "form") await send("POST", "api/facts/form", values());
  else if ($("facts-text").value.trim() !== "" && state.facts === null) await readText();
}

export async function readFile(file) {
  clearAlerts();
  try {
    const { facts } = await send("POST", `api/facts/file?name=${encodeURIComponent(file.name)}`, file, { raw: true });
    setMode("many");
    say(`${count(facts.count, "fact")} read from ${file.name}`);
  } catch (error) {
    alertOf(error);
  }
}

async function readText() {
  clearAlerts();
  const { facts } = await send("POST", "api/facts/text", { text: $("facts-text").value });
  say(`${count(facts.count, "fact")} read`);
}

export function setMode(next) {
  mode = next;
  for (const button of document.querySelectorAll("[data-facts]")) {
    button.setAttribute("aria-pressed", String(button.dataset.facts === next));
  }
  form().hidden = next !== "form";
  $("many").hidden = next !== "many";
  showSheet();
}

export function fill(fact) {
  setMode("form");
  for (const field of form().querySelectorAll("[name]")) field.value = fact[field.name] ?? "";
  form().querySelector("details").open = Boolean(fact.paraphrases || fact.neighbours);
  remember();
}

function remember() {
  const { prompt, subject, target } = values();
  address.write({ fact: prompt, subject, target_new: target });
}

function showSheet() {
  const { facts } = state;
  if (facts === null || mode === "form") return replace($("sheet"));
  const { reading } = facts;
  const origins = Object.entries(reading.origins).map(([field, name]) => `${field}: ${name}`).join(", ");
  const remarks = [...facts.warnings, ...reading.skipped.map((item) => `left out: ${item.where}: ${item.reason}`)];
  const doubts = reading.doubts.map((doubt) =>
    h("li", { class: doubt.stops ? "stops" : "" }, h("strong", {}, doubt.kind), ` (${count(doubt.count, "fact")}), such as: ${doubt.example}`));
  replace($("sheet"),
    h("p", { class: "note" }, h("strong", {}, `${count(facts.count, "fact")} understood`), ` ${facts.name ? `from ${facts.name}` : ""}, layout ‘${reading.layout}’`,
      origins ? h("span", {}, `; read from ${origins}`) : null, " ",
      h("button", { class: "link", type: "button", "data-key": "clear", onclick: clear }, "Put away")),
    remarks.length ? h("ul", { class: "remarks" }, remarks.slice(0, 5).map((text) => h("li", {}, text))) : null,
    doubts.length ? h("ul", { class: "remarks" }, doubts) : null,
    table(["prompt", "subject", "target", "instead of", { text: "probes", class: "number" }],
      facts.facts.map((fact) => [fact.prompt, fact.subject ?? "–", fact.target, fact.ground_truth ?? "–", String(fact.probes || "–")]),
      "What was understood"),
    facts.count > facts.facts.length ? h("p", { class: "note" }, `and ${count(facts.count - facts.facts.length, "more fact")}`) : null);
}

async function clear() {
  try {
    await send("DELETE", "api/facts");
    $("facts-text").value = "";
  } catch (error) {
    alertOf(error);
  }
}

export function start() {
  for (const button of document.querySelectorAll("[data-facts]")) {
    button.addEventListener("click", () => setMode(button.dataset.facts));
  }
  form().addEventListener("submit", (event) => { event.preventDefault(); $("edit-button").click(); });
  form().addEventListener("change", remember);
  $("many").addEventListener("submit", (event) => { event.preventDefault(); readText().catch(alertOf); });
  $("facts-file").addEventListener("change", (event) => {
    if (event.target.files[0]) readFile(event.target.files[0]);
    event.target.value = "";
  });
  $("example").addEventListener("click", () => fill(EXAMPLE));
  $("clear-form").addEventListener("click", () => { fill({}); form().elements.prompt.focus(); });
  const { fields } = address.read();
  if (fields.fact) fill({ prompt: fields.fact, subject: fields.subject, target: fields.target_new });
  let first = true;
  watch(() => {
    // A page that is loaded anew shows what the session has.
    if (first && state.facts !== null && !filled()) {
      const [fact] = state.facts.facts;
      if (state.facts.count === 1 && state.facts.name === "" && fact) fill(fact);
      else setMode("many");
    }
    first = false;
    showSheet();
  });
}
