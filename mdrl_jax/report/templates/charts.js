// The menu saves a chart alone; it needs no server.
const actions = { export: { png: true, svg: true }, source: false, compiled: false, editor: false };

const gap = (spec) => (typeof spec.spacing === "number" ? spec.spacing : (spec.spacing?.column ?? 20));
const sum = (sizes) => sizes.reduce((a, b) => a + b, 0);

// The px that the plots of a specification take side by side, without axes.
function taken(spec) {
  if (spec.hconcat) return sum(spec.hconcat.map(taken));
  const below = spec.vconcat ?? spec.concat;
  if (below) return Math.max(...below.map(taken)) * (spec.concat ? (spec.columns ?? 1) : 1);
  if (spec.facet) return (spec.columns ?? 1) * (taken(spec.spec) + gap(spec));
  return typeof spec.width === "number" ? spec.width : 0;
}

// A specification whose parts are stacked, whose lines of small charts are shorter by `fewer`, and whose plots take at most
// `most` px side by side. A chart with placed names stays as it is, and so do parts that share the names of their lines.
function narrowed(spec, most, fewer) {
  const made = { ...spec };
  if (made.name === "fixed") return made;
  if (made.hconcat && made.name !== "aligned") {
    made.vconcat = made.hconcat;
    delete made.hconcat;
  }
  if (made.concat) made.columns = 1;
  for (const key of ["vconcat", "hconcat", "concat"]) {
    const share = key === "hconcat" ? (part) => (most * taken(part)) / taken(made) : () => most;
    if (made[key]) made[key] = made[key].map((part) => narrowed(part, share(part), fewer));
  }
  if (made.facet && made.spec) {
    const each = (columns) => Math.floor(most / columns) - gap(made);
    let columns = Math.max(1, (made.columns ?? 1) - fewer);
    while (columns > 1 && each(columns) < Math.min(taken(made.spec), 90)) columns--;
    made.columns = columns;
    made.spec = narrowed(made.spec, each(columns), fewer);
  }
  if (typeof made.width === "number") made.width = Math.min(made.width, Math.max(most, 90));
  return made;
}

// A specification whose legends have at most `columns` columns.
function wrapped(spec, columns) {
  const legend = (key, value) => (key === "legend" && value?.constructor === Object ? { ...value, columns } : value);
  return JSON.parse(JSON.stringify(spec), legend);
}

async function draw(element) {
  const spec = JSON.parse(document.getElementById(element.dataset.spec).textContent);
  const options = { renderer: "svg", actions, downloadFileName: element.dataset.spec.slice(5) };
  await window.vegaEmbed(element, spec, options);
  // What axes and titles need is only known after drawing, so the plots shrink until the chart fits.
  let most = taken(spec);
  for (let i = 0; i < (spec.name === "fixed" ? 1 : 8) && excess(element) > 0; i++) {
    if (i % 2) most = Math.max(most - excess(element), 90);
    await window.vegaEmbed(element, wrapped(narrowed(spec, most, i >> 2), i < 4 ? 2 : 1), options);
  }
}

const excess = (element) => Math.ceil(element.querySelector("svg").getBoundingClientRect().width) - element.clientWidth;

// Says which charts and tables go on to the right.
function cue() {
  for (const element of document.querySelectorAll(".wide")) {
    element.classList.toggle("cropped", element.scrollWidth > element.clientWidth + 1);
  }
}

const show = (element) =>
  draw(element)
    .catch((error) => {
      element.textContent = `This chart could not be drawn: ${error}`;
      console.error(error);
    })
    .finally(cue);

// A chart in a folded part has no width yet, so it is drawn when its part is first opened.
const undrawn = new Set(document.querySelectorAll(".chart"));
function drawShown() {
  for (const element of undrawn) {
    if (element.closest("details.more:not([open])")) continue;
    undrawn.delete(element);
    show(element);
  }
  cue();
}
const folded = [...document.querySelectorAll("main details")].filter((part) => !part.closest(".chart"));
const unfold = document.getElementById("unfold");
for (const part of folded) part.addEventListener("toggle", drawShown);
unfold?.addEventListener("click", () => {
  const closed = folded.some((part) => !part.open);
  folded.forEach((part) => (part.open = closed));
  unfold.textContent = closed ? "Close all details" : "Open all details";
});
drawShown();
addEventListener("resize", cue);

// The meaning of a term, beside it and inside the window.
const tip = document.getElementById("tip");
const hide = () => (tip.hidden = true);
for (const term of document.querySelectorAll(".term")) {
  const text = term.title;
  term.removeAttribute("title"); // the browser would show it a second time
  term.setAttribute("aria-description", text);
  const explain = () => {
    tip.textContent = text;
    tip.hidden = false;
    const at = term.getBoundingClientRect();
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(at.left, room))}px`;
    const below = at.bottom + 6;
    tip.style.top = `${below + tip.offsetHeight > innerHeight ? at.top - tip.offsetHeight - 6 : below}px`;
  };
  for (const event of ["mouseenter", "focus"]) term.addEventListener(event, explain);
  for (const event of ["mouseleave", "blur"]) term.addEventListener(event, hide);
}
addEventListener("scroll", hide, { passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && hide());
