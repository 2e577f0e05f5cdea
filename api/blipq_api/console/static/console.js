// What pages do beside htmx, which renews them and swaps parts of them. Without scripts the same
// pages are links and forms, and stand still. Nothing here puts text into HTML.
"use strict";

const one = (what, within = document) => within.querySelector(what);
const all = (what, within = document) => within.querySelectorAll(what);
const on = (name, act) => document.addEventListener(name, act);

// -- what htmx may ask for, and may put into the page --

const SCROLLING = ".scroll, pre";
let scrolled = [];

// Whoever reads a question, writes, marks a text or waits for an answer would lose that to a new
// copy of the page.
function disturbs() {
  const live = one("#live");
  if (!live) return true;
  const active = document.activeElement;
  const selected = document.getSelection();
  return Boolean(
    one("details.confirm[open]", live) ||
      one("#main :is(a, form).htmx-request") ||
      (live.contains(active) && active.matches("input, select, textarea")) ||
      (!selected.isCollapsed && live.contains(selected.anchorNode)),
  );
}

const renews = (detail) => detail.requestConfig.elt.id === "fresh";
const show = (what, yes) => one(what).toggleAttribute("hidden", !yes);

on("htmx:beforeRequest", (event) => {
  const unseen = document.visibilityState !== "visible";
  if (renews(event.detail) && (unseen || disturbs())) event.preventDefault();
});

const SILENT = one("#lost span").textContent;

function lost(why) {
  const said = one("#lost span");
  if (why && said.textContent !== why) said.textContent = why; // a change is read out
  show("#lost", why);
}

// A renewal is repeated by itself. Nothing else is, and it may have been done: that notice stays
// until something else that was asked for has an answer.
function unanswered({ detail }) {
  if (renews(detail)) lost(SILENT);
  else show("#unanswered", true);
}
on("htmx:sendError", unanswered);
on("htmx:timeout", unanswered);

function problemIn(text) {
  const page = new DOMParser().parseFromString(text, "text/html");
  return [...all("#main :is(h1, .alert p)", page)].map((each) => each.textContent).join(": ");
}

// An error in place of a renewed page leaves that as it is; so does a proxy's own page.
on("htmx:beforeSwap", (event) => {
  const { detail } = event;
  const fresh = renews(detail);
  const answered = detail.serverResponse.includes('<main id="main"');
  const refused = fresh && detail.isError;
  detail.shouldSwap = answered && !refused && !(fresh && disturbs());
  if (!answered) unanswered(event);
  else lost(refused && `${problemIn(detail.serverResponse)}.`);
  if (answered && !fresh) show("#unanswered", false);
  if (fresh) keepPlace(detail);
  scrolled = fresh ? [...all(SCROLLING)].map((each) => each.scrollLeft) : [];
});

function keepPlace(detail) {
  detail.pathInfo.anchor = undefined; // the page's own: htmx would scroll there at each renewal
  // Opened only after the swap, the page would be shorter for a moment, and lose its place.
  const opened = one(".values")?.open ? '<details class="values" open>' : "$&";
  detail.serverResponse = detail.serverResponse.replace('<details class="values">', opened);
}

on("htmx:afterSwap", ({ detail }) => {
  all(SCROLLING).forEach((each, place) => (each.scrollLeft = scrolled[place] ?? 0));
  // htmx gives the focus to what has the same id. Where nothing has, it must not be lost.
  const focused = document.activeElement !== document.body;
  if (!renews(detail) && !focused) one("#main").focus({ preventScroll: true });
  begin();
});

// -- a job's stages, as the door sends them --

let stages = null;

function follow() {
  const live = one("[data-stages]");
  if (!live) {
    stages?.close();
    stages = null;
  } else if (!stages) {
    stages = new EventSource(live.dataset.stages);
    for (const name of ["running", "retrying", "succeeded", "failed", "cancelled", "expired"]) {
      stages.addEventListener(name, () => document.dispatchEvent(new Event("stage")));
    }
  }
}

// -- the chart, from the table of its values --

const HEIGHT = 160;
const theme = getComputedStyle(document.documentElement);
const colour = (name) => () => theme.getPropertyValue(name);
let chart = null;
let labels = [];

function draw() {
  const host = one("#chart");
  const cells = [...all("#values data")];
  const numbers = cells.map((each) => Number(each.value));
  const data = [0, 1].map((column) => numbers.filter((_, place) => place % 2 === column));
  labels = cells.filter((_, place) => place % 2 === 0).map((each) => each.textContent);
  if (!host) chart = null;
  else if (chart?.root.isConnected) chart.setData(data);
  else chart = charted(host, data);
}

function charted(host, data) {
  const axis = {
    font: `13px ${theme.getPropertyValue("--sans")}`,
    stroke: colour("--soft"),
    ticks: { show: false },
  };
  const made = new uPlot(
    {
      width: host.clientWidth,
      height: HEIGHT,
      cursor: { y: false, drag: { x: false }, points: { show: false } },
      legend: { markers: { show: false } },
      scales: {
        x: { time: false, range: (self) => [self.data[0][0], 0] },
        y: { range: (self, least, most) => [0, most] },
      },
      axes: [
        {
          ...axis,
          size: 30,
          grid: { show: false },
          splits: ({ data: [xs] }) => [xs[0], xs[xs.length / 2], 0],
          values: ({ data: [xs] }, splits) => splits.map((x) => labels[xs.indexOf(x)] ?? "now"),
        },
        { ...axis, size: 46, grid: { stroke: colour("--line"), width: 1 } },
      ],
      series: [
        { label: "From", value: (self, x, series, place) => labels[place] ?? "–" },
        {
          label: "Per second",
          fill: colour("--bar"),
          paths: uPlot.paths.bars({ size: [0.86, Infinity], align: 1 }),
          points: { show: false },
          value: (self, y) => y?.toFixed(1) ?? "–",
        },
      ],
    },
    data,
    host,
  );
  new ResizeObserver(() => made.setSize({ width: host.clientWidth, height: HEIGHT })).observe(host);
  return made;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => chart?.redraw());

// -- pictures that cannot be shown --

function watchPictures() {
  for (const picture of all("img[data-picture]")) {
    const failed = () => {
      picture.hidden = true;
      picture.nextElementSibling.hidden = false;
    };
    if (picture.complete && !picture.naturalWidth) failed();
    else picture.addEventListener("error", failed, { once: true });
  }
}

// -- the picture to try --

async function preview(drop, file) {
  one("[data-name]", drop).textContent = file ? file.name : "";
  const canvas = one("canvas", drop);
  canvas.hidden = true;
  if (!file) return;
  try {
    const image = await createImageBitmap(file);
    const scale = Math.min(1, 1200 / Math.max(image.width, image.height));
    canvas.width = Math.max(1, Math.round(image.width * scale));
    canvas.height = Math.max(1, Math.round(image.height * scale));
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.hidden = false;
  } catch {
    one("[data-name]", drop).textContent = `${file.name}: this browser draws no such picture`;
  }
}

function watchDrop() {
  const drop = one("[data-drop]");
  if (!drop) return;
  const input = one("input", drop);
  input.addEventListener("change", () => preview(drop, input.files[0]));
  for (const [name, over] of [["dragenter", true], ["dragleave", false], ["drop", false]]) {
    drop.addEventListener(name, () => drop.classList.toggle("over", over));
  }
}

// -- copies --

function watchCopies() {
  for (const button of all("[data-copy]")) {
    button.hidden = !navigator.clipboard;
    button.addEventListener("click", async () => {
      const text = one("pre", button.closest(".snippet")).textContent;
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
  }
}

function begin() {
  follow();
  draw();
  watchPictures();
  watchCopies();
}

watchDrop();
begin();
