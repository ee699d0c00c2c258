// Skeletons in 3D on a canvas that a person can turn: drag or arrow keys, wheel or + and − for the size, double click
// or 0 for the view from the start.
//
//   const view = orbit(canvas, { bones: [[parent, child], …], sides: ["left" | "right" | "middle", … per joint] });
//   view.setPoses({ name: { joints: [[x, y, z], …] | null, colour: "--green" | null, width: 1, visible: true }, … });
//   view.turn(azimuth, elevation);  // radians more to the right, and more from above
//   view.reset();
//
// Joints are in metres and camera axes (x right, y down, z forward), relative to the pelvis, which stays in the middle.
// Without a colour the sides tell left from right, in --blue and --orange; colours are CSS colours or variables, and
// follow `themechange`. Further options: span (metres shown, 2.4), azimuth and elevation of the start (radians),
// empty (what is written where there is no pose).
function orbit(canvas, options) {
  const { bones, sides, span = 2.4, azimuth = 0.49, elevation = 0.21, empty = "" } = options;
  const SIDE_COLOURS = { left: "--blue", right: "--orange", middle: "--ink" };
  const DISTANCE = 7; // metres from the pelvis to the eye: enough perspective to tell near from far
  const REACH = 0.75, CELL = 0.25; // metres, of the floor
  const STEEPEST = 1.5; // radians
  const start = { azimuth, elevation, zoom: 1 };
  const view = { ...start };
  const context = canvas.getContext("2d");
  const fingers = new Map(); // pointer id → where it was last
  const colours = new Map(); // colour as given → as computed under the present theme
  let poses = {};
  let waiting = false;

  // A variable's own value is not computed before a property uses it: light-dark(…) stays as it was written.
  const computed = (colour) => {
    if (!colours.has(colour)) {
      canvas.style.color = colour.startsWith("--") ? `var(${colour})` : colour;
      colours.set(colour, getComputedStyle(canvas).color);
      canvas.style.color = "";
    }
    return colours.get(colour);
  };

  const shownPoses = () => Object.values(poses).filter((pose) => pose.joints && pose.visible !== false);

  // [x, y, z] in metres → [x, y] in CSS px, and depth in metres, growing away from the eye.
  const projection = (width, height) => {
    const [ca, sa] = [Math.cos(view.azimuth), Math.sin(view.azimuth)];
    const [ce, se] = [Math.cos(view.elevation), Math.sin(view.elevation)];
    const scale = (view.zoom * Math.min(width, height)) / span;
    return ([x, y, z]) => {
      const across = ca * x + sa * z, along = ca * z - sa * x;
      const depth = ce * along + se * y;
      const size = (scale * DISTANCE) / Math.max(DISTANCE + depth, 0.1);
      return [width / 2 + size * across, 0.48 * height + size * (ce * y - se * along), depth];
    };
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

  const drawFloor = (place, y) => {
    for (let step = -REACH; step <= REACH + 1e-6; step += CELL) {
      line(place([step, y, -REACH]), place([step, y, REACH]), computed("--line"), 1);
      line(place([-REACH, y, step]), place([REACH, y, step]), computed("--line"), 1);
    }
  };

  // Of all poses together from far to near, each with a rim of the background, so that what is nearer covers.
  const drawSkeletons = (place, shown, thickness) => {
    const parts = [];
    for (const pose of shown) {
      const points = pose.joints.map(place);
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

  const draw = () => {
    waiting = false;
    const { clientWidth: width, clientHeight: height } = canvas;
    const ratio = devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio); // which also clears it
    canvas.height = Math.round(height * ratio);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const shown = shownPoses();
    if (!shown.length) {
      context.fillStyle = computed("--faint");
      context.font = `15px ${getComputedStyle(canvas).fontFamily}`;
      context.textAlign = "center";
      context.fillText(empty, width / 2, height / 2);
      return;
    }
    const place = projection(width, height);
    drawFloor(place, Math.max(...shown.flatMap((pose) => pose.joints.map((joint) => joint[1]))) + 0.02);
    drawSkeletons(place, shown, Math.max(2.5, Math.min(width, height) / 110));
  };

  const redraw = () => {
    if (!waiting) requestAnimationFrame(draw);
    waiting = true;
  };
  const turn = (right, up) => {
    view.azimuth += right;
    view.elevation = Math.min(STEEPEST, Math.max(-STEEPEST, view.elevation + up));
    redraw();
  };
  const zoom = (factor) => {
    view.zoom = Math.min(6, Math.max(0.3, view.zoom * factor));
    redraw();
  };
  const reset = () => {
    Object.assign(view, start);
    redraw();
  };

  const KEYS = {
    ArrowLeft: () => turn(0.1, 0), ArrowRight: () => turn(-0.1, 0),
    ArrowUp: () => turn(0, 0.1), ArrowDown: () => turn(0, -0.1),
    "+": () => zoom(1.1), "=": () => zoom(1.1), "-": () => zoom(1 / 1.1), 0: reset, Home: reset,
  };
  canvas.tabIndex = 0;
  canvas.style.touchAction = "none";
  canvas.addEventListener("keydown", (event) => {
    const act = event.ctrlKey || event.metaKey || event.altKey ? null : KEYS[event.key];
    if (act) {
      event.preventDefault();
      act();
    }
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.03 : 0.001)));
  }, { passive: false });
  canvas.addEventListener("dblclick", reset);
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const now = [event.clientX, event.clientY];
    const other = [...fingers].find(([id]) => id !== event.pointerId);
    if (other) {
      const apart = ([x, y]) => Math.hypot(x - other[1][0], y - other[1][1]);
      zoom(apart(now) / Math.max(apart(before), 1));
    } else {
      turn((before[0] - now[0]) / 120, (now[1] - before[1]) / 120);
    }
    fingers.set(event.pointerId, now);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => fingers.delete(event.pointerId));
  }

  const recolour = () => {
    colours.clear();
    redraw();
  };
  document.documentElement.addEventListener("themechange", recolour);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  new ResizeObserver(redraw).observe(canvas);

  return {
    setPoses: (given) => {
      poses = given;
      redraw();
    },
    turn,
    reset,
  };
}
