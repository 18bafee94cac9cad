"use strict";
(() => {
  const groups = JSON.parse(document.getElementById("data").textContent);
  const controls = document.getElementById("controls"), place = document.getElementById("drill");
  const letters = { edit: "E", paraphrase: "P", neighbourhood: "N", locality: "L", portability: "R",
    multi_hop: "M", hop: "H" };
  const make = (name, text, kind) => {
    const node = document.createElement(name);
    if (text !== undefined) node.textContent = text;
    if (kind) node.className = kind;
    return node;
  };
  const select = (label, names) => {
    const box = make("label", label + " "), list = make("select");
    names.forEach((name, index) => list.append(new Option(name, index)));
    box.append(list);
    controls.append(box);
    list.addEventListener("change", draw);
    return list;
  };
  const group = select("", groups.map(g => g.title));
  if (groups.length < 2) group.parentNode.hidden = true;
  const which = select("Show", ["all records", "where the edited prompt fails", "where a paraphrase fails",
    "where a neighbour fails"]);
  const method = select("with", ["any method"]);
  const search = make("input");
  search.type = "search"; search.placeholder = "text in the record";
  search.addEventListener("input", draw);
  const total = make("span");
  controls.append(search, total);
  let filled = null;

  const count = (record, index, kind) => {
    const answers = record.answers[index];
    if (!answers) return null;
    let right = 0, all = 0;
    record.probes.forEach((probe, i) => {
      if (probe[0] !== kind || answers[i][0] === null) return;
      all += 1; right += answers[i][0] ? 1 : 0;
    });
    return all ? [right, all] : null;
  };

  const marks = (record, index) => {
    const cell = make("td", undefined, "marks");
    if (!record.answers[index]) { cell.append(make("span", "not scored", "none")); return cell; }
    for (const kind of Object.keys(letters)) {
      const found = count(record, index, kind);
      if (!found) continue;
      const text = letters[kind] + " " + (found[1] > 1 ? found[0] + "/" + found[1] : (found[0] ? "✓" : "✗"));
      cell.append(make("span", text, "mark " + (found[0] === found[1] ? "ok" : found[0] ? "" : "no")));
    }
    return cell;
  };

  const detail = (data, record) => {
    const row = make("tr"), cell = make("td"), table = make("table", undefined, "inner");
    cell.colSpan = data.methods.length + 1;
    const head = make("tr");
    ["probe", "method", "", "P(answer)", "P(rival)", "what the model writes"].forEach(t => head.append(make("th", t)));
    table.append(head);
    record.probes.forEach((probe, i) => {
      let first = true;
      data.methods.forEach((m, index) => {
        const answers = record.answers[index];
        if (!answers) return;
        const [right, chance, rival, text] = answers[i], line = make("tr");
        if (first) {
          const name = make("td");
          name.rowSpan = record.answers.filter(a => a).length;
          name.append(make("span", probe[0].replace("_", " ") + (probe[1] ? ", " + probe[1] : ""), "id"), probe[2] + " ",
            make("span", probe[3].join(" / "), "target"));
          line.append(name);
          first = false;
        }
        const before = data.before === null ? null : record.answers[data.before];
        const same = before && index !== data.before && text !== null && text === before[i][3];
        line.append(make("td", m.label),
          make("td", right === null ? "" : right ? "✓" : "✗", right ? "ok" : "no"),
          make("td", chance === null ? "" : chance.toPrecision(3)),
          make("td", rival === null ? "" : rival.toPrecision(3)),
          make("td", text === null ? "" : same ? "as before" : text.trim() || "(nothing)", same ? "same" : "text"));
        table.append(line);
      });
    });
    cell.append(table); row.append(cell);
    return row;
  };

  const shown = (record, data) => {
    const kind = [null, "edit", "paraphrase", "neighbourhood"][which.value];
    const words = search.value.toLowerCase();
    if (words && !JSON.stringify([record.id, record.probes]).toLowerCase().includes(words)) return false;
    if (!kind) return true;
    const of = method.value === "0" ? data.methods.map((_, i) => i).filter(i => i !== data.before) : [method.value - 1];
    return of.some(index => { const c = count(record, index, kind); return c && c[0] < c[1]; });
  };

  function draw() {
    const data = groups[group.value];
    if (!data) return;
    if (filled !== group.value) {
      filled = group.value;
      method.replaceChildren(new Option("any method", 0));
      data.methods.forEach((m, index) => method.append(new Option(m.label, index + 1)));
    }
    const table = make("table", undefined, "list"), head = make("tr"), body = make("tbody"), top = make("thead");
    head.append(make("th", "record"));
    data.methods.forEach(m => {
      const cell = make("th"), dot = make("span", undefined, "dot");
      dot.style.background = m.colour;
      cell.append(dot, m.label);
      head.append(cell);
    });
    top.append(head);
    const records = data.records.filter(record => shown(record, data));
    records.forEach(record => {
      const row = make("tr", undefined, "record"), name = make("td");
      name.append(make("span", record.id, "id"), record.prompt + " ", make("span", record.target, "target"));
      row.append(name);
      data.methods.forEach((_, index) => row.append(marks(record, index)));
      row.tabIndex = 0;
      let open = null;
      const toggle = () => {
        if (open) { open.remove(); open = null; } else { open = detail(data, record); row.after(open); }
        row.classList.toggle("open", open !== null);
      };
      row.addEventListener("click", toggle);
      row.addEventListener("keydown", event => { if (event.key === "Enter") toggle(); });
      body.append(row);
    });
    table.append(top, body);
    place.replaceChildren(table);
    total.textContent = records.length + " of " + data.records.length + " records";
  }
  draw();
})();
