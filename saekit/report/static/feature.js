"use strict";

// One feature's panel: labels with scores, contexts, promoted and suppressed tokens, activation histogram, nearest features.
saekit.feature = (() => {
  const { h, s, unpack, isNumber, number, fixed, integer, percent, compact, oneIn, token, NONE } = saekit;
  const FIRST_CONTEXTS = 10;
  /** Stands for a token that only continues the character of the one before. */
  const TIE = "\u203f";
  const EFFECT_NAMES = { vocabproj: ["Decoder direction", "VocabProj: logits of the decoder vector alone, relative to their mean"], tokenchange: ["Steering the model", "TokenChange: mean change of the model's logits while the feature is added, relative to their mean"] };

  /** A chunk's packed arrays, unpacked once. */
  function decodeChunk(raw) {
    const contexts = (block) => block && Object.fromEntries(Object.entries(block).map(([key, value]) => [key, unpack(value)]));
    return {
      ...raw,
      top: contexts(raw.top), sampled: contexts(raw.sampled),
      firings: unpack(raw.firings), mean: unpack(raw.mean), histogram: unpack(raw.histogram),
      effects: Object.fromEntries(Object.entries(raw.effects).map(([kind, block]) => [kind, contexts(block)])),
      neighbors: unpack(raw.neighbors), cosines: unpack(raw.cosines),
    };
  }

  /** The contexts of one kind of one feature: [{place, document, position, act, window, pieces, stratum}]. */
  function contextsOf(block, slot) {
    if (!block) return null;
    const count = block.act.length;
    const width = count ? block.window.length / count : 0;
    return Array.from({ length: block.offsets[slot + 1] - block.offsets[slot] }, (_, n) => {
      const at = block.offsets[slot] + n;
      return {
        place: block.place[at], document: block.document[at], position: block.position[at], act: block.act[at],
        window: block.window.subarray(at * width, (at + 1) * width), pieces: block.pieces.subarray(at * width, (at + 1) * width),
        stratum: block.stratum ? block.stratum[at] : null,
      };
    });
  }

  class FeaturePanel {
    constructor(node) {
      this.node = node;
      this.kind = "top";
      node.addEventListener("pointerover", (event) => this.hover(event));
      node.addEventListener("pointerout", (event) => event.target.closest?.(".t") && saekit.hideTooltip());
      node.addEventListener("scroll", () => saekit.hideTooltip());
    }

    hover(event) {
      const piece = event.target.closest?.(".t");
      if (!piece) return;
      const { act, share } = piece.dataset;
      const box = piece.getClientRects()[0] ?? piece.getBoundingClientRect();
      const text = this.pieces.pieces[Number(piece.dataset.piece)];
      const value = act === undefined ? "outside the recorded window" : Number(act) > 0 ? [h("b", { text: `${piece.dataset.exact ? "" : "\u2248 "}${number(Number(act))}` }), ` \u00b7 ${percent(Number(share))} of the feature's largest`] : "does not fire";
      saekit.showTooltip(Math.min(event.clientX, box.right), box.top, h("div", { class: "tip-head" }, token(text)), h("div", {}, value));
    }

    /** Draws feature `number` of a run; `around` says its place in the list. */
    async show({ run, index, feature, previous, next, around, base }) {
      const chunkNumber = Math.floor(feature / index.chunkSize);
      const [raw, pieces] = await Promise.all([saekit.loadChunk(`${run.slug}/${saekit.chunkName("chunk", chunkNumber)}`), saekit.load("pieces")]);
      raw.decoded ??= decodeChunk(raw);
      pieces.specialSet ??= new Set(pieces.special);
      Object.assign(this, { run, index, feature, base, pieces, chunk: raw.decoded, slot: feature - raw.decoded.start });
      const maxAct = index.max ? index.max[feature] : null;
      const fires = index.fires(feature);
      this.maxAct = maxAct;
      this.node.replaceChildren(
        this.header({ previous, next, around }),
        this.facts(fires),
        ...[this.labels(), this.contexts(fires), this.effects(), h("div", { class: "grid two" }, this.histogram(fires), this.nearest())],
      );
      this.node.scrollTop = 0;
    }

    header({ previous, next, around }) {
      const label = this.index.label(this.feature, "");
      const step = (target, text, mark, key) => h("a", { class: `button step${target === null ? " off" : ""}`, href: target === null ? null : `${this.base}/feature/${target}`, "aria-disabled": target === null ? "true" : null, title: `${text} feature (${key})`, "aria-label": `${text} feature` }, mark);
      return h(
        "header",
        { class: "feature-head" },
        h("div", { class: "feature-bar" }, h("a", { class: "button", id: "close-feature", href: `${this.base}/features`, title: "Back to the table (Esc)" }, "\u2190 ", h("span", { text: "Features" })), h("span", { class: "crumb" }, `${this.run.name} / `, h("b", { text: String(this.feature) })), h("span", { class: "around", text: around }), step(previous, "Previous", "\u2039", "k"), step(next, "Next", "\u203a", "j")),
        h("h1", { tabindex: "-1", id: "feature-title", class: label ? null : "none" }, label ? label.text : this.index.fires(this.feature) === false ? "Never fired" : "No label"),
      );
    }

    facts(fires) {
      const { index, feature, run } = this;
      const density = index.density?.[feature];
      const facts = [];
      if (isNumber(density)) facts.push(["density", percent(density), density > 0 ? oneIn(density) : run.scanned_tokens ? `in ${integer(run.scanned_tokens)} tokens` : ""]);
      if (this.chunk.firings && run.scanned_tokens) facts.push(["firings", integer(this.chunk.firings[this.slot]), `of ${compact(run.scanned_tokens)} tokens`]);
      if (index.max && fires) facts.push(["largest activation", number(this.maxAct), `mean when it fires ${number(this.chunk.mean[this.slot])}`]);
      return h("dl", { class: "feature-facts" }, facts.map(([name, value, detail]) => h("div", {}, h("dt", { text: name }), h("dd", {}, h("b", { text: value }), detail && h("span", { text: ` ${detail}` })))));
    }

    labels() {
      const labels = this.chunk.labels[this.slot];
      const missing = this.index.labelers.length === 0 ? "Not computed: this SAE was not labelled." : "No label was written for this feature.";
      return block("Labels", null, labels.length ? h("div", { class: "labels" }, labels.map((label) => this.labelCard(label))) : h("p", { class: "absent", text: missing }));
    }

    labelCard(label) {
      const parts = [["fires on", label.fires_on], ["promotes", label.promotes], ["suppresses", label.suppresses]].filter(([, text]) => text);
      const rule = (label.rule ?? []).slice(0, 24).map((piece) => token(this.pieces.pieces[piece]));
      const body = label.status === "missing" ? [] : label.status === "failed"
        ? h("p", { class: "failed", text: `Failed: ${label.reason ?? "no reason was recorded"}` })
        : [
            h("p", { class: "label-text", text: label.label || "no label text" }),
            label.description && label.description !== label.label && parts.length === 0 && h("p", { class: "label-long", text: label.description }),
            parts.length > 0 && h("dl", { class: "label-parts" }, parts.map(([name, text]) => h("div", {}, h("dt", { text: name }), h("dd", { text })))),
            rule.length > 0 && h("div", { class: "rule" }, h("span", { class: "rule-name", text: "token rule" }), h("span", { class: "words" }, rule, label.rule.length > 24 && h("span", { class: "more", text: `and ${label.rule.length - 24} more` }))),
            label.description && parts.length > 0 && h("details", { class: "small" }, h("summary", { text: "Whole description" }), h("p", { class: "label-long", text: label.description })),
          ];
      const scores = label.scores.length ? label.scores.map((score) => saekit.judged.scoreTable(score, this.chunk.controls[this.slot].filter((control) => control.scorer === score.scorer))) : h("p", { class: "absent", text: "Not scored." });
      return h("article", { class: "card label-card" }, h("div", { class: "card-head" }, h("span", { class: "labeler", text: saekit.judged.labelerName(label.labeler) }), isNumber(label.confidence) && h("span", { class: "confidence", title: "lexical: the rule's F1 on the training documents; a language model: what it says of itself", text: `confidence ${fixed(label.confidence, 2)}` })), body, made(label), scores);
    }

    contexts(fires) {
      if (this.chunk.top === null) return block("Contexts", null, h("p", { class: "absent", text: "Not computed: no contexts were collected for this SAE." }));
      if (!fires) return block("Contexts", null, h("p", { class: "absent", text: `Never fired in ${integer(this.run.scanned_tokens)} tokens.` }));
      const kinds = [["top", "Strongest"], ["sampled", "All strengths"]].map(([kind, title]) => ({ kind, title, list: contextsOf(this.chunk[kind], this.slot) })).filter((one) => one.list?.length);
      const body = h("div", { class: "context-lists" });
      const tabs = h("div", { class: "segmented", role: "group", "aria-label": "Which contexts" }, kinds.map(({ kind, title, list }) => h("button", { type: "button", "data-kind": kind, onclick: () => this.setKind(kind) }, title, h("span", { class: "badge", text: String(list.length) }))));
      this.contextParts = { kinds, body, tabs };
      const node = block("Contexts", tabs, body);
      this.setKind(kinds.some((one) => one.kind === this.kind) ? this.kind : kinds[0]?.kind);
      return node;
    }

    setKind(kind) {
      const { kinds, body, tabs } = this.contextParts;
      const chosen = kinds.find((one) => one.kind === kind);
      if (!chosen) return;
      this.kind = kind;
      for (const button of tabs.children) button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
      body.replaceChildren(kind === "top" ? this.contextList(chosen.list) : this.strata(chosen.list));
    }

    toggleKind() {
      const kinds = this.contextParts?.kinds ?? [];
      if (kinds.length > 1) this.setKind(kinds.find((one) => one.kind !== this.kind).kind);
    }

    /** A list that shows its first contexts and the rest on demand. */
    contextList(list, first = FIRST_CONTEXTS) {
      const node = h("ol", { class: "contexts" }, list.slice(0, first).map((context) => this.context(context)));
      if (list.length <= first) return node;
      const more = h("button", { class: "link show-more", type: "button", text: `Show ${list.length - first} more` });
      more.addEventListener("click", () => {
        node.append(...list.slice(first).map((context) => this.context(context)));
        node.children[first].querySelector("button")?.focus({ preventScroll: true });
        more.remove();
      });
      return h("div", {}, node, more);
    }

    strata(list) {
      const edges = this.run.histogram_edges;
      const groups = new Map();
      for (const context of list) groups.set(context.stratum, [...(groups.get(context.stratum) ?? []), context]);
      const strongestFirst = [...groups].sort(([a], [b]) => b - a);
      return h("div", {}, strongestFirst.map(([stratum, contexts]) => h("section", { class: "stratum" }, h("h3", { text: edges && stratum + 1 < edges.length ? `activation ${number(edges[stratum])} to ${number(edges[stratum + 1])}` : `stratum ${stratum}` }), this.contextList(contexts.sort((a, b) => b.act - a.act)))));
    }

    context(context) {
      const text = h("div", { class: "context-text", dir: "auto" }, this.windowPieces(context));
      const document = this.pieces.documents?.[context.document];
      const expand = h("button", { type: "button", class: "expand", "aria-expanded": "false", text: "Whole context" });
      expand.addEventListener("click", () => this.expand(context, text, expand));
      const share = this.maxAct > 0 ? context.act / this.maxAct : 0;
      return h(
        "li",
        { class: "context" },
        h("div", { class: "context-act", title: `activation at the peak: ${number(context.act, 5)}` }, h("b", { text: number(context.act) }), h("span", { class: "act-bar", "aria-hidden": "true" }, h("i", { style: { width: `${Math.min(1, share) * 100}%` } }))),
        h("div", { class: "context-body" }, text, h("div", { class: "context-foot" }, expand, h("span", { class: "source", text: document ?? `document ${context.document}` }), h("span", { class: "position", text: `token ${context.position}` }))),
      );
    }

    windowPieces(context) {
      const nothing = context.pieces instanceof Uint16Array ? 0xffff : 0xffffffff;
      const peak = context.window.length >> 1;
      const spans = [];
      context.pieces.forEach((piece, at) => {
        if (piece !== nothing) spans.push(this.piece(piece, context.window[at], at === peak ? context.act : null));
      });
      const cut = h("span", { class: "cut", text: "\u2026", "aria-hidden": "true" });
      return [context.pieces[0] === nothing || context.position - peak <= 0 ? null : cut, ...spans, context.position + peak >= this.pieces.context_len ? null : cut.cloneNode(true)];
    }

    /** One token: a leading blank stays outside of the highlight. */
    piece(piece, byte, peakAct) {
      const text = this.pieces.pieces[piece];
      const blank = text.length > 1 && text.startsWith(" ") ? " " : "";
      const isPeak = peakAct !== null && peakAct !== undefined;
      const share = isPeak && this.maxAct > 0 ? peakAct / this.maxAct : byte / 255;
      const isOn = byte > 0 || isPeak;
      const classes = ["t", isOn && "on", isPeak && "peak", byte === undefined && "beyond", text === TIE && "tie", this.pieces.specialSet.has(piece) && "special"].filter(Boolean).join(" ");
      const act = byte === undefined ? undefined : isPeak ? peakAct : share * this.maxAct;
      const span = h("span", { class: classes, "data-piece": piece, "data-act": act, "data-share": share, "data-exact": isPeak, style: isOn ? { "--a": (0.14 + 0.86 * Math.min(1, share)).toFixed(3) } : {} }, text.slice(blank.length), isPeak && h("span", { class: "visually-hidden", text: ` (peak, activation ${number(peakAct)})` }));
      return [blank, span];
    }

    async expand(context, text, button) {
      if (button.getAttribute("aria-expanded") === "true") {
        text.replaceChildren(...this.windowPieces(context).flat().filter(Boolean));
        button.setAttribute("aria-expanded", "false");
        button.textContent = "Whole context";
        return;
      }
      const size = this.pieces.rows_per_chunk;
      const rows = await saekit.loadChunk(saekit.chunkName("rows", Math.floor(context.place / size)));
      rows.decoded ??= unpack(rows.pieces);
      const length = this.pieces.context_len;
      const at = context.place - rows.start;
      const row = rows.decoded.subarray(at * length, (at + 1) * length);
      const half = context.window.length >> 1;
      const spans = Array.from(row, (piece, position) => {
        const offset = position - context.position + half;
        const parts = this.piece(piece, context.window[offset], position === context.position ? context.act : null);
        return this.pieces.pieces[piece].endsWith("\u21b5") ? [...parts, h("br")] : parts;
      });
      text.replaceChildren(...spans.flat().filter(Boolean));
      button.setAttribute("aria-expanded", "true");
      button.textContent = "Only around the peak";
    }

    effects() {
      const cards = Object.entries(EFFECT_NAMES).map(([kind, [title, hint]]) => this.effectCard(this.chunk.effects[kind], title, hint));
      return block("What it does to the next token", null, h("div", { class: "grid two" }, cards));
    }

    effectCard(effects, title, hint) {
      const head = h("div", { class: "card-head" }, h("span", { class: "labeler", text: title }), h("span", { class: "confidence", text: hint.split(":")[0], title: hint }));
      const row = effects ? effects.features.indexOf(this.slot) : -1;
      if (row < 0) return h("article", { class: "card" }, head, h("p", { class: "absent", text: effects ? "Not computed for this feature." : "Not computed." }));
      const width = effects.promoted.length / effects.features.length;
      const cut = (list) => Array.from(list.subarray(row * width, (row + 1) * width));
      const [up, down] = [cut(effects.promoted_values), cut(effects.suppressed_values)];
      const largest = Math.max(...[...up, ...down].map(Math.abs), 1e-9);
      return h("article", { class: "card" }, head, h("div", { class: "effects" }, this.effectList("Promoted", cut(effects.promoted), up, largest, "up"), this.effectList("Suppressed", cut(effects.suppressed), down, largest, "down")));
    }

    effectList(title, tokens, values, largest, side) {
      const sign = (value) => (value > 0 ? `+${number(value)}` : number(value));
      const items = tokens.map((piece, n) => h("li", { hidden: n >= 10 }, token(this.pieces.pieces[piece]), h("span", { class: "effect-bar", "aria-hidden": "true" }, h("i", { style: { width: `${(Math.abs(values[n]) / largest) * 100}%` } })), h("span", { class: "effect-value", text: sign(values[n]) })));
      const list = h("ol", {}, items);
      const more = tokens.length > 10 && h("button", { type: "button", class: "link", text: `Show ${tokens.length - 10} more`, onclick: (event) => { items.forEach((item) => (item.hidden = false)); event.target.remove(); } });
      return h("div", { class: `effect ${side}` }, h("h3", { text: title }), list, more);
    }

    histogram(fires) {
      const counts = this.chunk.histogram;
      if (!counts || !fires) return block("How strongly it fires", null, h("p", { class: "absent", text: counts ? "Never fired." : "Not computed." }));
      const bins = counts.length / this.chunk.count;
      const mine = Array.from(counts.subarray(this.slot * bins, (this.slot + 1) * bins));
      const edges = this.run.histogram_edges;
      return block("How strongly it fires", null, saekit.charts.histogram({ title: "Activations when it fires", note: "outer bins also hold what lies beyond", edges, series: [{ name: "firings", color: "--series-1", counts: mine }], isLogX: true, xLabel: "activation (log)", unit: "tokens", xFormat: (value) => number(value, 2) }));
    }

    nearest() {
      const { neighbors, cosines } = this.chunk;
      if (!neighbors) return block("Nearest features", null, h("p", { class: "absent", text: "Not computed: this SAE was not evaluated." }));
      const width = neighbors.length / this.chunk.count;
      const list = Array.from({ length: width }, (_, n) => [neighbors[this.slot * width + n], cosines[this.slot * width + n]]).filter(([feature]) => feature >= 0);
      const items = list.map(([feature, cosine]) => {
        const label = this.index.label(feature, "");
        return h("li", {}, h("a", { href: `${this.base}/feature/${feature}` }, h("span", { class: "neighbor-id", text: String(feature) }), h("span", { class: label ? "neighbor-label" : "neighbor-label none", text: label ? label.text : this.index.fires(feature) === false ? "never fired" : "no label" }), h("span", { class: "effect-bar", "aria-hidden": "true" }, h("i", { style: { width: `${Math.max(0, Math.min(1, cosine)) * 100}%` } })), h("span", { class: "effect-value", text: fixed(cosine, 2) })));
      });
      return block("Nearest features", h("span", { class: "block-note", text: "cosine of the decoder vectors" }), items.length ? h("ol", { class: "neighbors" }, items) : h("p", { class: "absent", text: "There is no other feature." }));
    }
  }

  /** How a model's label came about: prompt, dollars, and of how many candidates it is the best. */
  function made(label) {
    const parts = [
      label.prompt_version && `prompt ${label.prompt_version}`,
      label.num_candidates && `best of ${integer(label.num_candidates)}${isNumber(label.selection_score) ? `, chosen at ${fixed(label.selection_score, 2)} on documents of their own` : ""}`,
      isNumber(label.cost) && `$${number(label.cost, 2)}`,
    ].filter(Boolean);
    return parts.length > 0 && h("p", { class: "score-foot", text: parts.join(" \u00b7 ") });
  }

  function block(title, aside, ...content) {
    return h("section", { class: "panel-block" }, h("div", { class: "panel-head" }, h("h2", { text: title }), aside), ...content);
  }

  return { FeaturePanel };
})();
