// The page: what is shown, which view is open, and what is going on.
import { listen, send, settle, run } from "./api.js";
import * as address from "./address.js";
import { alertOf, say } from "./alerts.js";
import { $, count, h, seconds } from "./dom.js";
import { state, update, watch } from "./state.js";
import * as bench from "./bench.js";
import * as compare from "./compare.js";
import * as facts from "./facts.js";
import * as health from "./health.js";
import * as method from "./method.js";
import * as stack from "./stack.js";
import * as trace from "./trace.js";

const views = { compare, trace, health, bench };
const running = new Map(); // jobs that have not ended, by id
const QUIET = new Set(["ask"]); // kinds of work that show themselves where they belong

function showView() {
  const { view, fields } = address.read();
  const narrow = matchMedia("(max-width: 1020px)").matches;
  const shown = view === "edit" && !narrow ? "compare" : view;
  document.body.dataset.view = shown;
  for (const name of Object.keys(views)) $(name).hidden = name !== shown;
  for (const tab of document.querySelectorAll(".tabs a")) {
    const current = tab.dataset.view === shown;
    if (current) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
    tab.href = address.link(tab.dataset.view, fields);
  }
  views[shown]?.open(fields);
}

function showModel() {
  const { model } = state;
  const chip = $("model-chip");
  chip.hidden = model === null;
  $("load").hidden = false;
  if (model === null) return;
  if ($("ref").value === "") $("ref").value = model.ref;
  chip.textContent = `${model.ref} · ${model.dtype} · ${model.device}`;
  const millions = Math.round(model.parameters / 1e6);
  const size = millions > 0 ? `${millions.toLocaleString("en")} M parameters` : count(model.parameters, "parameter");
  $("model-text").textContent = `${model.type}: ${size}, ${count(model.layers, "layer")}, ${model.width} wide${model.chat ? ", in its chat template" : ""}.`;
  address.write({ model: model.ref });
}

// Work

function showJob() {
  const jobs = [...running.values()].filter((job) => !QUIET.has(job.kind));
  const job = jobs.find((item) => item.state === "running") ?? jobs[0];
  $("job").hidden = job === undefined;
  document.body.classList.toggle("busy", job !== undefined);
  if (job === undefined) return;
  const more = jobs.length > 1 ? ` (and ${count(jobs.length - 1, "more job")} behind it)` : "";
  const elapsed = job.begun ? `, ${seconds(Math.max(0, Date.now() / 1000 - job.begun))}` : "";
  $("job-title").textContent = job.title;
  const steps = job.total ? ` ${job.done} of ${job.total}` : "";
  $("job-stage").textContent = job.state === "waiting" ? "waiting for its turn" : `${job.stage}${steps}${elapsed}${more}`;
  const progress = $("job-progress");
  if (job.total) progress.value = job.done / job.total;
  else progress.removeAttribute("value");
  $("job-cancel").dataset.job = job.id;
}

function onJob(job) {
  if (["done", "failed", "cancelled"].includes(job.state)) {
    if (running.has(job.id) && !QUIET.has(job.kind)) {
      const how = { done: `done in ${seconds(job.seconds ?? 0)}`, failed: "failed", cancelled: "cancelled; nothing was changed" }[job.state];
      say(`${job.title}: ${how}`);
    }
    running.delete(job.id);
  } else running.set(job.id, { ...running.get(job.id), ...job });
  showJob();
  settle(job);
  for (const view of Object.values(views)) view.onJob?.(job);
}

function onState(values) {
  running.clear();
  for (const job of values.jobs) running.set(job.id, job);
  update(values);
  showJob();
}

listen(
  {
    state: onState,
    job: onJob,
    partial: ({ id, values }) => { for (const view of Object.values(views)) view.onPartial?.(id, values); },
  },
  (linked) => {
    $("link-state").textContent = linked ? "" : "Not connected; trying again";
  },
);

$("job-cancel").addEventListener("click", (event) => send("DELETE", `api/jobs/${event.target.dataset.job}`).catch(alertOf));
setInterval(() => { if (running.size > 0) showJob(); }, 1000);

$("load").addEventListener("submit", async (event) => {
  event.preventDefault();
  const count_ = state.stack.length;
  if (count_ > 0 && !confirm(`Loading another model closes this one with its ${count(count_, "edit")}. Go on?`)) return;
  try {
    await run("POST", "api/load", { ref: $("ref").value });
  } catch (error) {
    alertOf(error);
  }
});

// Theme

const NEXT = { system: "light", light: "dark", dark: "system" };
const themeButton = $("theme");
function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "system";
  themeButton.replaceChildren(h("span", {}, "Theme: "), theme);
  themeButton.setAttribute("aria-label", `Theme: ${theme}`);
}
themeButton.addEventListener("click", () => {
  const theme = NEXT[document.documentElement.dataset.theme ?? "system"];
  if (theme === "system") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem("kecore-theme");
  } else {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("kecore-theme", theme);
  }
  showTheme();
});
showTheme();

// Files that are dropped anywhere

let depth = 0;
const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragenter", (event) => { if (hasFiles(event)) { depth += 1; $("drop").hidden = false; } });
addEventListener("dragleave", (event) => { if (hasFiles(event)) { depth -= 1; $("drop").hidden = depth > 0 ? false : true; } });
addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  depth = 0;
  $("drop").hidden = true;
  const file = event.dataTransfer.files[0];
  if (file === undefined) return;
  if (file.name.endsWith(".safetensors")) stack.openFile(file);
  else facts.readFile(file);
});

addEventListener("hashchange", showView);
matchMedia("(max-width: 1020px)").addEventListener("change", showView);

watch(showModel);
facts.start();
method.start();
stack.start();
for (const view of Object.values(views)) view.start();
const { fields } = address.read();
if (fields.model) $("ref").value = fields.model;
showView();
document.body.append(h("span", { id: "ready", hidden: true }));
