// Keyboard shortcuts of the review page. Everything works without them.
"use strict";

let current = ""; // id of the row that is chosen in the queue; the queue is swapped under it

function rows() {
  return Array.from(document.querySelectorAll(".row"));
}

function choose(step) {
  const list = rows();
  if (list.length === 0) return false;
  const at = list.findIndex((row) => row.id === current);
  const next = list[Math.min(Math.max(at + step, 0), list.length - 1)];
  current = next.id;
  mark();
  next.focus({ preventScroll: true });
  next.scrollIntoView({ block: "nearest" });
  return true;
}

function mark() {
  current ||= document.querySelector(".row.chosen")?.id ?? "";
  rows().forEach((row) => row.classList.toggle("chosen", row.id === current));
}

function toggle(id) {
  const element = document.getElementById(id);
  if (!element) return;
  if (element.tagName === "DETAILS") {
    element.open = !element.open;
    if (element.open) element.scrollIntoView({ block: "nearest" });
  } else {
    element.checked = !element.checked;
  }
}

function pick() {
  const box = document.getElementById(current)?.closest("li").querySelector(".pick");
  if (box) box.checked = !box.checked;
}

function pickAll() {
  const boxes = Array.from(document.querySelectorAll(".pick"));
  const all = boxes.every((box) => box.checked);
  boxes.forEach((box) => { box.checked = !all; });
}

function enlarge(link) {
  const dialog = document.getElementById("large");
  const image = new Image();
  image.src = link.href;
  image.alt = link.querySelector("img[alt]:not([alt=''])")?.alt ?? "";
  dialog.replaceChildren(image, dialog.querySelector("form"));
  dialog.showModal();
}

function showKeys() {
  document.getElementById("keys").showModal();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const target = event.target;
  if (target.closest("input:not([type=checkbox]), textarea, select, dialog")) {
    if (event.key === "Escape") target.blur();
    return;
  }
  const keys = {
    x: pick,
    X: pickAll,
    h: () => toggle("heat"),
    s: () => toggle("score"),
    m: () => document.querySelector("[data-comment]")?.focus(),
    "?": showKeys,
  };
  if (event.key === "j" && choose(1) || event.key === "k" && choose(-1)) {
    event.preventDefault();
    return;
  }
  const act = keys[event.key];
  if (act) {
    event.preventDefault();
    act();
    return;
  }
  if (!/^[a-z]$/.test(event.key) || event.repeat) return;
  const button = document.querySelector(`[data-key="${event.key}"]`);
  if (button) {
    event.preventDefault();
    button.click();
  }
});

document.addEventListener("click", (event) => {
  if (event.target.closest("[data-keys]")) showKeys();
  if (event.target.closest("[data-all]")) pickAll();
  const link = event.target.closest("[data-enlarge]");
  if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
    event.preventDefault();
    enlarge(link);
  }
});

// The row that the reviewer comes back from is where the keys go on.
mark();
document.getElementById(current)?.scrollIntoView({ block: "center" });

// What a swap brings in is as the server made it: open what was open before.
let opened = {};
document.addEventListener("htmx:beforeSwap", () => {
  opened = {
    score: document.getElementById("score")?.open, heat: document.getElementById("heat")?.checked,
    notices: document.querySelector(".notices")?.open,
  };
});
document.addEventListener("htmx:beforeRequest", (event) => { // a refresh would lose the selection
  if (event.target.id === "queue" && document.querySelector(".pick:checked")) event.preventDefault();
});
document.addEventListener("htmx:afterSettle", () => {
  mark();
  const score = document.getElementById("score");
  if (score && opened.score) score.open = true;
  const heat = document.getElementById("heat");
  if (heat && opened.heat) heat.checked = true;
  const notices = document.querySelector(".notices");
  if (notices && opened.notices) notices.open = true;
  document.querySelector(".flash")?.scrollIntoView({ block: "nearest" });
});
