// What lies under a pixel: boxes, and points of the scan.

const EDGE_REACH = 5; // pixels from an edge that count as on it
const LEAST_RADIUS = 2.5; // pixels around a point that count as on it

const volume = ({ local }) => local[3] * local[4] * local[5];

// Boxes whose faces or edges are under a pixel of a pane, the one that is meant first: the smallest among the nearest and
// those that overlap it along the line of sight, then the others from near to far.
function boxesUnder(camera, boxes, x, y) {
  const ray = camera.ray(x, y);
  const met = boxes.flatMap((box) => {
    const through = rayMeetsBox(ray, box.local) ?? edgeUnder(camera, box, x, y);
    return through ? [{ box, enters: through[0], leaves: through[1] }] : [];
  });
  met.sort((a, b) => a.enters - b.enters);
  const group = met.filter(({ enters }) => enters <= met[0].leaves).sort((a, b) => volume(a.box) - volume(b.box));
  return [...new Set([...group, ...met])].map(({ box }) => box);
}

// Distance in front of the eye of the edge of a box that is under a pixel, twice; null where none is.
function edgeUnder(camera, box, x, y) {
  const corners = boxCorners(box.local).map((corner) => camera.project(corner));
  if (!camera.parallel && corners.some(([, , depth]) => depth < 0.05)) return null;
  let nearest = null;
  for (const [a, b] of EDGES) {
    const [from, to] = [corners[a], corners[b]];
    const along = [to[0] - from[0], to[1] - from[1]];
    const share = ((x - from[0]) * along[0] + (y - from[1]) * along[1]) / (along[0] ** 2 + along[1] ** 2 || 1);
    const at = Math.max(0, Math.min(1, share));
    if (Math.hypot(from[0] + at * along[0] - x, from[1] + at * along[1] - y) > EDGE_REACH) continue;
    const depth = from[2] + at * (to[2] - from[2]);
    if (nearest === null || depth < nearest) nearest = depth;
  }
  if (nearest === null) return null;
  // Rays begin at the eye in perspective, and far in front of it otherwise.
  const start = camera.parallel ? 4 * camera.radius : 0;
  return [start + nearest, start + nearest];
}

// The drawn point under a pixel of a pane, the nearest of several; where none covers the pixel, the closest on the
// picture within `reach` pixels. Returns its place (m), or null.
// `places` are in steps of the lengths `step`; `look` has cut, front, pointSize (m) and mostRadius (pixels).
function pointUnder(camera, places, step, look, x, y, reach) {
  const { right, up, towards } = camera.axes;
  const { eye, parallel } = camera;
  const [rx, ry, rz] = right.map((v, k) => v * step[k]);
  const [ux, uy, uz] = up.map((v, k) => v * step[k]);
  const [dx, dy, dz] = towards.map((v, k) => -v * step[k]);
  const [r0, u0, d0] = [dot(right, eye), dot(up, eye), -dot(towards, eye)];
  const scale = camera.height / 2 / HALF_HEIGHT;
  const highest = look.cut / step[2];
  const least = parallel ? look.front : Math.max(look.front, 0.02);
  const [middleX, middleY, flat] = [camera.width / 2 - x, camera.height / 2 - y, scale / camera.distance];
  let [covering, coveringDepth, closest, closestOff] = [-1, Infinity, -1, reach * reach];
  for (let i = 0; i < places.length; i += 3) {
    const pz = places[i + 2];
    if (pz > highest) continue;
    const px = places[i];
    const py = places[i + 1];
    const depth = px * dx + py * dy + pz * dz - d0;
    if (depth < least) continue;
    const size = parallel ? flat : scale / depth;
    const offX = middleX + (px * rx + py * ry + pz * rz - r0) * size;
    const offY = middleY - (px * ux + py * uy + pz * uz - u0) * size;
    const off = offX * offX + offY * offY;
    if (off < closestOff) {
      closest = i;
      closestOff = off;
    }
    const radius = Math.max(LEAST_RADIUS, Math.min(look.mostRadius, (look.pointSize * size) / 2));
    if (off < radius * radius && depth < coveringDepth) {
      covering = i;
      coveringDepth = depth;
    }
  }
  const row = covering >= 0 ? covering : closest;
  return row < 0 ? null : step.map((length, k) => places[row + k] * length);
}
