// The menu saves a chart alone; it needs no server.
const actions = { export: { png: true, svg: true }, source: false, compiled: false, editor: false };
for (const element of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(document.getElementById(element.dataset.spec).textContent);
  window
    .vegaEmbed(element, spec, { renderer: "svg", actions, downloadFileName: element.dataset.spec.slice(5) })
    .catch((error) => {
      element.textContent = `This chart could not be drawn: ${error}`;
      console.error(error);
    });
}
