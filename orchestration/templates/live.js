"use strict";
// The live page: asks for state.json again and again and puts what is new in it into the page, as text.

const SVG = "http://www.w3.org/2000/svg";
const shown = {};

function make(tag, attributes, ...children) {
  const element = tag === "svg" || tag === "path" || tag === "line" || tag === "text"
    ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children.filter((c) => c !== null && c !== undefined && c !== ""));
  return element;
}

// Put a part into its place if it is another one than is there; an empty one hides its section.
function part(name, items, build) {
  const text = JSON.stringify(items);
  if (shown[name] === text) return;
  shown[name] = text;
  const section = document.getElementById("p-" + name);
  if (section) section.hidden = items.length === 0;
  const place = document.getElementById(name);
  const open = new Set([...place.querySelectorAll("details[open]")].map((d) => d.dataset.key));
  place.replaceChildren(...items.map(build));
  for (const d of place.querySelectorAll("details")) d.open = open.has(d.dataset.key);
}

function stage(s) {
  const kind = s.state === "done" ? "done" : ["failed", "unreadable"].includes(s.state) || s.state.startsWith("silent") ? "bad"
    : ["planning", "running", "finishing"].includes(s.state) ? "running" : "";
  const facts = [s.done, s.rate, s.left && s.left + " left", s.failed && s.failed + " set aside"].filter(Boolean);
  const bar = make("b", {});
  bar.style.width = 100 * Math.min(1, s.share || 0) + "%";
  return make("li", { class: "panel stage" },
    make("header", {}, make("h3", {}, s.name), make("span", { class: "badge " + kind }, s.state)),
    s.share ? make("div", { class: "track", "aria-hidden": "true" }, bar) : null,
    make("p", {}, facts.join(", ")),
    make("small", {}, [s.figures, s.updated].filter(Boolean).join(" · ")));
}

function short(value) {
  const size = Math.abs(value);
  for (const [limit, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= limit) return Number((value / limit).toPrecision(3)) + unit;
  }
  return size !== 0 && size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

function curve(c) {
  const [W, H, L, T, B] = [430, 190, 44, 8, 20];
  const log = c.log && c.points.every((p) => p[1] > 0);
  const y = (v) => (log ? Math.log(v) : v);
  const xs = c.points.map((p) => p[0]), ys = c.points.map((p) => y(p[1]));
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const X = (v) => L + (W - L) * (x1 > x0 ? (v - x0) / (x1 - x0) : 0.5);
  const Y = (v) => T + (H - T - B) * (y1 > y0 ? (y1 - v) / (y1 - y0) : 0.5);
  const path = c.points.map((p, i) => (i ? "L" : "M") + X(p[0]).toFixed(1) + " " + Y(y(p[1])).toFixed(1)).join("");
  const real = (v) => (log ? Math.exp(v) : v);
  const marks = y1 > y0 ? [y0, (y0 + y1) / 2, y1] : [y0];
  const last = c.points[c.points.length - 1];
  const words = `${c.title}: ${short(last[1])} at ${short(last[0])} images, between ${short(real(y0))} and ${short(real(y1))}`;
  return make("figure", { class: "panel chart plot" }, make("h3", {}, c.title),
    make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": words },
      ...marks.flatMap((m) => [make("line", { x1: L, x2: W, y1: Y(m), y2: Y(m) }),
        make("text", { x: L - 6, y: Y(m) + 3, "text-anchor": "end" }, short(real(m)))]),
      make("text", { x: L, y: H - 4 }, short(x0)),
      make("text", { x: W, y: H - 4, "text-anchor": "end" }, short(x1) + " images"),
      make("path", { d: path })),
    make("small", {}, "now " + short(last[1])));
}

function result(r) {
  const name = r.report ? make("a", { href: "/files/reports/" + encodeURIComponent(r.report) }, r.checkpoint) : r.checkpoint;
  const numbers = r.numbers.map(([label, value, interval]) => make("div", {}, label + " ", make("b", {}, value), interval ? " (" + interval + ")" : ""));
  return make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, ...numbers), make("td", { class: "def" }, r.label));
}

function sample(name) {
  const url = "/files/samples/" + encodeURIComponent(name), images = Number(name.replace(/\.png$/, ""));
  const caption = Number.isFinite(images) ? images.toLocaleString("en") + " images" : name;
  return make("figure", {}, make("a", { href: url }, make("img", { src: url, alt: "Samples at " + caption, loading: "lazy" })),
    make("figcaption", {}, caption));
}

function funnel(f) {
  return make("div", { class: "panel funnel" }, make("h3", {}, f.title), make("ol", {}, ...f.steps.map((s) => {
    const bar = make("b", {});
    bar.style.width = 100 * s.share + "%";
    const share = 100 * s.share;
    return make("li", { class: s.kind }, make("div", {}, s.label), make("span", {}, s.count.toLocaleString("en")),
      make("span", {}, (share > 0 && (share < 1 || share > 99) && share !== 100 ? share.toFixed(1) : Math.round(share)) + " %"),
      s.kind === "detail" ? null : make("div", { class: "track", "aria-hidden": "true" }, bar));
  })));
}

function failure(f) {
  return make("details", { class: "panel failure", "data-key": f.stage + f.shard },
    make("summary", {}, `${f.stage} ${f.shard}: ${f.error}`),
    make("p", {}, make("small", {}, `${f.attempts} attempts; told by ${f.host}`)), make("pre", {}, f.traceback || f.error));
}

async function refresh() {
  const trouble = document.getElementById("trouble");
  try {
    const answer = await fetch("/state.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.status === 403 ? "the link is not valid any more" : "it answered " + answer.status);
    const state = await answer.json();
    part("stages", state.stages, stage);
    part("results", state.results, result);
    part("curves", state.curves, curve);
    part("samples", state.samples, sample);
    part("funnels", state.funnels, funnel);
    part("reports", state.reports, (n) => make("li", {}, make("a", { href: "/files/reports/" + encodeURIComponent(n) }, n.replace(/\.html$/, ""))));
    part("failures", state.failures, failure);
    document.getElementById("seen").textContent = new Date(1000 * state.at).toLocaleTimeString();
    trouble.textContent = state.trouble.join("; ");
  } catch (error) {
    trouble.textContent = "What is shown is old: " + error.message;
  }
  trouble.hidden = trouble.textContent === "";
}

async function forever() {
  for (;;) {
    if (!document.hidden) await refresh();
    await new Promise((wake) => setTimeout(wake, Number(document.body.dataset.every)));
  }
}
document.addEventListener("visibilitychange", () => document.hidden || refresh());
forever();
