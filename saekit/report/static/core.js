"use strict";

// Namespace, data loading, formatting and DOM building. Texts of the data are untrusted: they only ever become text nodes.
const saekit = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const MAX_KEPT = 48;
  const loads = new Map();
  const resolvers = new Map();

  function bytesOf(base64) {
    const binary = atob(base64);
    const bytes = new Uint8Array(binary.length);
    for (let at = 0; at < binary.length; at += 1) bytes[at] = binary.charCodeAt(at);
    return bytes;
  }

  /** Called by every data file: base64 of deflated JSON. */
  function receive(name, packed) {
    const resolve = resolvers.get(name);
    resolvers.delete(name);
    if (!resolve) return;
    const stream = new Blob([bytesOf(packed)]).stream().pipeThrough(new DecompressionStream("deflate"));
    resolve(new Response(stream).json());
  }

  /** Loads data/<name>.js once; script tags work from file://, where fetch does not. */
  function load(name) {
    if (loads.has(name)) return loads.get(name);
    const promise = new Promise((resolve, reject) => {
      resolvers.set(name, resolve);
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.addEventListener("error", () => {
        loads.delete(name);
        reject(new Error(`data/${name}.js cannot be read. Was the report's folder moved in part?`));
      });
      script.addEventListener("load", () => script.remove());
      document.head.append(script);
    });
    loads.set(name, promise);
    return promise;
  }

  /** Like load, for the many chunk files: the oldest ones are let go. */
  function loadChunk(name) {
    const promise = load(name);
    loads.delete(name);
    loads.set(name, promise);
    const chunks = [...loads.keys()].filter((key) => /(chunk|rows)-\d+$/.test(key));
    for (const key of chunks.slice(0, Math.max(0, chunks.length - MAX_KEPT))) loads.delete(key);
    return promise;
  }

  const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array };

  /** "<type>:<base64>" to a typed array; null stays null. */
  function unpack(packed) {
    if (packed === null || packed === undefined) return null;
    return new TYPES[packed.slice(0, 2)](bytesOf(packed.slice(3)).buffer);
  }

  const chunkName = (kind, number) => `${kind}-${String(number).padStart(4, "0")}`;

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "text") node.textContent = value;
      else if (name === "style") for (const [key, item] of Object.entries(value)) node.style.setProperty(key, item);
      else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value === true ? "" : String(value));
    }
    for (const child of children.flat(Infinity)) {
      if (child !== null && child !== undefined && child !== false) node.append(child);
    }
    return node;
  }

  /** An HTML element; strings among the children become text nodes. */
  const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  /** An SVG element. */
  const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
  const NONE = "\u2013";

  /** A number with `digits` significant digits, grouped, never in e-notation above 1e-4. */
  function number(value, digits = 3) {
    if (!isNumber(value)) return NONE;
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 10 ** digits) return Math.round(value).toLocaleString("en-US");
    if (size < 1e-4) return value.toExponential(1).replace("-", "\u2212").replace(/^\u2212?/, value < 0 ? "\u2212" : "");
    return signed(value.toPrecision(digits));
  }

  const signed = (text) => text.replace("-", "\u2212");
  const fixed = (value, digits) => (isNumber(value) ? signed(value.toFixed(digits)) : NONE);
  const integer = (value) => (isNumber(value) ? Math.round(value).toLocaleString("en-US") : NONE);

  /** A share as a percentage with two or three significant digits. */
  function percent(value) {
    if (!isNumber(value)) return NONE;
    const hundredth = value * 100;
    if (hundredth === 0) return "0 %";
    if (hundredth < 0.001) return "<0.001 %";
    return `${hundredth >= 99.95 ? hundredth.toFixed(0) : hundredth.toPrecision(hundredth < 0.1 ? 2 : 3)} %`;
  }

  /** The same without trailing zeros, for axes. */
  const percentTick = (value) => `${Number((value * 100).toPrecision(3))} %`;

  /** 1234567 to "1.23M". */
  function compact(value) {
    if (!isNumber(value)) return NONE;
    const size = Math.abs(value);
    for (const [unit, letter] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (size >= unit) return `${Number((value / unit).toPrecision(3))}${letter}`;
    }
    return signed(String(Number(value.toPrecision(3))));
  }

  /** "1 in 240 tokens" */
  function oneIn(share) {
    return isNumber(share) && share > 0 ? `1 in ${integer(share > 0.5 ? 1 : 1 / share)} tokens` : "";
  }

  /** A token on its own: leading and trailing blanks made visible, in a quieter colour. */
  function token(text, attributes) {
    const lead = /^ */.exec(text)[0].length;
    const tail = lead === text.length ? 0 : / *$/.exec(text)[0].length;
    const blank = (count) => count > 0 && h("span", { class: "blank", text: count > 3 ? `\u2423\u00d7${count}` : "\u2423".repeat(count) });
    const body = text.slice(lead, text.length - tail);
    return h("span", { class: "token", title: text, ...attributes }, blank(lead), body, text.length === 0 && h("span", { class: "blank", text: "empty" }), blank(tail));
  }

  const tooltip = document.getElementById("tooltip");

  /** Shows `children` near a point of the window; hideTooltip takes it away. */
  function showTooltip(x, y, ...children) {
    tooltip.replaceChildren(...children);
    tooltip.hidden = false;
    const box = tooltip.getBoundingClientRect();
    const left = Math.min(Math.max(8, x - box.width / 2), window.innerWidth - box.width - 8);
    const top = y - box.height - 12 < 8 ? y + 20 : y - box.height - 12;
    tooltip.style.left = `${left}px`;
    tooltip.style.top = `${top}px`;
  }

  function hideTooltip() {
    tooltip.hidden = true;
  }

  return {
    receive, load, loadChunk, unpack, chunkName, h, s, isNumber, NONE,
    number, fixed, integer, percent, percentTick, compact, oneIn, token, showTooltip, hideTooltip,
  };
})();
