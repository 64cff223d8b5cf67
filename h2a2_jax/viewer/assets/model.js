// Boxes, the state of the page, and what follows from both; nothing here draws.

const HIT = [0.13, 0.72, 0.36];
const WRONG = [0.9, 0.2, 0.2];
const MISSED = [1.0, 0.55, 0.1];

class Model {
  constructor(data, places) {
    Object.assign(this, { data, places, truth: Boolean(data.truth) });
    const { points, frame, detections, truth } = data;
    this.origin = points.origin;
    this.low = subtract(frame.low, this.origin);
    this.high = subtract(frame.high, this.origin);
    const box = (numbers, row, label, more) => ({
      numbers, row, label, name: data.classes[label].name, ...more,
      // Relative to the scan's lowest corner, where float32 is precise however far away the scan lies.
      local: [...subtract(numbers.slice(0, 3), this.origin), ...numbers.slice(3)],
    });
    const found = detections.boxes.map((numbers, i) =>
      box(numbers, i, detections.labels[i], { score: detections.scores[i], isTruth: false }));
    const there = truth ? truth.boxes.map((numbers, i) => box(numbers, i, truth.labels[i], { isTruth: true })) : [];
    this.boxes = [...found, ...there];
    const height = this.high[2] - this.low[2];
    this.state = {
      score: data.score, hidden: new Set(), prediction: true, truth: true, beside: false, names: true, boxColor: "class",
      overlap: 0, byHeight: !points.colored, pointSize: 1, shading: true, floor: true, view: "room", chosen: null,
      cut: points.ceiling === null ? 1 : (points.ceiling - frame.low[2]) / height, front: 0, theme: "auto",
    };
  }

  isShown(box) {
    const { state } = this;
    if (state.hidden.has(box.label)) return false;
    return box.isTruth ? state.truth : state.prediction && box.score >= state.score;
  }

  get shown() {
    return this.boxes.filter((box) => this.isShown(box));
  }

  // Detections that only the score hides.
  get belowScore() {
    const { state } = this;
    if (!state.prediction) return [];
    return this.boxes.filter((box) => !box.isTruth && box.score < state.score && !state.hidden.has(box.label));
  }

  // Metres between the lines on the floor.
  get gridSpacing() {
    const reach = Math.max(this.high[0] - this.low[0], this.high[1] - this.low[1]);
    return reach > 60 ? 10 ** Math.ceil(Math.log10(reach / 60)) : 1;
  }

  // The height above which points are cut off, in the scan's frame.
  cutHeight() {
    return this.origin[2] + this.low[2] + this.state.cut * (this.high[2] - this.low[2]);
  }

  // Pairs up hits among detections of the present score; to be called when the score or the overlap changes.
  match() {
    const rows = this.data.detections.hits[this.state.overlap];
    const there = this.boxes.filter((box) => box.isTruth);
    const hits = this.boxes.filter((box) => !box.isTruth && box.score >= this.state.score && rows[box.row] >= 0);
    this.partners = new Map(hits.flatMap((box) => [[box, there[rows[box.row]]], [there[rows[box.row]], box]]));
  }

  // The box on the other side of a hit; undefined for none.
  partner(box) {
    return this.partners.get(box);
  }

  verdict(box) {
    if (!this.truth) return null;
    const partner = this.partner(box);
    const iou = (found) => this.data.detections.iou[found.row].toFixed(2);
    if (box.isTruth) return partner
      ? { good: true, words: `yes, score ${partner.score.toFixed(2)}, IoU ${iou(partner)}` }
      : { good: false, words: `not at score ${this.state.score.toFixed(2)} or above` };
    return partner ? { good: true, words: `yes, IoU ${iou(box)}` } : { good: false, words: `no, best IoU ${iou(box)}` };
  }

  tally() {
    const classes = (box) => !this.state.hidden.has(box.label);
    const found = this.boxes.filter((box) => !box.isTruth && box.score >= this.state.score && classes(box));
    const hits = found.filter((box) => this.partner(box)).length;
    const there = this.boxes.filter((box) => box.isTruth && classes(box)).length;
    return `${hits} of ${plural(there, "true box", "true boxes")} found, ${found.length - hits} of ${plural(found.length, "detection")} hit none.`;
  }

  colorOf(box) {
    if (this.state.boxColor === "class" || !this.truth) return this.data.classes[box.label].color;
    if (this.partner(box)) return HIT;
    return box.isTruth ? MISSED : WRONG;
  }

  pointsInside({ local }) {
    const { step } = this.data.points;
    const half = local.slice(3, 6).map((size) => size / 2);
    const [c, s] = [Math.cos(local[6]), Math.sin(local[6])];
    let count = 0;
    for (let i = 0; i < this.places.length; i += 3) {
      const z = this.places[i + 2] * step[2] - local[2];
      if (Math.abs(z) > half[2]) continue;
      const [x, y] = [this.places[i] * step[0] - local[0], this.places[i + 1] * step[1] - local[1]];
      if (Math.abs(x * c + y * s) <= half[0] && Math.abs(y * c - x * s) <= half[1]) count++;
    }
    return count;
  }
}
