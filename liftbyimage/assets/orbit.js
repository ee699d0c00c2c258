// Skeletons in 3D that a person can turn: drag or arrow keys, wheel, pinch or + and − for the size, 0 for the view from
// the start (as does a double click, where there is nothing to tap).
//
//   const skeleton = orbit(surface, { bones: [[parent, child], …], sides: ["left" | "right" | "middle" per joint] });
//   skeleton.setPoses({ name: { joints: [[x, y, z], …] | null, visible: true, … }, … });
//   skeleton.turn(right, up);  // degrees further to the camera's right, and more from above
//   skeleton.zoom(factor);
//   skeleton.see({ yaw, pitch, zoom });
//   skeleton.reset();
//
// Joints are in metres and camera axes (x right, y down, z forward), relative to the pelvis, which stays in the middle.
// `skeleton.setPoses(poses, around)` fits the view and the floor to the points `around` instead. Further options: view
// (the object that holds how it is seen, in degrees: { yaw: 28, pitch: 12, zoom: 1 }), span (metres shown, 2.4).
//
// The surface is one of two:
// - a <canvas>, for poses that change all the time. Without a pose's `colour` the sides tell left from right, in --blue
//   and --orange; colours are CSS colours or variables, and follow `themechange`; `width` is a factor. Option: empty
//   (what is written where there is no pose).
// - an <svg>, for poses to look at closely, styled by CSS: a group of the pose's name holds `.bone`s and, for a pose
//   with `dots`, `.joint`s (`.ring`, `.dot`, `.letter`), which can be chosen; both carry their side. Beside them are
//   `.floor` lines and the camera's `.axis`es. Options: names and letters (per joint), hover and tap (called with the
//   joint that is there, or null). `skeleton.highlight(joint | null)` makes a joint `.chosen` and writes its `.name`.
function orbit(surface, options) {
  const { view = { yaw: 28, pitch: 12, zoom: 1 }, span = 2.4, hover, tap } = options;
  const DISTANCE = 7; // metres from the pelvis to the eye: enough perspective to tell near from far
  const FLOOR = 0.75, CELL = 0.25, BELOW = 0.02; // metres: the floor's half width, its cells, and how far below a foot
  const REACH = 14, STILL = 5; // px: how near to a joint chooses it, and how far a tap may travel
  const start = { ...view };
  const fingers = new Map(); // pointer id → where it was last
  let travelled = 0;
  let poses = {};
  let box = null;
  let chosen = null;

  const size = () => {
    const { width, height } = surface.getBoundingClientRect();
    return { width: width || 1, height: height || 1 };
  };
  const shownPoses = () => Object.values(poses).filter((pose) => pose.joints && pose.visible !== false);

  // A direction as it is seen: right, down, and away from the eye.
  const turned = ([x, y, z]) => {
    const [yaw, pitch] = [view.yaw, view.pitch].map((degrees) => (degrees * Math.PI) / 180);
    const along = Math.cos(yaw) * z - Math.sin(yaw) * x;
    return [
      Math.cos(yaw) * x + Math.sin(yaw) * z,
      Math.cos(pitch) * y - Math.sin(pitch) * along,
      Math.cos(pitch) * along + Math.sin(pitch) * y,
    ];
  };

  const boxAround = (points) => {
    const axes = [0, 1, 2].map((axis) => points.map((point) => point[axis]));
    const [low, high] = [axes.map((values) => Math.min(...values)), axes.map((values) => Math.max(...values))];
    return { low, high, radius: Math.hypot(...low.map((value, axis) => high[axis] - value)) / 2 };
  };

  // [x, y, z] in metres → [x, y] in CSS px, and the distance from the eye in metres.
  const projection = () => {
    const { width, height } = size();
    const centre = box ? box.low.map((value, axis) => (value + box.high[axis]) / 2) : [0, 0, 0];
    const eye = box ? 5 * box.radius : DISTANCE;
    const scale = (view.zoom * Math.min(width, height) * eye) / (box ? box.radius / 0.42 : span);
    return (point) => {
      const [right, down, away] = turned(point.map((value, axis) => value - centre[axis]));
      const depth = Math.max(eye + away, 0.04 * eye);
      return [width / 2 + (scale / depth) * right, 0.48 * height + (scale / depth) * down, depth];
    };
  };

  // Pairs of points.
  const floor = () => {
    const y = (box ?? boxAround(shownPoses().flatMap((pose) => pose.joints))).high[1] + BELOW;
    const edge = (axis, side) => {
      if (!box) return side * FLOOR;
      return (side < 0 ? Math.floor((box.low[axis] - 0.1) / CELL) : Math.ceil((box.high[axis] + 0.1) / CELL)) * CELL;
    };
    const [left, right, front, back] = [edge(0, -1), edge(0, 1), edge(2, -1), edge(2, 1)];
    const steps = (from, to) => Array.from({ length: Math.round((to - from) / CELL) + 1 }, (_, i) => from + i * CELL);
    return [
      ...steps(left, right).map((x) => [[x, y, front], [x, y, back]]),
      ...steps(front, back).map((z) => [[left, y, z], [right, y, z]]),
    ];
  };

  const paint = (surface instanceof SVGElement ? onSvg : onCanvas)(surface, options);
  const draw = () => {
    const lines = box || shownPoses().length ? floor() : [];
    paint({ ...size(), poses, shown: shownPoses(), floor: lines, project: projection(), turned, chosen });
  };

  const see = (other) => {
    Object.assign(view, other);
    draw();
  };
  const turn = (right, up) =>
    see({ yaw: view.yaw + right, pitch: Math.min(90, Math.max(-90, view.pitch + up)) });
  const zoom = (factor) => see({ zoom: Math.min(8, Math.max(0.3, view.zoom * factor)) });
  const reset = () => see(start);

  const within = (event) => {
    const { left, top } = surface.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  };
  const jointAt = (at) => {
    const pose = shownPoses().find(({ dots }) => dots);
    return pose ? nearest(pose.joints.map(projection()), at, REACH) : null;
  };

  const KEYS = {
    ArrowLeft: () => turn(10, 0), ArrowRight: () => turn(-10, 0),
    ArrowUp: () => turn(0, -10), ArrowDown: () => turn(0, 10),
    "+": () => zoom(1.2), "=": () => zoom(1.2), "-": () => zoom(1 / 1.2), 0: reset, Home: reset,
  };
  surface.tabIndex = 0;
  surface.style.touchAction = "none";
  surface.addEventListener("keydown", (event) => {
    const act = event.ctrlKey || event.metaKey || event.altKey ? null : KEYS[event.key];
    if (act) {
      event.preventDefault();
      act();
    }
  });
  surface.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.03 : 0.0015)));
  }, { passive: false });
  surface.addEventListener("pointerdown", (event) => {
    surface.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, within(event));
    travelled = 0;
  });
  surface.addEventListener("pointermove", (event) => {
    const now = within(event);
    const before = fingers.get(event.pointerId);
    if (!before) return hover?.(jointAt(now));
    travelled += Math.hypot(now[0] - before[0], now[1] - before[1]);
    const other = [...fingers].find(([id]) => id !== event.pointerId);
    if (other) {
      const apart = ([x, y]) => Math.hypot(x - other[1][0], y - other[1][1]);
      zoom(apart(now) / Math.max(apart(before), 1));
    } else {
      turn(0.5 * (before[0] - now[0]), 0.5 * (now[1] - before[1]));
    }
    fingers.set(event.pointerId, now);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    surface.addEventListener(name, (event) => fingers.delete(event.pointerId));
  }
  surface.addEventListener("pointerleave", () => hover?.(null));
  if (tap) surface.addEventListener("click", (event) => { if (travelled < STILL) tap(jointAt(within(event))); });
  else surface.addEventListener("dblclick", reset);
  document.documentElement.addEventListener("themechange", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  new ResizeObserver(draw).observe(surface);

  return {
    setPoses: (given, around = null) => {
      poses = given;
      box = around && boxAround(around);
      draw();
    },
    highlight: (joint) => {
      chosen = joint;
      draw();
    },
    projection, turn, zoom, see, reset,
  };
}

function onCanvas(canvas, { bones, sides, empty = "" }) {
  const SIDE_COLOURS = { left: "--blue", right: "--orange", middle: "--ink" };
  const context = canvas.getContext("2d");
  const colours = new Map(); // colour as given → as computed under the present theme

  // A variable's own value is not computed before a property uses it: light-dark(…) stays as it was written.
  const computed = (colour) => {
    if (!colours.has(colour)) {
      canvas.style.color = colour.startsWith("--") ? `var(${colour})` : colour;
      colours.set(colour, getComputedStyle(canvas).color);
      canvas.style.color = "";
    }
    return colours.get(colour);
  };

  const line = (from, to, colour, width, cap = "round") => {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.lineCap = cap;
    context.beginPath();
    context.moveTo(from[0], from[1]);
    context.lineTo(to[0], to[1]);
    context.stroke();
  };

  // Of all poses together from far to near, each with a rim of the background, so that what is nearer covers.
  const drawSkeletons = (shown, project, thickness) => {
    const parts = [];
    for (const pose of shown) {
      const points = pose.joints.map(project);
      const width = thickness * (pose.width ?? 1);
      const colour = (joint) => computed(pose.colour ?? SIDE_COLOURS[sides[joint]]);
      for (const [parent, child] of bones) {
        const [from, to] = [points[parent], points[child]];
        parts.push({ depth: (from[2] + to[2]) / 2, draw: () => {
          line(from, to, computed("--panel"), width + 3, "butt"); // round, it would cover the joint at its end
          line(from, to, colour(child), width);
        } });
      }
      points.forEach(([x, y, depth], joint) => parts.push({ depth: depth - 0.15, draw: () => {
        context.fillStyle = colour(joint);
        context.beginPath();
        context.arc(x, y, width, 0, 2 * Math.PI);
        context.fill();
      } }));
    }
    parts.sort((one, other) => other.depth - one.depth).forEach((part) => part.draw());
  };

  return ({ width, height, shown, floor, project }) => {
    const ratio = devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio); // which also clears it
    canvas.height = Math.round(height * ratio);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    colours.clear();
    if (!shown.length) {
      context.fillStyle = computed("--faint");
      context.font = `15px ${getComputedStyle(canvas).fontFamily}`;
      context.textAlign = "center";
      context.fillText(empty, width / 2, height / 2);
      return;
    }
    for (const [from, to] of floor) line(project(from), project(to), computed("--line"), 1);
    drawSkeletons(shown, project, Math.max(2.5, Math.min(width, height) / 110));
  };
}

function onSvg(svg, { bones, sides, names, letters }) {
  const ground = make(svg, "g");
  const axes = ["x", "y", "z"].map((name) => {
    const group = make(svg, "g", { class: "axis-of-camera" });
    return { line: make(group, "line", { class: "axis" }), name: make(group, "text", { class: "faint" }, name) };
  });
  const figures = make(svg, "g");
  const label = make(svg, "text", { class: "name", x: 12, y: 24 });
  const drawn = new Map(); // name of a pose → its elements

  const buildJoint = (parent, joint) => {
    const group = make(parent, "g", { class: `joint ${sides[joint]}` });
    make(group, "circle", { class: "ring", r: 11 });
    make(group, "circle", { class: "dot", r: 5 });
    const letter = letters[joint];
    if (letter) make(group, "text", { class: "letter", x: letter === "L" ? 14 : -14 }, letter);
    return group;
  };
  const build = (name, dots) => {
    const group = make(figures, "g", { class: name });
    const lines = bones.map(([, child]) => make(group, "line", { class: `bone ${sides[child]}` }));
    return { group, lines, joints: dots ? sides.map((_, joint) => buildJoint(group, joint)) : [] };
  };

  const drawFloor = (lines, project) => {
    while (ground.children.length < lines.length) make(ground, "line", { class: "floor" });
    while (ground.children.length > lines.length) ground.lastChild.remove();
    lines.forEach(([from, to], index) => place(ground.children[index], project(from), project(to)));
  };

  const drawAxes = (turned, height) => {
    const origin = [52, height - 52];
    axes.forEach(({ line, name }, axis) => {
      const [x, y] = turned([0, 1, 2].map((other) => Number(other === axis)));
      place(line, origin, [origin[0] + 30 * x, origin[1] + 30 * y]);
      name.setAttribute("x", origin[0] + 40 * x - 3);
      name.setAttribute("y", origin[1] + 40 * y + 4);
    });
  };

  const drawPose = (name, pose, visible, project, chosen) => {
    if (!drawn.has(name)) drawn.set(name, build(name, pose.dots));
    const { group, lines, joints } = drawn.get(name);
    group.style.display = visible ? "" : "none";
    if (!visible) return;
    const at = pose.joints.map(project);
    bones.forEach(([parent, child], bone) => place(lines[bone], at[parent], at[child]));
    // What is nearer is drawn later.
    const depth = (bone) => bones[bone].reduce((sum, joint) => sum + at[joint][2], 0);
    const order = [...bones.keys()].sort((a, b) => depth(b) - depth(a));
    for (const bone of order) group.insertBefore(lines[bone], joints[0] ?? null);
    joints.forEach((dot, joint) => {
      dot.setAttribute("transform", `translate(${at[joint][0].toFixed(2)} ${at[joint][1].toFixed(2)})`);
      dot.classList.toggle("chosen", joint === chosen);
    });
  };

  // The units are CSS px, so that letters and joints keep their size on a narrow screen.
  return ({ width, height, poses, shown, floor, project, turned, chosen }) => {
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    drawFloor(floor, project);
    drawAxes(turned, height);
    for (const [name, pose] of Object.entries(poses)) drawPose(name, pose, shown.includes(pose), project, chosen);
    label.textContent = chosen === null ? "" : names[chosen];
  };
}

// --- small helpers, for the pages' own pictures too -------------------------------------------------------------

// A new element at the end of its parent, in SVG or HTML as that is.
function make(parent, name, attributes = {}, text = "") {
  const element = document.createElementNS(parent.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

function place(line, [x1, y1], [x2, y2]) {
  for (const [key, value] of Object.entries({ x1, y1, x2, y2 })) line.setAttribute(key, value.toFixed(2));
}

// The index of the point that is nearest, or null where none is within reach.
function nearest(points, [x, y], reach) {
  const distances = points.map(([px, py]) => Math.hypot(px - x, py - y));
  const closest = distances.indexOf(Math.min(...distances));
  return distances[closest] <= reach ? closest : null;
}
