// Lines and faces of boxes and of the floor, as rows for `Scene.setShapes`.

const EDGES = [...Array(8).keys()].flatMap((i) => [1, 2, 4].filter((bit) => !(i & bit)).map((bit) => [i, i | bit]));
const FACES = [[0, 1, 3, 2], [4, 5, 7, 6], [0, 1, 5, 4], [2, 3, 7, 6], [0, 2, 6, 4], [1, 3, 7, 5]];

// `wider` is added to the width of the lines (pixels).
function boxEdges(box, color, chosen, wider = 0) {
  const corners = boxCorners(box.local);
  const width = (box.isTruth ? 1.8 : 2.2) + (chosen ? 1.6 : 0) + wider;
  const look = [...color, 1, width, box.isTruth && !chosen ? 1 : 0];
  const lines = EDGES.map(([a, b]) => [...corners[a], ...corners[b], ...look]);
  // Where yaw points: from the middle of the top to the middle of its +x side.
  const middle = (rows) => rows.reduce((sum, row) => add(sum, corners[row], 1 / rows.length), [0, 0, 0]);
  if (box.local[6] !== 0 || chosen) lines.push([...middle([4, 5, 6, 7]), ...middle([5, 7]), ...look]);
  return lines;
}

function boxFaces(box, color, opacity) {
  if (opacity === 0) return [];
  const corners = boxCorners(box.local);
  return FACES.flatMap(([a, b, c, d]) => [a, b, c, a, c, d].map((row) => [...corners[row], ...color, opacity]));
}

// Lines at whole metres of the scan's frame, on its floor.
function gridLines({ low, high, origin, gridSpacing: every }, color) {
  const look = [...color, 0.35, 1, 0];
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
