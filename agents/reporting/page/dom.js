"use strict";
// Everything that comes from a run enters the page as text nodes, attributes of numbers, or CSS variables of numbers.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// A number as the run wrote it: the shortest decimal of its float32.
const full = (value) => (value === null || value === undefined ? "–" : String(value));

function short(value, signed) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text = size >= 1000 ? String(Math.round(value)) : size >= 0.1 ? value.toFixed(2) : String(Number(value.toPrecision(2)));
  if (value === 0) return "0";
  return signed && value > 0 ? `+${text}` : text;
}

// Characters that would vanish, or change what stands around them: controls, marks of direction, zero width, surrogates.
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]|\p{Cs}/gu;

// The text of a token with such characters made visible. A joiner within an emoji stays.
function visible(text) {
  const shown = text.replace(HIDDEN, (character, at) => {
    const code = character.codePointAt(0);
    if (character === "\n") return "↵\n";
    if (character === "\t") return "⇥";
    if (code < 32) return String.fromCodePoint(0x2400 + code);
    if (code === 127) return "␡";
    if (code === 0x200d && at > 0 && at < text.length - 1) return character;
    return `\\u${code > 0xffff ? `{${code.toString(16)}}` : code.toString(16).padStart(4, "0")}`;
  });
  return /^\p{M}/u.test(shown) ? `◌${shown}` : shown; // a mark would sit on the token before
}
