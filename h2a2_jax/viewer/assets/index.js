// The table of scans: filtered, sorted, and shown a page at a time, so that thousands of scans stay quick.

const ROWS = 100; // scans on a page of the table
const byId = (id) => document.getElementById(id);
const count = (number, one, more = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : more}`;

// Text is always set as text: names come from files.
function element(tag, { color, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  if (color) made.style.setProperty("--own", color);
  made.append(...children);
  return made;
}

const { classes, scans } = JSON.parse(byId("data").textContent);
const words = scans.map(({ name, counts }) => [name, ...counts.map(([row]) => classes[row].name)].join("\n").toLowerCase());
const byName = new Intl.Collator("en", { numeric: true }).compare;
const state = { filter: "", label: "", key: null, falling: false, page: 0 };

function matching() {
  const wanted = state.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const label = state.label === "" ? null : Number(state.label);
  const found = scans.filter((scan, i) =>
    wanted.every((word) => words[i].includes(word)) && (label === null || scan.counts.some(([row]) => row === label)));
  if (!state.key) return found;
  const compare = state.key === "name" ? (a, b) => byName(a.name, b.name) : (a, b) => (a[state.key] ?? -1) - (b[state.key] ?? -1);
  return found.sort((a, b) => (state.falling ? compare(b, a) : compare(a, b)));
}

function rowOf(scan) {
  const link = (...children) => (scan.page ? element("a", { href: scan.page }, ...children) : element("span", {}, ...children));
  const picture = scan.thumbnail
    ? element("img", { loading: "lazy", decoding: "async", alt: "", width: 144, height: 99, src: scan.thumbnail })
    : element("span", { className: "blank" });
  const title = element("bdi", { textContent: scan.name });
  const number = (textContent, word) => {
    const cell = element("td", { className: "number", textContent });
    cell.dataset.word = word;
    return cell;
  };
  const items = scan.counts.map(([row, boxes]) => element("li", {},
    element("i", { color: classes[row].color }), element("bdi", { textContent: classes[row].name }),
    element("b", { textContent: boxes.toLocaleString("en") })));
  const what = items.length ? element("ul", {}, ...items) : element("span", { className: "none", textContent: "no boxes" });
  const last = element("td", { className: "classes" }, what);
  if (scan.remarks.length) {
    const remarks = scan.remarks.map((textContent) => element("li", { textContent }));
    const summary = element("summary", { textContent: count(scan.remarks.length, "remark"), title: scan.remarks.join("\n") });
    last.append(element("details", { className: "remarks" }, summary, element("ul", {}, ...remarks)));
  }
  return element("tr", {},
    element("td", { className: "picture" }, link(picture)), element("td", { className: "name" }, link(title)),
    number(scan.boxes.toLocaleString("en"), scan.boxes === 1 ? "box" : "boxes"),
    number(scan.best === null ? "" : scan.best.toFixed(2), scan.best === null ? "" : "best"), last);
}

function update() {
  const found = matching();
  state.page = Math.max(0, Math.min(state.page, Math.ceil(found.length / ROWS) - 1));
  const first = state.page * ROWS;
  const shown = found.slice(first, first + ROWS);
  byId("rows").replaceChildren(...shown.map(rowOf));
  byId("matching").textContent = found.length < scans.length ? `${found.length.toLocaleString("en")} of ${count(scans.length, "scan")}` : "";
  byId("pager").hidden = found.length <= ROWS;
  byId("range").textContent = `${(first + 1).toLocaleString("en")} to ${(first + shown.length).toLocaleString("en")} of ${found.length.toLocaleString("en")}`;
  byId("previous").disabled = first === 0;
  byId("next").disabled = first + ROWS >= found.length;
  for (const head of document.querySelectorAll("[data-key]")) {
    if (head.dataset.key === state.key) head.ariaSort = state.falling ? "descending" : "ascending";
    else head.removeAttribute("aria-sort");
  }
}

function change(part) {
  Object.assign(state, { page: 0 }, part);
  update();
}

function turn(by) {
  change({ page: state.page + by });
  byId("scans").scrollIntoView();
}

byId("class").append(...classes.map(({ name }, row) => element("option", { value: row, textContent: name })));
byId("filter").addEventListener("input", () => change({ filter: byId("filter").value }));
byId("class").addEventListener("change", () => change({ label: byId("class").value }));
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
for (const head of document.querySelectorAll("[data-key]")) {
  const { key } = head.dataset;
  // Names begin with the first, numbers with the largest.
  const falling = () => (state.key === key ? !state.falling : key !== "name");
  head.firstChild.addEventListener("click", () => change({ key, falling: falling() }));
}
for (const part of ["filters", "table"]) byId(part).hidden = false;
// A browser that comes back to the page fills the fields in again.
change({ filter: byId("filter").value, label: byId("class").value });
