// The page beside the picture: it shows the state and changes it, and knows nothing of WebGL.

const byId = (id) => document.getElementById(id);
const cssColor = (color) => `rgb(${color.map((v) => Math.round(255 * v)).join(" ")})`;
const metres = (value) => `${value.toFixed(2)} m`;
const plural = (count, one, more = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : more}`;

// Text is always set as text: names come from files.
function element(tag, { color, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  if (color) made.style.setProperty("--own", cssColor(color));
  made.append(...children);
  return made;
}

// A class name, whose direction of writing does not reach the text beside it.
const nameOf = ({ name }) => element("bdi", { textContent: name });

class Panel {
  // `change` is called with a part of the state, `choose` with a box or null, `look` with the name of a view.
  constructor(model, actions) {
    Object.assign(this, { model, actions });
    document.documentElement.classList.toggle("without-truth", !model.truth);
    byId("notes").append(...model.data.notes.map((note) => element("p", { textContent: note })));
    byId("overlap").append(
      ...model.data.iouThresholds.map((iou, i) => element("option", { value: i, textContent: `IoU > ${iou}` })),
    );
    byId("grid-spacing").textContent = `Grid of ${model.gridSpacing} m`;
    byId("point-color-row").hidden = !model.data.points.colored;
    this.classRows = model.data.classes.map((entry, label) => this.classRow(entry, label));
    const occurring = new Set(model.boxes.map((box) => box.label));
    byId("classes").append(...this.classRows.filter((row, label) => occurring.has(label)).map((row) => row.item));
    const absent = model.data.classes.filter((entry, label) => !occurring.has(label)).map(({ name }) => name);
    const names = absent.flatMap((name, i) => [i ? ", " : "No box of ", nameOf({ name })]);
    byId("absent").replaceChildren(...names, absent.length ? "." : "");
    this.bind();
  }

  classRow({ name, color }, label) {
    const input = element("input", { type: "checkbox" });
    const output = element("output");
    input.addEventListener("change", () => this.hide([label], !input.checked));
    const words = [input, element("i", { color }), element("span", {}, nameOf({ name })), output];
    const item = element("li", {}, element("label", { className: "check" }, ...words));
    return { item, input, output };
  }

  hide(labels, hidden) {
    const next = new Set(this.model.state.hidden);
    labels.forEach((label) => (hidden ? next.add(label) : next.delete(label)));
    this.actions.change({ hidden: next });
  }

  bind() {
    const { change, look } = this.actions;
    const number = (id, set) => byId(id).addEventListener("input", () => change(set(Number(byId(id).value))));
    const check = (id, key) => byId(id).addEventListener("change", () => change({ [key]: byId(id).checked }));
    const select = (id, set) => byId(id).addEventListener("change", () => change(set(byId(id).value)));
    number("score", (score) => ({ score }));
    number("point-size", (pointSize) => ({ pointSize }));
    number("cut", (step) => ({ cut: step / 1000 }));
    number("front", (step) => ({ front: step / 100 }));
    for (const key of ["prediction", "truth", "beside", "names", "shading", "floor"]) check(key, key);
    select("box-color", (boxColor) => ({ boxColor }));
    select("overlap", (value) => ({ overlap: Number(value) }));
    select("point-color", (value) => ({ byHeight: value === "height" }));
    select("theme", (theme) => ({ theme }));
    const labels = [...this.classRows.keys()];
    byId("copy").addEventListener("click", () => copyTable(this.model));
    byId("table-close").addEventListener("click", () => byId("table").close());
    byId("below").addEventListener("click", () => this.showBelow());
    byId("all").addEventListener("click", () => this.hide(labels, false));
    byId("none").addEventListener("click", () => this.hide(labels, true));
    for (const button of byId("views").children) button.addEventListener("click", () => look(button.dataset.view));
  }

  // Lowers the score to that of the worst box, a step of the slider below it.
  showBelow() {
    const { belowScore } = this.model;
    if (!belowScore.length) return;
    this.actions.change({ score: Math.floor(100 * Math.min(...belowScore.map((box) => box.score))) / 100 });
  }

  // Shows the state; cheap enough to do on every change.
  update() {
    const { state, data } = this.model;
    byId("score").value = state.score;
    byId("score-value").textContent = state.score.toFixed(2);
    byId("point-size").value = state.pointSize;
    byId("point-size-value").textContent = `× ${state.pointSize.toFixed(1)}`;
    byId("cut").value = Math.round(1000 * state.cut);
    byId("cut-value").textContent = state.cut >= 1 ? "nothing" : `z = ${this.model.cutHeight().toFixed(2)} m`;
    byId("front").value = Math.round(100 * state.front);
    byId("front-value").textContent = state.front > 0 ? `${Math.round(100 * state.front)} %` : "nothing";
    for (const key of ["prediction", "truth", "beside", "names", "shading", "floor"]) byId(key).checked = state[key];
    byId("box-color").value = state.boxColor;
    byId("overlap").value = state.overlap;
    byId("point-color").value = state.byHeight ? "height" : "scan";
    byId("theme").value = state.theme;
    for (const button of byId("views").children) button.ariaPressed = String(button.dataset.view === state.view);
    this.updateClasses();
    this.updateSummary(data);
    this.updateBoxes();
    this.updateSelected();
  }

  updateClasses() {
    const { state, boxes } = this.model;
    this.classRows.forEach(({ input, output }, label) => {
      const own = boxes.filter((box) => box.label === label);
      const found = own.filter((box) => !box.isTruth);
      const above = found.filter((box) => box.score >= state.score);
      const true_ = this.model.truth ? ` · ${own.length - found.length} true` : "";
      input.checked = !state.hidden.has(label);
      output.textContent = `${above.length} of ${found.length}${true_}`;
    });
  }

  updateSummary({ points }) {
    const { shown, boxes, truth } = this.model;
    const found = boxes.filter((box) => !box.isTruth).length;
    const visible = shown.filter((box) => !box.isTruth).length;
    const words = [plural(points.total, "point"), `${visible} of ${plural(found, "detection")} shown`];
    if (truth) words.push(plural(boxes.length - found, "true box", "true boxes"));
    byId("summary").textContent = `${words.join(", ")}.`;
    const below = this.model.belowScore.length;
    byId("below").hidden = !below;
    byId("below").textContent = `${below.toLocaleString("en")} more below ${this.model.state.score.toFixed(2)}: show`;
    if (truth) byId("tally").textContent = this.model.tally();
  }

  updateBoxes() {
    byId("copied").textContent = "";
    byId("copy").disabled = !this.model.shown.length;
    const items = this.model.shown.map((box) => {
      const words = [element("span", {}, nameOf(box)), element("b", { textContent: box.score?.toFixed(2) ?? "true" })];
      const className = box.isTruth ? "truth" : "";
      const button = element("button", { type: "button", className, color: this.model.colorOf(box) }, ...words);
      button.ariaPressed = String(box === this.model.state.chosen);
      button.addEventListener("click", () => this.actions.choose(box));
      button.addEventListener("dblclick", () => this.actions.goTo(box));
      return element("li", {}, button);
    });
    // A list made anew loses the focus: it goes back to the row that had it.
    const list = byId("boxes");
    const focused = [...list.children].findIndex((item) => item.contains(document.activeElement));
    list.replaceChildren(...items);
    items[focused]?.firstChild.focus();
  }

  updateSelected() {
    const box = this.model.state.chosen;
    byId("selected").hidden = !box;
    if (!box) return;
    const numbers = (values) => values.map((v) => v.toFixed(3)).join(", ");
    const rows = [
      ["Centre x, y, z", `${numbers(box.numbers.slice(0, 3))} m`],
      ["Size dx, dy, dz", `${numbers(box.numbers.slice(3, 6))} m`],
      ["Volume", `${volume(box).toFixed(3)} m³`],
      ["Yaw", `${((box.numbers[6] * 180) / Math.PI).toFixed(1)}° (${box.numbers[6].toFixed(3)} rad)`],
      ["Score", box.isTruth ? "ground truth" : box.score.toFixed(3)],
      ["Points inside", this.model.pointsInside(box).toLocaleString("en")],
    ];
    const verdict = this.model.verdict(box);
    const table = element("table", {}, ...rows.map(([name, value]) => tableRow(name, value)));
    if (verdict) table.append(tableRow(box.isTruth ? "Found" : "Hit", verdict.words, verdict.good ? "hit" : "miss"));
    byId("selected").replaceChildren(element("h2", {}, nameOf(box)), table);
  }
}

function tableRow(name, value, className = "") {
  return element("tr", {}, element("th", { textContent: name, scope: "row" }), element("td", { textContent: value, className }));
}
