"use strict";
(() => {
  const MOST = 200, FEW = 3; // records that are listed at once; probes of a kind that are shown at once
  const groups = JSON.parse(document.getElementById("data").textContent);
  const controls = document.getElementById("controls"), place = document.getElementById("drill");
  const legend = document.getElementById("legend");
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
    list.addEventListener("change", () => draw());
    return list;
  };
  const group = select("", groups.map(g => g.title));
  if (groups.length < 2) group.parentNode.hidden = true;
  const which = select("Show", ["all records"]), method = select("with", ["any method"]);
  const search = make("input");
  search.type = "search"; search.placeholder = "text in the record";
  search.addEventListener("input", () => draw());
  const total = make("span");
  controls.append(search, total);
  let filled = null, most = MOST;

  // One notation for all: three decimals, and powers of ten where those would show nothing.
  const chance = value => {
    if (value === null) return "";
    if (value >= 0.001 || value === 0) return value.toFixed(3);
    const [digits, power] = value.toExponential(1).split("e-");
    return digits + "·10⁻" + [...power].map(digit => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");
  };
  const share = value => value === null ? "" : value === 1 ? "✓" : value === 0 ? "✗" : value.toFixed(2);
  const tint = value => value === null ? "" : value === 1 ? "ok" : value === 0 ? "no" : "";
  const figure = value => value === null ? "" : value.toFixed(Math.abs(value) < 10 ? 3 : Math.abs(value) < 1000 ? 1 : 0);
  const measured = (value, unit) => make("td", (unit ? share : figure)(value), "number " + (unit ? tint(value) : ""));

  const marks = (record, data, index) => {
    const cell = make("td", undefined, "marks"), found = record.marks[index];
    if (!found) { cell.append(make("span", "not scored", "none")); return cell; }
    for (const [kind, [right, tests, value]] of Object.entries(found)) {
      const text = right === null ? value.toFixed(2) : tests > 1 ? right + "/" + tests : share(value);
      cell.append(make("span", data.kinds[kind].letter + " " + text, "mark " + tint(value)), " ");
    }
    return cell;
  };

  const probeTable = (data, record, i) => {
    const [kind, axis, prompt, wanted, counts] = record.probes[i], about = data.kinds[kind];
    const box = make("div", undefined, counts ? "probe" : "probe void"), title = make("p");
    if (axis) title.append(make("b", axis), " ");
    title.append(make("span", prompt, "prompt"), " ", make("span", wanted, "target"));
    if (!counts) title.append(" ", make("i", "(not counted: its conditions do not hold before the edit)"));
    // The verdict on a text stands before the text.
    const used = about.metrics.map((_, m) => m)
      .filter(m => m !== about.text && record.answers.some(a => a && a[i][0][m] !== null));
    const texts = record.answers.some(a => a && a[i][3] !== null);
    const p = [1, 2].filter(at => record.answers.some(a => a && a[i][at] !== null));
    const table = make("table", undefined, "inner"), head = make("tr");
    head.append(make("th", "method"));
    p.forEach(at => head.append(make("th", at === 1 ? "P(answer)" : "P(rival)", "number")));
    used.forEach(m => {
      const cell = make("th", about.metrics[m][0], "number");
      cell.title = about.metrics[m][1];
      head.append(cell);
    });
    if (texts) head.append(make("th", "what the model writes"));
    table.append(head);
    data.methods.forEach((m, index) => {
      if (!record.answers[index]) return;
      const answer = record.answers[index][i], line = make("tr"), name = make("td"), dot = make("span", undefined, "dot");
      dot.style.background = m.colour;
      name.append(dot, m.label);
      line.append(name);
      p.forEach(at => line.append(make("td", chance(answer[at]), "number")));
      used.forEach(k => line.append(measured(answer[0][k], about.metrics[k][2])));
      if (texts) line.append(written(data, record, index, i, about.text));
      table.append(line);
    });
    box.append(title, table);
    return box;
  };

  const written = (data, record, index, i, judge) => {
    const text = record.answers[index][i][3], cell = make("td", undefined, "text");
    if (text === null) return cell;
    const right = judge === null ? null : record.answers[index][i][0][judge];
    if (right !== null) cell.append(make("span", share(right), "verdict " + tint(right)), " ");
    const before = data.before === null || index === data.before ? null : record.answers[data.before];
    const same = before && text === before[i][3];
    cell.append(make("span", same ? "as before" : text.trim() || "(nothing)", same ? "same" : "words"));
    return cell;
  };

  const detail = (data, record) => {
    const row = make("tr", undefined, "detail"), cell = make("td"), box = make("div");
    cell.colSpan = data.methods.length + 1;
    Object.entries(data.kinds).forEach(([kind, about]) => {
      const mine = record.probes.map((_, i) => i).filter(i => record.probes[i][0] === kind);
      if (!mine.length) return;
      const part = make("details"), count = mine.length > 1 ? " (" + mine.length + ")" : "";
      part.open = mine.length <= FEW;
      part.append(make("summary", about.name + count), ...mine.map(i => probeTable(data, record, i)));
      box.append(part);
    });
    cell.append(box); row.append(cell);
    return row;
  };

  const shown = (record, data) => {
    const kind = Object.keys(data.kinds)[which.value - 1];
    const words = search.value.toLowerCase();
    if (words && !JSON.stringify([record.id, record.probes]).toLowerCase().includes(words)) return false;
    if (!kind) return true;
    const of = method.value === "0" ? data.methods.map((_, i) => i).filter(i => i !== data.before) : [method.value - 1];
    return of.some(index => {
      const found = record.marks[index] && record.marks[index][kind];
      return found && found[2] < 1;
    });
  };

  const fill = data => {
    method.replaceChildren(new Option("any method", 0));
    data.methods.forEach((m, index) => method.append(new Option(m.label, index + 1)));
    which.replaceChildren(new Option("all records", 0));
    legend.replaceChildren();
    Object.values(data.kinds).forEach((kind, index) => {
      which.append(new Option("those below 1 in " + kind.name + (kind.mark ? " (" + kind.mark + ")" : ""), index + 1));
      const line = make("li");
      line.append(make("b", kind.letter), " " + kind.name + (kind.mark === kind.name ? "" : ", " + (kind.mark || "no mark")),
        kind.meaning ? ": " + kind.meaning : "");
      legend.append(line);
    });
    legend.append(make("li", "P(answer), P(rival): probability " + data.probability));
  };

  function draw(more) {
    const data = groups[group.value];
    if (!data) return;
    if (filled !== group.value) { filled = group.value; fill(data); }
    most = more || MOST;
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
    records.slice(0, most).forEach(record => {
      const row = make("tr", undefined, "record"), name = make("th");
      name.append(make("span", record.id, "id"), record.prompt + " ", make("span", record.target, "target"));
      row.append(name);
      data.methods.forEach((_, index) => row.append(marks(record, data, index)));
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
    const box = make("div", undefined, "box");
    box.append(table);
    place.replaceChildren(box);
    const fit = () => box.style.setProperty("--box", box.clientWidth + "px");
    fit();
    window.onresize = fit;
    if (records.length > most) {
      const button = make("button", "show the other " + (records.length - most));
      button.addEventListener("click", () => draw(records.length));
      place.append(button);
    }
    total.textContent = records.length + " of " + data.records.length + " records";
  }
  draw();
  // A link may name a record to be opened.
  const wanted = decodeURIComponent(location.hash.slice(1));
  const at = groups.length ? groups[group.value].records.findIndex(record => record.id === wanted) : -1;
  if (at >= 0 && at < MOST) place.querySelectorAll("tr.record")[at].click();
})();
