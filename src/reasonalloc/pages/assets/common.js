"use strict";

// The data of the page: facts (JSON) and arrays of whole numbers, each deflated.
async function unpack(entry) {
  const bytes = Uint8Array.from(atob(entry.deflated), (letter) => letter.charCodeAt(0));
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const content = await new Response(inflated).arrayBuffer();
  const kinds = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array };
  const numbers = new kinds[entry.kind](content);
  numbers.shape = entry.shape;
  return numbers;
}

async function readData() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const facts = JSON.parse(new TextDecoder().decode(await unpack(data.facts)));
  for (const name in data.arrays) facts[name] = await unpack(data.arrays[name]);
  return facts;
}

const element = (id) => document.getElementById(id);

function styleValue(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Colours from few (0) to many (1), as [red, green, blue]; made anew when light turns to dark.
let scale = [];
function readScale() {
  const stops = styleValue("--scale").split(",").map((stop) => parseInt(stop.trim().slice(1), 16));
  scale = stops.map((number) => [number >> 16, (number >> 8) & 255, number & 255]);
}

function rgb(share) {
  const at = Math.min(Math.max(share, 0), 1) * (scale.length - 1);
  const low = Math.min(Math.floor(at), scale.length - 2);
  return scale[low].map((value, i) => Math.round(value + (scale[low + 1][i] - value) * (at - low)));
}

const colour = (share) => `rgb(${rgb(share).join(",")})`;

function inkOn(share) {
  const [red, green, blue] = rgb(share);
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#14181b" : "#ffffff";
}

// A canvas of so many CSS pixels, sharp on every screen.
function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "11px system-ui, sans-serif";
  return pen;
}

function drawLegends() {
  for (const canvas of document.querySelectorAll(".legend canvas")) {
    const pen = canvas.getContext("2d");
    canvas.width = 90;
    canvas.height = 10;
    for (let x = 0; x < 90; x++) {
      pen.fillStyle = colour(x / 89);
      pen.fillRect(x, 0, 1, 10);
    }
  }
}

function showHint(text, event) {
  const hint = element("hint");
  hint.textContent = text;
  const { clientX: x, clientY: y } = event;
  const left = x + 16 + hint.offsetWidth > window.innerWidth ? x - hint.offsetWidth - 12 : x + 16;
  hint.style.left = `${Math.max(4, left)}px`;
  hint.style.top = `${y + 18 + hint.offsetHeight > window.innerHeight ? y - hint.offsetHeight - 12 : y + 18}px`;
}

const hideHint = () => { element("hint").textContent = ""; };

// One span for each token; a heading before the prompt and before the answer.
function writeText(parent, pieces, prompt) {
  const spans = pieces.map((piece, i) => {
    const span = document.createElement("span");
    span.textContent = piece || "\u00b7";
    span.dataset.at = i;
    return span;
  });
  const heading = (words) => {
    const found = document.createElement("b");
    found.textContent = words;
    return found;
  };
  const parts = [];
  if (prompt) parts.push(heading("Prompt"), ...spans.slice(0, prompt), heading("Answer"));
  parent.replaceChildren(...parts, ...spans.slice(prompt));
  return spans;
}

// A token's colour: its root tells few heads from fewer.
const tone = (share) => Math.sqrt(share);

function paint(span, share) {
  span.style.background = colour(share);
  span.style.color = inkOn(share);
}

function unpaint(span) {
  span.style.background = span.style.color = "";
}

const quoted = (piece) => `\u201c${piece.trim() || JSON.stringify(piece).slice(1, -1)}\u201d`;
const percent = (share) => `${Math.round(100 * share)}\u00a0%`;
const many = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
