"use strict";
const LOOKS = 2000, EVERY_MS = 1000, SVG = "http://www.w3.org/2000/svg";
const known = { started: null, newest: -1, looks: [], plans: [], heat: null };
const at = (id) => document.getElementById(id);
const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`);
const say = (id, text) => { if (at(id).textContent !== text) at(id).textContent = text; };

function shape(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function titled(node, text) {
  node.append(shape("title", {}, text));
  return node;
}

function ticks(low, high, count) {
  const raw = Math.max(high - low, 1e-9) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * (1 - 1e-9));
  const out = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-6; k++) out.push(Number((k * step).toPrecision(6)));
  return out;
}

function axes(svg, looks, low, high, marks, name) {
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  const left = 56, right = width - 12, top = 10, bottom = height - 34;
  const first = looks[0].step, last = Math.max(looks[looks.length - 1].step, first + 1);
  const x = (step) => left + ((step - first) / (last - first)) * (right - left);
  const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
  const parts = [];
  for (const [value, text] of marks) {
    parts.push(shape("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }));
    parts.push(shape("text", { class: "small", x: left - 6, y: y(value) + 4, "text-anchor": "end" }, text));
  }
  for (const step of ticks(first, last, 8)) {
    parts.push(shape("text", { class: "small", x: x(step), y: bottom + 15, "text-anchor": "middle" }, String(step)));
  }
  parts.push(shape("text", { class: "small", x: right, y: height - 2, "text-anchor": "end" }, name));
  return { x, y, top, bottom, first, parts };
}

function line(looks, key, x, y, kind) {
  const points = looks.filter((look) => look[key] !== null).map((look) => `${x(look.step).toFixed(1)},${y(look[key]).toFixed(1)}`);
  return shape("polyline", { class: kind, points: points.join(" ") });
}

function drawImbalance() {
  const svg = at("chart-imbalance"), looks = known.looks;
  if (!looks.length) return;
  const values = looks.flatMap((look) => [look.imbalance, look.after_restart]);
  const high = Math.max(1.05, ...values) * 1.02;
  const { x, y, top, bottom, first, parts } = axes(svg, looks, 1, high, ticks(1, high, 5).map((value) => [value, String(value)]), "steps watched");
  for (const plan of known.plans.filter((one) => one.accepted && one.step >= first)) {
    const mark = shape("line", { class: "plan-mark", x1: x(plan.step), x2: x(plan.step), y1: top, y2: bottom });
    parts.push(titled(mark, `step ${plan.step}: ${plan.reason}, predicted ${number(plan.predicted, 3)}`));
  }
  parts.push(line(looks, "after_restart", x, y, "line-first"), line(looks, "imbalance", x, y, "line-now"));
  svg.replaceChildren(...parts);
}

function drawDrift() {
  const svg = at("chart-drift"), looks = known.looks;
  if (!looks.length) return;
  const tested = looks.filter((look) => look.p_value !== null);
  const low = Math.floor(Math.log10(Math.min(0.01, ...tested.map((look) => look.p_value))));
  const marks = Array.from({ length: 1 - low }, (_, k) => [low + k, String(Number((10 ** (low + k)).toPrecision(1)))]);
  const { x, y, parts } = axes(svg, looks, low, 0, marks, "steps watched");
  for (const look of tested) {
    const dot = shape("circle", { class: look.alarm ? "alarm-mark" : "test-mark", cx: x(look.step), cy: y(Math.log10(look.p_value)), r: look.alarm ? 5 : 3 });
    parts.push(titled(dot, `step ${look.step}: p ${look.p_value.toPrecision(3)}${look.alarm ? ", alarm" : ""}`));
  }
  svg.replaceChildren(...parts);
}

function drawHeat() {
  const heat = known.heat, canvas = at("heat");
  if (!heat) return;
  const layers = heat.relative.length, devices = heat.relative[0].length;
  const style = getComputedStyle(document.documentElement), pen = canvas.getContext("2d");
  const colour = (name) => style.getPropertyValue(name).trim();
  const wide = Math.max(4, Math.min(48, Math.floor(960 / devices))), tall = Math.max(6, Math.min(24, Math.floor(420 / layers)));
  canvas.width = devices * wide;
  canvas.height = layers * tall;
  pen.fillStyle = colour("--panel");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  let worst = { value: 0, layer: 0, device: 0 };
  heat.relative.forEach((row, layer) => row.forEach((value, device) => {
    if (value > worst.value) worst = { value, layer, device };
  }));
  const span = Math.max(worst.value - 1, 0.5);
  heat.relative.forEach((row, layer) => row.forEach((value, device) => {
    pen.globalAlpha = Math.min(1, value >= 1 ? (value - 1) / span : 1 - value);
    pen.fillStyle = colour(value >= 1 ? "--hot" : "--cold");
    pen.fillRect(device * wide, layer * tall, wide - 1, tall - 1);
  }));
  pen.globalAlpha = 1;
  say("worst", `Fullest: layer ${heat.layers[worst.layer]}, device ${worst.device}, ${worst.value.toFixed(2)} times the layer's mean; ${layers} layers, ${devices} devices.`);
}

function drawPlans() {
  const rows = [...known.plans].reverse().map((plan) => {
    const row = document.createElement("tr");
    const cells = [
      plan.step, plan.reason, !plan.accepted ? "not worth it" : plan.restart ? "taken, for the next start" : "taken", percent(plan.gain), plan.moves,
      number(plan.bytes / 2 ** 20, 1), plan.left, number(plan.before, 3), number(plan.predicted, 3), number(plan.measured, 3),
      percent(plan.gap), plan.files.map((file) => file.split("/").pop()).join(", ") || "–",
    ];
    cells.forEach((value, column) => {
      const cell = document.createElement(column ? "td" : "th");
      if (!column) cell.scope = "row";
      if (column === 2 && plan.accepted) cell.className = "taken";
      if (column === 2 && plan.restart) cell.title = plan.restart;
      if (column === cells.length - 1) {
        cell.className = "files";
        cell.title = plan.files.join(", ");
      }
      cell.textContent = String(value);
      row.append(cell);
    });
    return row;
  });
  at("plans").replaceChildren(...rows);
}

function drawProblems(problems) {
  const items = [...problems].reverse().map((problem) => {
    const item = document.createElement("li");
    const times = problem.times > 1 ? ` (${problem.times} times)` : "";
    item.textContent = `${new Date(1000 * problem.at).toLocaleTimeString()} ${problem.message}${times}`;
    return item;
  });
  if (!items.length) {
    const item = document.createElement("li");
    item.textContent = "none";
    items.push(item);
  }
  at("problems").replaceChildren(...items);
}

function status(state, look) {
  if (state.up === false) return "The source does not answer";
  if (!look) return "Waiting for traffic";
  if (state.state === "planning") return `Planning after ${state.steps} steps`;
  if (look.alarm) return "The traffic has drifted";
  return state.learning ? `Learning this traffic, ${state.steps} steps watched` : `Watching, ${state.steps} steps, no drift`;
}

function waits(state, look) {
  if (state.up === false) return "It waits for the source to answer, and asks again by itself.";
  if (!look && !state.dumps) return "It waits for the first recorded traffic.";
  if (!look) return "It waits for enough steps for a first look.";
  if (state.state === "planning") return "It waits for the plan that is being made; the running map serves meanwhile.";
  if (state.learning) return "It waits for a reference of this traffic; then the drift test begins.";
  if (look.restart) return "A newer map is written: the engine takes it at its next start.";
  if (state.effect && state.effect.answer === "cannot tell yet") return "It waits for windows of like load, to tell whether the map helped.";
  return "It waits for nothing: the newest map runs, and a new plan comes when the traffic drifts.";
}

function show(state) {
  if (state.started !== known.started) Object.assign(known, { started: state.started, newest: -1, looks: [], heat: null });
  const fresh = state.looks.filter((look) => look.n > known.newest);
  known.looks = [...known.looks, ...fresh].slice(-LOOKS);
  known.newest = state.newest;
  known.plans = state.plans;
  known.heat = state.heat || known.heat;
  const look = known.looks[known.looks.length - 1], plan = known.plans[known.plans.length - 1];
  const taken = known.plans.filter((one) => one.accepted).pop();
  const tested = known.looks.filter((one) => one.p_value !== null).pop();
  say("status", status(state, look));
  at("status").className = state.up === false ? "down" : "";
  say("about", Object.values(state.about).join(" · "));
  say("imbalance", look ? number(look.imbalance, 3) : "–");
  say("imbalance-was", look && look.first !== null ? `placement at the engine's start: ${number(look.first, 3)}` : "");
  say("after-restart", look ? number(look.after_restart, 3) : "–");
  say("after-restart-was", look && look.restart ? look.restart.split("; ").pop() : "the newest map runs");
  say("waits", waits(state, look));
  const effect = state.effect;
  say("effect", effect ? effect.answer : "–");
  say("effect-was", effect ? `${effect.pairs} pairs of windows of like load` : "no metrics of the engine, or one map so far");
  say("effect-sentence", effect ? `By the engine's own metrics the map that runs ${effect.sentence}` : "");
  say("restart", look && look.restart ? look.restart : "");
  say("predicted", taken ? number(taken.predicted, 3) : "–");
  say("predicted-was", taken ? `measured after it: ${number(taken.measured, 3)}` : "no plan taken yet");
  say("p-value", tested ? tested.p_value.toPrecision(3) : "–");
  say("p-value-was", tested ? `at step ${tested.step}${tested.alarm ? ", alarm" : ""}` : "no test yet");
  say("gap", plan ? percent(plan.gap) : "–");
  say("gap-was", plan ? `gain ${percent(plan.gain)}, ${plan.moves} moves` : "no plan yet");
  say("dumps", String(state.dumps));
  say("dumps-was", `${state.dump_errors} could not be used`);
  drawImbalance();
  drawDrift();
  drawHeat();
  drawPlans();
  drawProblems(state.problems);
}

async function ask() {
  try {
    if (!document.hidden || known.started === null) {
      const answer = await fetch(`state.json?after=${known.newest}`, { cache: "no-store" });
      if (!answer.ok) throw new Error(String(answer.status));
      const state = await answer.json();
      if (known.started !== null && state.started !== known.started && known.newest >= 0) {
        known.newest = -1;
      } else {
        show(state);
      }
    }
  } catch {
    say("status", "No answer from poise watch");
    at("status").className = "down";
  }
  setTimeout(ask, EVERY_MS);
}

function tell(layer, device) {
  const row = known.heat.relative[layer];
  if (row && row[device] !== undefined) say("cell", `layer ${known.heat.layers[layer]}, device ${device}: ${row[device].toFixed(2)} times the mean`);
}

at("heat").addEventListener("pointermove", (event) => {
  if (!known.heat) return;
  const box = at("heat").getBoundingClientRect();
  const device = Math.floor(((event.clientX - box.left) / box.width) * known.heat.relative[0].length);
  const layer = Math.floor(((event.clientY - box.top) / box.height) * known.heat.relative.length);
  tell(layer, device);
});
const cell = { layer: 0, device: 0 };
at("heat").addEventListener("keydown", (event) => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!known.heat || !step) return;
  event.preventDefault();
  const rows = known.heat.relative;
  cell.layer = Math.min(rows.length - 1, Math.max(0, cell.layer + step[0]));
  cell.device = Math.min(rows[0].length - 1, Math.max(0, cell.device + step[1]));
  tell(cell.layer, cell.device);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawHeat);
ask();
