// What pages do beyond forms and links, which work without it: they stay fresh, show
// the picture that was dropped, and copy texts. Nothing here puts text into HTML.
"use strict";

const FRESH_MS = 2000;
const TIMEOUT_MS = 15000;
const one = (what, within = document) => within.querySelector(what);
const all = (what, within = document) => within.querySelectorAll(what);

// -- fresh pages --

// Whoever reads a question, writes or marks a text would lose it to a new copy of the page.
function disturbs() {
  const live = one("#live");
  if (!live) return true;
  const active = document.activeElement;
  const selected = document.getSelection();
  return Boolean(
    one("details[open]", live) ||
      (active && live.contains(active) && active.matches("input, select, textarea")) ||
      (selected && !selected.isCollapsed && live.contains(selected.anchorNode)),
  );
}

const lost = (yes) => one("#lost").toggleAttribute("hidden", !yes);
let fetching = false;

// One request at a time: a slow door gets no second one meanwhile.
async function refresh() {
  if (fetching || !one("#live[data-fresh]") || document.visibilityState !== "visible") return;
  if (disturbs()) return;
  fetching = true;
  try {
    const answer = await fetch(location.href, {
      headers: { "X-Refresh": "1" },
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    if (answer.status === 401) return location.assign("login");
    if (!answer.ok) throw new Error(answer.status);
    const copy = one("#live", new DOMParser().parseFromString(await answer.text(), "text/html"));
    lost(false);
    if (copy && !disturbs()) replace(one("#live"), copy);
  } catch {
    lost(true);
  } finally {
    fetching = false;
  }
}

setInterval(refresh, FRESH_MS);
document.addEventListener("visibilitychange", refresh);

// A fresh copy has the focus and the scrolled tables of the one that it replaces.

const identity = (element) => {
  const form = element.closest("form");
  const about = form && one("input[name=id], input[name=event]", form);
  return [element.tagName, element.textContent.trim(), element.getAttribute("href"), about?.value]
    .join("|");
};
const scrolling = ".scroll, pre";

function replace(live, copy) {
  const focus = live.contains(document.activeElement) ? identity(document.activeElement) : null;
  const scrolled = [...all(scrolling, live)].map((each) => each.scrollLeft);
  live.replaceWith(copy); // adopted from a document that runs no scripts
  all(scrolling, copy).forEach((each, place) => (each.scrollLeft = scrolled[place] ?? 0));
  const same = [...all("a, button, summary, [tabindex]", copy)].find(
    (each) => identity(each) === focus,
  );
  if (same) same.focus({ preventScroll: true });
  begin();
}

// -- a job's stages, as the door sends them --

let stages = null;

function follow() {
  const live = one("[data-stages]");
  if (!live) {
    if (stages) stages.close();
    stages = null;
    return;
  }
  if (stages) return;
  stages = new EventSource(live.dataset.stages);
  for (const name of ["running", "retrying", "succeeded", "failed", "cancelled", "expired"]) {
    stages.addEventListener(name, refresh);
  }
}

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
  watchPictures();
  watchCopies();
}

watchDrop();
begin();
