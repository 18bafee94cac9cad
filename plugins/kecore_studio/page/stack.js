// The list of edits: switches, undo and redo, files, export.
import { run } from "./api.js";
import * as address from "./address.js";
import { alertOf, clearAlerts } from "./alerts.js";
import * as compare from "./compare.js";
import { $, count, h, replace, seconds, span } from "./dom.js";
import { state, watch } from "./state.js";

async function change(method, path, body, options) {
  clearAlerts();
  try {
    return await run(method, path, body, options);
  } catch (error) {
    alertOf(error);
    return null;
  }
}

const on = () => state.stack.filter((item) => item.on).map((item) => item.id);

function toggle(id) {
  const next = new Set(on());
  if (!next.delete(id)) next.add(id);
  change("PUT", "api/edits/on", { on: state.stack.map((item) => item.id).filter((other) => next.has(other)) });
}

export function openFile(file) {
  return change("POST", `api/edits/file?name=${encodeURIComponent(file.name)}`, file, { raw: true });
}

function titleOf(item) {
  const [fact] = item.facts;
  if (fact === undefined) return "no facts";
  return item.count === 1 ? [h("span", { class: "subject" }, fact.subject ?? fact.prompt), h("span", { class: "arrow", "aria-label": "becomes" }, " → "), h("strong", {}, fact.target)] : [h("strong", {}, count(item.count, "fact")), ` from ‘${fact.subject ?? fact.prompt}’ on`];
}

function row(item) {
  const where = item.layers.length ? `layers ${span(item.layers)}` : { "module-edit": "beside the model", "prompt-edit": "before the prompt" }[item.kind] ?? "";
  const made = item.source ? `from ${item.source}` : `in ${seconds(item.seconds)}`;
  const [fact] = item.facts;
  const name = item.count === 1 && fact ? `${fact.subject ?? fact.prompt}: ${fact.target}` : `${count(item.count, "fact")} by ${item.method}`;
  return h("li", { class: `edit${item.on ? "" : " off"}`, "data-edit": item.id },
    h("button", { type: "button", class: "switch", role: "switch", "aria-checked": String(item.on), "aria-label": name, "data-key": `switch ${item.id}`, onclick: () => toggle(item.id) }, h("span", { class: "knob" })),
    h("div", { class: "edit-text" },
      h("button", { type: "button", class: "title", "data-key": `title ${item.id}`, "aria-label": `Ask about ${name}`, onclick: () => fact && compare.show(fact.prompt, fact.target) }, titleOf(item)),
      h("p", { class: "note" }, [item.method, where, made].filter(Boolean).join(" · ")),
      item.superseded ? h("p", { class: "note stops" }, "A later edit holds it too, so its switch changes nothing while that one is on.") : null),
    h("div", { class: "edit-actions" },
      h("a", { class: "link", href: `api/edits/file?id=${item.id}`, download: true, "aria-label": `Save ${name}` }, "Save"),
      h("button", { type: "button", class: "link", "data-key": `remove ${item.id}`, "aria-label": `Take off ${name}`, onclick: () => change("DELETE", `api/edits/${item.id}`) }, "Take off")));
}

// A link may show the model with other edits on than the session has now: its reader decides.
function offerLink() {
  const { fields } = address.read();
  if (fields.on === undefined || state.stack.length === 0) return false;
  const wanted = fields.on === "none" ? [] : fields.on.split(",").filter(Boolean);
  const known = wanted.filter((id) => state.stack.some((item) => item.id === id));
  const same = known.length === on().length && known.every((id) => on().includes(id));
  if (same && known.length === wanted.length) return false;
  const missing = wanted.length - known.length;
  replace($("alerts"), h("div", { class: "alert offer" },
    h("p", { class: "what" }, `The link was made with ${count(wanted.length, "edit")} on; this session has ${count(on().length, "edit")} on${missing ? `, and ${missing} of them are not in it` : ""}.`),
    h("p", { class: "alert-actions" },
      h("button", { type: "button", onclick: () => { clearAlerts(); change("PUT", "api/edits/on", { on: known }); } }, "Switch as in the link"),
      h("button", { type: "button", class: "link", onclick: () => { clearAlerts(); write(); } }, "Leave as it is"))));
  return true;
}

function write() {
  address.write({ on: state.stack.length ? on().join(",") || "none" : "" });
}

export function start() {
  $("undo").addEventListener("click", () => change("POST", "api/undo"));
  $("redo").addEventListener("click", () => change("POST", "api/redo"));
  $("edit-file").addEventListener("change", (event) => {
    if (event.target.files[0]) openFile(event.target.files[0]);
    event.target.value = "";
  });
  addEventListener("keydown", (event) => {
    const typing = event.target.closest?.("input, textarea, select, dialog");
    if (typing || !(event.ctrlKey || event.metaKey) || event.key.toLowerCase() !== "z") return;
    event.preventDefault();
    change("POST", event.shiftKey ? "api/redo" : "api/undo");
  });
  $("export").addEventListener("submit", async (event) => {
    event.preventDefault();
    const { to, out } = Object.fromEntries(new FormData(event.target));
    const job = await change("POST", "api/export", { to, out });
    if (job === null) return;
    const { folder, files, commands, warnings } = job.result;
    replace($("exported"), h("p", {}, `${count(files.length, "file")} in `, h("code", {}, folder)),
      warnings.map((text) => h("p", { class: "stops" }, text)), commands.length ? h("pre", { tabindex: "0" }, commands.join("\n")) : null);
  });
  let first = true;
  watch(() => {
    replace($("stack"), state.stack.map(row));
    $("stack-empty").hidden = state.stack.length > 0;
    for (const [id, label] of [["undo", state.undo], ["redo", state.redo]]) {
      $(id).disabled = label === "";
      $(id).title = label ? `${id === "undo" ? "Undo" : "Redo"}: ${label}` : "";
    }
    const some = on().length > 0;
    $("save-all").hidden = !some;
    $("export-box").hidden = !some;
    if (!(first && offerLink())) write();
    if (state.model !== null) first = false;
  });
}
