// Tables sort by the column that is clicked: greatest first, then the other way. Rows of a method's runs stay below it.
"use strict";

for (const table of document.querySelectorAll("table")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    head.addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      const groups = Array.from(table.tBodies).map((body) => [value(body.rows[0].cells[column]), body]);
      groups.sort(([one], [two]) => sign * compared(one, two, sign));
      table.append(...groups.map(([, body]) => body));
    });
  });
}

// Numbers before texts; a cell without a value comes last, whichever way.
function value(cell) {
  const text = cell.dataset.value;
  if (text === undefined) return undefined;
  return text !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
}

function compared(one, two, sign) {
  if (one === undefined || two === undefined) return sign * ((one === undefined) - (two === undefined));
  if (typeof one === "number" && typeof two === "number") return one - two;
  return String(one).localeCompare(String(two), "en", { numeric: true });
}
