"use strict";
const { charts } = JSON.parse(document.getElementById("data").textContent);
const LEFT = 58, RIGHT = 12, TOP = 8, FOOT = 34, HEIGHT = 260;
const make = (tag, attributes, text = "") => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
};

function ticks(low, high, count) {  // round numbers: 1, 2 or 5 times a power of ten apart
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const apart = power * [1, 2, 5, 10].find(times => times * power >= rough);
  const found = [];
  for (let n = Math.ceil(low / apart); n * apart <= high + apart / 1e6; n++) found.push(n * apart || 0);  // no -0
  return found;
}
const told = (value, digits) => {  // small ones, of learning rates, with as many digits that count
  const few = digits > 0 && value !== 0 && Math.abs(value) < 10 ** (1 - digits);
  return few ? value.toExponential(2) : value.toLocaleString("en", { maximumFractionDigits: digits, notation: Math.abs(value) < 1e7 ? "standard" : "compact" });
};
const where = (chart, value) => chart.along ? `${told(value, chart.along === "tokens" ? 0 : 2)} ${chart.along}` : `step ${told(value, 0)}`;

function draw(chart) {
  const width = Math.max(220, chart.svg.clientWidth), points = chart.lines.flatMap(line => line.points).filter(([, y]) => y !== null);
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  const least = (values, first) => values.reduce((a, b) => Math.min(a, b), first), most = (values, first) => values.reduce((a, b) => Math.max(a, b), first);
  const x0 = least(xs, Infinity), last = most(xs, -Infinity), x1 = last > x0 ? last : x0 + 1;
  let y0 = chart.from0 ? 0 : least(ys, Infinity), y1 = most(ys, -Infinity);
  const room = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
  y1 += room; if (!chart.from0) y0 -= room;
  const x = value => LEFT + (value - x0) / (x1 - x0) * (width - LEFT - RIGHT), y = value => HEIGHT - FOOT - (value - y0) / (y1 - y0) * (HEIGHT - FOOT - TOP);
  chart.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  chart.svg.replaceChildren();
  for (const value of ticks(y0, y1, 5)) {
    chart.svg.append(make("line", { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), stroke: "var(--line)" }));
    chart.svg.append(make("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, told(value, 6)));
  }
  const marks = ticks(x0, x1, Math.min(10, width / 80)).filter(value => chart.along || Number.isInteger(value));
  for (const value of marks) chart.svg.append(make("text", { x: x(value), y: HEIGHT - FOOT + 16, "text-anchor": "middle" }, told(value, chart.along ? 2 : 0)));
  chart.svg.append(make("text", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, chart.along || "steps"));
  for (const line of chart.lines) {
    const shown = line.points.filter(([, value]) => value !== null), path = shown.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
    if (!(line.dots && line.aside)) chart.svg.append(make("polyline", { points: path, fill: line.band ? line.colour : "none", stroke: line.band ? "none" : line.colour, "stroke-width": line.thin ? 1 : line.dots ? 1.5 : 2, opacity: line.thin ? 0.4 : 1, "stroke-dasharray": line.dash || "none", "stroke-linejoin": "round" }));
    if (line.dots || shown.length < 2) for (const [a, b] of shown) chart.svg.append(make("circle", { cx: x(a), cy: y(b), r: line.thin ? 1 : shown.length > 100 ? 2 : 4, fill: line.colour }));
  }
  chart.rule = make("line", { y1: TOP, y2: HEIGHT - FOOT, stroke: "var(--dim)", "stroke-dasharray": "3 3", visibility: "hidden" });
  chart.svg.append(chart.rule);
  chart.at = px => x0 + (px - LEFT) / (width - LEFT - RIGHT) * (x1 - x0);
  chart.x = x;
}

function point(chart, px) {  // says the values that are nearest to where the pointer is
  const wanted = chart.at(px), near = line => line.points.reduce((a, b) => Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a);
  const found = chart.lines.filter(line => line.points.length && !line.thin).map(line => [line, near(line)]);
  chart.rule.setAttribute("x1", chart.x(found[0][1][0])); chart.rule.setAttribute("x2", chart.x(found[0][1][0]));
  chart.rule.setAttribute("visibility", "visible");
  chart.now.textContent = found.map(([line, [step, value]]) => `${line.name}, ${where(chart, step)}: ${value === null ? "no number" : told(value, chart.digits)}`).join(" · ");
}

for (const chart of charts) {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  caption.textContent = `${chart.caption} `;
  const named = chart.lines.filter(line => !line.thin && !line.aside);
  if (chart.legend ?? chart.lines.length > 1) for (const line of named) {
    const key = document.createElement("span"), mark = document.createElement("i");
    key.className = "key"; mark.style.setProperty("--c", line.colour); mark.className = line.dots && !line.dash ? "dot" : line.dash ? "dash" : "";
    key.append(mark, line.name); caption.append(key);
  }
  chart.svg = make("svg", { height: HEIGHT, role: "img", "aria-label": chart.caption });
  chart.now = document.createElement("div"); chart.now.className = "now dim";
  figure.append(caption, chart.svg, chart.now);
  document.getElementById("charts").append(figure);
  chart.svg.addEventListener("pointermove", event => point(chart, event.clientX - chart.svg.getBoundingClientRect().left));
  chart.svg.addEventListener("pointerleave", () => { chart.rule.setAttribute("visibility", "hidden"); chart.now.textContent = ""; });
}
const drawAll = () => charts.forEach(draw);
new ResizeObserver(drawAll).observe(document.getElementById("charts"));
drawAll();
document.documentElement.dataset.ready = "yes";
