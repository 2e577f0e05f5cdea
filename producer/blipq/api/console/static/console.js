// What pages do beyond forms and links, which work without it: they stay fresh, show
// the picture that was dropped, and copy texts. Nothing here puts text into HTML.
"use strict";

const FRESH_MS = 2000;
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

function refresh(event) {
  if (document.visibilityState === "visible" && !disturbs()) htmx.trigger(document.body, event);
}

setInterval(() => refresh("tick"), FRESH_MS);
document.addEventListener("visibilitychange", () => refresh("tick"));

// A fresh copy has the focus and the scrolled tables of the one that it replaces.

const identity = (element) => {
  const form = element.closest("form");
  const about = form && one("input[name=id], input[name=event]", form);
  return [element.tagName, element.textContent.trim(), element.getAttribute("href"), about?.value]
    .join("|");
};
const scrolling = ".scroll, pre";
let kept = { focus: null, scrolled: [] };

document.addEventListener("htmx:beforeSwap", () => {
  const live = one("#live");
  const active = document.activeElement;
  kept = {
    focus: live && live.contains(active) ? identity(active) : null,
    scrolled: live ? [...all(scrolling, live)].map((each) => each.scrollLeft) : [],
  };
});
document.addEventListener("htmx:afterSwap", () => {
  const live = one("#live");
  if (!live) return;
  all(scrolling, live).forEach((each, place) => (each.scrollLeft = kept.scrolled[place] ?? 0));
  if (kept.focus === null) return;
  const same = [...all("a, button, summary, [tabindex]", live)].find(
    (each) => identity(each) === kept.focus,
  );
  if (same) same.focus({ preventScroll: true });
});

const lost = (yes) => one("#lost").toggleAttribute("hidden", !yes);
document.addEventListener("htmx:sendError", () => lost(true));
document.addEventListener("htmx:timeout", () => lost(true));
document.addEventListener("htmx:responseError", (event) => lost(event.detail.xhr.status !== 401));
document.addEventListener("htmx:afterOnLoad", (event) => {
  if (event.detail.xhr.status < 400) lost(false);
});

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
    stages.addEventListener(name, () => refresh("stage"));
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
document.addEventListener("htmx:afterSettle", begin);
