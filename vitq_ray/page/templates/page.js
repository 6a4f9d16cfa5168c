"use strict";
for (const button of document.querySelectorAll("table.data thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const column = head.cellIndex;
    const number = [...body.rows].some((row) => row.cells[column].dataset.v !== undefined);
    const up = head.getAttribute("aria-sort") !== "ascending";
    const key = (row) => {
      const cell = row.cells[column];
      return number ? Number(cell.dataset.v ?? NaN) : cell.textContent.trim();
    };
    const order = (a, b) => {
      const x = key(a), y = key(b);
      if (!number) return x.localeCompare(y, "en", { numeric: true });
      return Number.isNaN(x) ? (Number.isNaN(y) ? 0 : up ? 1 : -1) : Number.isNaN(y) ? (up ? -1 : 1) : x - y;
    };
    const rows = [...body.rows].sort((a, b) => (up ? order(a, b) : order(b, a)));
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
  });
}
