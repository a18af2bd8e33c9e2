"use strict";
// Sorts and filters the table, and the clips below it with it. Without scripts all clips are there, in the set's order.
const table = document.getElementById("table");
const body = table.tBodies[0];
const cards = document.getElementById("clips");
const filter = document.getElementById("filter");
const heads = [...table.tHead.rows[0].cells];
const rows = [...body.rows];
const card = (row) => document.getElementById("clip-" + row.dataset.clip);
let sorted = "in the order of the set";

function sort(column) {
  const head = heads[column];
  const numbers = head.dataset.kind === "number";
  const before = head.getAttribute("aria-sort");
  const first = numbers ? "descending" : "ascending"; // numbers: the best on top
  const other = numbers ? "ascending" : "descending";
  const direction = before === first ? other : first;
  const sign = direction === "ascending" ? 1 : -1;
  const value = (row) => row.cells[column].dataset.value;
  const compare = numbers ? (a, b) => value(a) - value(b) : (a, b) => value(a).localeCompare(value(b), "en", { numeric: true });
  rows.sort((a, b) => sign * compare(a, b) || a.dataset.clip - b.dataset.clip);
  heads.forEach((one) => one.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", direction);
  body.append(...rows);
  cards.append(...rows.map(card));
  sorted = "sorted by " + head.textContent.trim() + ", " + direction;
  tell();
}

function narrow() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of rows) {
    const hidden = !words.every((word) => row.dataset.text.includes(word));
    row.hidden = hidden;
    card(row).hidden = hidden;
  }
  tell();
}

function tell() {
  const shown = rows.filter((row) => !row.hidden).length;
  document.getElementById("status").textContent = `${shown} of ${rows.length} clips, ${sorted}`;
}

heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sort(column)));
filter.form.addEventListener("submit", (event) => event.preventDefault());
filter.addEventListener("input", narrow);
filter.form.hidden = false;
narrow(); // a browser may have kept what was typed
