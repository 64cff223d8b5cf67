// What is shown, how the user moves in it, and when it is drawn.

const MARKS = ["hover", "dimensions", "measure"]; // shapes that any pane shows over its boxes

class Viewer {
  constructor(model, scene) {
    Object.assign(this, { model, scene, canvas: scene.canvas, frames: 0, mouse: null, hovering: null });
    this.camera = new Camera(model.low, model.high);
    this.labels = new Labels(model, this.camera);
    this.hover = new Hover(this);
    this.measure = new Measure(this);
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
    this.labels.update();
    this.hover.box = undefined; // to be outlined anew: its colour may be another
    this.measure.setShapes();
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
    if (!both) return [{ camera: this.camera, x: 0, width, shapes: ["floor", "truth", "found", ...MARKS], isTruth: null }];
    return [
      { camera: this.camera, x: 0, width, shapes: ["floor", "found", ...MARKS], isTruth: false, caption: "Detections" },
      { camera: this.camera, x: width, width, shapes: ["floor", "truth", ...MARKS], isTruth: true, caption: "Ground truth" },
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
      const color = (box) => this.model.colorOf(box);
      const lines = own.flatMap((box) => boxEdges(box, color(box), box === this.state.chosen));
      this.scene.setShapes(name, lines, own.flatMap((box) => boxFaces(box, color(box), this.opacity(box))));
    }
    this.scene.setShapes("floor", this.state.floor ? gridLines(this.model, rgbOf("--quiet")) : [], []);
  }

  opacity(box) {
    return box === this.state.chosen ? 0.28 : box.isTruth ? 0 : 0.05;
  }

  redraw() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      this.draw();
    });
  }

  // Which points are drawn, and how large: height and distance from the eye at which they are cut off, diameter (m),
  // largest radius on the picture (pixels).
  get pointLook() {
    const { state, model, camera } = this;
    return {
      cut: state.cut >= 1 ? Infinity : model.cutHeight() - model.origin[2],
      front: state.front > 0 ? camera.distance + (1.6 * state.front - 1) * camera.radius : -1e9,
      pointSize: state.pointSize * 1.4 * model.data.points.spacing,
      mostRadius: MOST_PIXELS / 2 / this.ratio,
    };
  }

  draw() {
    const { state } = this;
    const dark = getComputedStyle(byId("panel")).color.match(/\d+/)[0] > 127;
    this.updateHover();
    const { panes, ratio } = this;
    this.labels.place((box) => (panes.find(({ isTruth }) => isTruth === box.isTruth)?.x ?? 0) / ratio);
    this.scene.setShapes("dimensions", this.dimensionLines(), []);
    this.scene.draw(panes, {
      ...this.pointLook,
      background: rgbOf("--stage"),
      halo: dark ? [0, 0, 0] : [1, 1, 1],
      byHeight: state.byHeight,
      shading: state.shading,
      ratio,
    });
    this.measure.moveLabels();
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

  // The edges of the chosen box that carry its dimensions.
  dimensionLines() {
    const { chosen } = this.state;
    if (!chosen) return [];
    const corners = boxCorners(chosen.local);
    return this.labels.edges.map(([a, b]) => [...corners[a], ...corners[b], ...rgbOf("--accent"), 1, 4, 0]);
  }

  // Boxes under a pixel of the page's picture, the one that is meant first; a label stands for its box.
  boxesAt(x, y) {
    const named = this.labels.placed.find(({ rectangle }) => overlaps(rectangle, [x, y, x, y]));
    if (named) return [named.box];
    const pane = this.paneAt(x);
    const candidates = this.model.shown.filter((box) => pane.isTruth === null || box.isTruth === pane.isTruth);
    return boxesUnder(this.camera, candidates, x - pane.x / this.ratio, y);
  }

  // The point of the scan at a pixel of the page's picture or within `reach` pixels of it; null for none.
  pointAt(x, y, reach) {
    const { places, data } = this.model;
    const left = this.paneAt(x).x / this.ratio;
    return pointUnder(this.camera, places, data.points.step, this.pointLook, x - left, y, reach);
  }

  // The mouse rests at a pixel of the picture, or nowhere (null); the scan is drawn anew only where this changes it.
  hovered(place) {
    this.mouse = place;
    this.hovering ??= requestAnimationFrame(() => {
      this.hovering = null;
      if (this.updateHover()) this.redraw();
    });
  }

  updateHover() {
    const [other, further] = [this.hover.update(this.mouse), this.measure.hover(this.mouse)];
    return other || further;
  }

  clicked(x, y, isTouch) {
    if (this.measure.active) return this.measure.click(x, y, isTouch);
    const boxes = this.boxesAt(x, y);
    this.choose(boxes.length ? boxes[(boxes.indexOf(this.state.chosen) + 1) % boxes.length] : null);
  }

  // Where a box's centre is on the picture, in pixels of the page; for those who drive the page from outside.
  screen(box) {
    return this.camera.project(box.local.slice(0, 3)).slice(0, 2);
  }
}

// A colour of the style sheet as the browser resolves it, 0 to 1.
function rgbOf(variable) {
  const probe = (rgbOf.probe ??= document.body.appendChild(element("i", { hidden: true })));
  probe.style.color = `var(${variable})`;
  return getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map((v) => v / 255);
}

// Written out: `Uint8Array.from` with a function takes ten times as long.
function bytesOf(binary) {
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

function decoded(id, Type) {
  const text = byId(id).textContent;
  const bytes = Uint8Array.fromBase64?.(text) ?? bytesOf(atob(text));
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
