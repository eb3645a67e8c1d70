"use strict";

// The feature table: filters, sortable headers, and rows that exist only while they are in view.
saekit.table = (() => {
  const { h, s, isNumber, number, percent, integer, fixed, token, NONE } = saekit;
  const { RANGES, DEFAULTS, parseQuery, formatQuery, select, defaultSort } = saekit.query;
  const ROW_HEIGHT = 40;
  const COMPACT_ROW_HEIGHT = 62;
  const COMPACT_BELOW = 720;
  const OVERSCAN = 8;

  const COLUMNS = [
    { key: "id", title: "#", name: "feature number" },
    { key: "label", title: "Label", name: "label" },
    { key: "peak", title: "Fires on", isPlain: true },
    { key: "promoted", title: "Promotes", isPlain: true },
    { key: "density", title: "Density", name: "density", isDescending: true },
    { key: "max", title: "Max act", name: "max activation", isDescending: true },
    { key: "f1", title: "F1", name: "F1", isDescending: true },
  ];

  /** The list pane. `open(feature)` navigates; `changed(query)` writes the address. */
  class FeatureTable {
    constructor(node, { open, changed }) {
      this.node = node;
      this.open = open;
      this.changed = changed;
      this.index = null;
      this.order = [];
      this.active = -1;
      this.current = null;
      this.build();
      new ResizeObserver(() => this.resize()).observe(node);
    }

    build() {
      const choice = (key, label, options) => h("label", { class: "field" }, h("span", { class: "visually-hidden", text: label }), h("select", { "data-key": key, onchange: (event) => this.ask({ [key]: event.target.value }) }, options.map(([value, text]) => h("option", { value, text }))));
      this.search = h("input", { type: "search", id: "search", placeholder: "Search labels and tokens", autocomplete: "off", spellcheck: "false", "aria-label": "Search features", oninput: () => this.askSoon({ q: this.search.value }), onkeydown: (event) => this.searchKey(event) });
      this.scope = choice("in", "Search in", [["all", "Labels and tokens"], ["labels", "Labels only"], ["tokens", "Tokens only"]]);
      this.labeler = choice("labeler", "Labeler", [["", "Any labeler"]]);
      this.firing = choice("fires", "Firing", [["", "Firing or not"], ["yes", "Fires"], ["no", "Never fired"]]);
      this.sorting = choice("sort", "Sort by", []);
      this.sorting.classList.add("sort-field");
      const rangeFields = RANGES.map(({ key, title }) => h("fieldset", {}, h("legend", { text: title }), ["min", "max"].map((end) => h("input", { type: "number", step: "any", inputmode: "decimal", placeholder: end, "aria-label": `${title}, ${end === "min" ? "at least" : "at most"}`, "data-key": `${key}_${end}`, oninput: (event) => this.askSoon({ [`${key}_${end}`]: event.target.value }) }))));
      this.more = h("details", { class: "ranges" }, h("summary", { text: "Ranges" }), h("div", { class: "ranges-body" }, rangeFields));
      this.summary = h("p", { class: "count", "aria-live": "polite" });
      this.reset = h("button", { class: "link", type: "button", text: "Clear filters", onclick: () => this.ask({ ...this.clean(), sort: this.query.sort }) });
      this.random = h("button", { class: "link random", type: "button", title: "Open a random feature of this list (r)", text: "Random", onclick: () => this.openRandom() });
      this.head = h("div", { class: "row head", role: "row", "aria-rowindex": "1" }, COLUMNS.map((column) => this.headCell(column)));
      this.rows = h("div", { class: "rows", role: "rowgroup" });
      this.nothing = h("p", { class: "absent nothing", hidden: true, text: "No feature matches." });
      this.drawn = new Map();
      this.scroller = h("div", { class: "scroller", tabindex: "0", role: "grid", "aria-label": "Features", "aria-colcount": COLUMNS.length, onscroll: () => this.drawSoon(), onkeydown: (event) => this.gridKey(event) }, h("div", { role: "rowgroup", class: "head-group" }, this.head), this.rows, this.nothing);
      this.scroller.addEventListener("focus", () => this.scroller.matches(":focus-visible") && this.active < 0 && this.order.length && this.setActive(Math.max(0, this.order.indexOf(this.current))));
      this.node.replaceChildren(h("div", { class: "filters", role: "search" }, h("div", { class: "search" }, this.search), h("div", { class: "selects" }, this.scope, this.labeler, this.firing, this.sorting, this.more)), h("div", { class: "count-line" }, this.summary, this.reset, this.random), this.scroller);
    }

    headCell(column) {
      const attributes = { role: "columnheader", class: `cell c-${column.key}`, "data-column": column.key };
      if (column.isPlain) return h("div", attributes, column.title);
      return h("div", attributes, h("button", { type: "button", title: `Sort by ${column.name}`, onclick: () => this.sortBy(column) }, column.title, h("span", { class: "sort-mark", "aria-hidden": "true" })));
    }

    sortBy(column) {
      const first = column.isDescending ? `-${column.key}` : column.key;
      const second = column.isDescending ? column.key : `-${column.key}`;
      this.ask({ sort: this.query.sort === first ? second : first });
    }

    clean() {
      return { ...DEFAULTS, ...Object.fromEntries(RANGES.flatMap(({ key }) => [[`${key}_min`, ""], [`${key}_max`, ""]])) };
    }

    /** Shows another run's index, or another query of the same one. */
    show(index, queryText) {
      const query = parseQuery(queryText);
      query.sort = query.sort || defaultSort(index);
      if (index !== this.index) {
        this.index = index;
        const names = index.labelers.map((one) => [one.name, one.name]);
        this.setOptions(this.labeler, [["", names.length ? "Any labeler" : "No labels"], ...names, ["none", "Without a label"]]);
        this.setOptions(this.sorting, COLUMNS.filter((column) => !column.isPlain).flatMap((column) => {
          const both = [[column.key, `${column.name} \u2191`], [`-${column.key}`, `${column.name} \u2193`]];
          return column.isDescending ? both.reverse() : both;
        }));
        this.selected = null;
      }
      const asked = formatQuery(query);
      if (this.selected !== asked) {
        this.selected = asked;
        this.query = { ...this.clean(), ...query };
        this.order = select(index, query);
        this.rows.replaceChildren();
        this.drawn.clear();
        this.place = new Map(this.order.map((feature, at) => [feature, at]));
        this.active = -1;
        this.fillFields();
        this.scroller.scrollTop = 0;
      }
      this.resize();
    }

    setOptions(field, options) {
      field.querySelector("select").replaceChildren(...options.map(([value, text]) => h("option", { value, text })));
    }

    fillFields() {
      if (document.activeElement !== this.search) this.search.value = this.query.q;
      for (const field of this.node.querySelectorAll("[data-key]")) {
        if (document.activeElement !== field || field.tagName === "SELECT") field.value = this.query[field.dataset.key] ?? "";
      }
      const rangeCount = RANGES.flatMap(({ key }) => [`${key}_min`, `${key}_max`]).filter((key) => this.query[key]).length;
      this.more.querySelector("summary").textContent = rangeCount ? `Ranges (${rangeCount})` : "Ranges";
      const isFiltered = this.order.length !== this.index.count || formatQuery({ ...this.query, sort: "" }) !== "";
      this.summary.textContent = isFiltered ? `${integer(this.order.length)} of ${integer(this.index.count)} features` : `${integer(this.index.count)} features`;
      this.reset.hidden = !isFiltered;
      for (const cell of this.head.children) {
        const key = cell.dataset.column;
        const isSorted = this.query.sort.replace("-", "") === key;
        cell.setAttribute("aria-sort", isSorted ? (this.query.sort.startsWith("-") ? "descending" : "ascending") : "none");
      }
    }

    ask(change) {
      clearTimeout(this.timer);
      this.changed(formatQuery({ ...this.query, ...change }));
    }

    askSoon(change) {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.ask(change), 90);
    }

    searchKey(event) {
      if (event.key === "ArrowDown" || event.key === "Enter") {
        event.preventDefault();
        this.ask({ q: this.search.value });
        this.scroller.focus();
      }
    }

    gridKey(event) {
      const page = Math.max(1, Math.floor(this.scroller.clientHeight / this.rowHeight) - 2);
      const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
      if (event.key in steps && !event.altKey && !event.metaKey && !event.ctrlKey) {
        event.preventDefault();
        this.setActive(this.active + steps[event.key]);
      } else if (event.key === "Enter" && event.target === this.scroller && this.active >= 0) {
        this.open(this.order[this.active]);
      }
    }

    setActive(place) {
      if (this.order.length === 0) return;
      this.active = Math.min(this.order.length - 1, Math.max(0, place));
      this.reveal(this.active);
      this.draw();
      this.scroller.setAttribute("aria-activedescendant", `row-${this.order[this.active]}`);
    }

    openRandom() {
      if (this.order.length > 0) this.open(this.order[Math.floor(Math.random() * this.order.length)]);
    }

    /** Marks the feature whose panel is open and scrolls to it. */
    setCurrent(feature) {
      this.current = feature;
      const place = this.place?.get(feature);
      if (place !== undefined) {
        this.active = place;
        this.reveal(place);
      }
      this.draw();
    }

    /** Scrolls to a row: just into view when walking, to the middle when it was out of sight altogether. */
    reveal(place) {
      const top = place * this.rowHeight;
      const view = this.scroller.clientHeight - this.headHeight;
      const above = this.scroller.scrollTop - top;
      const below = top + this.rowHeight - this.scroller.scrollTop - view;
      if (Math.max(above, below) > 2 * this.rowHeight) this.scroller.scrollTop = top - view / 2;
      else if (above > 0) this.scroller.scrollTop = top;
      else if (below > 0) this.scroller.scrollTop = top + this.rowHeight - view;
    }

    /** The feature before or after in the current order; by number where the feature is filtered out. */
    neighbor(feature, step) {
      const place = this.place?.get(feature);
      if (place === undefined) {
        const next = feature + step;
        return next >= 0 && next < this.index.count ? next : null;
      }
      return this.order[place + step] ?? null;
    }

    resize() {
      if (!this.index || this.node.clientWidth === 0) return;
      const isCompact = this.node.clientWidth < COMPACT_BELOW;
      this.node.classList.toggle("compact", isCompact);
      this.rowHeight = isCompact ? COMPACT_ROW_HEIGHT : ROW_HEIGHT;
      this.headHeight = this.head.offsetHeight;
      this.rows.style.height = `${this.order.length * this.rowHeight}px`;
      this.scroller.setAttribute("aria-rowcount", this.order.length + 1);
      if (this.current !== null && this.place.has(this.current)) this.reveal(this.place.get(this.current));
      this.draw();
    }

    drawSoon() {
      this.frame ??= requestAnimationFrame(() => {
        this.frame = null;
        this.draw();
      });
    }

    draw() {
      if (!this.index || !this.rowHeight) return;
      const first = Math.max(0, Math.floor(this.scroller.scrollTop / this.rowHeight) - OVERSCAN);
      const last = Math.min(this.order.length, Math.ceil((this.scroller.scrollTop + this.scroller.clientHeight) / this.rowHeight) + OVERSCAN);
      const wanted = this.order.slice(first, last);
      // Rows that stay are kept: replacing one between pointer down and up would swallow the click.
      const keep = new Set(wanted);
      for (const [feature, row] of this.drawn) {
        if (keep.has(feature)) continue;
        row.remove();
        this.drawn.delete(feature);
      }
      wanted.forEach((feature, n) => {
        if (!this.drawn.has(feature)) this.drawn.set(feature, this.row(feature));
        const row = this.drawn.get(feature);
        if (this.rows.children[n] !== row) this.rows.insertBefore(row, this.rows.children[n] ?? null);
        this.placeRow(row, feature, first + n);
      });
      this.nothing.hidden = this.order.length > 0;
    }

    /** Where a row stands and how it is marked: what changes while it is in view. */
    placeRow(row, feature, place) {
      row.style.top = `${place * this.rowHeight}px`;
      row.style.height = `${this.rowHeight}px`;
      row.setAttribute("aria-rowindex", place + 2);
      row.setAttribute("aria-selected", String(feature === this.current));
      row.classList.toggle("current", feature === this.current);
      row.classList.toggle("active", place === this.active);
    }

    row(feature) {
      const { index } = this;
      const label = index.label(feature, this.query.labeler === "none" ? "" : this.query.labeler);
      const isDead = index.fires(feature) === false;
      const cell = (key, ...children) => h("div", { class: `cell c-${key}`, role: "gridcell" }, ...children);
      const density = index.density?.[feature];
      const words = (column) => h("span", { class: "words" }, index.wordsOf(column, feature).map((word) => token(word)));
      return h(
        "div",
        { class: isDead ? "row dead" : "row", role: "row", id: `row-${feature}`, onclick: (event) => this.rowClick(event, feature) },
        cell("id", String(feature)),
        cell("label", h("a", { href: `${this.base}/feature/${feature}`, tabindex: "-1", class: label ? "label" : "label none", text: label ? label.text : isDead ? "never fired" : "no label" }), label && label.labeler !== index.labelers[0].name && this.query.labeler === "" && h("span", { class: "tag", text: label.labeler.replace(/^llm:/, "") })),
        cell("peak", words(index.peak)),
        cell("promoted", words(index.promoted)),
        cell("density", isNumber(density) ? percent(density) : NONE),
        cell("max", index.max ? number(index.max[feature]) : NONE),
        cell("f1", label && isNumber(label.f1) ? [h("span", { class: "value", text: fixed(label.f1, 2) }), meter(label.f1)] : NONE),
      );
    }

    rowClick(event, feature) {
      if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
      event.preventDefault();
      this.open(feature);
    }
  }

  function meter(share) {
    return s("svg", { class: "meter", width: 44, height: 6, viewBox: "0 0 44 6", preserveAspectRatio: "none", "aria-hidden": "true" }, s("rect", { class: "meter-track", width: 44, height: 6, rx: 3 }), s("rect", { class: "meter-fill", width: Math.max(0, Math.min(1, share)) * 44, height: 6, rx: 3 }));
  }

  return { FeatureTable };
})();
