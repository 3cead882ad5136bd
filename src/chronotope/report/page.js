// The letters: t, h, w axes of the grid; n = t * h * w tokens; token of a cell = (time * h + row) * w + column.
const data = JSON.parse(document.getElementById("payload").textContent);
const { t: T, h: H, w: W } = data.grid;
const N = T * H * W;
const byId = (id) => document.getElementById(id);

const unpacked = new Map();

// Bytes of a base64 text of zlib; each text is unpacked once.
function unpack(text) {
  if (!unpacked.has(text)) {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    unpacked.set(text, new Response(stream).arrayBuffer());
  }
  return unpacked.get(text);
}

// Browsers of 2025 are the first with Float16Array; a table of all 65536 values serves the others too.
const halves = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, part = bits & 1023;
  if (exponent === 0) return sign * part * 2 ** -24;
  if (exponent === 31) return part ? NaN : sign * Infinity;
  return sign * (1 + part / 1024) * 2 ** (exponent - 15);
});

const asFloats = (buffer) => Float32Array.from(new Uint16Array(buffer), (bits) => halves[bits]);

function options(select, names, chosen) {
  select.replaceChildren(...names.map((name, number) => new Option(name, select.dataset.numbers ? number : name)));
  if (chosen !== undefined) select.value = chosen;
}

function panel(strip, caption, canvases) {
  const figure = document.createElement("figure");
  const words = document.createElement("figcaption");
  words.textContent = caption;
  figure.append(...canvases, words);
  strip.append(figure);
}

function canvas(width, height, attributes) {
  const made = document.createElement("canvas");
  Object.assign(made, { width, height });
  Object.assign(made.dataset, attributes);
  return made;
}

function sortBy(head) {
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.children) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const column = head.cellIndex, body = byId("rows").tBodies[0];
  const value = (row) => row.cells[column].dataset.value;
  const order = (a, b) => {
    // What was not measured stays at the end in both directions.
    if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === "");
    const step = column === 0 ? value(a).localeCompare(value(b)) : value(a) - value(b);
    return up ? step : -step;
  };
  body.append(...[...body.rows].sort(order));
}

for (const head of byId("rows").tHead.rows[0].cells) {
  head.querySelector("button").addEventListener("click", () => sortBy(head));
}

const [CLIPS, FRAMES, HEIGHT, WIDTH, CHANNELS] = data.shape;

function paint(target, pixels, offset) {
  const image = new ImageData(WIDTH, HEIGHT);
  for (let i = 0; i < WIDTH * HEIGHT; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = pixels[offset + i * CHANNELS + (CHANNELS === 3 ? c : 0)];
    image.data[4 * i + 3] = 255;
  }
  target.getContext("2d").putImageData(image, 0, 0);
}

async function drawPictures() {
  const pattern = byId("picture-pattern").value, clip = byId("picture-clip").value;
  const arrays = await Promise.all([unpack(data.true), unpack(data.predicted[pattern])]);
  if (pattern !== byId("picture-pattern").value || clip !== byId("picture-clip").value) return;
  const [truth, predicted] = arrays.map((buffer) => new Uint8Array(buffer));
  const length = HEIGHT * WIDTH * CHANNELS;
  for (let frame = 0; frame < FRAMES; frame++) {
    const offset = (clip * FRAMES + frame) * length;
    const here = (kind) => document.querySelector(`canvas[data-kind="${kind}"][data-at="${frame}"]`);
    paint(here("true"), truth, offset);
    paint(here("predicted"), predicted, offset);
    const part = truth.subarray(offset, offset + length);
    paint(here("difference"), part.map((value, i) => Math.abs(value - predicted[offset + i])), 0);
  }
}

function startPictures() {
  const names = Object.keys(data.predicted);
  byId("pictures").hidden = names.length === 0;
  if (names.length === 0) return Promise.resolve();
  byId("picture-clip").dataset.numbers = "yes";
  options(byId("picture-pattern"), names, names.includes(data.best) ? data.best : names[0]);
  options(byId("picture-clip"), Array.from({ length: CLIPS }, (_, clip) => `${clip + 1} of ${CLIPS}`));
  for (let frame = 0; frame < FRAMES; frame++) {
    const kinds = ["true", "predicted", "difference"];
    const made = kinds.map((kind) => canvas(WIDTH, HEIGHT, { kind, at: frame }));
    panel(byId("picture-frames"), `frame ${frame}`, made);
  }
  for (const id of ["picture-pattern", "picture-clip"]) byId(id).addEventListener("change", drawPictures);
  return drawPictures();
}

const CELL = Math.max(4, Math.floor(192 / W));
const UNSEEN = [29, 39, 48], SEEN = [25, 168, 157];
const RAMP = [[26, 74, 78], [25, 168, 157], [240, 255, 214]];
let query = [Math.floor(T / 2), Math.floor(H / 2), Math.floor(W / 2)];

function colour(share) {
  const place = Math.min(share, 1) * (RAMP.length - 1), low = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[low].map((value, i) => Math.round(value + (place - low) * (RAMP[low + 1][i] - value)));
}

// The root spreads small weights over more of the colours; the legend names the weights.
const strengthColour = (weight, most) => colour(Math.sqrt(weight / most));

async function loadCone(name) {
  const cone = data.cones[name];
  const [mask, q, k] = await Promise.all([cone.mask, cone.q, cone.k].map(unpack));
  return { masks: cone.masks, size: cone.size, mask: new Uint8Array(mask), q: asFloats(q), k: asFloats(k) };
}

// Tokens that the query sees, in token order.
function seenBy(cone, head, token) {
  const row = ((cone.masks === 1 ? 0 : head) * N + token) * Math.ceil(N / 8);
  const seen = [];
  for (let key = 0; key < N; key++) if (cone.mask[row + (key >> 3)] & (128 >> (key & 7))) seen.push(key);
  return seen;
}

// softmax(scale * q . k) over the seen keys, in their order.
function weights(cone, head, token, seen) {
  const d = cone.size, from = (head * N + token) * d;
  const scores = seen.map((key) => {
    const to = (head * N + key) * d;
    let sum = 0;
    for (let i = 0; i < d; i++) sum += cone.q[from + i] * cone.k[to + i];
    return data.scale * sum;
  });
  const most = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = scores.map((score) => Math.exp(score - most));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / total);
}

const place = (token) => [Math.floor(token / (H * W)), Math.floor(token / W) % H, token % W];
const inWords = ([t, h, w]) => `t ${t}, h ${h}, w ${w}`;
const inPercent = (share) => `${(100 * share).toPrecision(3)} %`;

const loaded = new Map();

async function drawCone() {
  const name = byId("cone-pattern").value;
  if (!loaded.has(name)) loaded.set(name, loadCone(name));
  const cone = await loaded.get(name);
  if (name !== byId("cone-pattern").value) return;
  const head = Number(byId("cone-head").value), token = (query[0] * H + query[1]) * W + query[2];
  const seen = seenBy(cone, head, token), share = weights(cone, head, token, seen);
  const top = share.reduce((best, value, i) => (best < 0 || value > share[best] ? i : best), -1);
  const how = byId("cone-strength").checked;
  const cells = new Array(N).fill(UNSEEN);
  seen.forEach((key, i) => { cells[key] = how ? strengthColour(share[i], share[top]) : SEEN; });
  for (const target of document.querySelectorAll("canvas[data-frame]")) fillFrame(target, cells);
  tell(token, seen, share, top, how);
}

function fillFrame(target, cells) {
  const frame = Number(target.dataset.frame), pen = target.getContext("2d");
  for (let cell = 0; cell < H * W; cell++) {
    pen.fillStyle = `rgb(${cells[frame * H * W + cell]})`;
    pen.fillRect((cell % W) * CELL, Math.floor(cell / W) * CELL, CELL - 1, CELL - 1);
  }
  if (frame === query[0]) {
    const line = Math.max(2, CELL / 5);
    Object.assign(pen, { strokeStyle: "#ff9d2e", lineWidth: line });
    pen.strokeRect(query[2] * CELL + line / 2 - 0.5, query[1] * CELL + line / 2 - 0.5, CELL - line, CELL - line);
  }
}

function tell(token, seen, share, top, how) {
  const show = (id, label, value, attributes) => {
    const strong = document.createElement("b");
    strong.textContent = value;
    byId(id).replaceChildren(label, strong);
    Object.assign(byId(id).dataset, attributes);
  };
  show("cone-query", "query ", inWords(query), { token });
  show("cone-count", "sees ", `${seen.length} of ${N} tokens (${inPercent(seen.length / N)})`, { count: seen.length });
  const strongest = top < 0 ? "none" : `${inWords(place(seen[top]))} (${inPercent(share[top])} of the weight)`;
  show("cone-strongest", "strongest ", strongest, { token: seen[top] ?? "", weight: share[top] ?? "" });
  const most = share[top] ?? 0;
  byId("cone-scale").textContent = `${inPercent(most)} of the weight (the middle is ${inPercent(most / 4)})`;
  document.querySelector(".key.how").hidden = !how;
  document.querySelector(".key.who").hidden = how;
}

function moveTo(cell) {
  const sizes = [T, H, W];
  query = cell.map((value, axis) => Math.min(Math.max(value, 0), sizes[axis] - 1));
  return drawCone();
}

function click(event) {
  const target = event.target.closest("canvas[data-frame]");
  if (!target) return;
  const box = target.getBoundingClientRect();
  const row = Math.floor(((event.clientY - box.top) / box.height) * H);
  const column = Math.floor(((event.clientX - box.left) / box.width) * W);
  moveTo([Number(target.dataset.frame), row, column]);
}

const STEPS = {
  ArrowUp: [0, -1, 0],
  ArrowDown: [0, 1, 0],
  ArrowLeft: [0, 0, -1],
  ArrowRight: [0, 0, 1],
  ",": [-1, 0, 0],
  ".": [1, 0, 0],
};

function press(event) {
  const step = STEPS[event.key];
  if (!step) return;
  event.preventDefault();
  moveTo(query.map((value, axis) => value + step[axis]));
}

function startCones() {
  const names = Object.keys(data.cones);
  byId("cone").parentElement.hidden = names.length === 0;
  if (names.length === 0) return Promise.resolve();
  byId("cone-head").dataset.numbers = "yes";
  options(byId("cone-pattern"), names, names.includes(data.best) ? data.best : names[0]);
  options(byId("cone-head"), Array.from({ length: data.heads }, (_, head) => String(head)));
  const scale = data.scale.toPrecision(3);
  byId("cone-source").textContent = `Strength is softmax(q · k × ${scale}) in layer ${data.layer} of the trained model.`;
  const stops = Array.from({ length: 9 }, (_, i) => `rgb(${colour(i / 8)})`);
  document.querySelector(".ramp").style.background = `linear-gradient(to right, ${stops})`;
  for (let frame = 0; frame < T; frame++) {
    panel(byId("cone-frames"), `t = ${frame}`, [canvas(W * CELL, H * CELL, { frame })]);
  }
  byId("cone-frames").addEventListener("click", click);
  byId("cone-frames").addEventListener("keydown", press);
  for (const id of ["cone-pattern", "cone-head", "cone-strength"]) byId(id).addEventListener("change", drawCone);
  return drawCone();
}

await Promise.all([startPictures(), startCones()]);
document.body.dataset.ready = "yes";
