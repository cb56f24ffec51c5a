// The menu saves a chart alone; it needs no server.
const actions = { export: { png: true, svg: true }, source: false, compiled: false, editor: false };

// A specification whose parts are stacked and whose plots are at most `most` px wide. Charts with placed names stay as they are.
function narrowed(spec, most) {
  const made = { ...spec };
  if (made.usermeta?.fixed) return made;
  if (Array.isArray(made.hconcat) && !made.usermeta?.aligned) {
    made.vconcat = made.hconcat;
    delete made.hconcat;
  }
  for (const key of ["vconcat", "hconcat", "concat"]) {
    if (made[key]) made[key] = made[key].map((part) => narrowed(part, made.hconcat ? most / made.hconcat.length : most));
  }
  if (made.concat) made.columns = 1;
  if (made.facet && made.spec) {
    const gap = typeof made.spacing === "number" ? made.spacing : (made.spacing?.column ?? 20);
    const wide = made.spec.width ?? most;
    made.columns = Math.max(1, Math.min(made.columns ?? Infinity, Math.floor((most + gap) / (wide + gap))));
    made.spec = narrowed(made.spec, most);
  }
  if (typeof made.width === "number") made.width = Math.min(made.width, most);
  return made;
}

async function draw(element) {
  const spec = JSON.parse(document.getElementById(element.dataset.spec).textContent);
  const options = { renderer: "svg", actions, downloadFileName: element.dataset.spec.slice(5) };
  await window.vegaEmbed(element, spec, options);
  // On a narrow screen: what the axes need is only known after drawing, so the plots shrink until the chart fits.
  let most = element.clientWidth;
  for (let i = 0; i < 3 && excess(element) > 0; i++) {
    most -= i ? excess(element) : Math.min(60, most / 4);
    if (most < 90) break;
    await window.vegaEmbed(element, narrowed(spec, most), options);
  }
}

const excess = (element) => Math.ceil(element.querySelector("svg").getBoundingClientRect().width) - element.clientWidth;

// Says which charts and tables go on to the right.
function cue() {
  for (const element of document.querySelectorAll(".wide")) {
    element.classList.toggle("cropped", element.scrollWidth > element.clientWidth + 1);
  }
}

for (const element of document.querySelectorAll(".chart")) {
  draw(element)
    .catch((error) => {
      element.textContent = `This chart could not be drawn: ${error}`;
      console.error(error);
    })
    .finally(cue);
}
cue();
addEventListener("resize", cue);

// The meaning of a term, beside it and inside the window.
const tip = document.getElementById("tip");
const hide = () => (tip.hidden = true);
for (const term of document.querySelectorAll(".term")) {
  const text = term.title;
  term.removeAttribute("title"); // the browser would show it a second time
  term.setAttribute("aria-description", text);
  const show = () => {
    tip.textContent = text;
    tip.hidden = false;
    const at = term.getBoundingClientRect();
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(at.left, room))}px`;
    const below = at.bottom + 6;
    tip.style.top = `${below + tip.offsetHeight > innerHeight ? at.top - tip.offsetHeight - 6 : below}px`;
  };
  for (const event of ["mouseenter", "focus"]) term.addEventListener(event, show);
  for (const event of ["mouseleave", "blur"]) term.addEventListener(event, hide);
}
addEventListener("scroll", hide, { passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && hide());
