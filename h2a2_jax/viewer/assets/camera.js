// The camera: orbits a target, z up. Vectors are [x, y, z] in metres relative to the scan's lowest corner (float64).

const FIELD_OF_VIEW = (40 * Math.PI) / 180;
const HALF_HEIGHT = Math.tan(FIELD_OF_VIEW / 2); // of the picture, at distance 1
const STRAIGHT_UP = Math.PI / 2;

const VIEWS = {
  room: { yaw: -1.99, pitch: 0.88, parallel: false },
  top: { yaw: -Math.PI / 2, pitch: STRAIGHT_UP, parallel: true },
  front: { yaw: -Math.PI / 2, pitch: 0, parallel: true },
  side: { yaw: 0, pitch: 0, parallel: true },
};

const add = (a, b, scale = 1) => a.map((value, i) => value + scale * b[i]);
const subtract = (a, b) => a.map((value, i) => value - b[i]);
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];

class Camera {
  constructor(low, high) {
    this.low = low;
    this.high = high;
    this.width = this.height = 1; // of the picture, in pixels
    this.look("room");
  }

  // Right, up and towards the eye; written out, so that looking straight down is no special case.
  get axes() {
    const [sy, cy, sp, cp] = [Math.sin(this.yaw), Math.cos(this.yaw), Math.sin(this.pitch), Math.cos(this.pitch)];
    return { right: [-sy, cy, 0], up: [-sp * cy, -sp * sy, cp], towards: [cp * cy, cp * sy, sp] };
  }

  get eye() {
    return add(this.target, this.axes.towards, this.distance);
  }

  get radius() {
    return Math.max(Math.hypot(...subtract(this.high, this.low)) / 2, 0.05);
  }

  // Metres at the target per pixel.
  get metresPerPixel() {
    return (2 * this.distance * HALF_HEIGHT) / this.height;
  }

  look(name) {
    Object.assign(this, VIEWS[name]);
    this.fit();
  }

  // The nearest place from which everything is seen, in the present direction.
  fit() {
    this.target = this.low.map((low, i) => (low + this.high[i]) / 2);
    const wide = HALF_HEIGHT * Math.min(this.width / this.height, 4);
    for (let step = 0; step < 4; step++) {
      const { right, up, towards } = this.axes;
      const places = this.corners().map((corner) => subtract(corner, this.target));
      const reach = (place, axis, half) => Math.abs(dot(place, axis)) / half + (this.parallel ? 0 : dot(place, towards));
      this.distance = 1.04 * Math.max(...places.map((p) => Math.max(reach(p, right, wide), reach(p, up, HALF_HEIGHT))));
      // In perspective the middle of the box is not the middle of its picture.
      const seen = this.corners().map((corner) => this.project(corner));
      const off = [0, 1].map((k) => (Math.min(...seen.map((s) => s[k])) + Math.max(...seen.map((s) => s[k]))) / 2);
      this.pan(this.width / 2 - off[0], this.height / 2 - off[1]);
    }
  }

  corners() {
    return [...Array(8).keys()].map((i) => [0, 1, 2].map((k) => (i & (1 << k) ? this.high[k] : this.low[k])));
  }

  turn(dx, dy) {
    this.yaw -= dx;
    this.pitch = Math.max(-STRAIGHT_UP, Math.min(STRAIGHT_UP, this.pitch + dy));
  }

  // Moves what is seen by pixels.
  pan(dx, dy) {
    const { right, up } = this.axes;
    const scale = this.metresPerPixel;
    this.target = add(add(this.target, right, -dx * scale), up, dy * scale);
  }

  // Zooms so that what is under (x, y) stays there.
  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const before = this.distance;
    this.distance = Math.max(0.1, Math.min(20 * this.radius + 1, before * factor));
    const kept = 1 - this.distance / before;
    const { right, up } = this.axes;
    const scale = (2 * before * HALF_HEIGHT) / this.height;
    this.target = add(add(this.target, right, kept * (x - this.width / 2) * scale), up, kept * (this.height / 2 - y) * scale);
  }

  // Depth range that holds the whole scan, as tight as float depth wants it.
  get range() {
    const far = this.distance + 4 * this.radius + 1;
    return [this.parallel ? -far : Math.max(this.distance / 50, 0.02), far];
  }

  // Clip coordinates from metres, column by column as WebGL wants it.
  get matrix() {
    const { right, up, towards } = this.axes;
    const eye = this.eye;
    const aspect = this.width / this.height;
    const [near, far] = this.range;
    const rows = [right.map((v) => v / aspect), up].map((axis) => {
      const size = this.parallel ? this.distance * HALF_HEIGHT : HALF_HEIGHT;
      return [...axis.map((v) => v / size), -dot(axis, eye) / size];
    });
    const depth = [...towards.map((v) => -v), dot(towards, eye)]; // distance in front of the eye
    const [a, b] = this.parallel
      ? [2 / (far - near), -(far + near) / (far - near)]
      : [(far + near) / (far - near), (-2 * far * near) / (far - near)];
    rows.push(depth.map((v, i) => a * v + (i === 3 ? b : 0)));
    rows.push(this.parallel ? [0, 0, 0, 1] : depth);
    return new Float32Array([0, 1, 2, 3].flatMap((column) => rows.map((row) => row[column])));
  }

  // Pixel and distance in front of the eye of a place; the pixel means nothing behind the eye.
  project(place) {
    const { right, up, towards } = this.axes;
    const offset = subtract(place, this.eye);
    const depth = -dot(offset, towards);
    const size = (this.parallel ? this.distance : Math.max(depth, 1e-6)) * HALF_HEIGHT;
    const scale = this.height / 2 / size;
    return [this.width / 2 + dot(offset, right) * scale, this.height / 2 - dot(offset, up) * scale, depth];
  }

  // The line of sight through a pixel.
  ray(x, y) {
    const { right, up, towards } = this.axes;
    const across = ((2 * x - this.width) / this.height) * HALF_HEIGHT;
    const along = (1 - (2 * y) / this.height) * HALF_HEIGHT;
    if (!this.parallel) {
      return { origin: this.eye, direction: add(add(towards.map((v) => -v), right, across), up, along) };
    }
    const far = add(this.target, towards, 4 * this.radius + this.distance);
    const origin = add(add(far, right, across * this.distance), up, along * this.distance);
    return { origin, direction: towards.map((v) => -v) };
  }
}

// Boxes are [x, y, z, dx, dy, dz, yaw]. Corner i has bit 1 for +x, 2 for +y, 4 for +z, along the box's own axes.
function boxCorners(box) {
  const [c, s] = [Math.cos(box[6]), Math.sin(box[6])];
  return [...Array(8).keys()].map((i) => {
    const [x, y, z] = [0, 1, 2].map((k) => ((i & (1 << k) ? 1 : -1) * box[3 + k]) / 2);
    return [box[0] + x * c - y * s, box[1] + x * s + y * c, box[2] + z];
  });
}

// Into the box's own axes, about its centre.
function intoBox(box, [x, y, z]) {
  const [c, s] = [Math.cos(box[6]), Math.sin(box[6])];
  return [x * c + y * s, y * c - x * s, z];
}

// Distances along a ray to where it enters a box and where it leaves it; null where it misses.
function rayMeetsBox({ origin, direction }, box) {
  const start = intoBox(box, subtract(origin, box.slice(0, 3)));
  const along = intoBox(box, direction);
  let [enters, leaves] = [-Infinity, Infinity];
  for (let k = 0; k < 3; k++) {
    const half = Math.max(box[3 + k] / 2, 0.01);
    const [first, second] = [-half, half].map((side) => (side - start[k]) / (along[k] || 1e-12));
    enters = Math.max(enters, Math.min(first, second));
    leaves = Math.min(leaves, Math.max(first, second));
  }
  return enters <= leaves && leaves > 0 ? [Math.max(enters, 0), leaves] : null;
}
