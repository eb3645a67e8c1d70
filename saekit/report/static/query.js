"use strict";

// What the feature table asks of a run's index: one columnar file in memory, filtered and sorted as arrays of feature numbers.
saekit.query = (() => {
  const { unpack } = saekit;
  const NO_WORD = 0xffffffff;

  /** The decoded index of one run. */
  class FeatureIndex {
    constructor(raw) {
      this.count = raw.count;
      this.chunkSize = raw.chunk_size;
      this.density = unpack(raw.density);
      this.max = unpack(raw.max);
      this.peak = unpack(raw.peak);
      this.promoted = unpack(raw.promoted);
      this.words = raw.words;
      this.labelers = raw.labelers.map((one) => ({ ...one, f1: unpack(one.f1) }));
      this.wordsOf = (column, feature) => {
        if (!column) return [];
        const slots = column.length / this.count;
        return Array.from(column.subarray(feature * slots, (feature + 1) * slots)).filter((word) => word !== NO_WORD).map((word) => this.words[word]);
      };
      this.tokenText = Array.from({ length: this.count }, (_, feature) => [...this.wordsOf(this.peak, feature), ...this.wordsOf(this.promoted, feature)].join("\n").toLowerCase());
    }

    /** True where the feature fired, null where nobody counted. */
    fires(feature) {
      return this.density ? this.density[feature] > 0 : null;
    }

    /** The label that stands for a feature: that of the asked labeler, or of the first one that has any. */
    label(feature, labeler) {
      for (const one of this.labelers) {
        if ((labeler === "" || one.name === labeler) && one.labels[feature] !== null) return { text: one.labels[feature], labeler: one.name, scorer: one.scorer, f1: one.f1[feature] };
      }
      return null;
    }
  }

  const RANGES = [
    { key: "density", title: "Density, %", factor: 0.01 },
    { key: "max", title: "Max activation", factor: 1 },
    { key: "f1", title: "F1", factor: 1 },
  ];
  const DEFAULTS = { q: "", in: "all", labeler: "", fires: "", sort: "" };

  /** What is asked of the table, as plain text values: the part of the address after "?". */
  function parseQuery(text) {
    const query = { ...DEFAULTS };
    for (const [key, value] of new URLSearchParams(text)) {
      if (key in DEFAULTS || RANGES.some((range) => key === `${range.key}_min` || key === `${range.key}_max`)) query[key] = value;
    }
    return query;
  }

  function formatQuery(query) {
    const kept = Object.entries(query).filter(([key, value]) => value !== "" && value !== DEFAULTS[key]);
    return new URLSearchParams(kept).toString();
  }

  /** Returns the features that the query keeps, in its order. */
  function select(index, query) {
    const words = query.q.toLowerCase().split(/\s+/).filter(Boolean);
    const labels = Array.from({ length: index.count }, (_, feature) => index.label(feature, query.labeler === "none" ? "" : query.labeler));
    const f1 = labels.map((label) => (label ? label.f1 : NaN));
    const columns = { density: index.density, max: index.max, f1 };
    const ranges = RANGES.flatMap(({ key, factor }) => [[key, `${key}_min`, 1, factor], [key, `${key}_max`, -1, factor]]).filter(([, name]) => query[name] && Number.isFinite(Number(query[name])));
    const kept = [];
    for (let feature = 0; feature < index.count; feature += 1) {
      if (query.fires === "yes" && index.fires(feature) === false) continue;
      if (query.fires === "no" && index.fires(feature) !== false) continue;
      if (query.labeler === "none" ? labels[feature] !== null : query.labeler !== "" && labels[feature] === null) continue;
      if (ranges.some(([key, name, sign, factor]) => !(sign * columns[key]?.[feature] >= sign * Number(query[name]) * factor))) continue;
      if (words.length && !matches(index, feature, words, query)) continue;
      kept.push(feature);
    }
    return order(kept, query, { ...columns, labels });
  }

  function matches(index, feature, words, query) {
    const texts = [];
    if (query.in !== "tokens") texts.push(...index.labelers.filter((one) => query.labeler === "" || one.name === query.labeler).map((one) => one.labels[feature]?.toLowerCase() ?? ""));
    if (query.in !== "labels") texts.push(index.tokenText[feature]);
    return words.every((word) => word === String(feature) || word === `#${feature}` || texts.some((text) => text.includes(word)));
  }

  function defaultSort(index) {
    return index.labelers.some((one) => one.f1.some((value) => value > 0)) ? "-f1" : index.max ? "-max" : "id";
  }

  function order(kept, query, columns) {
    const key = query.sort.replace("-", "");
    const sign = query.sort.startsWith("-") ? -1 : 1;
    if (key === "label") {
      const collator = new Intl.Collator("en", { sensitivity: "base", numeric: true });
      const text = (feature) => columns.labels[feature]?.text ?? null;
      return kept.sort((a, b) => {
        const [left, right] = [text(a), text(b)];
        if (left === null || right === null) return (left === null) - (right === null) || a - b;
        return sign * collator.compare(left, right) || a - b;
      });
    }
    const values = columns[key];
    if (!values) return sign < 0 ? kept.reverse() : kept;
    return kept.sort((a, b) => {
      const [left, right] = [values[a], values[b]];
      // What has no value stands last in both directions.
      if (Number.isNaN(left) || Number.isNaN(right)) return Number.isNaN(left) - Number.isNaN(right) || a - b;
      return sign * (left - right) || a - b;
    });
  }

  return { FeatureIndex, RANGES, DEFAULTS, parseQuery, formatQuery, select, defaultSort };
})();
