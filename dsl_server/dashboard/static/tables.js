// Tables that follow their numbers: a row is kept as long as its key is there, and only what changed is touched.

/** `rows`: [{key, cells}], the first cell the row's heading; a cell is {text, value?, bar?} or {text, shape}; `label`
 * stands over it on a phone. */
export function fill(body, rows) {
  const old = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  rows.forEach(({ key, cells }, place) => {
    const row = old.get(String(key)) ?? made(key, cells);
    old.delete(String(key));
    cells.forEach((cell, at) => write(row.cells[at], cell));
    if (body.rows[place] !== row) body.insertBefore(row, body.rows[place] ?? null);
  });
  for (const row of old.values()) row.remove();
}

/** A state is never told by its colour alone: it has a shape, and its name. */
export function writeState(place, shape, text) {
  if (place.dataset.text === text && place.dataset.shape === shape) return;
  Object.assign(place.dataset, { text, shape });
  place.className = `state ${shape}`;
  const icon = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  icon.setAttribute("aria-hidden", "true");
  icon.append(document.createElementNS("http://www.w3.org/2000/svg", "use"));
  icon.firstChild.setAttribute("href", `#state-${shape}`);
  place.replaceChildren(icon, text);
}

function made(key, cells) {
  const row = document.createElement("tr");
  row.dataset.key = key;
  row.role = "row";
  cells.forEach((_, at) => {
    const cell = document.createElement(at ? "td" : "th");
    cell.role = at ? "cell" : "rowheader"; // said, since on a phone a row is laid out as a card
    if (!at) cell.scope = "row";
    row.append(cell);
  });
  return row;
}

function write(place, { text, value, bar, shape, title, label }) {
  if (label) place.dataset.label = label;
  if (shape) {
    if (!place.firstChild) place.append(document.createElement("span"));
    writeState(place.firstChild, shape, text);
  } else {
    if (!place.firstChild) place.append(document.createElement(value === undefined ? "span" : "data"));
    const [number] = place.children;
    if (number.textContent !== text) number.textContent = text;
    if (value !== undefined) number.value = value ?? "";
  }
  if (title !== undefined) place.title = title;
  if (bar === undefined) return;
  if (place.children.length === 1) {
    place.append(document.createElement("span"));
    place.lastChild.className = "bar";
  }
  place.lastChild.style.width = `${100 * bar}%`;
  place.lastChild.style.visibility = bar ? "visible" : "hidden";
}
