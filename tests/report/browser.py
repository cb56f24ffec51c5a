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
WIDE = 1400
TEXT, MARK = 4.5, 3.0  # the least contrast of a text, and of a mark that carries meaning (WCAG 2.2, AA)
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
  const waits = (c) => !c.querySelector("svg") && !c.textContent.includes("could not");
  const wait = async (some) => {
    for (let i = 0; i < 200 && some.some(waits); i++) await new Promise((done) => setTimeout(done, 100));
  };
  await wait(charts.filter((c) => !c.closest("details.more")));
  met.folded = document.documentElement.scrollHeight;
  document.getElementById("unfold")?.click(); // what is folded is looked at, too
  await wait(charts);
  // A chart that does not fit is drawn again, so wait until nothing changes.
  const drawn = () => charts.map((c) => c.querySelector("svg")?.outerHTML.length ?? 0).join();
  for (let i = 0, before = ""; i < 100 && before !== (before = drawn()); i++) {
    await new Promise((done) => setTimeout(done, 300));
  }
  const shown = (e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility !== "hidden";
  const rect = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const clear = (colour) => colour === "none" || /, 0\\)$/.test(colour);
  const paper = getComputedStyle(document.documentElement).backgroundColor;

  // Rectangles of one size, of more than a few px, are cells of a heat map; so is a single one with a number.
  const cells = new Set();
  const numbered = (e) => {
    const [left, top, right, bottom] = rect(e);
    return [...e.ownerSVGElement.querySelectorAll(".mark-text text")].some((text) => {
      const [l, t, r, b] = rect(text);
      return left < (l + r) / 2 && (l + r) / 2 < right && top < (t + b) / 2 && (t + b) / 2 < bottom;
    });
  };
  for (const group of document.querySelectorAll(".chart .mark-rect")) {
    const own = [...group.children].filter((e) => e.tagName === "path");
    const sizes = own.map((e) => { const b = e.getBBox(); return [Math.round(b.width), Math.round(b.height)]; });
    const same = sizes.every(([w, h]) => w === sizes[0][0] && h === sizes[0][1] && Math.min(w, h) > 8);
    if (same && own.length && (own.length > 1 || numbered(own[0]))) own.forEach((e) => cells.add(e));
  }
  const place = (e) => rect(e).map(Math.round).join();
  const places = new Set([...cells].map(place));
  for (const e of document.querySelectorAll(".chart .mark-rect path")) {
    if (+getComputedStyle(e).fillOpacity === 0 && places.has(place(e))) cells.add(e); // a frame around a cell
  }
  const behind = new Map();
  const under = (e) => {
    const svg = e.ownerSVGElement;
    if (!svg) {
      for (let at = e; at; at = at.parentElement) {
        const colour = getComputedStyle(at).backgroundColor;
        if (!clear(colour)) return colour;
      }
      return paper;
    }
    if (!behind.has(svg)) {
      const filled = [...svg.querySelectorAll(".mark-rect path")].filter((p) => cells.has(p));
      behind.set(svg, filled.map((p) => [rect(p), getComputedStyle(p)]).filter(([, s]) => +s.fillOpacity === 1));
    }
    const [left, top, right, bottom] = rect(e);
    const [x, y] = [(left + right) / 2, (top + bottom) / 2];
    const hits = behind.get(svg).filter(([[l, t, r, b]]) => l <= x && x <= r && t <= y && y <= b);
    return hits.length ? hits[hits.length - 1][1].fill : paper;
  };

  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    const words = walker.currentNode.textContent.trim();
    if (!words || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(e.tagName) || !shown(e)) continue;
    const style = getComputedStyle(e);
    const inked = e instanceof SVGElement;
    const opacity = +style.opacity * (inked ? +style.fillOpacity : 1);
    const colour = inked ? style.fill : style.color;
    if (opacity === 0) continue; // Vega hides labels of an axis that would overlap
    texts.push({ words, px: parseFloat(style.fontSize), colour, opacity, under: under(e) });
  }

  const marks = new Map();
  const kinds = ["symbol path", "line path", "rule line", "area path", "rect path", "trail path", "arc path"];
  for (const e of document.querySelectorAll(kinds.map((k) => `.chart .mark-${k}`).join(", "))) {
    if (e.closest(".role-axis, .role-legend-gradient, .role-legend-band") || cells.has(e) || !shown(e)) continue;
    const s = getComputedStyle(e);
    const box = e.getBoundingClientRect();
    if (Math.max(box.width, box.height) === 0 || (clear(s.fill) && clear(s.stroke))) continue;
    const name = e.closest(".chart").dataset.spec.slice(5);
    const kind = e.closest(".role-legend") ? "legend" : e.parentElement.getAttribute("class").split(" ")[0];
    const fill = clear(s.fill) ? null : [s.fill, +s.opacity * +s.fillOpacity];
    const stroke = clear(s.stroke) || !parseFloat(s.strokeWidth) ? null : [s.stroke, +s.opacity * +s.strokeOpacity];
    const mark = { name, kind, fill, stroke };
    marks.set(JSON.stringify(mark), mark);
  }

  met.charts = charts.map((c) => {
    const svg = c.querySelector("svg");
    const box = svg ? svg.getBoundingClientRect() : { width: 0, height: 0, right: 0 };
    const named = ".mark-rect path, .mark-symbol path, .mark-line path, .mark-rule line, .mark-area path";
    const title = c.parentElement.querySelector("h3");
    const legends = svg ? [...svg.querySelectorAll(".role-legend")].map((l) => l.getBoundingClientRect().right) : [];
    const range = document.createRange();
    if (title) range.selectNodeContents(title);
    const menu = c.querySelector("summary");
    const over = ([a, b, c, d], [e, f, g, h]) => a < g && e < c && b < h && f < d;
    const lines = title && menu ? [...range.getClientRects()] : [];
    const covered = lines.some((r) => over([r.left, r.top, r.right, r.bottom], rect(menu)));
    return {
      name: c.dataset.spec.slice(5), width: box.width, height: box.height, right: box.right,
      marks: svg ? svg.querySelectorAll(named).length : 0, legend: Math.max(0, ...legends), covered,
      cropped: c.scrollWidth > c.clientWidth + 1, cue: c.classList.contains("cropped"),
    };
  });
  met.texts = texts;
  met.marks = [...marks.values()];
  met.paper = paper;
  met.wide = document.documentElement.scrollWidth;
  met.tall = document.documentElement.scrollHeight;
  met.resources = performance.getEntriesByType("resource").map((r) => r.name);
  parent.postMessage(JSON.stringify({ width: innerWidth, met }), "*");
})();
</script>"""
# Chromium makes no window that is narrower than about 500 px, so each width is a frame.
FRAMES = """<!doctype html><meta name="color-scheme" content="light dark"><body>
<script>
const found = {};
addEventListener("message", (e) => {
  const { width, met } = JSON.parse(e.data);
  found[width] = met;
  if (Object.keys(found).length < document.querySelectorAll("iframe").length) return;
  const out = document.createElement("script");
  out.type = "application/json"; out.id = "met"; out.textContent = JSON.stringify(found).replace(/</g, "\\\\u003c");
  document.body.append(out);
});
</script>
"""


def look(page: Path, folder: Path, dark: bool = False, widths: Sequence[int] = (WIDE,)) -> dict[int, dict[str, Any]]:
    """What Chromium meets on the page, by the width of the window in px."""
    assert CHROMIUM is not None
    html = page.read_text()
    body, end = html.rsplit("</body>", 1)
    watched, frames = folder / f"watched-{dark}.html", folder / f"frames-{dark}.html"
    watched.write_text(body.replace("<head>", "<head>" + WATCH, 1) + LOOK + "</body>" + end)
    shown = [f'<iframe src="{watched.name}" style="border: 0; width: {w}px; height: 900px"></iframe>' for w in widths]
    frames.write_text(FRAMES + "".join(shown))
    command = [
        CHROMIUM, "--headless", "--disable-gpu", "--hide-scrollbars", f"--window-size={max(widths)},1000", "--dump-dom",
        "--virtual-time-budget=60000", f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        frames.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    found = re.search(r'<script type="application/json" id="met">(.*?)</script>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return {int(width): met for width, met in json.loads(found[1]).items()}


def faults(met: dict[str, Any], width: int) -> list[str]:
    """What is wrong with how the page looks: pale text or marks, overflow, legends off screen, crops without a cue."""
    found = [f"the page is {met['wide']} px wide in a window of {width} px"] if met["wide"] > width else []
    for t in met["texts"]:
        ratio = contrast(blend(t["colour"], t["opacity"], t["under"]), t["under"])
        found += [f"text {t['words'][:40]!r}: contrast {ratio:.2f}"] if ratio < TEXT else []
        found += [f"text {t['words'][:40]!r}: {t['px']} px"] if t["px"] < 12 else []
    for m in met["marks"]:
        parts = [contrast(blend(*part, met["paper"]), met["paper"]) for part in (m["fill"], m["stroke"]) if part]
        found += [f"{m['name']}, {m['kind']}: contrast {max(parts):.2f} {m}"] if max(parts) < MARK else []
    for c in met["charts"]:
        found += [f"{c['name']}: cropped without a cue"] if c["cropped"] and not c["cue"] else []
        found += [f"{c['name']}: the menu covers the title"] if c["covered"] else []
        found += [f"{c['name']}: the legend ends at {c['legend']:.0f} px"] if c["legend"] > width else []
    return found


def page_of(figures: Sequence[Figure]) -> str:
    """A bare page with some figures."""
    charts = "".join(
        f'<figure><div class="chart" data-spec="spec-{f.name}"></div>'
        f'<script type="application/json" id="spec-{f.name}">{f.json()}</script></figure>'
        for f in figures
    )
    library = vl_convert.javascript_bundle().replace("</script", "<\\/script")
    draw = files("mdrl_jax.report").joinpath("templates/charts.js").read_text()
    tip = '<div id="tip" hidden></div>'
    return f"<html><head></head><body>{charts}{tip}<script>{library}</script><script>{draw}</script></body></html>"


def blend(colour: str, opacity: float, under: str) -> str:
    """The opaque colour, as `rgb(…)`, of a colour with an opacity on an opaque one."""
    above, below = (list(map(float, re.findall(r"[\d.]+", c))) for c in (colour, under))
    share = opacity * (above[3] if len(above) > 3 else 1.0)
    return f"rgb({', '.join(str(round(share * a + (1 - share) * b)) for a, b in zip(above[:3], below, strict=False))})"


def contrast(a: str, b: str) -> float:
    """The WCAG contrast ratio of two opaque colours, as `rgb(…)`."""

    def luminance(colour: str) -> float:
        parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
