// Speaks with the server: JSON requests, and the stream of events.

export const page = crypto.randomUUID?.() ?? String(Math.random()).slice(2);

export class StudioError extends Error {
  constructor(error) {
    super(error.message);
    this.error = error;
  }
}

export async function send(method, path, body, { raw = false } = {}) {
  const options = { method, headers: { "x-kecore-studio": "1" } };
  if (body !== undefined) {
    options.body = raw ? body : JSON.stringify(body);
    if (!raw) options.headers["content-type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    const what = "the studio does not answer";
    throw new StudioError({ type: "Offline", message: what, what, advice: "look whether kecore studio still runs in its terminal", page: "" });
  }
  let values;
  try {
    values = await response.json();
  } catch {
    const what = `the studio answered with status ${response.status}`;
    throw new StudioError({ type: "Broken", message: what, what, advice: "its terminal shows why", page: "" });
  }
  if (!response.ok) throw new StudioError(values.error ?? { type: "Broken", message: "", what: JSON.stringify(values), advice: "", page: "" });
  return values;
}

// Work on the model: resolves with the job once it has ended, rejects where it failed or was cancelled.
const waiting = new Map();

export async function run(method, path, body, options) {
  const { job } = await send(method, path, body, options);
  return new Promise((resolve, reject) => {
    waiting.set(job.id, { resolve, reject });
    // The end may have been told before anybody waited for it.
    send("GET", `api/jobs/${job.id}`).then((values) => settle(values.job)).catch(() => {});
  });
}

export function settle(job) {
  const promise = waiting.get(job.id);
  if (promise === undefined || !["done", "failed", "cancelled"].includes(job.state)) return;
  if (job.state === "done" && job.result === undefined) return;
  waiting.delete(job.id);
  if (job.state === "done") promise.resolve(job);
  else promise.reject(job.state === "failed" ? new StudioError(job.error) : new StudioError({ type: "Cancelled", message: "cancelled", what: "cancelled", advice: "", page: "" }));
}

export function listen(handlers, onLink) {
  const source = new EventSource("api/events");
  for (const [name, handle] of Object.entries(handlers)) {
    source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
  }
  source.addEventListener("open", () => onLink(true));
  source.addEventListener("error", () => onLink(false));
}
