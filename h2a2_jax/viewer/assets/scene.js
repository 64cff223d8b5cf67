// What WebGL draws: points shaded by their surroundings, lines of any width, faint faces of boxes.

const MOST_PIXELS = 64; // of the drawing buffer that a point is wide

const POINTS_VERTEX = `#version 300 es
in vec3 place;
in vec3 color;
uniform mat4 camera;
uniform vec3 extent;
uniform vec4 depthRow;
uniform float cut, front, pixels, byHeight;
uniform vec2 heights;
uniform vec3 ramp[8];
out vec3 shade;
vec3 heightColor(float z) {
  float at = clamp((z - heights.x) / (heights.y - heights.x), 0.0, 1.0) * 7.0;
  int step = int(min(at, 6.0));
  return mix(ramp[step], ramp[step + 1], at - float(step));
}
void main() {
  vec3 where = place * extent;
  shade = byHeight > 0.5 ? heightColor(where.z) : color;
  gl_Position = camera * vec4(where, 1.0);
  gl_PointSize = clamp(pixels / gl_Position.w, 1.5, ${MOST_PIXELS}.0);
  bool away = where.z > cut || dot(depthRow, vec4(where, 1.0)) < front;
  if (away) gl_Position = vec4(2.0, 2.0, 2.0, 1.0);
}`;

const POINTS_FRAGMENT = `#version 300 es
precision mediump float;
in vec3 shade;
out vec4 pixel;
void main() {
  vec2 off = gl_PointCoord - 0.5;
  if (dot(off, off) > 0.3) discard; // between a disc and a square: no gaps on a regular grid
  pixel = vec4(shade, 1.0);
}`;

const SCREEN_VERTEX = `#version 300 es
void main() {
  gl_Position = vec4(vec2(gl_VertexID & 1, gl_VertexID >> 1) * 4.0 - 1.0, 0.0, 1.0);
}`;

// Darkens a pixel by how far it lies behind its neighbours ("eye-dome lighting", Boucheny 2009): shape without normals.
const SCREEN_FRAGMENT = `#version 300 es
precision highp float;
uniform sampler2D colors;
uniform highp sampler2D depths;
uniform vec2 range; // near, far
uniform float parallel, reference, strength, radius;
out vec4 pixel;
float away(ivec2 at) {
  float depth = texelFetch(depths, at, 0).x;
  float near = range.x, far = range.y;
  return parallel > 0.5 ? near + depth * (far - near) : near * far / (far - depth * (far - near));
}
void main() {
  ivec2 at = ivec2(gl_FragCoord.xy), most = textureSize(depths, 0) - 1;
  float depth = texelFetch(depths, at, 0).x;
  if (depth >= 1.0) discard;
  float here = away(at), sum = 0.0;
  float scale = parallel > 0.5 ? reference : here;
  for (int k = 0; k < 8; k++) {
    vec2 step = vec2(cos(0.7854 * float(k)), sin(0.7854 * float(k))) * radius;
    ivec2 near = clamp(at + ivec2(round(step)), ivec2(0), most);
    sum += clamp((here - away(near)) / scale, 0.0, 0.03);
  }
  pixel = vec4(texelFetch(colors, at, 0).rgb * exp(-strength * sum), 1.0);
  gl_FragDepth = depth;
}`;

const LINES_VERTEX = `#version 300 es
in vec3 start, end;
in vec4 color;
in vec2 style; // width (pixels), dashed
uniform mat4 camera;
uniform vec2 size;
uniform float ratio, bias;
out vec4 shade;
out float across, along, dashed, halfWidth;
void main() {
  vec4 a = camera * vec4(start, 1.0), b = camera * vec4(end, 1.0);
  // What is behind the eye is cut off before the division.
  const float least = 1e-3;
  if (a.w < least && b.w < least) { gl_Position = vec4(2.0, 2.0, 2.0, 1.0); return; }
  if (a.w < least) a = mix(a, b, (least - a.w) / (b.w - a.w));
  if (b.w < least) b = mix(b, a, (least - b.w) / (a.w - b.w));
  vec2 from = a.xy / a.w * size, to = b.xy / b.w * size;
  float length = max(distance(from, to), 1e-4) * 0.5;
  vec2 forward = (to - from) / (2.0 * length);
  float side = (gl_VertexID & 1) == 0 ? -1.0 : 1.0;
  bool atEnd = gl_VertexID > 1;
  halfWidth = style.x * ratio * 0.5;
  float reach = halfWidth + 1.5 * ratio;
  vec4 here = atEnd ? b : a;
  vec2 shift = vec2(-forward.y, forward.x) * side * reach + forward * (atEnd ? 1.0 : -1.0) * halfWidth;
  here.xy += shift * 2.0 / size * here.w;
  here.z -= bias * here.w;
  gl_Position = here;
  shade = color;
  // Distances in pixels are linear on the screen, not in space: carried with w, divided by it for each pixel.
  across = side * reach * here.w;
  along = (atEnd ? length : 0.0) * here.w;
  dashed = style.y;
}`;

const LINES_FRAGMENT = `#version 300 es
precision highp float;
in vec4 shade;
in float across, along, dashed, halfWidth;
uniform vec3 halo;
uniform float ratio, alpha;
out vec4 pixel;
void main() {
  float off = abs(across * gl_FragCoord.w), far = along * gl_FragCoord.w;
  if (dashed > 0.5 && mod(far, 9.0 * ratio) > 5.5 * ratio) discard;
  float inner = clamp(halfWidth + 0.5 - off, 0.0, 1.0);
  float outer = clamp(halfWidth + 1.0 * ratio + 0.5 - off, 0.0, 1.0) * 0.45 * step(1.2 * ratio, 2.0 * halfWidth);
  float covered = max(inner, outer) * shade.a * alpha;
  if (covered < 0.01) discard;
  pixel = vec4(mix(halo, shade.rgb, inner), covered);
}`;

const FACES_VERTEX = `#version 300 es
in vec3 start;
in vec4 color;
uniform mat4 camera;
out vec4 shade;
void main() { gl_Position = camera * vec4(start, 1.0); shade = color; }`;

const FACES_FRAGMENT = `#version 300 es
precision mediump float;
in vec4 shade;
out vec4 pixel;
void main() { pixel = shade; }`;

// How strongly lines are drawn where points hide them, so that a box is a box from every side.
const SEEN_THROUGH = { floor: 0, measure: 0.75, dimensions: 0.75 };
const SEEN_THROUGH_BOXES = 0.32;

class Scene {
  // Throws where WebGL 2 is missing.
  constructor(canvas, points) {
    const gl = canvas.getContext("webgl2", { antialias: false, alpha: false, powerPreference: "high-performance" });
    if (!gl) throw new Error("WebGL 2 is not available");
    Object.assign(this, { gl, canvas, points });
    this.programs = {
      points: program(gl, POINTS_VERTEX, POINTS_FRAGMENT),
      screen: program(gl, SCREEN_VERTEX, SCREEN_FRAGMENT),
      lines: program(gl, LINES_VERTEX, LINES_FRAGMENT),
      faces: program(gl, FACES_VERTEX, FACES_FRAGMENT),
    };
    this.pointArrays = this.uploadPoints();
    this.target = { framebuffer: gl.createFramebuffer(), color: gl.createTexture(), depth: gl.createTexture() };
    this.empty = gl.createVertexArray();
    this.shapes = new Map();
  }

  uploadPoints() {
    const { gl, points } = this;
    const array = gl.createVertexArray();
    gl.bindVertexArray(array);
    attribute(gl, this.programs.points, "place", points.places, 3, gl.UNSIGNED_SHORT, true);
    if (points.colors.length) attribute(gl, this.programs.points, "color", points.colors, 3, gl.UNSIGNED_BYTE, true);
    gl.bindVertexArray(null);
    return array;
  }

  // Lines: rows of [x, y, z, x, y, z, red, green, blue, alpha, width, dashed]; faces: rows of [x, y, z, r, g, b, a].
  setShapes(name, lines, faces) {
    const { gl } = this;
    const shapes = this.shapes.get(name) ?? {
      lines: this.layout("lines", { start: 3, end: 3, color: 4, style: 2 }, 1),
      faces: this.layout("faces", { start: 3, color: 4 }, 0),
    };
    this.shapes.set(name, shapes);
    for (const [kind, rows] of Object.entries({ lines, faces })) {
      shapes[kind].count = rows.length;
      gl.bindBuffer(gl.ARRAY_BUFFER, shapes[kind].buffer);
      gl.bufferData(gl.ARRAY_BUFFER, new Float32Array(rows.flat()), gl.DYNAMIC_DRAW);
    }
  }

  layout(programName, fields, divisor) {
    const { gl } = this;
    const [array, buffer] = [gl.createVertexArray(), gl.createBuffer()];
    gl.bindVertexArray(array);
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    const stride = 4 * Object.values(fields).reduce((sum, size) => sum + size, 0);
    let offset = 0;
    for (const [field, size] of Object.entries(fields)) {
      const at = gl.getAttribLocation(this.programs[programName].handle, field);
      gl.enableVertexAttribArray(at);
      gl.vertexAttribPointer(at, size, gl.FLOAT, false, stride, offset);
      gl.vertexAttribDivisor(at, divisor);
      offset += 4 * size;
    }
    gl.bindVertexArray(null);
    return { array, buffer, count: 0 };
  }

  resize(width, height) {
    const { gl, canvas, target } = this;
    if (canvas.width === width && canvas.height === height && target.ready) return;
    Object.assign(canvas, { width, height });
    gl.bindFramebuffer(gl.FRAMEBUFFER, target.framebuffer);
    const attach = (texture, internal, format, type, slot) => {
      gl.bindTexture(gl.TEXTURE_2D, texture);
      gl.texImage2D(gl.TEXTURE_2D, 0, internal, width, height, 0, format, type, null);
      gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
      gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
      gl.framebufferTexture2D(gl.FRAMEBUFFER, slot, gl.TEXTURE_2D, texture, 0);
    };
    attach(target.color, gl.RGBA8, gl.RGBA, gl.UNSIGNED_BYTE, gl.COLOR_ATTACHMENT0);
    attach(target.depth, gl.DEPTH_COMPONENT24, gl.DEPTH_COMPONENT, gl.UNSIGNED_INT, gl.DEPTH_ATTACHMENT);
    target.ready = true;
  }

  // Panes are {camera, x, width (of the drawing buffer), shapes: names}; side by side, they share the points.
  draw(panes, look) {
    const { gl } = this;
    gl.enable(gl.SCISSOR_TEST);
    for (const pane of panes) {
      for (const call of [gl.viewport, gl.scissor]) call.call(gl, pane.x, 0, pane.width, this.canvas.height);
      this.drawPoints(pane, look);
      this.shadePoints(pane, look);
      const matrix = pane.camera.matrix;
      gl.enable(gl.BLEND);
      gl.blendFuncSeparate(gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA, gl.ONE, gl.ONE);
      gl.depthMask(false);
      for (const name of pane.shapes) this.drawShapes(this.shapes.get(name), matrix, pane, look, SEEN_THROUGH[name] ?? SEEN_THROUGH_BOXES);
      gl.depthMask(true);
      gl.disable(gl.BLEND);
    }
  }

  drawPoints(pane, look) {
    const { gl, points } = this;
    const { handle, at } = this.programs.points;
    const { camera } = pane;
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.target.framebuffer);
    gl.enable(gl.DEPTH_TEST);
    gl.depthFunc(gl.LESS);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.useProgram(handle);
    const { towards } = camera.axes;
    gl.uniformMatrix4fv(at.camera, false, camera.matrix);
    gl.uniform3fv(at.extent, points.extent);
    gl.uniform4f(at.depthRow, ...towards.map((v) => -v), dot(towards, camera.eye));
    gl.uniform1f(at.cut, look.cut);
    gl.uniform1f(at.front, look.front);
    const pixels = (look.pointSize * this.canvas.height) / 2 / HALF_HEIGHT;
    gl.uniform1f(at.pixels, camera.parallel ? pixels / camera.distance : pixels);
    gl.uniform1f(at.byHeight, look.byHeight ? 1 : 0);
    gl.uniform2fv(at.heights, points.heights);
    gl.uniform3fv(at.ramp, points.ramp.flat());
    gl.bindVertexArray(this.pointArrays);
    gl.drawArrays(gl.POINTS, 0, points.count);
  }

  shadePoints({ camera }, look) {
    const { gl, target } = this;
    const { handle, at } = this.programs.screen;
    gl.bindFramebuffer(gl.FRAMEBUFFER, null);
    gl.clearColor(...look.background, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.depthFunc(gl.ALWAYS);
    gl.useProgram(handle);
    [target.color, target.depth].forEach((texture, unit) => {
      gl.activeTexture(gl.TEXTURE0 + unit);
      gl.bindTexture(gl.TEXTURE_2D, texture);
    });
    gl.uniform1i(at.colors, 0);
    gl.uniform1i(at.depths, 1);
    gl.uniform2fv(at.range, camera.range);
    gl.uniform1f(at.parallel, camera.parallel ? 1 : 0);
    gl.uniform1f(at.reference, camera.distance);
    gl.uniform1f(at.strength, look.shading ? 11 : 0);
    gl.uniform1f(at.radius, Math.max(1, 1.2 * look.ratio));
    gl.bindVertexArray(this.empty);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
    gl.activeTexture(gl.TEXTURE0);
  }

  drawShapes({ lines, faces }, matrix, pane, look, seenThrough) {
    const { gl } = this;
    gl.depthFunc(gl.LEQUAL);
    gl.useProgram(this.programs.faces.handle);
    gl.uniformMatrix4fv(this.programs.faces.at.camera, false, matrix);
    gl.bindVertexArray(faces.array);
    gl.drawArrays(gl.TRIANGLES, 0, faces.count);
    const { handle, at } = this.programs.lines;
    gl.useProgram(handle);
    gl.uniformMatrix4fv(at.camera, false, matrix);
    gl.uniform2f(at.size, pane.width, this.canvas.height);
    gl.uniform1f(at.ratio, look.ratio);
    gl.uniform1f(at.bias, 1e-4);
    gl.uniform3fv(at.halo, look.halo);
    gl.bindVertexArray(lines.array);
    for (const [test, alpha] of [[gl.GREATER, seenThrough], [gl.LEQUAL, 1]]) {
      if (!alpha) continue;
      gl.depthFunc(test);
      gl.uniform1f(at.alpha, alpha);
      gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, lines.count);
    }
  }
}

function program(gl, vertex, fragment) {
  const handle = gl.createProgram();
  for (const [type, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(type);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(handle, shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
  }
  gl.linkProgram(handle);
  if (!gl.getProgramParameter(handle, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(handle));
  const at = {};
  for (let i = 0; i < gl.getProgramParameter(handle, gl.ACTIVE_UNIFORMS); i++) {
    const name = gl.getActiveUniform(handle, i).name.replace("[0]", "");
    at[name] = gl.getUniformLocation(handle, name);
  }
  return { handle, at };
}

function attribute(gl, { handle }, name, data, size, type, normalised) {
  const at = gl.getAttribLocation(handle, name);
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
  gl.enableVertexAttribArray(at);
  gl.vertexAttribPointer(at, size, type, normalised, 0, 0);
}
