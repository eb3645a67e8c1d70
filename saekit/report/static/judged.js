"use strict";

// Scores of labels, of whatever scorer: one feature's tables, and the run's means beside labels that know nothing.
saekit.judged = (() => {
  const { h, isNumber, number, fixed, integer, NONE } = saekit;
  const FIGURES = { f1: "F1", auprc: "AUPRC", f1_natural: "F1 at natural rate", auprc_natural: "AUPRC at natural rate", accuracy: "accuracy", balanced_accuracy: "balanced accuracy", pearson: "correlation", pearson_natural: "correlation at natural rate", r2: "explained variance", gain: "gain, nats a token", f1_near: "F1, near negatives", auprc_near: "AUPRC, near negatives", specificity_near: "near ones judged silent" };
  /** What a figure of a label that says nothing would be. */
  const REFERENCES = { auprc: ["base_rate", "base rate"], auprc_natural: ["natural_rate", "natural rate"], accuracy: ["base_rate", "chance"] };
  /** Figures with an interval of their own. */
  const INTERVALS = { pearson: ["pearson_low", "pearson_high"], specificity_near: ["near_low", "near_high"] };
  /** Which figure `low` and `high` belong to, where that is not a score's first. */
  const MAIN = { input: "auprc" };
  /** Numbers that are no figures of their own. */
  const BESIDE = new Set(["low", "high", "base_rate", "natural_rate", "precision", "recall", "balanced_accuracy", "num_positive", "num_negative", "num_near", "num_unparsed", ...Object.values(INTERVALS).flat()]);
  const NAMES = { rule: "Token rule", "control:no label": "no label: texts alone", "control:empty": "empty label", "control:random": "random words", "control:shuffled": "another feature's label" };
  const UNITS = { input: "sentences", rule: "held-out tokens", intruder: "groups of texts", output: "trials", intervention: "pairs of texts" };

  const spaced = (name) => name.replaceAll("_", " ");
  const figureName = (name) => FIGURES[name] ?? spaced(name);
  const labelerName = (name) => NAMES[name] ?? name;
  const scorerName = (name) => NAMES[name] ?? spaced(name.charAt(0).toUpperCase() + name.slice(1));
  const range = (low, high) => (isNumber(low) && isNumber(high) ? `${fixed(low, 2)} \u2026 ${fixed(high, 2)}` : "");

  /** The figures that a score has: the known ones first, then any other number. */
  function figuresOf(score) {
    const known = Object.keys(FIGURES).filter((name) => isNumber(score[name]) && !BESIDE.has(name));
    const others = Object.keys(score).filter((name) => isNumber(score[name]) && !BESIDE.has(name) && !(name in FIGURES));
    return [...known, ...others];
  }

  /** One score of one feature, with the same figure of its controls. */
  function scoreTable(score, controls) {
    const figures = figuresOf(score);
    const total = score.num_positive + score.num_negative;
    const near = score.num_near ? `, ${integer(score.num_near)} near ones are silent` : "";
    const unusable = score.num_unparsed ? `, ${integer(score.num_unparsed)} answers unusable` : "";
    const positives = total ? `${integer(score.num_positive)} of ${integer(total)} ${UNITS[score.scorer] ?? "held-out contexts"} ${score.scorer === "input" ? "should activate it" : score.scorer in UNITS && score.scorer !== "rule" ? "judged" : "fire"}${near}${unusable}` : "";
    const main = MAIN[score.scorer] ?? figures[0];
    const line = (name) => {
      const [key, referenceName] = REFERENCES[name] ?? [];
      const [low, high] = (INTERVALS[name] ?? (name === main ? ["low", "high"] : [])).map((end) => score[end]);
      const reference = key && isNumber(score[key]) ? score[key] : undefined;
      const details = [range(low, high) && `95 %: ${range(low, high)}`, isNumber(reference) && `${referenceName} ${number(reference, 2)}`].filter(Boolean);
      const isShare = score[name] >= 0 && score[name] <= 1;
      const chart = isShare && saekit.charts.whisker({ name: figureName(name), value: score[name], low, high, reference, referenceName });
      return h("tr", {}, h("th", { scope: "row", text: figureName(name) }), h("td", { class: "value", text: fixed(score[name], 2) }), h("td", { class: "figure" }, chart), h("td", { class: "range", text: details.join(", ") }));
    };
    const rates = [["precision", score.precision], ["recall", score.recall], ["balanced accuracy", score.balanced_accuracy]].filter(([, value]) => isNumber(value)).map(([name, value]) => `${name} ${fixed(value, 2)}`);
    const known = controls.filter((control) => isNumber(control[figures[0]])).map((control) => `${labelerName(control.labeler)} ${fixed(control[figures[0]], 2)}`);
    return h(
      "div",
      { class: "score" },
      h("div", { class: "score-head" }, h("b", { text: scorerName(score.scorer) }), h("span", { text: [positives, score.judge && `judge ${score.judge}`].filter(Boolean).join(" \u00b7 ") })),
      figures.length ? h("table", {}, h("tbody", {}, figures.map(line))) : h("p", { class: "absent", text: "No figure: too few texts, or no usable answer." }),
      rates.length > 0 && h("p", { class: "score-foot", text: rates.join(" \u00b7 ") }),
      known.length > 0 && h("p", { class: "score-foot", text: `${figureName(figures[0])} of labels that know nothing: ${known.join(" \u00b7 ")}` }),
    );
  }

  function table(name, head, rows, note) {
    const header = h("tr", {}, head.map(([text, side]) => h("th", { scope: "col", class: side, text })));
    return h("div", { class: "controls" }, note && h("p", { class: "small", text: note }), h("div", { class: "scroll-x", tabindex: "0", role: "region", "aria-label": name }, h("table", { class: "figures" }, h("thead", {}, header), h("tbody", {}, rows))));
  }

  /** One scorer's means over features, its controls below its labelers. */
  function scorerTable(scorer, entries) {
    const figures = [...new Set(entries.flatMap((entry) => Object.keys(entry).filter((key) => isNumber(entry[key]) && Array.isArray(entry[`${key}_interval`]))))];
    const rates = ["base_rate", "natural_rate"].filter((name) => entries.some((entry) => isNumber(entry[name])));
    const cell = (entry, name) => {
      if (!isNumber(entry[name])) return h("td", { class: "missing", text: NONE });
      const [low, high] = entry[`${name}_interval`];
      return h("td", { class: entry.is_control ? null : "own" }, h("span", { class: "value", text: fixed(entry[name], 2) }), h("span", { class: "range", text: range(low, high) }));
    };
    const rows = entries.map((entry) => h("tr", {}, h("th", { scope: "row", class: "left", text: labelerName(entry.labeler) }), h("td", { text: integer(entry.scored) }), figures.map((name) => cell(entry, name)), rates.map((name) => h("td", { text: number(entry[name], 2) }))));
    const judges = [...new Set(entries.map((entry) => entry.judge).filter(Boolean))];
    const unusable = entries.reduce((sum, entry) => sum + (entry.unparsed ?? 0), 0);
    const note = `${scorerName(scorer)}${judges.length ? ` by ${judges.join(", ")}` : ""}: means over features${unusable ? `; ${integer(unusable)} answers were unusable and count as wrong` : ""}.`;
    return table(scorerName(scorer), [["label", "left"], ["features"], ...figures.map((name) => [figureName(name)]), ...rates.map((name) => [spaced(name)])], rows, note);
  }

  function outcomeTable(outcome) {
    const reasons = (labeler) => [
      ...Object.entries(labeler.failed_reasons ?? {}).map(([reason, count]) => `${integer(count)} failed: ${reason}`),
      ...Object.keys(labeler.skipped_features ?? {}).map((reason) => `skipped: ${reason}`),
    ].join("; ");
    const rows = outcome.labelers.map((labeler) => h("tr", {}, h("th", { scope: "row", class: "left", text: labeler.name }), ["labelled", "failed", "skipped", "missing"].map((key) => h("td", { text: integer(labeler[key]) })), h("td", { class: "left reasons", text: reasons(labeler) || NONE })));
    return table("What became of every feature", [["labeler", "left"], ["labelled"], ["failed"], ["skipped"], ["still to do"], ["reasons", "left"]], rows, "What became of every feature:");
  }

  function moneyLine(llm) {
    const parts = [
      llm.model, `${integer(llm.requests_sent)} requests`, `${integer(llm.input_tokens)} input and ${integer(llm.output_tokens)} output tokens`,
      isNumber(llm.cost) ? `$${number(llm.cost, 3)}` : "no price known", isNumber(llm.cost_per_feature) && `$${number(llm.cost_per_feature, 2)} a feature`,
      llm.interrupted_requests > 0 && `${integer(llm.interrupted_requests)} ${llm.interrupted_requests === 1 ? "request" : "requests"} cut off${isNumber(llm.interrupted_cost_at_most) ? `, at most $${number(llm.interrupted_cost_at_most, 2)}` : ""}`,
    ].filter(Boolean);
    return h("p", { class: "small money", text: `Labelling model: ${parts.join(" \u00b7 ")}` });
  }

  /** How the labels of a run came about and what judges say of them; nothing where neither was recorded. */
  function section(run) {
    const scorers = new Map();
    for (const entry of run.judged) scorers.set(entry.scorer, [...(scorers.get(entry.scorer) ?? []), entry]);
    if (!run.outcome && scorers.size === 0) return null;
    return h(
      "section",
      { class: "block", id: "judged" },
      h("h2", { text: "Labels and their judges" }),
      scorers.size > 0 && h("p", { class: "intro", text: "Small print: 95 % intervals over resampled features. A label is worth what it scores above the controls below it and above its rate." }),
      run.outcome && outcomeTable(run.outcome),
      run.outcome?.llm && moneyLine(run.outcome.llm),
      [...scorers].map(([scorer, entries]) => scorerTable(scorer, entries)),
    );
  }

  return { labelerName, scoreTable, section };
})();
