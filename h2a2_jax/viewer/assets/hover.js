// The box under the mouse: its outline is stronger, and a tip says what it is. Fingers have no hover.

class Hover {
  constructor(viewer) {
    Object.assign(this, { viewer, box: undefined, tip: byId("tip") });
  }

  // Returns true if another box is under the mouse, which is at a pixel of the picture or nowhere (null). Called before
  // each frame too: the camera or the boxes may have moved under a mouse that rests.
  update(place) {
    const { viewer } = this;
    const box = (place && !viewer.measure.active && viewer.boxesAt(...place)[0]) || null;
    viewer.canvas.classList.toggle("over", Boolean(box));
    if (box) this.move(place);
    if (box === this.box) return false;
    this.box = box;
    this.tip.hidden = !box || box === viewer.state.chosen; // whose dimensions stand at its edges
    const { scene, model } = viewer;
    scene.setShapes("hover", box ? boxEdges(box, model.colorOf(box), box === model.state.chosen, 1) : [], []);
    if (this.tip.hidden) return true;
    const size = box.local.slice(3, 6);
    const score = box.isTruth ? "ground truth" : `score ${box.score.toFixed(2)}`;
    const lines = [score, `${size.map((v) => v.toFixed(2)).join(" × ")} m`, `${volume(box).toFixed(3)} m³`];
    this.tip.replaceChildren(
      element("strong", {}, nameOf(box)), ...lines.map((textContent) => element("span", { textContent })),
    );
    this.tip.style.setProperty("--own", cssColor(model.colorOf(box)));
    this.size = [this.tip.offsetWidth, this.tip.offsetHeight];
    this.move(place);
    return true;
  }

  // Beside the mouse, on the side where there is room.
  move([x, y]) {
    if (!this.size || this.tip.hidden) return;
    const [width, height] = this.size;
    const { clientWidth, clientHeight } = byId("stage");
    const left = x + 16 + width > clientWidth ? Math.max(4, x - 12 - width) : x + 16;
    const top = y + 18 + height > clientHeight ? Math.max(4, y - 12 - height) : y + 18;
    this.tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
  }
}
