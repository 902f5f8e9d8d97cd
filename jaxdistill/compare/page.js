// A click on the head of a column sorts by it: numbers with the highest first, cells without one last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending" || (i === 0 && head.getAttribute("aria-sort") !== "ascending");
    heads.forEach(each => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[i].dataset.v ?? "";
    const body = table.tBodies[0];
    [...body.rows].sort((a, b) => {
      const one = value(a), other = value(b);
      if (one === "" || other === "") return (one === "") - (other === "");
      const order = i === 0 ? one.localeCompare(other) : one - other;
      return up ? order : -order;
    }).forEach(row => body.append(row));
  }));
}
