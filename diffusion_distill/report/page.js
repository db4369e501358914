"use strict";

// Tables: a click on a heading sorts by its column, upwards first. Cells without a value stay below.
function key(cell) {
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  const text = cell.textContent.trim();
  return text === "" || text === "-" ? null : text;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sort(head) {
  const table = head.closest("table");
  const body = table.tBodies[0];
  const upwards = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentNode.children) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", upwards ? "ascending" : "descending");
  const rows = Array.from(body.rows, (row) => [key(row.cells[head.cellIndex]), row]);
  const absent = (value) => value === null || Number.isNaN(value);
  rows.sort(([a], [b]) => {
    if (absent(a) || absent(b)) return absent(a) - absent(b);
    return upwards ? compare(a, b) : compare(b, a);
  });
  for (const [, row] of rows) body.append(row);
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sort(button.parentNode));
}

// Charts: the values of all lines nearest to the pointer.
const SIDE = 1000; // units of a drawing along both axes
const REACH = 40; // a line whose nearest point is farther away has no value there

function element(parent, name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function lineOf(path) {
  return {
    at: Array.from(path.getAttribute("d").matchAll(/[ML]([-\d.]+)/g), (found) => Number(found[1])),
    x: path.dataset.x.split(" "),
    y: path.dataset.y.split(" "),
    label: path.dataset.label,
    colour: path.style.getPropertyValue("--line"),
  };
}

function nearest(places, at) {
  let best = 0;
  places.forEach((place, i) => { if (Math.abs(place - at) < Math.abs(places[best] - at)) best = i; });
  return best;
}

function follow(plot) {
  const lines = Array.from(plot.querySelectorAll(".line"), lineOf);
  let guide = null, tip = null;
  const leave = () => {
    if (guide) { guide.remove(); tip.remove(); guide = tip = null; }
  };
  plot.addEventListener("pointerleave", leave);
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * SIDE;
    const found = lines.map((line) => [line, nearest(line.at, at)]);
    const [first, i] = found.reduce((a, b) => (
      Math.abs(b[0].at[b[1]] - at) < Math.abs(a[0].at[a[1]] - at) ? b : a
    ));
    const place = first.at[i];
    leave();
    guide = element(plot, "div", "guide");
    guide.style.left = `${place / SIDE * 100}%`;
    tip = element(plot, "div", "tip");
    element(tip, "div", "", `${plot.dataset.x} ${first.x[i]}`);
    for (const [line] of found) {
      const k = nearest(line.at, place);
      if (Math.abs(line.at[k] - place) > REACH) continue;
      const row = element(tip, "div");
      row.style.setProperty("--line", line.colour);
      element(row, "span", "", line.label);
      element(row, "b", "", line.y[k]);
    }
    tip.style[place < SIDE / 2 ? "left" : "right"] = `calc(${(place < SIDE / 2 ? place : SIDE - place) / SIDE * 100}% + 0.6rem)`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
}

for (const plot of document.querySelectorAll(".plot")) follow(plot);
