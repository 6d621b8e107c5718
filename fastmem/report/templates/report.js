// A click on a column head sorts its table, ascending first, then descending; missing values last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const rising = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const isNumber = head.classList.contains("number");
    const value = (row) => {
      const cell = row.cells[head.cellIndex];
      return cell.dataset.value ?? cell.textContent;
    };
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      return (isNumber ? a - b : a.localeCompare(b)) * (rising ? 1 : -1);
    };
    const body = head.closest("table").tBodies[0];
    const rows = [...body.rows].map((row) => [value(row), row]);
    rows.sort(([a], [b]) => compare(a, b));
    body.append(...rows.map(([, row]) => row));
  });
}
// On a phone the cells of a stacked table stand below each other, each with its column's head.
for (const table of document.querySelectorAll("table.stack")) {
  table.classList.add("stacked");
  const heads = [...table.tHead.rows[0].cells].map((head) => head.textContent);
  for (const row of table.tBodies[0].rows) {
    [...row.cells].forEach((cell, i) => (cell.dataset.label = heads[i]));
  }
}
// What the token under the pointer, or under a finger, is, beside the name of its passage.
for (const passage of document.querySelectorAll(".passage")) {
  const shown = passage.querySelector("output");
  passage.addEventListener("pointerover", ({ target }) => {
    if (shown && target.title) shown.textContent = target.title;
  });
}
