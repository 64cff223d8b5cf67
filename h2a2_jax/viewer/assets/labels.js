// Names of boxes over the picture, the dimensions of the chosen box, and where they find room.

const MOST_LABELS = 150;
// Along the box's x, y and z, with the bits of its corners.
const DIMENSIONS = [["width", 1], ["depth", 2], ["height", 4]];
const LABEL_GAP = 5; // pixels

const overlaps = (a, b) => a[0] < b[2] + 2 && b[0] < a[2] + 2 && a[1] < b[3] + 1 && b[1] < a[3] + 1;

class Labels {
  constructor(model, camera) {
    Object.assign(this, { model, camera, names: new Map(), placed: [], edges: null });
    this.dimensions = DIMENSIONS.map(() => byId("labels").appendChild(element("span", { className: "dimension" })));
  }

  update() {
    const { state, shown } = this.model;
    const wanted = new Set(state.names ? shown.slice(0, 4 * MOST_LABELS) : state.chosen ? [state.chosen] : []);
    for (const [box, label] of this.names) if (!wanted.has(box)) label.remove(), this.names.delete(box);
    for (const box of wanted) {
      if (!this.names.has(box)) this.names.set(box, byId("labels").appendChild(element("span")));
      const label = this.names.get(box);
      label.classList.toggle("truth", box.isTruth);
      label.classList.toggle("chosen", box === state.chosen);
      label.style.setProperty("--own", cssColor(this.model.colorOf(box)));
      label.replaceChildren(nameOf(box));
      if (!box.isTruth) label.append(element("b", { textContent: box.score.toFixed(2) }));
    }
    this.edges = null;
    this.dimensions.forEach((label, axis) => {
      label.style.visibility = "hidden";
      if (state.chosen) label.textContent = `${DIMENSIONS[axis][0]} ${metres(state.chosen.local[3 + axis])}`;
    });
    // Measured at once: reading a size after writing another makes the browser lay out the page again.
    const labels = [...this.names.values(), ...this.dimensions];
    for (const label of labels) label.size = [label.offsetWidth, label.offsetHeight];
  }

  // The chosen box's labels first, then by score; one that would cover another is left out. `left` gives the pixel at
  // which the pane of a box begins.
  place(left) {
    this.placed = [];
    const { chosen } = this.model.state;
    const boxes = [...this.names.keys()];
    boxes.sort((a, b) => (b === chosen) - (a === chosen) || (b.score ?? 0) - (a.score ?? 0));
    if (chosen && boxes[0] === chosen) this.put(boxes.shift(), this.nameRectangles(chosen, left(chosen)));
    if (chosen) this.placeDimensions(chosen, left(chosen));
    for (const box of boxes) this.put(box, this.nameRectangles(box, left(box)));
  }

  // Shows a label in the first of its rectangles that is free.
  put(box, rectangles, label = this.names.get(box)) {
    const isFree = (one) => !this.placed.some(({ rectangle }) => overlaps(one, rectangle));
    const free = this.placed.length < MOST_LABELS && rectangles.find(isFree);
    label.style.visibility = free ? "visible" : "hidden";
    if (!free) return;
    this.placed.push({ box, rectangle: free });
    label.style.transform = `translate(${free[0].toFixed(1)}px, ${free[1].toFixed(1)}px)`;
  }

  isSeen([x, y, depth]) {
    const { camera } = this;
    return (camera.parallel || depth >= 0.05) && x >= 0 && x <= camera.width && y >= 0 && y <= camera.height;
  }

  nameRectangles(box, left) {
    const [width, height] = this.names.get(box).size;
    const place = this.camera.project([box.local[0], box.local[1], box.local[2] + box.local[5] / 2]);
    if (!this.isSeen(place)) return [];
    const [x, y] = [place[0] + left - width / 2, place[1] - 3];
    return [[x, y - height, x + width, y]];
  }

  placeDimensions(box, left) {
    const corners = boxCorners(box.local);
    const seen = corners.map((corner) => this.camera.project(corner));
    this.edges = dimensionEdges(this.camera, seen, this.edges);
    const centre = this.camera.project(box.local.slice(0, 3));
    // Edges seen end on come last: they have no direction in the picture.
    const length = ([a, b]) => Math.hypot(seen[a][0] - seen[b][0], seen[a][1] - seen[b][1]);
    const order = this.edges.map((edge, axis) => [axis, length(edge)]);
    for (const [axis] of order.sort((a, b) => b[1] - a[1])) {
      const [a, b] = this.edges[axis];
      const middle = this.camera.project(add(corners[a], subtract(corners[b], corners[a]), 0.5));
      const label = this.dimensions[axis];
      this.put(box, this.isSeen(middle) ? outside(middle, centre, label.size, left) : [], label);
    }
  }
}

// Rectangles of a size that touch a place on the picture, on the side away from a centre; further ones after nearer ones.
function outside(place, centre, [width, height], left) {
  const away = [place[0] - centre[0], place[1] - centre[1]];
  const length = Math.hypot(...away);
  const [x, y] = length < 1 ? [0, 1] : away.map((v) => v / length);
  const side = (v) => Math.max(-1, Math.min(1, 1.5 * v));
  const middle = [place[0] + left + (side(x) * width) / 2, place[1] + (side(y) * height) / 2];
  return [[0, 0], [0, 1], [0, -1], [1, 0], [0, 2], [0, -2], [1, 1], [1, -1]].map(([further, lower]) => {
    const reach = LABEL_GAP + further * height;
    const [cx, cy] = [middle[0] + x * reach, middle[1] + y * reach + lower * (height + 2)];
    return [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2];
  });
}

// The edges of a box on which its dimensions are written, for each axis a pair of corners: the horizontal edges that are
// nearest to the eye, and the rightmost upright one. An edge is kept until another is clearly better, so that labels do
// not jump while the scan is turned. `seen` are the corners' pixels and distances.
function dimensionEdges(camera, seen, before) {
  const level = camera.pitch < 0 ? 4 : 0;
  return DIMENSIONS.map(([, bit], axis) => {
    const rows = [...Array(8).keys()].filter((i) => !(i & bit) && (bit === 4 || (i & 4) === level));
    const sum = (i, k) => seen[i][k] + seen[i | bit][k];
    const worth = (i) => (bit === 4 ? sum(i, 0) : -sum(i, 2) / camera.metresPerPixel);
    const kept = before?.[axis][0];
    const best = rows.reduce((a, b) => (worth(b) > worth(a) ? b : a));
    const row = rows.includes(kept) && worth(best) - worth(kept) < 12 ? kept : best;
    return [row, row | bit];
  });
}
