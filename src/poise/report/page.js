"use strict";
document.documentElement.classList.add("js");

for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => {
        const cell = row.cells[column];
        return "value" in cell.dataset ? (cell.dataset.value === "" ? null : Number(cell.dataset.value)) : cell.textContent;
      };
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === null || y === null) return (x === null) - (y === null);
        return (up ? 1 : -1) * (typeof x === "string" ? x.localeCompare(y) : x - y);
      });
      table.tBodies[0].append(...rows);
    });
  });
}

// Arrow keys on a drawing: [rows, columns] to go by.
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const clamp = (value, most) => Math.max(0, Math.min(most, value));

function pickable(svg, step) {
  svg.tabIndex = 0;
  svg.addEventListener("keydown", (event) => {
    if (event.key in ARROWS) {
      event.preventDefault();
      step(...ARROWS[event.key]);
    }
  });
}

// Cells say their value when pointed at.
for (const figure of document.querySelectorAll("figure.matrix")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg"), ground = figure.querySelector(".ground");
  const cursor = figure.querySelector(".cursor"), said = figure.querySelector("output");
  let at = null;
  const choose = (row, column) => {
    at = [clamp(row, data.rows.length - 1), clamp(column, data.columns.length - 1)];
    cursor.setAttribute("y", at[0]);
    cursor.setAttribute("x", at[1]);
    cursor.style.visibility = "visible";
    const words = { r: data.rows[at[0]], c: data.columns[at[1]], v: data.values[at[0]][at[1]].toLocaleString("en") };
    said.textContent = data.said.replace(/\{([rcv])\}/g, (_, key) => words[key]);
  };
  svg.addEventListener("pointermove", (event) => {
    const box = ground.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * data.rows.length);
    const column = Math.floor(((event.clientX - box.left) / box.width) * data.columns.length);
    if (row >= 0 && column >= 0 && row < data.rows.length && column < data.columns.length) choose(row, column);
  });
  pickable(svg, (down, right) => (at === null ? choose(0, 0) : choose(at[0] + down, at[1] + right)));
}

// Flow between two layers: bars are experts, grouped by device; ribbons are tokens.
const flowData = document.getElementById("flow-data");
if (flowData) {
  const data = JSON.parse(flowData.textContent);
  const slider = document.getElementById("flow-pair"), name = document.getElementById("flow-name");
  const TOP = 8, HIGH = 414, LEFT = 56, RIGHT = 424, BAR = 9;
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const draw = (parent, tag, attributes, words) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (words !== undefined) made.textContent = words;
    parent.append(made);
    return made;
  };

  const side = (flows, end) => {
    const bars = new Map();
    for (const flow of flows) {
      const bar = bars.get(flow.experts[end]) ?? { expert: flow.experts[end], device: flow.devices[end], size: 0 };
      bar.size += flow.pairs;
      bars.set(bar.expert, bar);
    }
    const order = [...bars.values()].sort((a, b) => a.device - b.device || b.size - a.size);
    const groups = new Set(order.map((bar) => bar.device)).size;
    const gap = Math.min(9, (0.35 * HIGH) / groups);
    const total = order.reduce((sum, bar) => sum + bar.size, 0);
    const scale = (HIGH - gap * (groups - 1)) / total;
    let y = TOP, last = order.length ? order[0].device : 0;
    for (const bar of order) {
      if (bar.device !== last) y += gap;
      last = bar.device;
      bar.top = bar.next = y;
      y += bar.size * scale;
    }
    return { bars, order, scale };
  };

  const drawSide = (svg, { order, scale }, x, labelX, anchor) => {
    let device = -1, free = 0;
    for (const bar of order) {
      const high = Math.max(1, bar.size * scale - 1);
      draw(svg, "rect", { fill: `hsl(${(360 * bar.device) / data.devices} 50% 52%)`, x, y: bar.top.toFixed(1), width: BAR, height: high.toFixed(1) });
      if (bar.device !== device && bar.top + 10 >= free) {
        draw(svg, "text", { class: "small", x: labelX, y: (bar.top + 10).toFixed(1), "text-anchor": anchor }, bar.device);
        free = bar.top + 22;
      }
      device = bar.device;
    }
  };

  const show = (figure, pair, which) => {
    const svg = figure.querySelector("svg"), said = figure.querySelector("output");
    const at = 3 + 4 * which;
    const flows = pair.flows.map((row) => ({
      experts: row.slice(0, 2), pairs: row[2], devices: row.slice(at, at + 2), device: row[at + 2], node: row[at + 3],
    }));
    svg.replaceChildren();
    const ends = [side(flows, 0), side(flows, 1)];
    const bar = (flow, end) => ends[end].bars.get(flow.experts[end]);
    for (const end of [0, 1]) {
      for (const flow of [...flows].sort((a, b) => bar(a, 1 - end).top - bar(b, 1 - end).top)) {
        flow[end] = [bar(flow, end).next, flow.pairs * ends[end].scale];
        bar(flow, end).next += flow[end][1];
      }
    }
    const x0 = LEFT + BAR, x1 = RIGHT, middle = (x0 + x1) / 2;
    for (const flow of flows) {
      const [[y0, h0], [y1, h1]] = [flow[0], flow[1]];
      const d = `M${x0} ${y0}C${middle} ${y0} ${middle} ${y1} ${x1} ${y1}v${h1}C${middle} ${y1 + h1} ${middle} ${y0 + h0} ${x0} ${y0 + h0}z`;
      const kind = flow.device >= 50 ? "stay" : flow.node >= 50 ? "near" : "far";
      flow.ribbon = draw(svg, "path", { class: `ribbon ${kind}`, d });
      flow.ribbon.addEventListener("pointerenter", () => choose(flows.indexOf(flow)));
    }
    drawSide(svg, ends[0], LEFT, LEFT - 8, "end");
    drawSide(svg, ends[1], RIGHT, RIGHT + BAR + 8, "start");
    const [device, node] = pair.local[which];
    const oneNode = data.nodes === 1;
    figure.querySelector(".figures").textContent = `same device ${percent(device)}` + (oneNode ? "" : `, same node ${percent(node)}`);
    let chosen = -1;
    const choose = (index) => {
      if (!flows.length) return;
      if (chosen >= 0) flows[chosen].ribbon.classList.remove("chosen");
      chosen = clamp(index, flows.length - 1);
      const flow = flows[chosen];
      flow.ribbon.classList.add("chosen");
      said.textContent = `expert ${flow.experts[0]} to expert ${flow.experts[1]}: ${flow.pairs.toLocaleString("en")} (${percent(flow.pairs / pair.total)}); `
        + `${flow.device}% on one device, ${flow.node}% on one node`;
    };
    figure.step = (down, right) => choose(chosen + down + right);
    said.textContent = "Point at a flow, or use the arrow keys.";
  };

  const figures = [...document.querySelectorAll("#flow .sankey")];
  for (const figure of figures) pickable(figure.querySelector("svg"), (down, right) => figure.step(down, right));
  const update = () => {
    const pair = data.pairs[slider.value];
    const shown = pair.flows.reduce((sum, row) => sum + row[2], 0) / Math.max(1, pair.total);
    name.textContent = `layer ${pair.layers[0]} to layer ${pair.layers[1]}: ${pair.flows.length} flows, ${percent(shown)} of all`;
    slider.setAttribute("aria-valuetext", name.textContent);
    figures.forEach((figure, which) => show(figure, pair, which));
  };
  slider.addEventListener("input", update);
  update();
}

// What if: figures of every setting are in the page, radio buttons choose one.
const whatIf = document.getElementById("what-if");
if (whatIf) {
  const data = JSON.parse(whatIf.querySelector("script").textContent);
  const bars = [...whatIf.querySelectorAll(".track i")], words = [...whatIf.querySelectorAll(".figure")];
  const said = whatIf.querySelector("output");
  const chosen = (key) => Number(whatIf.querySelector(`input[name=what-if-${key}]:checked`).value);
  const update = () => {
    const figures = data.figures[chosen("redundant")][chosen("tokens")][chosen("machine")];
    const most = Math.max(...figures.map(([ms]) => ms ?? 0));
    figures.forEach(([ms, even], row) => {
      bars[row].style.width = `${((100 * (ms ?? 0)) / most).toFixed(2)}%`;
      const more = row === figures.length - 1 ? "" : `, ${even?.toFixed(2)} × mean`;
      words[row].textContent = ms === null ? "no such map" : `${ms.toFixed(2)} ms${more}`;
    });
    const base = figures[0][0];
    let best = 0;
    data.maps.forEach((_, row) => { if (figures[row][0] !== null && figures[row][0] < figures[best][0]) best = row; });
    const saved = 1 - figures[best][0] / base;
    said.textContent = base === null ? `${data.maps[0]} does not exist with these slots.`
      : saved < data.worth ? `Not worth it: nothing saves 1 % over ${data.maps[0]}.`
      : `${data.maps[best]} saves ${(100 * saved).toFixed(1)}% over ${data.maps[0]}.`;
  };
  whatIf.addEventListener("change", update);
  update();
}
