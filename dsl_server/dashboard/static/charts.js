// Lines over a number, by uPlot. Each line has a colour and a dash of its own; what it is, and its number at the
// pointer or else its last one, stands above. The table below each chart is for whoever does not see it.

const HEIGHT = 220;
const EPOCHS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
const TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800];

/** `lines`: [{name, colour, dash, stepped}]. `write`: a value as text, `tick`: on the axis. `along`: the axis below,
 * {label, write, times}. `top`: what no value exceeds. `words`: what to say of the chart. `empty`: until there is one. */
export class Chart {
  constructor(place, { lines, write, tick, along, top, words, empty }) {
    Object.assign(this, { lines, write, tick, along, top, words });
    this.legend = document.createElement("ul");
    this.legend.className = "legend";
    this.legend.append(...lines.map(entry));
    this.place = document.createElement("div");
    this.place.className = "plot";
    const nothing = document.createElement("p");
    nothing.className = "empty";
    nothing.textContent = empty;
    this.place.append(nothing);
    place.append(this.legend, this.place);
    new ResizeObserver(() => this.plot?.setSize(this.size())).observe(this.place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.plot?.redraw(false));
  }

  /** `xs`, and for each line its values there, null where it has none. */
  show(xs, values) {
    this.data = [xs, ...values];
    const points = values.flat().some((value) => value !== null);
    if (!this.plot && points) {
      this.place.replaceChildren();
      this.place.setAttribute("role", "img");
      this.plot = new uPlot(this.options(), this.data, this.place);
    } else {
      this.plot?.setData(this.data);
    }
    this.tell(this.plot?.cursor.idx);
    if (this.plot) this.place.setAttribute("aria-label", this.words(this.texts(null)));
  }

  /** Each line's number at the index, or else its last. */
  texts(at) {
    return this.data.slice(1).map((line) => {
      const value = at === null ? line.findLast((each) => each !== null) : line[at];
      return this.write(value);
    });
  }

  tell(at) {
    this.texts(at ?? null).forEach((text, line) => {
      this.legend.children[line].lastChild.textContent = text;
      this.legend.children[line].hidden = this.data[line + 1].every((value) => value === null);
    });
  }

  size() {
    return { width: Math.max(200, this.place.clientWidth), height: HEIGHT };
  }

  options() {
    const axis = { stroke: () => colour("--soft"), grid: { stroke: () => colour("--line"), width: 1 }, ticks: { show: false } };
    axis.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    return {
      ...this.size(),
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false } },
      padding: [8, 12, 0, 0],
      scales: {
        x: { time: false, range: (_, least, most) => spread(least, most, this.along.times) },
        y: { range: { min: { pad: 0.1, hard: 0 }, max: { pad: 0.1, hard: this.top } } },
      },
      axes: [
        { ...axis, label: this.along.label, labelSize: 18, labelFont: axis.font, size: 26, gap: 4, space: 48,
          incrs: this.along.times ? TIMES : EPOCHS, values: (_, ticks) => ticks.map(this.along.write) },
        { ...axis, size: 52, gap: 6, values: (_, ticks) => ticks.map((tick) => this.tick(+tick.toPrecision(6))) },
      ],
      series: [{}, ...this.lines.map((line) => this.series(line))],
      hooks: { setCursor: [(plot) => this.tell(plot.cursor.idx)] },
    };
  }

  series({ colour: name, dash, stepped }) {
    return {
      stroke: () => colour(name),
      width: 2,
      dash: dash?.map((length) => length * devicePixelRatio),
      spanGaps: true,
      points: { show: stepped ? false : (plot) => plot.data[0].length <= 40, size: 6, fill: () => colour(name) },
      ...(stepped && { paths: uPlot.paths.stepped({ align: -1 }), fill: () => colour("--fill") }),
    };
  }
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Epochs with some air at both ends, so that the first and the last point are whole; times from their start. */
function spread(least, most, times) {
  if (times) return [least, Math.max(most, least + 10)];
  const air = Math.max((most - least) * 0.04, 0.25);
  return [least - air, most + air];
}

function entry({ name, colour: variable, dash }) {
  const item = document.createElement("li");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  const drawn = { x1: 1, x2: 25, y1: 4, y2: 4, stroke: `var(${variable})`, "stroke-width": 2.5, "stroke-dasharray": (dash ?? []).join(" ") };
  for (const [attribute, value] of Object.entries(drawn)) line.setAttribute(attribute, value);
  svg.setAttribute("aria-hidden", "true");
  svg.append(line);
  item.append(svg, name, document.createElement("b"));
  return item;
}
