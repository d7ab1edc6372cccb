// The viewer's pictures in the page. It draws what the kernel sends, and sends back what is clicked, dragged or dropped.
const GRID = 14, BAR = 34, LARGEST_FILE = 8e6, SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, ...children) {
  const node = ["svg", "g", "rect", "line", "circle", "path", "text", "title"].includes(tag)
    ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false) node.setAttribute(name, value);
  node.append(...children);  // strings become text, never markup
  return node;
}

const short = value => value === 0 ? "0" : Math.abs(value) >= 0.001 ? String(+value.toPrecision(2)) : value.toExponential(1);

function render({ model, el }) {
  const state = { shown: null, opacity: 0.6, photo: null, cells: new Set(), drag: null, width: 0 };
  const parts = Object.fromEntries(["strip", "tools", "message", "panels", "readout", "facts", "below"].map(
    name => [name, make("div", { class: ["strip"].includes(name) ? name : `row ${name}` })]));
  parts.facts.className = "facts";
  parts.message.setAttribute("role", "alert");
  const root = make("div", { class: "fsc-viewer" }, ...Object.values(parts));
  el.append(root);

  const send = (kind, more = {}, buffers = []) => model.send({ kind, ...more }, undefined, buffers);
  const scene = () => model.get("scene");
  const say = text => parts.message.replaceChildren(text || "");

  // --- thumbnails

  function drawStrip() {
    const { thumbs = [], text = "", more = [false, false] } = model.get("strip");
    const turn = (by, sign, can) => make("button", {
      class: "turn", "aria-label": by < 0 ? "previous pictures" : "next pictures", disabled: can ? false : "",
      onclick: () => send("page", { by }) }, sign);
    parts.strip.replaceChildren(turn(-1, "‹", more[0]), ...thumbs.map(({ place, src, text }) => make("button", {
      "data-place": place, title: text, class: place === scene().place ? "chosen" : "",
      onclick: () => send("open", { place }) }, make("img", { src, alt: "" }), text)), turn(1, "›", more[1]), text);
  }

  // --- panels: photograph and maps

  function colourOf(panel, value) {
    const part = panel.signed ? (value / panel.largest + 1) / 2 : Math.sqrt(Math.max(0, value / panel.largest));
    return model.get("colours")[panel.colours][Math.round(255 * Math.min(1, part))];
  }

  function drawPanel(canvas, panel, width) {
    const ratio = window.devicePixelRatio || 1, height = width * state.photo.height / state.photo.width;
    const total = height + (panel.values ? BAR : 0), pen = canvas.getContext("2d");
    Object.assign(canvas, { width: width * ratio, height: total * ratio, photoHeight: height });
    Object.assign(canvas.style, { width: `${width}px`, height: `${total}px` });
    pen.scale(ratio, ratio);
    pen.drawImage(state.photo, 0, 0, width, height);
    const line = (i, length) => Math.round(i * length / GRID * ratio) / ratio;  // whole pixels, or seams show
    const cell = i => {
      const [row, column] = [Math.floor(i / GRID), i % GRID], [x, y] = [line(column, width), line(row, height)];
      return [x, y, line(column + 1, width) - x, line(row + 1, height) - y];
    };
    if (panel.values) {
      pen.globalCompositeOperation = "saturation";  // grey below the colours
      pen.fillStyle = "#000";
      pen.fillRect(0, 0, width, height);
      pen.globalCompositeOperation = "source-over";
      pen.globalAlpha = state.opacity;
      panel.values.forEach((value, i) => {
        pen.fillStyle = colourOf(panel, value);
        pen.fillRect(...cell(i));
      });
      pen.globalAlpha = 1;
      drawBar(pen, panel, width, height + 4);
    } else for (const [x, y] of scene().dots) {
      pen.beginPath();
      pen.arc(x * width, y * height, 2.5, 0, 7);
      Object.assign(pen, { fillStyle: "#ff2d2d", strokeStyle: "#fff", lineWidth: 0.7 });
      pen.fill(); pen.stroke();
    }
    for (const i of state.drag ? merged() : state.cells) {
      Object.assign(pen, { fillStyle: "rgb(127 127 127 / 0.85)", strokeStyle: "#fff", lineWidth: 0.5 });
      pen.fillRect(...cell(i));
      pen.strokeRect(...cell(i));
    }
  }

  function drawBar(pen, panel, width, top) {
    for (let x = 0; x < width; x++) {
      const part = x / (width - 1);
      pen.fillStyle = colourOf(panel, panel.signed ? (2 * part - 1) * panel.largest : part * part * panel.largest);
      pen.fillRect(x, top, 1.5, 10);
    }
    pen.fillStyle = getComputedStyle(root).color;
    pen.font = "12px system-ui, sans-serif";
    const ticks = panel.signed ? [-1, 0, 1] : [0, 0.25, 1];
    ticks.forEach((tick, i) => {
      pen.textAlign = ["left", "center", "right"][i];
      pen.fillText(short(tick * panel.largest), width * (panel.signed ? (tick + 1) / 2 : Math.sqrt(tick)), top + 24);
    });
  }

  function cellAt(event) {
    const canvas = event.currentTarget, box = canvas.getBoundingClientRect();
    const clip = x => Math.min(GRID - 1, Math.max(0, Math.floor(x * GRID)));
    const y = (event.clientY - box.top) / canvas.photoHeight;
    return y > 1 && !state.drag ? null : [clip(y), clip((event.clientX - box.left) / box.width)];
  }

  function merged() {  // the hidden cells with the rectangle that is being dragged
    const { from: [r, c], to: [s, d], adds } = state.drag, cells = new Set(state.cells);
    for (let i = Math.min(r, s); i <= Math.max(r, s); i++)
      for (let j = Math.min(c, d); j <= Math.max(c, d); j++) cells[adds ? "add" : "delete"](i * GRID + j);
    return cells;
  }

  function point(event) {
    const cell = cellAt(event);
    if (!cell) return parts.readout.replaceChildren();
    const values = scene().panels.filter(panel => panel.values).map(
      panel => `${panel.name} ${short(panel.values[cell[0] * GRID + cell[1]])}`);
    parts.readout.replaceChildren(`row ${cell[0] + 1}, column ${cell[1] + 1}: ${values.join(", ")}`);
    if (state.drag) { state.drag.to = cell; drawPanels(); }
  }

  const dragging = {
    onpointerdown: event => {
      const cell = cellAt(event);
      if (!cell || !scene().can_hide) return;
      event.currentTarget.setPointerCapture(event.pointerId);
      state.drag = { from: cell, to: cell, adds: !state.cells.has(cell[0] * GRID + cell[1]) };
      drawPanels();
    },
    onpointermove: point,
    onpointerleave: () => parts.readout.replaceChildren(),
    onpointerup: () => {
      if (!state.drag) return;
      state.cells = merged();
      state.drag = null;
      send("hide", { cells: [...state.cells].sort((a, b) => a - b) });
    },
  };

  function drawPanels() {
    if (!state.photo) return;
    const panels = scene().panels.filter(panel => state.shown?.get(panel.name) ?? true);
    const wide = (root.clientWidth || 900) - 12 * panels.length;
    const width = Math.floor(Math.min(wide / panels.length, 480, 420 * state.photo.width / state.photo.height));
    if (parts.panels.dataset.names !== panels.map(panel => panel.name).join()) {  // else the canvas under a drag stays
      parts.panels.dataset.names = panels.map(panel => panel.name).join();
      parts.panels.replaceChildren(...panels.map(panel => make("figure", {},
        make("figcaption"), make("canvas", { class: "map", "data-panel": panel.name, ...dragging }))));
    }
    panels.forEach((panel, i) => {
      const [caption, canvas] = parts.panels.children[i].children;
      caption.replaceChildren(panel.title || panel.name);
      drawPanel(canvas, panel, width);
    });
  }

  // --- tools

  function drawTools() {
    const names = scene().panels.map(panel => panel.name);
    if (parts.tools.dataset.names === names.join() + scene().can_hide) return;
    parts.tools.dataset.names = names.join() + scene().can_hide;
    state.shown = new Map(names.map(name => [name, state.shown?.get(name) ?? true]));
    const box = name => make("label", {}, make("input", {
      type: "checkbox", checked: state.shown.get(name) ? "" : false, "data-show": name,
      onchange: event => {
        state.shown.set(name, event.target.checked);
        if (![...state.shown.values()].some(Boolean)) { state.shown.set(name, true); event.target.checked = true; }
        drawPanels();
      } }), ` ${name}`);
    const opacity = make("input", { type: "range", min: 0, max: 1, step: 0.05, value: state.opacity,
      oninput: event => { state.opacity = +event.target.value; drawPanels(); } });
    parts.tools.replaceChildren(...names.map(box), make("label", {}, "opacity ", opacity));
    if (!scene().can_hide) return;
    const file = make("input", { type: "file", accept: "image/*", onchange: event => upload(event.target.files[0]) });
    parts.tools.append(make("button", { onclick: () => { state.cells = new Set(); send("hide", { cells: [] }); } },
      "show all cells"), make("label", {}, "own picture ", file));
  }

  async function upload(file) {
    if (!file) return;
    if (file.size > LARGEST_FILE)
      return say(`${file.name} has ${Math.round(file.size / 1e6)} MB, more than the ${LARGEST_FILE / 1e6} that go ` +
        "through a notebook's connection: make it smaller, or give its path to predict()");
    say(`reading ${file.name} ...`);
    send("picture", { name: file.name }, [await file.arrayBuffer()]);
  }

  root.addEventListener("dragover", event => {
    if (scene().can_hide && event.dataTransfer.types.includes("Files")) { event.preventDefault(); root.classList.add("over"); }
  });
  root.addEventListener("dragleave", () => root.classList.remove("over"));
  root.addEventListener("drop", event => {
    event.preventDefault();
    root.classList.remove("over");
    if (scene().can_hide) upload(event.dataTransfer.files[0]);
  });

  // --- below: distribution, predicted against true, atlas

  function distribution({ first, width, heights, marks }) {
    const W = 320, H = 150, count = Object.values(heights)[0].length, step = W / count;
    const most = Math.max(...Object.values(heights).flat(), 1e-9), colours = model.get("colours");
    const svg = make("svg", { width: W + 20, height: H + 56, "data-plot": "distribution" });
    const at = number => 10 + ((number - first) / width + 0.5 / width) * step;
    Object.entries(heights).forEach(([name, values], k) => values.forEach((p, i) => svg.append(make("rect", {
      x: 10 + i * step, y: 16 + H - H * p / most, width: Math.max(1, step - 1), height: H * p / most, "data-of": name,
      fill: k ? "none" : colours.count, stroke: k ? colours.new : "none", "stroke-width": 2 },
      make("title", {}, `${name}, ${first + i * width}: ${(100 * p).toFixed(1)} %`)))));
    Object.entries(marks).forEach(([name, number], k) => svg.append(
      make("line", { x1: at(number), x2: at(number), y1: 12, y2: 16 + H, stroke: "currentColor",
        "stroke-dasharray": ["2 3", "7 3", "1 0"][k % 3] }),
      make("text", { x: Math.min(at(number) + 3, W - 60), y: 12 + 14 * k }, `${name} ${number}`)));
    [0, Math.floor(count / 2), count - 1].forEach((i, k) => svg.append(make("text", {
      x: 10 + (i + 0.5) * step, y: H + 30, "text-anchor": ["start", "middle", "end"][k] }, String(first + i * width))));
    const key = Object.keys(heights).length > 1 ? "bars: all cells, outlines: the rest" : "probability of each number";
    svg.append(make("text", { x: 10, y: H + 48 }, key));
    return svg;
  }

  function scatter(points) {
    const S = 210, most = Math.log1p(Math.max(...points.flatMap(([, t, p]) => [t, p ?? 0]), 1));
    const x = value => 34 + S * Math.log1p(value) / most, y = value => 10 + S - S * Math.log1p(value) / most;
    const svg = make("svg", { width: S + 54, height: S + 56, "data-plot": "against-truth" },
      make("line", { x1: x(0), y1: y(0), x2: 34 + S, y2: 10, stroke: "currentColor" }));
    for (const tick of [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 3000].filter(n => Math.log1p(n) <= most * 1.001))
      svg.append(make("text", { x: x(tick), y: S + 30, "text-anchor": "middle" }, String(tick)),
        make("text", { x: 28, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
    for (const [place, truth, predicted, name] of points) svg.append(make("circle", {
      cx: x(truth), cy: predicted === null ? S + 14 : y(predicted), r: place === scene().place ? 7 : 4, "data-place": place,
      fill: predicted === null ? "#b00020" : model.get("colours").count, "fill-opacity": 0.55,
      stroke: place === scene().place ? model.get("colours").new : "none", "stroke-width": 2.5,
      onclick: () => send("open", { place }) }, make("title", {}, `${name}: ${predicted ?? "no number"} of ${truth}`)));
    svg.append(make("text", { x: 34, y: S + 48 }, "predicted (up) against true count"));
    return svg;
  }

  function atlas({ layers, heads, masses, chosen }) {
    const bytes = new Uint8Array(model.get("atlas").buffer, model.get("atlas").byteOffset);
    const size = Math.max(GRID, Math.min(56, Math.floor(360 / heads), Math.floor(260 / layers.length)));
    const canvas = make("canvas", { class: "atlas", width: heads * (size + 2), height: layers.length * (size + 2) });
    const pen = canvas.getContext("2d"), ramp = model.get("colours").viridis;
    for (let l = 0; l < layers.length; l++) for (let h = 0; h < heads; h++) {
      const left = h * (size + 2) + 1, top = l * (size + 2) + 1, start = (l * heads + h) * GRID * GRID;
      for (let i = 0; i < GRID * GRID; i++) {
        pen.fillStyle = ramp[bytes[start + i]];
        pen.fillRect(left + i % GRID * size / GRID, top + Math.floor(i / GRID) * size / GRID, size / GRID + 0.5, size / GRID + 0.5);
      }
      if (chosen.some(([a, b]) => a === l && b === h)) {
        Object.assign(pen, { strokeStyle: model.get("colours").new, lineWidth: 2 });
        pen.strokeRect(left, top, size, size);
      }
    }
    const at = event => [Math.floor(event.offsetY / (size + 2)), Math.floor(event.offsetX / (size + 2))];
    const inside = ([l, h]) => l >= 0 && h >= 0 && l < layers.length && h < heads;
    canvas.addEventListener("click", event => { const [l, h] = at(event); if (inside([l, h])) send("head", { layer: layers[l], head: h }); });
    canvas.addEventListener("pointermove", event => {
      const [l, h] = at(event);
      if (inside([l, h])) parts.readout.replaceChildren(`layer ${layers[l]}, head ${h}: ${Math.round(100 * masses[l][h])} % of its attention is on the picture`);
    });
    return make("figure", {}, canvas, make("figcaption", {}, "layers (down) and heads (across), one scale"));
  }

  function drawBelow() {
    const now = scene(), plots = [];
    if (now.bars) plots.push(distribution(now.bars));
    if (now.points?.length) plots.push(scatter(now.points));
    if (now.atlas) plots.push(atlas(now.atlas));
    parts.below.replaceChildren(...plots);
  }

  // --- all

  let seen = null;
  async function draw() {
    const bytes = model.get("photo");
    if (bytes !== seen && bytes.byteLength) {
      seen = bytes;
      state.photo = await createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
    }
    if (!state.drag) state.cells = new Set(scene().cells || []);
    say(scene().message);
    drawStrip(); drawTools(); drawPanels(); drawBelow();
    parts.facts.replaceChildren(...(scene().facts || []).map(line => make("div", {}, line)));
    root.dataset.version = model.get("version");  // the browser's tests wait for it
  }

  model.on("change:version", draw);
  const watcher = new ResizeObserver(() => {
    if (root.clientWidth !== state.width) { state.width = root.clientWidth; drawPanels(); }
  });
  watcher.observe(root);
  draw();
  return () => { watcher.disconnect(); model.off("change:version", draw); };
}

export default { render };
