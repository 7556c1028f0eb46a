"use strict";
// The page is complete without this: it adds sorting, filtering and tabs.

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
}

function compare(a, b) {
  const numeric = [a, b].map((value) => typeof value === "number");
  if (numeric[0] && numeric[1]) return a - b;
  if (numeric[0] !== numeric[1]) return numeric[0] ? -1 : 1;
  return a.localeCompare(b, undefined, { numeric: true });
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if ("plain" in head.dataset) return;
    const button = make("button", { type: "button", textContent: head.textContent });
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => sign * compare(valueOf(a, column), valueOf(b, column)));
      table.tBodies[0].append(...rows);
    });
  });
}

function filterable(table) {
  const rows = [...table.tBodies[0].rows];
  const input = make("input", { type: "search", autocomplete: "off", spellcheck: false });
  const output = make("output");
  const show = () => {
    const words = input.value.toLowerCase().split(/\s+/);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      count += !row.hidden;
    }
    output.textContent = `${count} of ${rows.length} rows`;
  };
  input.addEventListener("input", show);
  const label = make("label", {}, "Filter ", input);
  table.parentElement.before(make("div", { className: "filter" }, label, output));
  show();
}

function tabs(box, number) {
  const panels = [...box.children];
  if (panels.length < 2) return;
  const buttons = panels.map((panel, i) => {
    panel.id = `panel-${number}-${i}`;
    panel.setAttribute("role", "tabpanel");
    const button = make("button", { type: "button", id: `tab-${number}-${i}`, textContent: panel.dataset.tab });
    button.setAttribute("role", "tab");
    button.setAttribute("aria-controls", panel.id);
    panel.removeAttribute("aria-label");
    panel.setAttribute("aria-labelledby", button.id);
    return button;
  });
  const select = (chosen) => buttons.forEach((button, i) => {
    button.setAttribute("aria-selected", String(i === chosen));
    button.tabIndex = i === chosen ? 0 : -1;
    panels[i].hidden = i !== chosen;
  });
  buttons.forEach((button, i) => {
    button.addEventListener("click", () => select(i));
    button.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: -1 };
      if (!(event.key in steps)) return;
      event.preventDefault();
      const next = (steps[event.key] + buttons.length) % buttons.length;
      select(next);
      buttons[next].focus();
    });
  });
  const list = make("div", {}, ...buttons);
  list.setAttribute("role", "tablist");
  list.setAttribute("aria-label", box.dataset.tabs);
  box.before(list);
  box.classList.add("tabbed");
  select(0);
}

document.querySelectorAll("table.sortable").forEach((table) => {
  sortable(table);
  if (table.tBodies[0].rows.length > 1) filterable(table);
});
document.querySelectorAll("[data-tabs]").forEach(tabs);
