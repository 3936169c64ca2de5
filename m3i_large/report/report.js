"use strict";
// A click on a heading sorts its table; numbers by value, the rest as text.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((heading) => {
    const button = document.createElement("button");
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const rising = heading.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const key = (row) => row.cells[heading.cellIndex].textContent.trim();
      const number = (text) => parseFloat(text.replaceAll(",", ""));
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [number(key(a)), number(key(b))];
        const order = Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
        return rising ? order : -order;
      });
      body.append(...rows);
    });
  });
}
// Under the pointer a panel says its values.
for (const panel of document.querySelectorAll("figure.panel")) {
  const { limits, lines } = JSON.parse(panel.dataset.curves);
  const svg = panel.querySelector("svg");
  const area = svg.querySelector('[id$="-area"] path').getBBox();
  const reading = document.createElement("div");
  reading.className = "read";
  reading.hidden = true;
  reading.setAttribute("aria-hidden", "true");
  panel.append(reading);
  svg.addEventListener("pointermove", (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const step = limits[0] + ((point.x - area.x) / area.width) * (limits[1] - limits[0]);
    const near = (steps) => steps.reduce((best, s, i) => (Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best), 0);
    const shown = lines.map((line) => `${line.label} ${line.values[near(line.steps)]}`);
    reading.textContent = `step ${Math.round(lines[0].steps[near(lines[0].steps)])}: ${shown.join(", ")}`;
    reading.hidden = false;
  });
  svg.addEventListener("pointerleave", () => { reading.hidden = true; });
}
