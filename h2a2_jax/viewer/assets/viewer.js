// What is shown, how the user moves in it, and when it is drawn.

const MOST_LABELS = 150;
const EDGES = [...Array(8).keys()].flatMap((i) => [1, 2, 4].filter((bit) => !(i & bit)).map((bit) => [i, i | bit]));
const FACES = [[0, 1, 3, 2], [4, 5, 7, 6], [0, 1, 5, 4], [2, 3, 7, 6], [0, 2, 6, 4], [1, 3, 7, 5]];

class Viewer {
  constructor(model, scene) {
    Object.assign(this, { model, scene, canvas: scene.canvas, frames: 0, labels: new Map() });
    this.camera = new Camera(model.low, model.high);
    this.panel = new Panel(model, {
      change: (part) => this.change(part),
      choose: (box) => this.choose(box),
      goTo: (box) => this.goTo(box),
      look: (view) => this.look(view),
    });
    new ResizeObserver(() => this.resize()).observe(byId("stage"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.change({}));
    bindPointers(this);
    bindKeys(this);
    this.resize();
    this.camera.look("room");
    this.change({});
  }

  get state() {
    return this.model.state;
  }

  change(part) {
    Object.assign(this.state, part);
    if (this.state.theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = this.state.theme;
    this.model.match();
    if (this.state.chosen && !this.model.isShown(this.state.chosen)) this.state.chosen = null;
    this.panel.update();
    this.updateShapes();
    this.updateLabels();
    this.resize();
  }

  choose(box) {
    this.change({ chosen: box });
  }

  step(by) {
    const { shown } = this.model;
    if (!shown.length) return;
    const at = shown.indexOf(this.state.chosen);
    this.choose(shown[at < 0 ? (by > 0 ? 0 : shown.length - 1) : (at + by + shown.length) % shown.length]);
  }

  goTo(box) {
    this.camera.target = box.local.slice(0, 3);
    this.camera.distance = Math.max(1, 2.2 * Math.hypot(...box.local.slice(3, 6)));
    this.redraw();
  }

  look(view) {
    this.camera.look(view);
    this.change({ view });
  }

  // Called when the user moves: what is seen is no longer one of the views.
  moved() {
    if (this.state.view) {
      this.state.view = null;
      for (const button of byId("views").children) button.ariaPressed = "false";
    }
    this.redraw();
  }

  get panes() {
    const both = this.model.truth && this.state.beside;
    const width = Math.floor(this.canvas.width / (both ? 2 : 1));
    if (!both) return [{ camera: this.camera, x: 0, width, shapes: ["floor", "truth", "found"], isTruth: null }];
    return [
      { camera: this.camera, x: 0, width, shapes: ["floor", "found"], isTruth: false, caption: "Detections" },
      { camera: this.camera, x: width, width, shapes: ["floor", "truth"], isTruth: true, caption: "Ground truth" },
    ];
  }

  resize() {
    const ratio = Math.min(devicePixelRatio || 1, 2);
    const { clientWidth, clientHeight } = byId("stage");
    this.scene.resize(Math.max(1, Math.round(clientWidth * ratio)), Math.max(1, Math.round(clientHeight * ratio)));
    this.ratio = ratio;
    const before = this.camera.width / this.camera.height;
    this.camera.width = this.panes[0].width / ratio;
    this.camera.height = this.canvas.height / ratio;
    if (this.state.view && Math.abs(before - this.camera.width / this.camera.height) > 0.01) this.camera.fit();
    this.updateCaptions();
    this.redraw();
  }

  updateCaptions() {
    const made = this.panes.filter((pane) => pane.caption).flatMap((pane) => {
      const caption = element("span", { textContent: pane.caption });
      caption.style.left = `${(pane.x + pane.width / 2) / this.ratio}px`;
      const border = element("i");
      border.style.left = `${pane.x / this.ratio}px`;
      return pane.x ? [border, caption] : [caption];
    });
    byId("captions").replaceChildren(...made);
  }

  updateShapes() {
    const shown = this.model.shown;
    for (const [name, isTruth] of [["found", false], ["truth", true]]) {
      const own = shown.filter((box) => box.isTruth === isTruth);
      this.scene.setShapes(name, own.flatMap((box) => this.edges(box)), own.flatMap((box) => this.faces(box)));
    }
    this.scene.setShapes("floor", this.state.floor ? this.grid() : [], []);
  }

  edges(box) {
    const corners = boxCorners(box.local);
    const chosen = box === this.state.chosen;
    const width = (box.isTruth ? 1.8 : 2.2) + (chosen ? 1.6 : 0);
    const look = [...this.model.colorOf(box), 1, width, box.isTruth && !chosen ? 1 : 0];
    const lines = EDGES.map(([a, b]) => [...corners[a], ...corners[b], ...look]);
    // Where yaw points: from the middle of the top to the middle of its +x side.
    const middle = (rows) => rows.reduce((sum, row) => add(sum, corners[row], 1 / rows.length), [0, 0, 0]);
    if (box.local[6] !== 0 || chosen) lines.push([...middle([4, 5, 6, 7]), ...middle([5, 7]), ...look]);
    return lines;
  }

  faces(box) {
    const corners = boxCorners(box.local);
    const look = [...this.model.colorOf(box), box === this.state.chosen ? 0.28 : box.isTruth ? 0 : 0.05];
    if (look[3] === 0) return [];
    return FACES.flatMap(([a, b, c, d]) => [a, b, c, a, c, d].map((row) => [...corners[row], ...look]));
  }

  // Lines at whole metres of the scan's frame, on its floor.
  grid() {
    const { low, high, origin } = this.model;
    const look = [...rgbOf("--quiet"), 0.35, 1, 0];
    const every = this.model.gridSpacing;
    const wholes = (k) => {
      const [first, last] = [Math.floor((low[k] + origin[k]) / every), Math.ceil((high[k] + origin[k]) / every)];
      return [...Array(last - first + 1).keys()].map((i) => (first + i) * every - origin[k]);
    };
    const [xs, ys] = [wholes(0), wholes(1)];
    const z = low[2];
    return [
      ...xs.map((x) => [x, ys[0], z, x, ys.at(-1), z, ...look]),
      ...ys.map((y) => [xs[0], y, z, xs.at(-1), y, z, ...look]),
    ];
  }

  updateLabels() {
    const wanted = this.state.names ? this.model.shown.slice(0, 4 * MOST_LABELS) : [];
    for (const [box, label] of this.labels) if (!wanted.includes(box)) label.remove(), this.labels.delete(box);
    for (const box of wanted) {
      if (!this.labels.has(box)) this.labels.set(box, byId("labels").appendChild(element("span")));
      const label = this.labels.get(box);
      label.classList.toggle("truth", box.isTruth);
      label.classList.toggle("chosen", box === this.state.chosen);
      label.style.setProperty("--own", cssColor(this.model.colorOf(box)));
      label.textContent = box.name;
      if (!box.isTruth) label.append(element("b", { textContent: box.score.toFixed(2) }));
    }
    // Measured at once: reading a size after writing another makes the browser lay out the page again.
    for (const label of this.labels.values()) label.size = [label.offsetWidth, label.offsetHeight];
  }

  // The chosen box's label first, then by score; one that would cover another is left out.
  placeLabels() {
    const placed = [];
    const boxes = [...this.labels.keys()];
    boxes.sort((a, b) => (b === this.state.chosen) - (a === this.state.chosen) || (b.score ?? 0) - (a.score ?? 0));
    for (const box of boxes) {
      const label = this.labels.get(box);
      const rectangle = this.labelRectangle(box, label.size);
      const free = rectangle && placed.length < MOST_LABELS && !placed.some((other) => overlaps(rectangle, other.rectangle));
      label.style.visibility = free ? "visible" : "hidden";
      if (!free) continue;
      placed.push({ box, rectangle });
      label.style.transform = `translate(${rectangle[0].toFixed(1)}px, ${rectangle[1].toFixed(1)}px)`;
    }
    this.placedLabels = placed;
  }

  labelRectangle(box, [width, height]) {
    const pane = this.panes.find((candidate) => candidate.isTruth === null || candidate.isTruth === box.isTruth);
    const top = [box.local[0], box.local[1], box.local[2] + box.local[5] / 2];
    const [x, y, depth] = this.camera.project(top);
    if ((!this.camera.parallel && depth < 0.05) || x < 0 || x > this.camera.width || y < 0 || y > this.camera.height) return null;
    const left = x + pane.x / this.ratio - width / 2;
    return [left, y - height - 3, left + width, y - 3];
  }

  redraw() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      this.draw();
    });
  }

  draw() {
    const { state, model, camera } = this;
    const dark = getComputedStyle(byId("panel")).color.match(/\d+/)[0] > 127;
    const depth = camera.radius;
    this.scene.draw(this.panes, {
      background: rgbOf("--stage"),
      halo: dark ? [0, 0, 0] : [1, 1, 1],
      cut: state.cut >= 1 ? Infinity : model.cutHeight() - model.origin[2],
      front: state.front > 0 ? camera.distance - depth + state.front * 1.6 * depth : -1e9,
      pointSize: state.pointSize * 1.4 * model.data.points.spacing,
      byHeight: state.byHeight,
      shading: state.shading,
      ratio: this.ratio,
    });
    this.placeLabels();
    this.drawScale();
    this.frames++;
    this.firstFrame ??= performance.now();
  }

  // Lengths are the same everywhere only in parallel projection.
  drawScale() {
    const bar = byId("scale");
    bar.hidden = !this.camera.parallel;
    if (bar.hidden) return;
    const most = this.camera.metresPerPixel * 160;
    const power = 10 ** Math.floor(Math.log10(most));
    const length = [5, 2, 1].find((n) => n * power <= most) * power;
    bar.firstChild.style.width = `${length / this.camera.metresPerPixel}px`;
    bar.firstChild.textContent = `${length.toLocaleString("en")} m`;
  }

  paneAt(x) {
    return this.panes.findLast((pane) => x * this.ratio >= pane.x) ?? this.panes[0];
  }

  // Boxes under a pixel of the page's picture, the nearest first; a label stands for its box.
  boxesAt(x, y) {
    const named = this.placedLabels.find(({ rectangle }) => overlaps(rectangle, [x, y, x, y]));
    if (named) return [named.box];
    const pane = this.paneAt(x);
    const ray = this.camera.ray(x - pane.x / this.ratio, y);
    const candidates = this.model.shown.filter((box) => pane.isTruth === null || box.isTruth === pane.isTruth);
    const met = candidates.map((box) => [rayMeetsBox(ray, box.local), box]).filter(([distance]) => distance < Infinity);
    return met.sort((a, b) => a[0] - b[0]).map(([, box]) => box);
  }

  clicked(x, y) {
    const boxes = this.boxesAt(x, y);
    this.choose(boxes.length ? boxes[(boxes.indexOf(this.state.chosen) + 1) % boxes.length] : null);
  }

  // Where a box's centre is on the picture, in pixels of the page; for those who drive the page from outside.
  screen(box) {
    return this.camera.project(box.local.slice(0, 3)).slice(0, 2);
  }
}

const overlaps = (a, b) => a[0] < b[2] + 2 && b[0] < a[2] + 2 && a[1] < b[3] + 1 && b[1] < a[3] + 1;

// A colour of the style sheet as the browser resolves it, 0 to 1.
function rgbOf(variable) {
  const probe = (rgbOf.probe ??= document.body.appendChild(element("i", { hidden: true })));
  probe.style.color = `var(${variable})`;
  return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map((v) => v / 255);
}

function decoded(id, Type) {
  const text = byId(id).textContent;
  const bytes = Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  byId(id).remove();
  return new Type(bytes.buffer);
}

function start() {
  const data = JSON.parse(byId("scene-data").textContent);
  const [places, colors] = [decoded("places", Uint16Array), decoded("colors", Uint8Array)];
  const model = new Model(data, places);
  const { count, heights, origin, step } = data.points;
  try {
    const scene = new Scene(byId("scene"), {
      places, colors, count, ramp: data.ramp,
      extent: step.map((length) => length * 65535),
      heights: heights.map((z) => z - origin[2]),
    });
    window.viewer = new Viewer(model, scene);
  } catch (error) {
    document.documentElement.classList.add("plain");
    throw error;
  }
}

start();
