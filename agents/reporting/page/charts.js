// Line charts of metrics. A line is not drawn over iterations without its metric, and is over optimizer steps.

const WIDTH = 340, HEIGHT = 170, LEFT = 44, BOTTOM = 22, TOP = 8, RIGHT = 10;

const bridged = data.unit !== "iteration"; // points of steps that are measured now and then are joined

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at += 1) found.push(Number((at * step).toPrecision(12)));
  return found;
}

// Limits of an axis: not so close that a small change looks large.
function limits(values) {
  let low = Math.min(...values), high = Math.max(...values);
  const least = Math.max(0.1 * Math.max(Math.abs(low), Math.abs(high)), 1e-9);
  if (high - low < least) [low, high] = [(low + high - least) / 2, (low + high + least) / 2];
  const margin = 0.05 * (high - low);
  return [low - margin, high + margin];
}

// lines: {label, color, points: [[x, y] or null], start: value before training, if measured}; names: of the points, for the line under the chart.
// shows: values that the vertical axis always has.
function chart(title, unit, across, lines, names, shows) {
  const drawn = lines.flatMap((line) => line.points.filter(Boolean));
  const keys = el("div", { class: "keys" });
  const figure = el("figure", {}, el("figcaption", {}, title, el("span", { class: "dim" }, ` ${unit}`)), keys);
  const starts = lines.map((line) => line.start).filter(Number.isFinite);
  const xs = limits(drawn.map((point) => point[0])), ys = limits([...shows, ...starts, ...drawn.map((point) => point[1])]);
  const x = (value) => LEFT + ((value - xs[0]) / (xs[1] - xs[0])) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - ys[0]) / (ys[1] - ys[0])) * (HEIGHT - BOTTOM - TOP);
  const first = lines.map((line) => `${line.label} from ${short(line.points.find(Boolean)?.[1])} to ${short(line.points.findLast(Boolean)?.[1])}`);
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0, "aria-label": `${title}: ${first.join("; ")}. Arrow keys move along it.` });
  for (const value of ticks(ys[0], ys[1], 4)) {
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    picture.append(svg("text", { x: LEFT - 5, y: y(value) + 4, "text-anchor": "end" }, String(value)));
  }
  for (const value of ticks(xs[0], xs[1], 5).filter((value) => across !== data.unit || Number.isInteger(value))) picture.append(svg("text", { x: x(value), y: HEIGHT - 6, "text-anchor": "middle" }, String(value)));
  lines.forEach((line, at) => drawLine(picture, line, at, x, y));
  const cursor = svg("g");
  picture.append(cursor);
  follow(picture, cursor, keys, { lines, names, x, y });
  figure.append(picture);
  return figure;
}

function drawLine(picture, line, at, x, y) {
  const color = `c-${line.color}`;
  if (!line.points.some(Boolean)) return;
  if (Number.isFinite(line.start)) picture.append(svg("path", { class: `${color} start`, d: `M${LEFT} ${y(line.start)}H${WIDTH - RIGHT}` }));
  let path = "", before = null;
  line.points.forEach((point, index) => {
    if (point) {
      path += `${before ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`;
      if (!before && !line.points[index + 1]) picture.append(svg("circle", { class: color, cx: x(point[0]), cy: y(point[1]), r: 2.5 }));
    }
    before = point ?? (bridged ? before : null);
  });
  picture.append(svg("path", { class: `${color} dash-${at}`, d: path }));
  const end = line.points.findLast(Boolean);
  picture.append(svg("circle", { class: color, cx: x(end[0]), cy: y(end[1]), r: 3.5 }));
}

// The numbers of the last point, or of the one under the pointer, or where arrow keys have gone.
function follow(picture, cursor, keys, { lines, names, x, y }) {
  const last = names.length - 1;
  let here = last;
  const show = (index) => {
    here = index;
    cursor.replaceChildren();
    keys.replaceChildren(el("span", {}, names[index]));
    lines.forEach((line, at) => {
      const point = line.points[index], said = point ?? (bridged ? line.points.slice(0, index + 1).findLast(Boolean) : null);
      keys.append(el("span", {}, el("i", { class: `swatch c-${line.color} dash-${at}` }), `${line.label} ${said ? short(said[1]) : "–"}`));
      if (point && index !== last) {
        cursor.append(svg("line", { class: "cursor", x1: x(point[0]), x2: x(point[0]), y1: TOP, y2: HEIGHT - BOTTOM }));
        cursor.append(svg("circle", { class: `c-${line.color}`, cx: x(point[0]), cy: y(point[1]), r: 4 }));
      }
    });
  };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * WIDTH;
    const far = (index) => Math.min(...lines.map((line) => (line.points[index] ? Math.abs(x(line.points[index][0]) - at) : Infinity)));
    show(names.reduce((best, _, index) => (far(index) < far(best) ? index : best), last));
  });
  picture.addEventListener("pointerleave", () => show(last));
  picture.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    show(Math.min(last, Math.max(0, here + move)));
  });
  show(last);
}

// Points of a metric; null where it is missing, and between iterations that are not neighbors.
const points = (metric, over = "iteration") => data.metrics.map((row) => (Number.isFinite(row[metric]) && Number.isFinite(row[over]) ? [row[over], row[metric]] : null));

// Lines that would be flat beside another get a chart of their own.
function apart(lines) {
  const size = (line) => Math.max(...line.points.filter(Boolean).map((point) => Math.abs(point[1])));
  const largest = Math.max(...lines.map(size));
  if (largest === 0) return [lines];
  const large = lines.filter((line) => size(line) > largest / 10), small = lines.filter((line) => size(line) <= largest / 10);
  return small.length ? [large, ...apart(small)] : [large];
}

function drawCharts() {
  const names = data.metrics.map((row) => `${data.unit} ${row.iteration}`), holder = $("charts");
  const put = (title, unit, across, lines, shows = []) => {
    const present = lines.filter((line) => line.points.some(Boolean));
    const groups = present.length ? apart(present) : [];
    for (const group of groups) {
      const own = groups.length > 1 ? `${title}: ${group.map((line) => line.label).join(", ")}` : title;
      holder.append(chart(own, unit, across, group, names, shows));
    }
  };
  if (!data.metrics.length) {
    holder.append(el("p", { class: "dim" }, `No ${data.unit} has ended yet.`));
    return;
  }
  if (points("kl_per_response").some(Boolean)) {
    const over = (metric, label, color) => ({ label, color, points: points(metric, "kl_per_response") });
    put("Score and gold against KL", "over nats a response", "KL", [over(points("score/raw").some(Boolean) ? "score/raw" : "score", "score", "blue"), over("gold", "gold", "orange")]);
  }
  for (const panel of data.panels) {
    const lines = panel.lines.map((line) => ({ ...line, start: data.before[line.evaluated], points: points(line.metric) }));
    put(panel.title, panel.unit, data.unit, lines, panel.shows);
  }
}
