// The address says what is in view, so that it can be sent to a colleague: #/compare?model=..&prompt=..&on=a,b

const VIEWS = ["edit", "compare", "trace", "health", "bench"];

export function read() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const fields = Object.fromEntries(new URLSearchParams(query));
  return { view: VIEWS.includes(path) ? path : "compare", fields };
}

export function link(view, fields) {
  const kept = Object.entries(fields).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const query = new URLSearchParams(kept).toString();
  return `#/${view}${query ? `?${query}` : ""}`;
}

// Writes fields into the address without a new entry in the history; empty ones are left out.
export function write(changes, view = read().view) {
  const next = link(view, { ...read().fields, ...changes });
  if (next !== location.hash) history.replaceState(null, "", next);
}
