// Measuring: two clicks on points of the scan draw a line with its length, and its horizontal and vertical parts.

const MOUSE_REACH = 12; // pixels within which a click finds a point
const FINGER_REACH = 28;
const HINTS = ["Choose a point", "Choose a second point", "Choose a point to measure anew"];

class Measure {
  constructor(viewer) {
    Object.assign(this, { viewer, active: false, ends: [], preview: null, pane: 0 });
    this.marks = [0, 1].map(() => byId("measure").appendChild(element("i", { hidden: true })));
    this.label = byId("measure").appendChild(element("span", { hidden: true }));
    byId("measuring").addEventListener("click", () => this.toggle());
    byId("measuring-end").addEventListener("click", () => this.toggle(false));
  }

  toggle(active = !this.active) {
    Object.assign(this, { active, ends: [], preview: null });
    byId("measuring").ariaPressed = String(active);
    byId("hint").hidden = !active;
    document.documentElement.classList.toggle("measures", active);
    this.say(HINTS[0]);
    this.update();
  }

  // Shows a hint; the result stands at the line, and is spoken.
  say(words, result = "") {
    byId("hint-words").textContent = words;
    byId("measured").textContent = result;
  }

  click(x, y, isTouch) {
    const point = this.viewer.pointAt(x, y, isTouch ? FINGER_REACH : MOUSE_REACH);
    if (!point) return this.say("No point of the scan there: choose a point");
    if (this.ends.length === 2) this.ends = [];
    if (!this.ends.length) this.pane = this.viewer.panes.indexOf(this.viewer.paneAt(x));
    this.ends.push(point);
    this.preview = null;
    this.say(HINTS[this.ends.length], this.ends.length === 2 ? this.words().join(", ") : "");
    this.update();
  }

  // Marks the point that a click would take, with the mouse at a pixel of the picture or nowhere (null). Returns true if
  // it is another than before.
  hover(place) {
    const wanted = this.active && place && this.ends.length < 2;
    const point = wanted ? this.viewer.pointAt(...place, MOUSE_REACH) : null;
    if (String(point) === String(this.preview)) return false;
    this.preview = point;
    this.setShapes();
    return true;
  }

  get shown() {
    return this.ends.length < 2 && this.preview ? [...this.ends, this.preview] : this.ends;
  }

  words() {
    const [from, to] = this.shown;
    const [x, y, z] = subtract(to, from);
    return [metres(Math.hypot(x, y, z)), `horizontal ${metres(Math.hypot(x, y))}`, `vertical ${metres(Math.abs(z))}`];
  }

  update() {
    this.setShapes();
    this.viewer.redraw();
  }

  setShapes() {
    const [from, to] = this.shown;
    const line = (a, b, width, dashed) => [...a, ...b, ...rgbOf("--measure"), 1, width, dashed];
    const lines = [];
    if (to) {
      const corner = from[2] < to[2] ? [to[0], to[1], from[2]] : [from[0], from[1], to[2]];
      const [lower, upper] = from[2] < to[2] ? [from, to] : [to, from];
      lines.push(line(lower, corner, 2.2, 1), line(corner, upper, 2.2, 1), line(from, to, 3, 0));
      const [length, ...parts] = this.words();
      const rest = parts.map((textContent) => element("small", { textContent }));
      this.label.replaceChildren(element("b", { textContent: length }), ...rest);
      this.label.hidden = false;
      this.size = [this.label.offsetWidth, this.label.offsetHeight];
    }
    this.label.hidden = !to;
    this.viewer.scene.setShapes("measure", lines, []);
  }

  // Called after each frame: moves marks and label to where their points are.
  moveLabels() {
    const { camera, panes, ratio } = this.viewer;
    const left = (panes[this.pane] ?? panes[0]).x / ratio;
    const { shown } = this;
    const inside = ([x, y, depth]) =>
      (camera.parallel || depth > 0.02) && x >= 0 && y >= 0 && x <= camera.width && y <= camera.height;
    this.marks.forEach((mark, i) => {
      const seen = shown[i] && camera.project(shown[i]);
      mark.hidden = !seen || !inside(seen);
      mark.classList.toggle("preview", i >= this.ends.length);
      if (seen) mark.style.transform = `translate(${seen[0] + left}px, ${seen[1]}px)`;
    });
    if (shown.length < 2) return;
    const middle = camera.project(add(shown[0], subtract(shown[1], shown[0]), 0.5));
    this.label.hidden = !inside(middle);
    const [width, height] = this.size;
    const x = Math.max(2, Math.min(camera.width - width - 2, middle[0] - width / 2)) + left;
    const y = Math.max(2, Math.min(camera.height - height - 2, middle[1] - height - 10));
    this.label.style.transform = `translate(${x.toFixed(1)}px, ${y.toFixed(1)}px)`;
  }
}
