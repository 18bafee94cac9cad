// Both models side by side: next tokens, texts, and what else is asked.
import { page, send } from "./api.js";
import * as address from "./address.js";
import { alertOf, errorBox } from "./alerts.js";
import { $, h, percent, replace, visible } from "./dom.js";
import { state, watch } from "./state.js";

const KINDS = { fact: "Edited facts", paraphrase: "In other words", neighbour: "Neighbours", canary: "Canaries" };
const HOLDS = { fact: ["fact holds", "facts hold"], paraphrase: ["paraphrase holds", "paraphrases hold"], neighbour: ["neighbour kept", "neighbours kept"], canary: ["canary kept", "canaries kept"] };
const SHOWN = 9; // tokens, the expected one besides
let job = null; // the job whose answers are shown
let asked = null; // prompt, target and revision that it was for
let seen = {};
let [pending, asks, turn] = [false, 0, Promise.resolve()]; // a question is on its way; their number; the last one
let lost = false; // other work ended the question before it was answered

const form = () => $("ask");

export function show(prompt, target = "") {
  form().elements.prompt.value = prompt;
  form().elements.target.value = target;
  if (address.read().view !== "compare") location.hash = address.link("compare", { ...address.read().fields, prompt, target });
  ask();
}

function ask() {
  const prompt = form().elements.prompt.value;
  const target = form().elements.target.value.trim();
  if (state.model === null || prompt.trim() === "") return showEmpty();
  address.write({ prompt, target });
  const { revision } = state;
  if (pending && asked.prompt === prompt && asked.target === target && asked.revision === revision) return;
  asked = { prompt, target, revision };
  pending = true;
  const number = ++asks;
  // One after another, so that the last question is the last that the server gets: it ends the one before.
  turn = turn.then(() => (number === asks ? post(prompt, target) : null));
}

async function post(prompt, target) {
  try {
    ({ job } = await send("POST", "api/ask", { prompt, target, page }));
    lost = false;
    // Answers may have been told before this page knew that they are its own.
    const { job: known } = await send("GET", `api/jobs/${job.id}`);
    if (Object.keys(known.partial).length > 0) onPartial(known.id, known.partial);
    onJob(known);
  } catch (error) {
    alertOf(error);
  }
  pending = false;
}

export function onJob(other) {
  const ended = ["done", "failed", "cancelled"].includes(other.state);
  if (other.id !== job?.id) {
    if (lost && ended && other.kind !== "ask") ask(); // what ended the question is over
    return;
  }
  job = { ...job, ...other };
  lost = job.state === "cancelled";
  if (job.state === "failed") {
    $("results").hidden = true;
    replace($("compare-empty"), errorBox(job.error));
    $("compare-empty").hidden = false;
  }
  if (job.state === "done" && job.result) onPartial(job.id, job.result);
  for (const id of ["text-before", "text-after"]) $(id).classList.toggle("writing", !ended);
}

export function onPartial(id, values) {
  if (id !== job?.id) return;
  if (values.distributions) seen = {};
  Object.assign(seen, values);
  $("compare-empty").hidden = true;
  $("results").hidden = false;
  if (values.distributions) {
    showTokens(values.distributions);
    if (asked) { $("text-before").textContent = $("text-after").textContent = ""; }
  }
  if (values.answers) showAnswers(values.answers);
  if (values.after !== undefined || values.before !== undefined) showTexts();
}

function showTokens({ tokens, divergence }) {
  tokens = tokens.filter((token, index) => token.target || (index < SHOWN && Math.max(token.before, token.after) >= 0.002));
  const most = Math.max(...tokens.flatMap((token) => [token.before, token.after]), 0.001);
  const bar = (side, value) => {
    const fill = h("span", { class: `fill ${side}` });
    fill.style.inlineSize = `${Math.max(value / most, 0.004) * 100}%`;
    return h("div", { class: "bar-row" }, h("span", { class: "track" }, fill), h("span", { class: "value" }, h("span", { class: "unseen" }, `${side} `), percent(value)));
  };
  const rows = tokens.map((token) => {
    const delta = token.after - token.before;
    const moved = Math.abs(delta) >= 0.05;
    return h("li", { class: moved ? "moved" : "" },
      h("div", { class: "token" }, h("code", {}, visible(token.text)),
        token.target ? h("span", { class: "tag" }, "expected") : null,
        moved ? h("span", { class: `delta ${delta > 0 ? "up" : "down"}` }, `${delta > 0 ? "▲" : "▼"} ${Math.round(Math.abs(delta) * 100)}`, h("span", { class: "unseen" }, ` points ${delta > 0 ? "more" : "less"}`)) : null),
      h("div", { class: "bars" }, bar("before", token.before), bar("after", token.after)));
  });
  const others = (side) => Math.max(0, 1 - tokens.reduce((sum, token) => sum + token[side], 0));
  const moved = divergence === null ? "not finite" : `${divergence < 0.001 && divergence > 0 ? "<0.001" : divergence.toFixed(3)} nats`;
  replace($("tokens"), h("ol", { class: "tokens" }, rows),
    h("p", { class: "note" }, `All others: ${percent(others("before"))} before, ${percent(others("after"))} after. KL divergence ${moved}.`));
}

// The texts word by word; words from the first difference on are marked.
function showTexts() {
  const { before, after } = seen;
  const split = (text) => (text ?? "").replace(/\n\s*\n/g, "\n").split(/(?<=\s)/);
  const words = { before: split(before), after: split(after) };
  let same = 0;
  while (same < words.before.length && same < words.after.length && words.before[same].trim() === words.after[same].trim()) same += 1;
  const comparable = before !== undefined && after !== undefined && before !== after;
  for (const side of ["before", "after"]) {
    const text = words[side];
    const shared = comparable ? text.slice(0, same).join("") : text.join("");
    const other = comparable ? text.slice(same).join("") : "";
    replace($(`text-${side}`), h("span", { class: "prompt" }, `${asked?.prompt ?? ""} `), h("span", {}, shared), other ? h("mark", { class: side }, other) : null);
  }
}

function badge(answer) {
  if (answer.kind === "fact" || answer.kind === "paraphrase") return answer.good ? ["good", "✓ holds"] : ["bad", "✗ fails"];
  if (answer.change === "same") return ["good", "✓ kept"];
  return answer.change === "drift" ? ["drift", "≈ begins alike"] : ["bad", "✗ changed"];
}

function showAnswers(answers) {
  const kinds = Object.keys(KINDS).filter((kind) => answers.some((answer) => answer.kind === kind));
  const words = kinds.map((kind) => {
    const some = answers.filter((answer) => answer.kind === kind);
    const good = some.filter((answer) => answer.good).length;
    return h("span", { class: `sum ${good === some.length ? "good" : "bad"}` }, h("strong", {}, `${good} of ${some.length}`), ` ${HOLDS[kind][some.length === 1 ? 0 : 1]}`);
  });
  replace($("verdict"), words);
  replace($("answers"), kinds.map((kind) => h("section", { class: "kind" }, h("h4", {}, KINDS[kind]),
    h("ul", { class: "answers" }, answers.filter((answer) => answer.kind === kind).map((answer) => {
      const [mark, text] = badge(answer);
      const same = answer.before.text === answer.after.text;
      const likely = answer.after.probability === null ? null
        : h("p", { class: "note" }, `P(${answer.target}) ${percent(answer.before.probability)} → ${percent(answer.after.probability)}`);
      return h("li", { class: mark },
        h("button", { type: "button", class: "title", "data-key": `${kind} ${answer.prompt}`, onclick: () => show(answer.prompt, answer.target) }, answer.prompt),
        h("div", { class: "said" }, h("p", {}, same ? h("span", { class: "kept" }, answer.after.text || "(nothing)")
          : [h("span", { class: "was" }, h("span", { class: "unseen" }, "before: "), answer.before.text || "(nothing)"), h("span", { class: "arrow", "aria-hidden": "true" }, " → "), h("span", { class: "now" }, h("span", { class: "unseen" }, "after: "), answer.after.text || "(nothing)")]), likely),
        h("div", { class: "marks" }, h("span", { class: `badge ${mark}` }, text)));
    })))));
}

function showEmpty() {
  if (job !== null && state.model !== null) return;
  $("results").hidden = true;
  $("compare-empty").hidden = false;
  const loading = state.jobs.some((item) => item.kind === "load");
  const steps = state.model === null
    ? [h("h2", {}, loading ? "The model is on its way" : "Open a model"), h("p", {}, "Name one under Model: ", h("code", {}, "demo"), ", a folder, a .gguf file or a Hub id. Prompts and facts stay on this machine."),
       loading ? null : h("p", {}, h("button", { type: "button", class: "primary", onclick: () => { $("ref").value ||= "demo"; $("load").requestSubmit(); } }, "Load the demo model"))]
    : [h("h2", {}, "See what a model says, then change it"), h("p", {}, "Type the beginning of a sentence above to ask the model. Or give it a fact, choose a method, and edit: what it says before and after will stand here, with what changed and what did not."),
       h("p", {}, h("button", { type: "button", class: "primary", onclick: example }, "Fill in an example"))];
  replace($("compare-empty"), steps);
}

function example() {
  $("example").click();
  show("The Eiffel Tower is in the city of", "Rome");
}

function suggest() {
  const some = state.stack.flatMap((item) => item.facts.slice(0, 2)).slice(-4);
  replace($("suggestions"), some.map((fact) => h("button", { type: "button", class: "chip", "data-key": `ask ${fact.prompt}`, onclick: () => show(fact.prompt, fact.target) }, fact.prompt)));
}

export function open(fields) {
  const { prompt, target } = form().elements;
  if (fields.prompt !== undefined && fields.prompt !== prompt.value) {
    prompt.value = fields.prompt;
    target.value = fields.target ?? "";
    if (state.model !== null) ask();
  }
  if (job === null) showEmpty();
}

export function start() {
  form().addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  $("canaries").addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await send("PUT", "api/canaries", { prompts: $("canary-text").value.split("\n") });
      ask();
    } catch (error) {
      alertOf(error);
    }
  });
  watch(() => {
    suggest();
    if (document.activeElement !== $("canary-text")) $("canary-text").value = state.canaries.join("\n");
    if (form().elements.prompt.value === "" && state.stack.length > 0) {
      const [fact] = state.stack.at(-1).facts;
      if (fact) { form().elements.prompt.value = fact.prompt; form().elements.target.value = fact.target; }
    }
    if (state.model === null) job = null;
    if (asked?.revision !== state.revision || job === null) ask();
  });
}
