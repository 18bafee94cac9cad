// The choice of a method, what it would take, and the edit itself.
import { run, send, StudioError } from "./api.js";
import * as address from "./address.js";
import { alertOf, clearAlerts } from "./alerts.js";
import * as compare from "./compare.js";
import { $, bytes, count, h, replace, seconds, span } from "./dom.js";
import * as facts from "./facts.js";
import { state, watch } from "./state.js";

const NEEDS = { "needs training": "has to be trained first (kecore train)", "needs examples": "needs examples (kecore edit --examples)" };
const FAMILIES = { locate: "Locate and edit", finetune: "Fine-tuning", memory: "Memory beside the model", prompt: "Prompts", meta: "Trained editors", longform: "Long texts" };
const CHANGES = { weights: "changes weights", modules: "acts beside the model", prompt: "writes before the prompt" };
const NO_MODEL = { type: "", message: "", what: "no model is open", advice: "load one first; demo is a small one that kecore knows", page: "" };
let cards = [];

const card = () => cards.find((item) => item.name === $("method").value);
const refusal = (item) => item.abilities.map((ability) => NEEDS[ability]).find(Boolean);

function choice() {
  const config = {};
  for (const input of $("fields").querySelectorAll("[data-field]")) {
    if (input.value.trim() !== "") config[input.dataset.field] = parse(input.value.trim());
  }
  return { method: $("method").value, preset: $("preset")?.value ?? "", config };
}

// What is typed into a setting: JSON where it is some, else a text.
function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

function showCard() {
  const item = card();
  if (item === undefined) return;
  address.write({ method: item.name === "memit" ? "" : item.name });
  const { measured } = item;
  const tags = [CHANGES[item.changes], ...item.abilities].map((text) => h("li", {}, text));
  const numbers = measured === null ? [] : [
    ["edits", measured.success], ["reworded", measured.paraphrases], ["neighbours kept", measured.neighbours],
  ].filter(([, value]) => value !== null).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value.toFixed(2))));
  if (measured?.seconds_per_fact) numbers.push(h("div", {}, h("dt", {}, "a fact"), h("dd", {}, seconds(measured.seconds_per_fact))));
  const why = refusal(item);
  replace($("card"),
    h("p", {}, item.summary),
    h("ul", { class: "abilities" }, tags),
    h("p", { class: "note" }, `Take it when ${item.use_when}.`),
    numbers.length ? h("dl", { class: "figures", title: "Measured on SmolLM2-135M, 50 facts each edited alone; docs/results.md" }, numbers) : null,
    why ? h("p", { class: "stops" }, `It ${why}, which the studio does not do.`) : null);
  $("edit-button").disabled = $("plan-button").disabled = Boolean(why);
  const presets = Object.keys(item.presets);
  replace($("fields"),
    presets.length ? h("label", {}, "Published set-up", h("select", { id: "preset" }, h("option", { value: "" }, "none"), presets.map((name) => h("option", { value: name }, name)))) : null,
    item.fields.map((field) => h("label", { title: field.meaning }, h("span", {}, field.name, " ", h("small", {}, field.type)),
      h("input", { "data-field": field.name, placeholder: field.default === null ? "none" : JSON.stringify(field.default), autocomplete: "off" }))));
  replace($("plan"));
}

function showPlan(plan) {
  const rows = [
    ["takes", plan.seconds === null ? "not foretold by this method" : `about ${seconds(plan.seconds)} at the most`],
    ["memory", `${bytes(plan.memory.peak)} at its height${plan.memory.budget ? ` of ${bytes(plan.memory.budget)}` : ""}`],
    ["statistics", plan.statistics],
    plan.layers.length ? ["of layers", span(plan.layers)] : null,
    plan.known.length ? ["known already", count(plan.known.length, "fact")] : null,
  ].filter(Boolean);
  replace($("plan"), h("dl", { class: "plan" }, rows.map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", {}, text)))));
}

async function submit(path, done) {
  clearAlerts();
  if (state.model === null) return alertOf(new StudioError(NO_MODEL));
  const buttons = [$("edit-button"), $("plan-button")];
  buttons.forEach((button) => { button.disabled = true; });
  try {
    await facts.ready();
    done(await run("POST", path, choice()));
  } catch (error) {
    alertOf(error);
  } finally {
    buttons.forEach((button) => { button.disabled = Boolean(refusal(card())); });
  }
}

function edit() {
  replace($("plan"));
  submit("api/edit", (job) => {
    const item = state.stack.find((other) => other.id === job.result.edit) ?? state.stack.at(-1);
    const fact = item?.facts[0];
    if (fact) compare.show(fact.prompt, fact.target);
  });
}

export async function start() {
  $("edit-button").addEventListener("click", edit);
  $("plan-button").addEventListener("click", () => submit("api/plan", (job) => showPlan(job.result)));
  $("method").addEventListener("change", showCard);
  watch(() => { document.body.classList.toggle("no-model", state.model === null); });
  try {
    cards = (await send("GET", "api/methods")).methods;
  } catch (error) {
    return alertOf(error);
  }
  const families = Map.groupBy(cards, (item) => item.family);
  replace($("method"), [...families].sort((a, b) => b[1].length - a[1].length).map(([family, items]) =>
    h("optgroup", { label: FAMILIES[family] ?? family }, items.map((item) => h("option", { value: item.name }, item.name)))));
  const wanted = address.read().fields.method ?? "memit";
  $("method").value = cards.some((item) => item.name === wanted) ? wanted : cards[0]?.name;
  showCard();
}
