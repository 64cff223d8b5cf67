// How mouse, fingers and keys move the camera, choose boxes and measure.

const STILL = { mouse: 4, pen: 6, touch: 10 }; // pixels that a click may move

function bindPointers(viewer) {
  const { canvas, camera } = viewer;
  const fingers = new Map();
  let travelled = 0;
  const spread = () => {
    const [a, b] = [...fingers.values()];
    return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, apart: Math.max(Math.hypot(a.x - b.x, a.y - b.y), 1) };
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    canvas.classList.add("dragged");
    if (!fingers.size) travelled = 0;
    fingers.set(event.pointerId, { x: event.offsetX, y: event.offsetY, button: event.button });
  });
  canvas.addEventListener("pointermove", (event) => {
    const finger = fingers.get(event.pointerId);
    if (!finger) {
      if (event.pointerType !== "touch" && !fingers.size) viewer.hovered([event.offsetX, event.offsetY]);
      return;
    }
    const before = fingers.size === 2 ? spread() : null;
    const [dx, dy] = [event.offsetX - finger.x, event.offsetY - finger.y];
    Object.assign(finger, { x: event.offsetX, y: event.offsetY });
    travelled += Math.abs(dx) + Math.abs(dy);
    if (travelled < STILL[event.pointerType]) return;
    viewer.hovered(null);
    if (before) {
      const after = spread();
      camera.pan(after.x - before.x, after.y - before.y);
      camera.zoom(before.apart / after.apart, after.x - viewer.paneAt(after.x).x / viewer.ratio, after.y);
    } else if (finger.button || event.shiftKey || event.ctrlKey) camera.pan(dx, dy);
    else camera.turn(dx * 0.006, dy * 0.006);
    viewer.moved();
  });
  const release = (event) => {
    const finger = fingers.get(event.pointerId);
    fingers.delete(event.pointerId);
    if (!fingers.size) canvas.classList.remove("dragged");
    const isClick = event.type === "pointerup" && finger?.button === 0 && travelled < STILL[event.pointerType];
    if (isClick) viewer.clicked(event.offsetX, event.offsetY, event.pointerType === "touch");
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => viewer.hovered(null));
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("dblclick", (event) => {
    if (viewer.measure.active) return;
    const [box] = viewer.boxesAt(event.offsetX, event.offsetY);
    if (box) viewer.choose(box), viewer.goTo(box);
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 30 : 1;
    const x = event.offsetX - viewer.paneAt(event.offsetX).x / viewer.ratio;
    camera.zoom(Math.exp(Math.max(-300, Math.min(300, event.deltaY * lines)) * 0.0015), x, event.offsetY);
    viewer.moved();
  }, { passive: false });
}

function bindKeys(viewer) {
  const { canvas, camera, state } = viewer;
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const others = {
    "+": () => camera.zoom(0.85),
    "=": () => camera.zoom(0.85),
    "-": () => camera.zoom(1 / 0.85),
    f: () => state.chosen && viewer.goTo(state.chosen),
  };
  const choices = {
    n: () => viewer.step(1),
    p: () => viewer.step(-1),
    m: () => viewer.measure.toggle(),
    Escape: () => (viewer.measure.active ? viewer.measure.toggle(false) : viewer.choose(null)),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("table").open) return;
    const { target } = event;
    if (target !== canvas && target !== document.body) {
      // Sliders, lists and buttons keep their own keys.
      if (choices[event.key] && !(target.matches("select, textarea") && event.key !== "Escape")) choices[event.key]();
      return;
    }
    const arrow = arrows[event.key];
    const view = Object.keys(VIEWS)[Number(event.key) - 1];
    if (arrow && event.shiftKey) camera.pan(-40 * arrow[0], -40 * arrow[1]);
    else if (arrow) camera.turn(-0.1 * arrow[0], -0.1 * arrow[1]);
    else if (view) return viewer.look(view);
    else if (choices[event.key]) return choices[event.key]();
    else if (others[event.key]) others[event.key]();
    else return;
    event.preventDefault();
    viewer.moved();
  });
}
