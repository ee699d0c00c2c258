// One person at a time: where joints look (over the crop), what stage 2 keeps, and the poses in 3D.
const SVG = "http://www.w3.org/2000/svg";
const HOME = { yaw: 28, pitch: 12, zoom: 1 }; // degrees; from the camera's right, as in the pictures
const CAMERA = { yaw: 0, pitch: 0, zoom: 1 };
const REACH = 14; // how near to a joint, in px of the crop, chooses it
const LETTERS = { left_wrist: "L", left_ankle: "L", right_wrist: "R", right_ankle: "R" };

const byId = (id) => document.getElementById(id);
const names = DATA.joints.map((name) => name.replaceAll("_", " "));
const side = (joint) => DATA.joints[joint].match(/^(left|right)_/)?.[1] ?? "middle";
const hasPatches = DATA.grid !== null;
const state = {
  person: 0,
  joint: null, // what is hovered or focused
  held: null, // what was clicked
  map: DATA.importance, // of a lifter with patches
  stop: DATA.trained ?? 0,
  block: DATA.blocks - 1, // of a lifter that reads maps at places
  level: null, // all
  view: { ...HOME },
  shown: { refined: true, coarse: true, truth: true },
};
const person = () => DATA.people[state.person];
const joint = () => state.joint ?? state.held;

// --- what is embedded -------------------------------------------------------------------------------------------

const TYPES = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array };

function unpack({ type, base64 }) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return new TYPES[type](bytes.buffer);
}

function once(make) {
  const made = new Map();
  return (key) => {
    if (!made.has(key)) made.set(key, make(key));
    return made.get(key);
  };
}

const cropOf = once((of) => {
  const image = new Image();
  image.src = of.crop;
  return image;
});
const orderOf = once((of) => unpack(of.order));
const codesOf = once((map) => unpack(map.codes));

// Multiples of uniform attention [P], of one joint or the mean over all.
function attentionOf(person, map, joint) {
  const stored = DATA.people[person].attention[map];
  const codes = codesOf(stored);
  const value = Float64Array.from({ length: 256 }, (_, code) => stored.low * stored.step ** code);
  const patches = codes.length / names.length;
  const ratio = new Float64Array(patches);
  const joints = joint === null ? names.keys() : [joint];
  const share = joint === null ? 1 / names.length : 1;
  for (const one of joints) for (let p = 0; p < patches; p++) ratio[p] += share * value[codes[one * patches + p]];
  return ratio;
}

function keptOf(person, stop) {
  const kept = new Uint8Array(DATA.grid[0] * DATA.grid[1]);
  for (const patch of orderOf(DATA.people[person]).subarray(0, DATA.keep[stop])) kept[patch] = 1;
  return kept;
}

// --- small helpers ----------------------------------------------------------------------------------------------

// Where an event is, in an SVG's own units.
function within(svg, event) {
  const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  return [x, y];
}

const millimetres = (metres) => `${(1000 * metres).toFixed(0)} mm`;
const distance = (a, b) => Math.hypot(...a.map((value, axis) => value - b[axis]));
const meanDistance = (a, b) => a.reduce((sum, one, index) => sum + distance(one, b[index]), 0) / a.length;

function times(ratio) {
  const digits = ratio >= 10 ? 0 : ratio >= 1 ? 1 : 2;
  return `${ratio.toFixed(digits)}×`;
}

// --- the crop and its joints ------------------------------------------------------------------------------------

const look = byId("look").querySelector("svg");
const figure = { halos: [], bones: [], joints: [] };

function buildFigure() {
  look.setAttribute("role", "group");
  look.setAttribute("aria-label", "Joints: up and down arrow keys choose one");
  for (const _ of DATA.bones) figure.halos.push(make(look, "line", { class: "halo" }));
  for (const [, child] of DATA.bones) figure.bones.push(make(look, "line", { class: `bone ${side(child)}` }));
  names.forEach((name, index) => {
    const group = make(look, "g", { class: `joint ${side(index)}`, role: "button", "aria-label": name });
    make(group, "circle", { class: "ring", r: 7 });
    make(group, "circle", { class: "dot", r: 3.4 });
    const letter = LETTERS[DATA.joints[index]];
    if (letter) make(group, "text", { class: "letter", x: letter === "L" ? 10 : -10, "aria-hidden": true }, letter);
    group.addEventListener("focus", () => choose(index));
    group.addEventListener("blur", () => choose(null));
    figure.joints.push(group);
  });
  look.addEventListener("pointermove", (event) => choose(nearest(points(), within(look, event), REACH)));
  look.addEventListener("pointerleave", () => choose(null));
  look.addEventListener("click", (event) => hold(nearest(points(), within(look, event), REACH)));
  look.addEventListener("keydown", stepThroughJoints);
}

// The middle of pixel (0, 0) lies half a pixel inside the picture.
const points = () => person().pose_2d.map(([x, y]) => [x + 0.5, y + 0.5]);

function placeFigure() {
  const at = points();
  look.setAttribute("viewBox", `0 0 ${person().size.join(" ")}`);
  DATA.bones.forEach(([parent, child], bone) => {
    place(figure.halos[bone], at[parent], at[child]);
    place(figure.bones[bone], at[parent], at[child]);
  });
  figure.joints.forEach((group, index) => group.setAttribute("transform", `translate(${at[index].join(" ")})`));
}

function stepThroughJoints(event) {
  const count = names.length;
  const now = figure.joints.indexOf(event.target);
  const next = { ArrowDown: now + 1, ArrowUp: now - 1 + count, Home: 0, End: count - 1 }[event.key];
  if (event.key === "Enter" || event.key === " ") hold(now);
  else if (next === undefined) return;
  else figure.joints[next % count].focus();
  event.preventDefault();
}

function choose(index) {
  if (state.joint === index) return;
  state.joint = index;
  showJoint();
}

function hold(index) {
  state.held = state.held === index ? null : index;
  showJoint();
}

function showJoint() {
  figure.joints.forEach((group, index) => {
    group.classList.toggle("chosen", index === joint());
    group.setAttribute("aria-pressed", index === state.held);
    group.setAttribute("tabindex", index === (joint() ?? 0) ? 0 : -1); // one tab stop for all
  });
  showLooking();
  skeleton.highlight(joint());
  showErrors();
}

function showLooking() {
  const name = joint() === null ? null : names[joint()];
  if (hasPatches) drawHeat();
  if (DATA.blocks) drawPlaces();
  byId("looking").textContent = name === null ? withoutJoint() : `${name[0].toUpperCase()}${name.slice(1)}${byWhat()}`;
}

function withoutJoint() {
  if (!hasPatches) return "Choose a joint: hover over it, tap it or use the keyboard.";
  const isImportance = state.map === DATA.importance;
  const what = isImportance ? "the importance, which decides what is kept" : `layer ${DATA.maps[state.map]}`;
  return `Mean over all joints: ${what}. Hover over a joint, or tap it, to see where it looks.`;
}

function byWhat() {
  if (hasPatches) return `: layer ${DATA.maps[state.map]}.`;
  if (!DATA.blocks) return ".";
  return `: ${shownPlaces().length} places read by block ${state.block + 1}. Area is weight.`;
}

// --- places of the context blocks -------------------------------------------------------------------------------

function shownPlaces() {
  if (joint() === null) return [];
  return person().places[state.block][joint()].filter(([level]) => state.level === null || level === state.level);
}

function drawPlaces() {
  figure.places ??= make(look, "g", { class: "places" });
  figure.places.replaceChildren();
  for (const [level, x, y, weight] of shownPlaces()) {
    const circle = { cx: x + 0.5, cy: y + 0.5, r: 4 * Math.sqrt(weight) };
    make(figure.places, "circle", { class: `place level-${level % 4}`, ...circle });
  }
}

function buildPlaces() {
  for (let block = 0; block < DATA.blocks; block++) make(byId("block"), "option", { value: block }, `${block + 1}`);
  make(byId("level"), "option", { value: "" }, "all");
  for (let level = 0; level < DATA.levels; level++) {
    make(byId("level"), "option", { value: level }, `${level + 1}`);
    const entry = make(byId("maps"), "span");
    entry.append(document.createElementNS(SVG, "svg"), `map ${level + 1}`);
    entry.firstChild.setAttribute("viewBox", "0 0 10 10");
    make(entry.firstChild, "circle", { class: `level-${level % 4}`, cx: 5, cy: 5, r: 4 });
  }
  byId("block").value = state.block;
  byId("block").addEventListener("change", (event) => {
    state.block = Number(event.target.value);
    showLooking();
  });
  byId("level").addEventListener("change", (event) => {
    state.level = event.target.value === "" ? null : Number(event.target.value);
    showLooking();
  });
}

// --- patches ----------------------------------------------------------------------------------------------------

const colours = hasPatches ? unpack(DATA.colours) : null;

function drawHeat() {
  const ratio = attentionOf(state.person, state.map, joint());
  const sorted = Float64Array.from(ratio).sort();
  const quantile = (share) => sorted[Math.round(share * (sorted.length - 1))];
  const low = quantile(0.4);
  const high = Math.max(quantile(0.999), 2 * low);
  const canvas = byId("look").querySelector("canvas");
  [canvas.height, canvas.width] = DATA.grid;
  const image = new ImageData(canvas.width, canvas.height);
  ratio.forEach((value, patch) => {
    const strength = Math.min(1, Math.max(0, Math.log(value / low) / Math.log(high / low)));
    const colour = 3 * Math.round(255 * strength);
    image.data.set([...colours.subarray(colour, colour + 3), 255 * (0.25 + 0.65 * strength)], 4 * patch);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
  byId("low").textContent = times(low);
  byId("high").textContent = `${times(high)} uniform`;
}

function paintScale() {
  const stops = Array.from({ length: 18 }, (_, stop) => `rgb(${colours.subarray(45 * stop, 45 * stop + 3).join(" ")})`);
  byId("colours").style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
}

// The crop itself where a patch is kept; beneath lies the same crop, dimmed.
async function drawKept() {
  const [rows, columns] = DATA.grid;
  const mask = new OffscreenCanvas(columns, rows);
  const image = new ImageData(columns, rows);
  keptOf(state.person, state.stop).forEach((kept, patch) => { image.data[4 * patch + 3] = 255 * kept; });
  mask.getContext("2d").putImageData(image, 0, 0);
  const crop = cropOf(person());
  await crop.decode();
  if (crop !== cropOf(person())) return; // another person by now
  const canvas = byId("kept").querySelector("canvas");
  [canvas.width, canvas.height] = person().size;
  const context = canvas.getContext("2d");
  context.drawImage(crop, 0, 0);
  context.imageSmoothingEnabled = false;
  context.globalCompositeOperation = "destination-in";
  context.drawImage(mask, 0, 0, canvas.width, canvas.height);
}

const percent = (stop) => `${Number((100 * DATA.retentions[stop]).toFixed(2))} %`;

function showKept() {
  const keep = DATA.keep[state.stop];
  const patches = DATA.grid[0] * DATA.grid[1];
  const note = state.stop === DATA.trained ? " (as trained)" : "";
  byId("retention").setAttribute("aria-valuetext", percent(state.stop) + note);
  drawTrend();
  byId("keeping").textContent = `${percent(state.stop)}${note}: ${keep} of ${patches} patches kept`;
  drawKept();
}

// How the refined pose fares at every retention: its MPJPE, or without a truth how far it lies from the one as trained.
const trendOf = once(({ refined, truth }) => refined.map((pose) => meanDistance(pose, truth ?? refined[DATA.trained])));

function drawTrend() {
  const [width, height, left, bottom] = [270, 96, 8, 16];
  const svg = byId("trend");
  const values = trendOf(person());
  const what = person().truth ? "MPJPE" : "distance from the pose as trained";
  const shown = values.map((value, stop) => `${percent(stop)}: ${millimetres(value)}`).join(", ");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", `Refined pose, ${what}: ${shown}`);
  svg.replaceChildren();
  make(svg, "text", { class: "faint", x: left, y: 11 }, `refined: ${what}`);
  const step = (width - 2 * left) / values.length;
  values.forEach((value, stop) => {
    const size = (height - 44) * (value / Math.max(...values, 1e-9));
    const bar = { x: left + stop * step + 2, y: height - bottom - size, width: step - 4, height: size };
    make(svg, "rect", { class: stop === state.stop ? "bar now" : "bar", ...bar });
    if (stop !== state.stop) return;
    const middle = left + (stop + 0.5) * step;
    make(svg, "text", { x: middle, y: bar.y - 4, "text-anchor": "middle" }, (1000 * value).toFixed(0) + " mm");
  });
  for (const stop of [0, DATA.trained, values.length - 1]) {
    const at = { x: left + (stop + 0.5) * step, y: height - 3 };
    make(svg, "text", { class: "faint", "text-anchor": "middle", ...at }, percent(stop));
  }
}

// --- 3D ---------------------------------------------------------------------------------------------------------

const posesOf = (of) => ({ truth: of.truth, coarse: of.coarse, refined: of.refined[state.stop] });
const skeleton = orbit(byId("space"), {
  bones: DATA.bones, sides: names.map((_, index) => side(index)),
  names, letters: DATA.joints.map((name) => LETTERS[name]),
  view: state.view, hover: choose, tap: hold,
});

// Around every pose of this person, so that nothing jumps when the retention changes.
function showSpace() {
  const { truth, refined, coarse } = posesOf(person());
  const { shown } = state;
  skeleton.setPoses({
    truth: { joints: truth, visible: shown.truth },
    refined: { joints: refined, visible: shown.refined, dots: true },
    coarse: { joints: coarse, visible: shown.coarse },
  }, [...person().refined, person().coarse, person().truth].filter(Boolean).flat());
}

// --- figures ----------------------------------------------------------------------------------------------------

const LABELS = { refined: "refined (stage 2)", coarse: "coarse (stage 1)", truth: "truth" };
const label = (pose) => (hasPatches || pose === "truth" ? LABELS[pose] : "lifted");
const shortLabel = (pose) => label(pose).replace(/ \(.*/, "");

function buildSwitches() {
  for (const pose of ["refined", "coarse", "truth"]) {
    const wrapper = make(byId("switches"), "label", { "data-pose": pose });
    const box = make(wrapper, "input", { type: "checkbox" });
    make(wrapper, "span", { class: `key ${pose}` });
    make(wrapper, "span", {}, shortLabel(pose));
    box.checked = true;
    box.addEventListener("change", () => {
      state.shown[pose] = box.checked;
      showSpace();
    });
  }
}

function showSwitches() {
  const poses = posesOf(person());
  for (const wrapper of byId("switches").children) wrapper.hidden = !poses[wrapper.dataset.pose];
}

function showErrors() {
  const { truth, ...poses } = posesOf(person());
  const report = byId("errors");
  report.replaceChildren();
  if (!truth) return showShift(report);
  const table = make(report, "table");
  const head = make(table, "tr");
  for (const text of ["distance from the truth", "MPJPE", ...(joint() === null ? [] : [names[joint()]])]) {
    make(head, "th", { scope: "col" }, text);
  }
  for (const [name, pose] of Object.entries(poses).reverse()) {
    if (!pose) continue;
    const row = make(table, "tr", { "data-pose": name });
    make(row, "td", {}, label(name));
    make(row, "td", {}, millimetres(meanDistance(pose, truth)));
    if (joint() !== null) make(row, "td", {}, millimetres(distance(pose[joint()], truth[joint()])));
  }
}

// Without a truth: what the retention changes.
function showShift(report) {
  if (!hasPatches) return;
  const { refined, coarse } = person();
  const away = (pose) => millimetres(meanDistance(refined[state.stop], pose));
  const more = state.stop === DATA.trained ? "" : `, ${away(refined[DATA.trained])} from the one as trained`;
  make(report, "p", {}, `The refined pose lies ${away(coarse)} from the coarse one${more} (mean over joints).`);
}

// --- persons ----------------------------------------------------------------------------------------------------

function showPerson(index) {
  state.person = (index + DATA.people.length) % DATA.people.length;
  state.held = null;
  byId("person").value = state.person;
  for (const image of document.querySelectorAll(".picture img")) image.src = person().crop;
  if (hasPatches) showKept();
  placeFigure();
  showSwitches();
  showSpace();
  showJoint();
}

function buildPersons() {
  DATA.people.forEach(({ title }, index) => make(byId("person"), "option", { value: index }, title));
  byId("person").addEventListener("change", (event) => showPerson(Number(event.target.value)));
  byId("previous").addEventListener("click", () => showPerson(state.person - 1));
  byId("next").addEventListener("click", () => showPerson(state.person + 1));
  for (const id of ["previous", "next"]) byId(id).disabled = DATA.people.length === 1;
}

function buildPatches() {
  DATA.maps.forEach((name, index) => make(byId("map"), "option", { value: index }, name));
  byId("map").value = state.map;
  byId("map").addEventListener("change", (event) => {
    state.map = Number(event.target.value);
    showLooking();
  });
  const slider = byId("retention");
  slider.max = DATA.keep.length - 1;
  slider.value = state.stop;
  slider.addEventListener("input", () => {
    state.stop = Number(slider.value);
    showKept();
    showSpace();
    showErrors();
  });
  const step = Math.max(...DATA.people.flatMap((of) => of.attention.map((map) => map.step)));
  const within = `Values are stored to within ${(100 * (Math.sqrt(step) - 1)).toFixed(1)} %`;
  byId("exactness").textContent = `${within}; below ${DATA.faintest}× they read as ${DATA.faintest}×.`;
  paintScale();
}

function pressKey(event) {
  if (event.key === "Escape") {
    state.held = null;
    choose(null);
    showJoint();
  }
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, #space")) return;
  if (event.key === "ArrowLeft") showPerson(state.person - 1);
  if (event.key === "ArrowRight") showPerson(state.person + 1);
}

document.body.classList.toggle("patches", hasPatches);
document.querySelector("main").classList.toggle("plain", !hasPatches);
for (const item of document.querySelectorAll(".patches-only")) item.hidden = !hasPatches;
for (const item of document.querySelectorAll(".places-only")) item.hidden = !DATA.blocks;
byId("reset").addEventListener("click", skeleton.reset);
byId("camera").addEventListener("click", () => skeleton.see(CAMERA));
byId("closer").addEventListener("click", () => skeleton.zoom(1.2));
byId("farther").addEventListener("click", () => skeleton.zoom(1 / 1.2));
document.addEventListener("keydown", pressKey);
buildFigure();
buildSwitches();
buildPersons();
if (hasPatches) buildPatches();
if (DATA.blocks) buildPlaces();
showPerson(0);
