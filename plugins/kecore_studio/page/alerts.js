// Says what went wrong: what was expected or came, and what to do.
import { send, StudioError } from "./api.js";
import { $, h } from "./dom.js";

export function say(text) {
  $("live").textContent = text;
}

export function alertOf(error) {
  if (!(error instanceof StudioError)) {
    console.error(error);
    show({ type: error.name, what: error.message, advice: "reload the page; this is a mistake in the studio", page: "" });
  } else if (error.error.type !== "Cancelled") show(error.error);
}

export function clearAlerts() {
  $("alerts").replaceChildren();
}

export function errorBox(error) {
  const named = error.type && !["Offline", "Broken", "Refused"].includes(error.type);
  return h("div", { class: "alert", role: "alert" },
    h("p", { class: "what" }, capitalise(error.what)),
    error.advice ? h("p", { class: "advice" }, h("span", { class: "tag" }, "What to do"), " ", capitalise(error.advice)) : null,
    h("p", { class: "alert-actions" },
      named ? h("button", { class: "link", type: "button", onclick: () => explain(error.type) }, error.type) : null,
      h("button", { class: "link", type: "button", onclick: (event) => event.target.closest(".alert").remove() }, "Dismiss")));
}

function show(error) {
  $("alerts").replaceChildren(errorBox(error));
  $("alerts").scrollIntoView({ block: "nearest" });
}

async function explain(name) {
  try {
    const { page } = await send("GET", `api/errors/${name}`);
    $("explain-title").textContent = name;
    $("explain-text").textContent = page.replace(/^# .*\n+/, "");
    $("explain").showModal();
  } catch (error) {
    alertOf(error);
  }
}

const capitalise = (text) => text.charAt(0).toUpperCase() + text.slice(1);
