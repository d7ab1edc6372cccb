// The viewer's part in the page. It draws what the kernel sends, and sends back what is clicked, dragged or dropped.
const GRID = 14, LARGEST_FILE = 8e6, PANELS = ["photograph", "target", "map", "difference"];
const SHAPES = ["svg", "g", "rect", "line", "circle", "text", "title"];

function make(tag, attributes = {}, ...children) {
  const node = SHAPES.includes(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false) node.setAttribute(name, value);
  node.append(...children);  // strings become text, never markup
  return node;
}

function cellAt({ currentTarget, clientX, clientY }, rows = GRID, columns = GRID) {  // the nearest one of a grid
  const { left, top, width, height } = currentTarget.getBoundingClientRect();
  const place = (part, n) => Math.min(n - 1, Math.max(0, Math.floor(part * n)));
  return [place((clientY - top) / height, rows), place((clientX - left) / width, columns)];
}

const show = (image, src) => { if (image.getAttribute("src") !== src) image.src = src; };
const short = value => value === 0 ? "0" : Math.abs(value) >= 0.001 ? String(+value.toPrecision(2)) : value.toExponential(1);

function render({ model, el }) {
  const scene = () => model.get("scene"), canHide = scene().can_hide;
  const send = (kind, more = {}, buffers = []) => model.send({ kind, ...more }, undefined, buffers);
  const parts = Object.fromEntries(["strip", "tools", "message", "panels", "readout", "facts", "below"].map(
    name => [name, make("div", { class: name })]));
  parts.message.setAttribute("role", "alert");
  const root = make("div", { class: "fsc-viewer" }, ...Object.values(parts));
  const say = text => parts.message.replaceChildren(text);
  const tell = text => parts.readout.replaceChildren(text);
  let hidden = new Set(), drag = null;  // cells, and the rectangle that is being dragged

  // --- thumbnails

  function drawStrip() {
    const { thumbs, text, more } = model.get("strip");
    const turn = (by, label, sign, can) => make("button", {
      class: "turn", "aria-label": label, disabled: can ? false : "", onclick: () => send("page", { by }) }, sign);
    const thumb = ({ place, src, text }) => make("button", {
      "data-place": place, title: text, class: place === scene().place ? "chosen" : "",
      onclick: () => send("open", { place }) }, make("img", { src, alt: "" }), text);
    parts.strip.replaceChildren(
      turn(-1, "previous pictures", "‹", more[0]), ...thumbs.map(thumb), turn(1, "next pictures", "›", more[1]), text);
  }

  // --- panels: photograph and maps

  function drawPanels() {
    parts.panels.style.setProperty("--aspect", scene().aspect);
    for (const { name, box, label, figure, caption, photo, map, bar, ticks } of panels) {
      const panel = scene().panels[name];
      label.hidden = !panel;
      figure.hidden = !panel || !box.checked;
      if (!panel) continue;
      caption.replaceChildren(panel.title);
      show(photo, model.get("photo"));
      if (!panel.values) continue;
      show(map, panel.src);
      show(bar, panel.bar);
      ticks.replaceChildren(...panel.ticks.map(tick => make("span", {}, short(tick))));
    }
    panels[0].dots.replaceChildren(...scene().dots.map(
      ([x, y]) => make("circle", { cx: `${100 * x}%`, cy: `${100 * y}%`, r: 2.5 })));
    drawCells();
  }

  function drawCells() {
    const side = 100 / GRID;
    for (const { cells } of panels) cells.replaceChildren(...[...merged()].map(i => make("rect", {
      x: `${i % GRID * side}%`, y: `${Math.floor(i / GRID) * side}%`, width: `${side}%`, height: `${side}%` })));
  }

  function merged() {  // the hidden cells with the rectangle
    if (!drag) return hidden;
    const { from: [r, c], to: [s, d], adds } = drag, cells = new Set(hidden);
    for (let i = Math.min(r, s); i <= Math.max(r, s); i++)
      for (let j = Math.min(c, d); j <= Math.max(c, d); j++) cells[adds ? "add" : "delete"](i * GRID + j);
    return cells;
  }

  const dragging = {
    onpointerdown: event => {
      if (!canHide) return;
      const cell = cellAt(event);
      event.currentTarget.setPointerCapture(event.pointerId);
      drag = { from: cell, to: cell, adds: !hidden.has(cell[0] * GRID + cell[1]) };
      drawCells();
    },
    onpointermove: event => {
      const [row, column] = cellAt(event);
      const values = Object.entries(scene().panels).filter(([, panel]) => panel.values).map(
        ([name, panel]) => `${name} ${short(panel.values[row * GRID + column])}`);
      tell(`row ${row + 1}, column ${column + 1}: ${values.join(", ")}`);
      if (drag) { drag.to = [row, column]; drawCells(); }
    },
    onpointerleave: () => tell(""),
    onpointerup: () => {
      if (!drag) return;
      hidden = merged();
      drag = null;
      send("hide", { cells: [...hidden].sort((a, b) => a - b) });
    },
  };

  const panels = PANELS.map(name => {
    const nodes = { caption: make("figcaption"), photo: make("img", { alt: "" }), map: make("img", { class: "cells", alt: "" }),
      dots: make("g"), cells: make("g"), bar: make("img", { class: "bar", alt: "" }), ticks: make("div", { class: "ticks" }) };
    const view = make("div", { class: `view ${name}`, "data-panel": name, ...dragging }, nodes.photo, nodes.map,
      make("svg", {}, nodes.dots, nodes.cells));
    const box = make("input", { type: "checkbox", checked: "", "data-show": name, onchange: drawPanels });
    const figure = make("figure", {}, nodes.caption, view, nodes.bar, nodes.ticks);
    return { name, box, label: make("label", {}, box, ` ${name}`), figure, ...nodes };
  });
  parts.panels.append(...panels.map(({ figure }) => figure));

  // --- tools

  const opacity = make("input", { type: "range", min: 0, max: 1, step: 0.05, value: 0.6,
    oninput: () => root.style.setProperty("--opacity", opacity.value) });
  parts.tools.append(...panels.map(({ label }) => label), make("label", {}, "opacity ", opacity));
  if (canHide) {
    const file = make("input", { type: "file", accept: "image/*", onchange: () => upload(file.files[0]) });
    parts.tools.append(make("button", { onclick: () => send("hide", { cells: [] }) }, "show all cells"),
      make("label", {}, "own picture ", file));
    const over = on => event => { event.preventDefault(); root.classList.toggle("over", on); };
    root.addEventListener("dragover", over(true));
    root.addEventListener("dragleave", over(false));
    root.addEventListener("drop", event => { over(false)(event); upload(event.dataTransfer.files[0]); });
  }

  async function upload(file) {
    if (!file) return;
    if (file.size > LARGEST_FILE)
      return say(`${file.name} has ${Math.round(file.size / 1e6)} MB, more than the ${LARGEST_FILE / 1e6} that go ` +
        "through a notebook's connection: make it smaller, or give its path to predict()");
    say(`reading ${file.name} ...`);
    send("picture", { name: file.name }, [await file.arrayBuffer()]);
  }

  // --- below: distribution, predicted against true, atlas

  function distribution({ first, width, heights, marks }) {
    const W = 320, H = 150, foot = H + 34, all = Object.values(heights), count = all[0].length, step = W / count;
    const most = Math.max(...all.flat(), 1e-9), at = number => 10 + ((number - first) + 0.5) / width * step;
    const rects = Object.entries(heights).flatMap(([name, values]) => values.map((p, i) => make("rect", {
      x: 10 + i * step, y: foot - H * p / most, width: Math.max(1, step - 1), height: H * p / most, "data-of": name },
      make("title", {}, `${name}, ${first + i * width}: ${(100 * p).toFixed(1)} %`))));
    const lines = Object.entries(marks).flatMap(([name, number], k) => [
      make("line", { x1: at(number), x2: at(number), y1: 18 + 14 * k, y2: foot, class: name }),
      make("text", { x: Math.min(at(number) + 3, W - 60), y: 12 + 14 * k }, `${name} ${number}`)]);
    const numbers = [0, Math.floor(count / 2), count - 1].map((i, k) => make("text", {
      x: 10 + (i + 0.5) * step, y: foot + 14, "text-anchor": ["start", "middle", "end"][k] }, String(first + i * width)));
    const key = all.length > 1 ? "bars: all cells, outlines: the rest" : "probability of each number";
    return make("svg", { width: W + 20, height: foot + 38, "data-plot": "distribution" },
      ...rects, ...lines, ...numbers, make("text", { x: 10, y: foot + 32 }, key));
  }

  function scatter(points) {
    const S = 210, most = Math.log1p(Math.max(...points.flatMap(([, t, p]) => [t, p ?? 0]), 1));
    const x = value => 34 + S * Math.log1p(value) / most, y = value => 44 + S - x(value);
    const ticks = [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 3000].filter(tick => Math.log1p(tick) <= most * 1.001);
    return make("svg", { width: S + 54, height: S + 56, "data-plot": "against-truth" },
      make("line", { x1: x(0), y1: y(0), x2: 34 + S, y2: 10 }),
      ...ticks.flatMap(tick => [make("text", { x: x(tick), y: S + 30, "text-anchor": "middle" }, String(tick)),
        make("text", { x: 28, y: y(tick) + 4, "text-anchor": "end" }, String(tick))]),
      ...points.map(([place, truth, predicted, name]) => make("circle", {
        cx: x(truth), cy: predicted === null ? S + 14 : y(predicted), "data-place": place,
        r: place === scene().place ? 7 : 4, onclick: () => send("open", { place }),
        class: (predicted === null ? "unparsed" : "") + (place === scene().place ? " chosen" : ""),
      }, make("title", {}, `${name}: ${predicted ?? "no number"} of ${truth}`))),
      make("text", { x: 34, y: S + 48 }, "predicted (up) against true count"));
  }

  function atlas({ src, masses, chosen }) {
    const layers = masses.length, heads = masses[0].length, part = (i, n) => `${100 * i / n}%`;
    const size = Math.max(GRID, Math.min(56, Math.floor(360 / heads), Math.floor(260 / layers)));
    return make("figure", {}, make("div", {
      class: "atlas", style: `width: ${heads * (size + 2)}px; height: ${layers * (size + 2)}px`,
      onclick: event => { const [layer, head] = cellAt(event, layers, heads); send("head", { layer, head }); },
      onpointermove: event => {
        const [layer, head] = cellAt(event, layers, heads);
        tell(`layer ${layer}, head ${head}: ${Math.round(100 * masses[layer][head])} % of its attention is on the picture`);
      } }, make("img", { src, class: "cells", alt: "" }), ...chosen.map(([layer, head]) => make("div", {
      style: `top: ${part(layer, layers)}; left: ${part(head, heads)}; width: ${part(1, heads)}; height: ${part(1, layers)}` }))),
    make("figcaption", {}, "layers (down) and heads (across), one scale"));
  }

  // --- all

  async function draw() {
    const { version, message, facts, cells, bars, points, atlas: heads } = scene();
    if (!drag) hidden = new Set(cells);
    say(message);
    drawStrip();
    drawPanels();
    parts.facts.replaceChildren(...facts.map(line => make("div", {}, line)));
    parts.below.replaceChildren(
      ...bars ? [distribution(bars)] : [], ...points.length ? [scatter(points)] : [], ...heads ? [atlas(heads)] : []);
    await Promise.allSettled([...root.querySelectorAll("figure:not([hidden]) img[src]")].map(image => image.decode()));
    root.dataset.version = version;  // all of it is seen: the browser's tests wait for it
  }

  el.append(root);
  let last = draw();
  const next = () => { last = last.then(draw); };
  model.on("change:scene", next);
  return () => model.off("change:scene", next);
}

export default { render };
