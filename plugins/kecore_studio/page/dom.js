// Makes elements. Text is always set as text, so that a prompt that looks like a tag stays a prompt.

export const $ = (id) => document.getElementById(id);

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  set(element, attributes);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
}

// Puts new content in place of the old; what had the focus keeps it, told by data-key.
export function replace(container, ...children) {
  const active = document.activeElement;
  const key = container.contains(active) ? active.dataset.key : undefined;
  container.replaceChildren(...children.flat().filter(Boolean));
  if (key !== undefined) container.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}

export function table(headings, rows, caption = "") {
  const head = headings.map((heading) => h("th", { scope: "col", class: heading.class ?? "" }, heading.text ?? heading));
  const body = rows.map((cells) =>
    h("tr", {}, cells.map((cell, index) => {
      const content = cell?.nodeType || typeof cell === "string" ? cell : String(cell ?? "");
      return h("td", { class: headings[index].class ?? "", "data-label": headings[index].text ?? headings[index] }, content);
    })));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption || "Table" },
    h("table", {}, caption ? h("caption", { class: "unseen" }, caption) : null, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}

export const percent = (value) => {
  if (value === null || value === undefined) return "";
  if (value === 0) return "0\u00a0%";
  if (value < 0.001) return "<0.1\u00a0%";
  return `${(value * 100).toFixed(value >= 0.1 ? 0 : 1)}\u00a0%`;
};

export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

export const seconds = (value) => {
  if (value === null || value === undefined) return "not known";
  if (value < 10) return `${value.toFixed(1)} s`;
  return value < 100 ? `${Math.round(value)} s` : `${Math.round(value / 60)} min`;
};

export const bytes = (value) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let index = 0;
  while (value >= 1024 && index < units.length - 1) { value /= 1024; index += 1; }
  return `${value.toFixed(value < 10 && index > 0 ? 1 : 0)} ${units[index]}`;
};

// Layers in words: "4 to 8", or a list where there are gaps.
export function span(layers) {
  const ordered = [...layers].sort((a, b) => a - b);
  const last = ordered.at(-1);
  if (ordered.length > 2 && last - ordered[0] === ordered.length - 1) return `${ordered[0]} to ${last}`;
  return ordered.join(", ");
}

// A token as it is: its space is part of it.
export const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
