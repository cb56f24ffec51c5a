"""Opens a report in headless Chromium and says what a reader would meet: errors, hidden charts, small or pale text."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import vl_convert

from mdrl_jax.report.figure import Figure

CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
WIDTH = 1280
WATCH = """<script>
const met = { errors: [], blocked: [] };
addEventListener("error", (e) => met.errors.push(String(e.message)));
addEventListener("unhandledrejection", (e) => met.errors.push(String(e.reason)));
addEventListener("securitypolicyviolation", (e) => met.blocked.push(e.blockedURI));
for (const level of ["error", "warn"]) {
  const before = console[level];
  console[level] = (...args) => { met.errors.push(args.map(String).join(" ")); before(...args); };
}
</script>"""
LOOK = """<script>
(async () => {
  const charts = [...document.querySelectorAll(".chart")];
  for (let i = 0; i < 200 && charts.some((c) => !c.querySelector("svg") && !c.textContent.includes("could not")); i++) {
    await new Promise((done) => setTimeout(done, 100));
  }
  const shown = (e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== "hidden";
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    const words = walker.currentNode.textContent.trim();
    if (!words || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(e.tagName) || !shown(e)) continue;
    const style = getComputedStyle(e);
    const inked = e instanceof SVGElement;
    const cell = inked && !e.closest(".role-axis, .role-legend, .role-title, .role-row-header, .role-column-header");
    texts.push({ words, px: parseFloat(style.fontSize), colour: inked ? style.fill : style.color, cell });
  }
  met.charts = charts.map((c) => {
    const svg = c.querySelector("svg");
    const box = svg ? svg.getBoundingClientRect() : { width: 0, height: 0, right: 0 };
    const kinds = ".mark-rect path, .mark-symbol path, .mark-line path, .mark-rule line, .mark-area path";
    const marks = svg ? svg.querySelectorAll(kinds).length : 0;
    return { name: c.dataset.spec.slice(5), width: box.width, height: box.height, right: box.right, marks };
  });
  met.texts = texts;
  met.paper = getComputedStyle(document.documentElement).backgroundColor;
  met.wide = document.documentElement.scrollWidth;
  met.resources = performance.getEntriesByType("resource").map((r) => r.name);
  const out = document.createElement("script");
  out.type = "application/json"; out.id = "met"; out.textContent = JSON.stringify(met).replace(/</g, "\\\\u003c");
  document.body.append(out);
})();
</script>"""


def look(page: Path, folder: Path, dark: bool = False) -> dict[str, Any]:
    """What Chromium meets on the page, 1280 px wide."""
    assert CHROMIUM is not None
    html = page.read_text()
    body, end = html.rsplit("</body>", 1)
    watched = folder / f"watched-{dark}.html"
    watched.write_text(body.replace("<head>", "<head>" + WATCH, 1) + LOOK + "</body>" + end)
    command = [
        CHROMIUM, "--headless", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},1000", "--dump-dom",
        "--virtual-time-budget=60000", f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        watched.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<script type="application/json" id="met">(.*?)</script>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(found[1])


def page_of(figures: Sequence[Figure]) -> str:
    """A bare page with some figures."""
    charts = "".join(
        f'<div class="chart" data-spec="spec-{f.name}"></div>'
        f'<script type="application/json" id="spec-{f.name}">{f.json()}</script>'
        for f in figures
    )
    library = vl_convert.javascript_bundle().replace("</script", "<\\/script")
    draw = files("mdrl_jax.report").joinpath("templates/charts.js").read_text()
    return f"<html><head></head><body>{charts}<script>{library}</script><script>{draw}</script></body></html>"


def contrast(a: str, b: str) -> float:
    """The WCAG contrast ratio of two opaque colours, as `rgb(…)`."""

    def luminance(colour: str) -> float:
        parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
