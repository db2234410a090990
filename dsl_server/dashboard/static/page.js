// The page follows the run: three kinds of events, each of them whole. It asks nothing but the server that it came from.

import { Chart } from "./charts.js";
import { clock, loss, megabytes, percent, points, tenths, whole } from "./format.js";
import { fill, writeState } from "./tables.js";

const at = (id) => document.getElementById(id);
const body = (id) => at(id).tBodies[0];
const number = (value, write) => ({ text: write(value), value });

// ------------------------------------------------------------------ lines of metrics.jsonl

const epochs = { label: "epoch", write: String };

let metric = "accuracy"; // what is scored: a share, or a number of another metric

const isShare = () => metric === "accuracy";
const joined = (test) => (test.metric ? test.metric.joined : test.accuracy);
const alone = (test) => (test.metric ? test.metric.client_only : test.client_only_accuracy);
const score = (value) => (isShare() ? percent(value) : loss(value));
const inWords = (value) => `${score(value)}${isShare() ? "%" : ""}`;

/** A run of another metric: what stands on the page is renamed, once. */
function name(scored) {
  if (scored === metric) return;
  metric = scored;
  scores.top = undefined;
  for (const place of document.querySelectorAll("[data-scored]")) place.textContent = place.dataset.scored.replace("{}", metric);
  at("accuracy-region").setAttribute("aria-label", `Test ${metric}, table`);
}

const scores = new Chart(at("accuracy-chart"), {
  lines: [
    { name: "joined", colour: "--first" },
    { name: "client alone", colour: "--second", dash: [6, 4] },
  ],
  write: (value) => (isShare() ? points(value) : loss(value)),
  tick: (value) => (isShare() ? `${value}%` : String(value)),
  along: epochs,
  top: 100,
  words: ([joined, alone]) => `Test ${metric} by epoch, a line chart. Last: joined ${joined}, client alone ${alone}.`,
  empty: "The first score comes at the end of an epoch that is scored.",
});
const losses = new Chart(at("loss-chart"), {
  lines: [
    { name: "joined, test", colour: "--first" },
    { name: "server, training", colour: "--third", dash: [2, 3] },
    { name: "client, training", colour: "--second", dash: [6, 4] },
  ],
  write: loss,
  tick: String,
  along: epochs,
  words: ([test, server, client]) =>
    `Loss by epoch, a line chart. Last: joined on the test set ${test}, server in training ${server}, client in training ${client}.`,
  empty: "The first loss comes at the end of an epoch that is scored.",
});

function showLines(lines) {
  const other = lines.at(-1)?.test.metric; // lines may come before the first view
  if (other) name(other.name.split(":").at(-1));
  const of = (pick) => lines.map((line) => pick(line) ?? null);
  const drawn = (value) => (value === null || value === undefined ? null : isShare() ? 100 * value : value);
  const at_ = of((line) => line.epoch);
  scores.show(at_, [of((l) => drawn(joined(l.test))), of((l) => drawn(alone(l.test)))]);
  losses.show(at_, [of((l) => l.test.loss), of((l) => l.train.loss), of((l) => l.train.client_loss)]);
  const table = (id, cells) =>
    fill(body(id), lines.map((line) => ({ key: line.epoch, cells: [number(line.epoch, whole), ...cells(line)] })));
  table("accuracy-table", ({ test }) => [number(joined(test), score), number(alone(test), score)]);
  table("loss-table", ({ test, train }) => [test.loss, train.loss, train.client_loss].map((value) => number(value, loss)));
  table("lines-table", (line) => [
    number(line.seconds, tenths),
    number(line.samples_trained, whole),
    number(line.wire.up, megabytes),
    number(line.wire.down, megabytes),
  ]);
}

// ------------------------------------------------------------------ how far it had come when

const speed = new Chart(at("speed-chart"), {
  lines: [{ name: "samples/s that the server learns from", colour: "--first", stepped: true }],
  write: whole,
  tick: whole,
  along: { label: "time since the first client joined", write: clock, times: true },
  words: ([last]) => `Samples per second over the time of the run, a line chart. Last: ${last}.`,
  empty: "Time begins when the first client joins.",
});

function showPoints(points) {
  const spans = points.slice(1).map(([to, samples], index) => {
    const [from, before] = points[index];
    return { from, to, samples: samples - before, rate: (samples - before) / (to - from) };
  });
  speed.show(points.map(([seconds]) => seconds), [[null, ...spans.map((span) => span.rate)]]);
  fill(body("speed-table"), spans.map((span) => ({
    key: span.to,
    cells: [number(span.from, tenths), number(span.to, tenths), number(span.samples, whole), number(span.rate, tenths)],
  })));
}

// ------------------------------------------------------------------ the run as it is

const STATES = ["lost", "away", "waiting", "training", "awaited", "left"]; // who needs a look comes first
const LAG_S = 5; // rows change places by lags of so much, not by each second
const REASONS = 5; // that are told

let states = new Map(); // of the clients, as last told

function showView(view) {
  at("name").textContent = view.name;
  at("facts").textContent = `${view.method} on ${view.model} cut at ${view.place}`;
  name(view.metric);
  showStage(view);
  showTiles(view);
  showTraffic(view);
  showClients(view);
  at("told").textContent = `as of ${new Date().toLocaleTimeString()}`;
}

const isOver = (view) => view.finished || view.reason !== null;

function stage(view) {
  const here = view.clients.filter(({ state }) => state !== "awaited").length;
  if (view.finished) return ["left", "finished"];
  if (view.reason !== null) return ["lost", "ended early"];
  if (!view.samples && here < view.clients_expected) return ["awaited", `waiting for clients, ${here} of ${view.clients_expected} came`];
  return ["training", "training"];
}

function showStage(view) {
  const [shape, text] = stage(view);
  const scored = joined(view.test) === null ? "" : `${inWords(joined(view.test))} · `;
  const epoch = Math.min(view.epoch + 1, view.epochs);
  writeState(at("stage"), shape, text);
  at("epoch").textContent = `epoch ${whole(epoch)} of ${whole(view.epochs)}`;
  at("elapsed").textContent = view.seconds ? `${clock(view.seconds)} elapsed` : "";
  at("left").textContent = view.left_s === null || isOver(view) ? "" : `about ${clock(view.left_s)} left`;
  at("progress").value = view.finished ? 1 : view.done;
  at("also").textContent = [
    view.saved_s === null ? "" : `last checkpoint ${clock(view.saved_s)} ago`,
    view.skipped ? `${whole(view.skipped)} steps left out, since they came to what is not finite` : "",
    view.replayed ? `${whole(view.replayed)} samples learned from once more` : "",
  ].filter(Boolean).join(" · ");
  document.title = `${scored}${epoch}/${view.epochs} · ${view.name}`;
}

function showTiles(view) {
  const up = total(view.wire.up);
  const down = total(view.wire.down);
  writeNumber("accuracy", score(joined(view.test)), joined(view.test), isShare() ? "%" : "");
  at("alone").textContent = alone(view.test) === null ? "" : `client alone ${inWords(alone(view.test))}`;
  writeNumber("loss", loss(view.test.loss), view.test.loss, "");
  at("training-loss").textContent = view.loss === null ? "" : `server, training ${loss(view.loss)}`;
  const rate = isOver(view) && view.seconds ? view.samples / view.seconds : view.rate;
  writeNumber("rate", whole(rate), rate, "samples/s");
  at("samples").textContent = `${whole(view.samples)} samples${isOver(view) ? ", mean of the run" : ""}`;
  writeNumber("up", ...volume(up));
  at("down").textContent = `down ${volume(down)[0]} ${volume(down)[2]}`;
}

function writeNumber(id, text, value, unit) {
  if (at(id).firstChild.value === String(value ?? "")) return;
  const number = document.createElement("data");
  number.value = value ?? "";
  number.textContent = text;
  const small = document.createElement("small");
  small.textContent = value === null ? "" : ` ${unit}`;
  at(id).replaceChildren(number, small);
}

/** As text, its bytes, and the unit: a tile has room for few digits. */
const volume = (bytes) => [megabytes(bytes >= 1e10 ? bytes / 1000 : bytes), bytes, bytes >= 1e10 ? "GB" : "MB"];

const total = (way) => Object.values(way).reduce((sum, bytes) => sum + bytes, 0);

function showTraffic({ wire, socket }) {
  const kinds = Object.keys({ ...wire.up, ...wire.down }).filter((kind) => wire.up[kind] || wire.down[kind]);
  const most = Math.max(1, ...Object.values(wire.up), ...Object.values(wire.down));
  const cell = (way, kind) => ({ ...number(way[kind] ?? 0, megabytes), bar: (way[kind] ?? 0) / most });
  fill(body("traffic-table"), kinds.map((kind) => ({ key: kind, cells: [{ text: kind }, cell(wire.up, kind), cell(wire.down, kind)] })));
  const sums = [{ key: "all", cells: [{ text: "all messages" }, number(total(wire.up), megabytes), number(total(wire.down), megabytes)] }];
  if (socket) sums.push({ key: "socket", cells: [{ text: "by the kernel’s count" }, number(socket.up, megabytes), number(socket.down, megabytes)] });
  fill(at("traffic-table").tFoot, sums);
}

function showClients(view) {
  const rank = ({ state }) => (state === "waiting" ? STATES.indexOf("training") : STATES.indexOf(state));
  const lag = ({ lag_s }) => Math.floor(lag_s / LAG_S);
  const ordered = view.clients.toSorted((a, b) => rank(a) - rank(b) || lag(b) - lag(a) || a.client - b.client);
  fill(body("clients-table"), ordered.map((client) => ({ key: client.client, cells: cells(client) })));
  const counts = STATES.map((state) => [view.clients.filter((client) => client.state === state).length, state]);
  at("clients-count").textContent = counts.filter(([count]) => count).map(([count, state]) => `${count} ${state}`).join(", ");
  showReasons(view.clients.map(({ reason }) => reason).filter(Boolean));
  tellNews(view);
}

/** Why clients are lost; of many, the first. */
function showReasons(reasons) {
  const told = reasons.slice(0, REASONS);
  if (reasons.length > REASONS) told.push(`and ${reasons.length - REASONS} more, in audit.jsonl`);
  if (told.join() === [...at("reasons").children].map((item) => item.textContent).join()) return;
  at("reasons").replaceChildren(...told.map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
}

function cells(client) {
  const name = client.name || `client ${client.client}`;
  const came = client.state !== "awaited";
  const of = (label, value, write) => ({ ...number(came ? value : null, write), label });
  return [
    { text: name, title: client.name ? `client ${client.client}: ${name}` : name },
    { text: client.state, shape: client.state },
    of("epoch", client.epoch + 1, whole),
    of("samples", client.samples, whole),
    of("samples/s", client.rate, whole),
    of("queue", client.queue, whole),
    of("up, MB", client.up, megabytes),
    of("down, MB", client.down, megabytes),
    of("loss", client.loss, loss),
    of("lag, s", client.state === "left" || client.state === "lost" ? null : client.lag_s, tenths),
  ];
}

/** What changed since the last view, for who listens: a few clients by their names, many by their number. */
function tellNews(view) {
  const changed = view.clients.filter(({ client, state }) => states.has(client) && states.get(client) !== state);
  const telling = changed.filter(({ state }) => state !== "waiting" && state !== "training");
  const back = changed.filter(({ client }) => ["away", "awaited"].includes(states.get(client)));
  const news = [...new Set([...telling, ...back])];
  if (news.length > 3) at("news").textContent = `${news.length} clients changed: ${at("clients-count").textContent}`;
  else if (news.length) at("news").textContent = news.map(({ client, name, state }) => `${name || `client ${client}`} is ${state}`).join(", ");
  states = new Map(view.clients.map(({ client, state }) => [client, state]));
}

// ------------------------------------------------------------------ the connection

let over = null; // the view with which the run ended

function follow() {
  const events = new EventSource("events");
  events.addEventListener("lines", ({ data }) => showLines(JSON.parse(data)));
  events.addEventListener("points", ({ data }) => showPoints(JSON.parse(data)));
  events.addEventListener("view", ({ data }) => {
    const view = JSON.parse(data);
    over = isOver(view) ? view : null;
    showView(view);
    if (view.finished) events.close(); // there is nothing more to come
    trouble(view.reason === null ? "" : `The run ended before it was finished: ${view.reason}. If the server goes on with it at this address, so does this page.`);
    if (over) at("news").textContent = view.finished ? "The run is finished." : "The run has ended early.";
  });
  events.onerror = () => {
    if (!over) trouble("The connection to the server is lost; these are the last numbers that came. Trying again …");
    if (events.readyState === EventSource.CLOSED && !over?.finished) setTimeout(follow, 3000);
  };
}

function trouble(text) {
  if (at("trouble").textContent !== text) at("trouble").textContent = text;
  at("trouble").hidden = !text;
}

follow();
