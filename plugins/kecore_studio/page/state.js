// What the session is, as the server told it last, and who wants to know when it changes.

export const state = { revision: 0, model: null, stack: [], undo: "", redo: "", facts: null, canaries: [], jobs: [] };
const watchers = [];

export function watch(watcher) {
  watchers.push(watcher);
}

export function update(values) {
  Object.assign(state, values);
  for (const watcher of watchers) watcher(state);
}
