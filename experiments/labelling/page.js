"use strict";

const RETRY_MS = 1000;
const LONG = 240; // characters of a prompt above which it is set smaller
const SMALL_PX = 256; // pictures below this are enlarged without smoothing
const KEYS = {
  ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", t: "tie", s: "skip", u: "undo", Backspace: "undo",
};
const SCREENS = ["choosing", "starting", "waiting", "ended"];

const $ = (id) => document.getElementById(id);
const pictures = new Map(); // address -> <img> that has begun to load
let annotator = "";
let state = null;
let version = 0; // grows with everything that the person does: an answer to something older is not shown
let busy = false; // a choice is on its way: keys wait for the next pair

function notice(text) {
  $("notice").hidden = !text;
  $("notice").textContent = text || "";
}

// Asks until the server answers. What was sent is meant once, however often it arrives.
async function ask(path, body) {
  for (;;) {
    let answer, text;
    try {
      answer = await fetch(path, body && {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
      });
      text = await answer.text();
    } catch {
      notice(body
        ? "No connection to the server. Your last choice is kept here and is sent as soon as it is back."
        : "No connection to the server. Trying again.");
      await new Promise((done) => setTimeout(done, RETRY_MS));
      continue;
    }
    if (answer.ok) {
      const found = JSON.parse(text);
      notice(found.problem && `No more pairs come: ${found.problem}`);
      return found;
    }
    try {
      notice(JSON.parse(text).error);
    } catch {
      notice(text);
    }
    return null;
  }
}

const stateAddress = () => `state?annotator=${encodeURIComponent(annotator)}`;

function picture(address) {
  if (!pictures.has(address)) {
    const image = new Image();
    image.alt = "";
    image.draggable = false;
    image.addEventListener("load", () => {
      image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) < SMALL_PX);
      enable();
    });
    image.addEventListener("error", async () => {
      if (image.dataset.again) {
        image.dataset.broken = "yes";
        image.remove();
        enable();
      } else { // perhaps the server was away: once more when it answers
        image.dataset.again = "yes";
        await ask(stateAddress());
        image.src = `${address}?again`;
      }
    });
    image.src = address;
    pictures.set(address, image);
  }
  return pictures.get(address);
}

const loaded = (address) => picture(address).complete && picture(address).naturalWidth > 0;
const broken = (address) => picture(address).dataset.broken === "yes";

function allowed(answer) {
  if (busy || !state) return false;
  if (answer === "undo") return state.last !== null;
  if (!state.pair) return false;
  return answer === "skip" || (loaded(state.pair.left) && loaded(state.pair.right));
}

function enable() {
  for (const button of document.querySelectorAll("footer [data-answer]")) {
    button.disabled = !allowed(button.dataset.answer);
  }
  $("undo").disabled = !allowed("undo");
  for (const side of ["left", "right"]) {
    $(side).classList.toggle("broken", Boolean(state && state.pair && broken(state.pair[side])));
  }
}

function screen(name) {
  for (const id of SCREENS) $(id).hidden = id !== name;
  $("progress").hidden = $("keys").hidden = name === "starting";
  $("answers").hidden = $("skip").hidden = name !== "choosing";
}

function show(next) {
  state = next;
  const done = state.chosen + state.skipped;
  $("bar").max = state.total;
  $("bar").value = done;
  $("count").textContent = `${done} of ${state.total}` + (state.skipped ? `, ${state.skipped} skipped` : "");
  $("supply").textContent = state.ready < state.total ? `${state.ready} ${state.makes}` : "";
  $("who").textContent = annotator;
  if (state.pair) {
    showPair();
  } else if (state.ready < state.total && !state.problem) {
    $("made").textContent = state.makes;
    screen("waiting");
  } else {
    showEnd();
  }
  enable();
}

function showPair() {
  const wanted = [state.pair, state.next].filter(Boolean).flatMap((pair) => [pair.left, pair.right]);
  for (const address of pictures.keys()) if (!wanted.includes(address)) pictures.delete(address);
  if ($("prompt").dataset.key !== state.pair.key) {
    $("prompt").dataset.key = state.pair.key;
    $("prompt").textContent = state.pair.prompt;
    $("prompt").classList.toggle("long", state.pair.prompt.length > LONG);
    for (const side of ["left", "right"]) {
      $(side).classList.remove("taken");
      $(side).replaceChildren(picture(state.pair[side]));
    }
  }
  wanted.forEach(picture);
  screen("choosing");
}

function showEnd() {
  const rest = state.total - state.chosen - state.skipped;
  $("prompt").dataset.key = "";
  $("verdict").textContent = rest ? "No more pairs come" : "All pairs are done";
  $("summary").textContent = `${state.chosen} chosen, ${state.skipped} skipped` + (rest ? `, ${rest} left` : "") + ".";
  $("record").textContent = state.record;
  $("command").textContent = state.command;
  screen("ended");
}

async function act(answer) {
  if (!allowed(answer)) return;
  busy = true;
  version += 1;
  enable();
  if (answer === "left" || answer === "right") $(answer).classList.add("taken");
  const next = answer === "undo"
    ? await ask("undo", { annotator, pair: state.last })
    : await ask("choice", { annotator, pair: state.pair.key, answer });
  busy = false;
  for (const side of ["left", "right"]) $(side).classList.remove("taken");
  if (next) show(next);
  enable();
}

// While pairs are being made their number grows, and the next one may have come.
async function watch() {
  if (state && !busy && state.ready < state.total && !state.problem) {
    const seen = version;
    const next = await ask(stateAddress());
    if (next && version === seen) show(next);
  }
  setTimeout(watch, RETRY_MS);
}

async function begin(name) {
  annotator = name;
  version += 1;
  history.replaceState(null, "", `?annotator=${encodeURIComponent(name)}`);
  const found = await ask(stateAddress());
  if (found) {
    annotator = found.annotator;
    show(found);
  } else {
    start();
  }
}

function start() {
  $("name").value = annotator;
  annotator = "";
  state = null;
  version += 1;
  $("prompt").dataset.key = "";
  screen("starting");
  $("name").focus();
}

document.addEventListener("keydown", (event) => {
  const undo = event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey);
  if (!state || event.repeat || event.altKey || (!undo && (event.ctrlKey || event.metaKey))) return;
  const answer = undo ? "undo" : KEYS[event.key] || KEYS[event.key.toLowerCase()];
  if (answer) {
    event.preventDefault();
    act(answer);
  }
});
for (const button of document.querySelectorAll("[data-answer]")) {
  button.addEventListener("click", () => { button.blur(); act(button.dataset.answer); });
}
$("undo").addEventListener("click", () => { $("undo").blur(); act("undo"); });
$("who").addEventListener("click", start);
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  begin($("name").value);
});

const given = new URLSearchParams(location.search).get("annotator");
if (given) begin(given); else start();
watch();
