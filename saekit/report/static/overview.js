"use strict";

// The overview of one run: key figures, training curves, metrics beside null rows, feature statistics, the store, provenance.
saekit.overview = (() => {
  const { h, isNumber, number, fixed, integer, percent, percentTick, compact, NONE } = saekit;
  const { lines, histogram } = saekit.charts;

  const BETTER = {
    fvu: "lower", fvu_massive: "lower", delta_ce: "lower", ce: "lower", kl: "lower", dead_fraction: "lower",
    cosine_similarity: "higher", ce_recovered_zero: "higher", ce_recovered_mean: "higher", kl_recovered_zero: "higher", kl_recovered_mean: "higher",
    norm_ratio: "to 1", relative_reconstruction_bias: "to 1",
  };
  /** Below this many documents a bootstrap over documents says too little. */
  const FEW_DOCUMENTS = 20;
  const ARROW = { lower: "\u2193 lower is better", higher: "\u2191 higher is better", "to 1": "\u2192 1 is unbiased" };

  const kindName = (kind) => ({ topk: "TopK", jumprelu: "JumpReLU", batchtopk: "BatchTopK" })[kind] ?? String(kind);

  function architectureLine(run) {
    const cfg = run.architecture;
    const parts = [kindName(cfg.kind), `${integer(cfg.d_sae)} features`];
    if (isNumber(cfg.d_in) && cfg.d_in > 0) parts.push(`${integer(cfg.d_in)} wide`);
    if (isNumber(cfg.k)) parts.push(`k = ${cfg.k}`);
    if (isNumber(cfg.target_l0)) parts.push(`target L0 = ${number(cfg.target_l0)}`);
    return parts.join(" \u00b7 ");
  }

  /** Where the texts come from, of whatever kind the cache's config names. */
  function textsLine(text) {
    if (!text) return null;
    const named = [text.name, text.config_name, text.split].filter(Boolean).join(", ");
    return named || (text.paths ?? []).join(", ") || text.kind;
  }

  /** The last part of a local path; a hub name as it is. */
  const shortName = (name) => (name && /^([/~.]|[A-Za-z]:\\)/.test(name) ? name.split(/[/\\]/).filter(Boolean).at(-1) : name);

  const saeRow = (run) => run.evaluation?.rows.find((row) => row.name === "sae") ?? null;
  const saeFigure = (run, metric) => saeRow(run)?.metrics[metric] ?? null;

  function interval(figure, digits) {
    return figure && isNumber(figure[1]) && isNumber(figure[2]) ? `${fixed(figure[1], digits)} \u2026 ${fixed(figure[2], digits)}` : "";
  }

  function tile(name, value, detail, hint) {
    return h("div", { class: "tile", title: hint }, h("div", { class: "tile-name", text: name }), h("div", { class: "tile-value", text: value }), h("div", { class: "tile-detail", text: detail || "\u00a0" }));
  }

  function tiles(run) {
    const metric = (name) => run.evaluation?.metrics.find((one) => one.name === name);
    const figureTile = (name, title, digits, asPercent) => {
      const figure = saeFigure(run, name);
      const shown = figure ? (asPercent ? percent(figure[0]) : fixed(figure[0], digits)) : NONE;
      const range = figure && isNumber(figure[1]) ? (asPercent ? `95 %: ${percent(figure[1])} \u2026 ${percent(figure[2])}` : `95 %: ${interval(figure, digits)}`) : "";
      return tile(title, shown, figure ? range : "not computed", metric(name)?.definition);
    };
    const { total, firing, labelled } = run.features;
    const best = run.labelers.find((one) => Object.values(one.scorers).some((scorer) => isNumber(scorer.f1)));
    const [scorer, scored] = best ? Object.entries(best.scorers).find(([, one]) => isNumber(one.f1)) : [null, null];
    return h(
      "div",
      { class: "tiles" },
      figureTile("fvu", "FVU", 3),
      figureTile("l0", "L0", 1),
      figureTile("ce_recovered_zero", "CE recovered", 3, true),
      figureTile("delta_ce", "\u0394 CE, nats", 3),
      tile("Features that fire", firing === null ? NONE : integer(firing), firing === null ? "not computed" : `of ${integer(total)} \u00b7 ${percent(firing / total)}`),
      tile("Labelled", labelled === null ? NONE : integer(labelled), labelled === null ? "not computed" : `of ${integer(total)} \u00b7 ${percent(labelled / total)}`),
      tile("Median F1 of labels", scored ? fixed(scored.f1, 2) : NONE, scored ? `${best.name} \u00b7 ${scorer}` : "not computed"),
    );
  }

  function section(title, intro, ...content) {
    return h("section", { class: "block" }, h("h2", { text: title }), intro && h("p", { class: "intro", text: intro }), ...content);
  }

  const absent = (text) => h("p", { class: "absent", text });

  function compare(report) {
    if (report.runs.length < 2) return null;
    const columns = [["fvu", "FVU", 3], ["l0", "L0", 1], ["dead_fraction", "dead", 3], ["ce_recovered_zero", "CE recovered", 3], ["delta_ce", "\u0394 CE", 3], ["kl", "KL", 3]];
    const head = h("tr", {}, h("th", { scope: "col", class: "left", text: "SAE" }), h("th", { scope: "col", text: "architecture", class: "left" }), columns.map(([, title]) => h("th", { scope: "col", text: title })), h("th", { scope: "col", text: "median F1" }));
    const rows = report.runs.map((run) => {
      const scored = run.labelers.flatMap((one) => Object.values(one.scorers)).find((one) => isNumber(one.f1));
      const cells = columns.map(([name, , digits]) => figureCell(saeFigure(run, name), digits));
      return h("tr", {}, h("th", { scope: "row" }, h("a", { href: `#/${run.slug}`, text: run.name })), h("td", { class: "left", text: architectureLine(run) }), cells, h("td", { text: scored ? fixed(scored.f1, 2) : NONE }));
    });
    return section("SAEs of this report", null, h("div", { class: "scroll-x", tabindex: "0", role: "region", "aria-label": "SAEs of this report" }, h("table", { class: "figures" }, h("thead", {}, head), h("tbody", {}, rows))), pareto(report));
  }

  /** Quality against L0 of the SAEs of each place, those that no other one beats joined by a line. */
  function pareto(report) {
    const places = [...new Set(report.pareto.map((row) => row.place))].filter((place) => report.pareto.filter((row) => row.place === place).length > 1);
    const charts = places.flatMap((place) =>
      [["fvu", "FVU against L0"], ["ce_recovered_zero", "CE recovered against L0"]].map(([metric, title]) => {
        const rows = report.pareto.filter((row) => row.place === place && isNumber(row.l0) && isNumber(row[metric]));
        const [front, others] = [true, false].map((isOn) => rows.filter((row) => row.fronts.includes(metric) === isOn));
        const series = [["not beaten by another", "--series-1", front, false], ["others", "--series-2", others, true]].filter(([, , shown]) => shown.length > 0);
        return lines({ title, note: `${place}; not beaten: ${front.map((row) => row.name).join(", ")}`, series: series.map(([name, color, shown, isPoints]) => ({ name, color, isPoints, x: shown.map((row) => row.l0), y: shown.map((row) => row[metric]) })), xLabel: "L0", fromZero: false });
      }),
    );
    return charts.length > 0 && h("div", { class: "grid two" }, charts);
  }

  function figureCell(figure, digits, isOwn) {
    if (!figure) return h("td", { class: "missing", text: NONE, title: "not computed" });
    const range = interval(figure, digits);
    return h("td", { class: isOwn ? "own" : null }, h("span", { class: "value", text: fixed(figure[0], digits) }), range && h("span", { class: "range", text: range }));
  }

  function metricTable(run) {
    const evaluation = run.evaluation;
    if (!evaluation) return section("Metrics", null, absent("Not computed: this SAE was not evaluated."));
    const shown = evaluation.metrics.filter((metric) => evaluation.rows.some((row) => row.metrics[metric.name]));
    const left = evaluation.metrics.filter((metric) => !shown.includes(metric)).map((metric) => metric.title);
    const head = h("tr", {}, h("th", { scope: "col", class: "left", text: "metric" }), evaluation.rows.map((row) => h("th", { scope: "col", text: row.name === "sae" ? run.name : row.title, title: row.definition, class: row.name === "sae" ? "own" : null })));
    const body = shown.map((metric) => {
      const name = h("th", { scope: "row", class: "left" }, h("span", { class: "metric-name", title: metric.definition, text: metric.title }), BETTER[metric.name] && h("span", { class: "direction", text: ARROW[BETTER[metric.name]].slice(0, 1), title: ARROW[BETTER[metric.name]] }));
      return h("tr", {}, name, evaluation.rows.map((row) => figureCell(row.metrics[metric.name], metric.digits, row.name === "sae")));
    });
    const reference = Object.entries(evaluation.reference).filter(([, value]) => isNumber(value));
    return section(
      "Metrics, beside null dictionaries",
      `${integer(evaluation.num_tokens)} held-out tokens of ${integer(evaluation.num_documents)} documents; CE and KL on ${integer(evaluation.num_loss_tokens)} positions. Small print: 95 % intervals over ${integer(evaluation.num_bootstrap)} resamples of the documents${evaluation.num_documents < FEW_DOCUMENTS ? `; from fewer than ${FEW_DOCUMENTS} documents they are too narrow to rely on` : ""}.`,
      h("div", { class: "scroll-x", tabindex: "0", role: "region", "aria-label": "Metrics" }, h("table", { class: "figures" }, h("thead", {}, head), h("tbody", {}, body))),
      reference.length > 0 && h("p", { class: "small", text: `Reference losses in nats: ${reference.map(([name, value]) => `${name.replace("_", " ").replace("ce", "CE").replace("kl", "KL")} ${fixed(value, 3)}`).join(", ")}.` }),
      left.length > 0 && h("p", { class: "small", text: `Not computed: ${left.join(", ")}.` }),
      h("details", { class: "small" }, h("summary", { text: "What each metric is" }), h("dl", { class: "definitions" }, shown.map((metric) => h("div", {}, h("dt", { text: metric.title }), h("dd", { text: metric.definition }))))),
    );
  }

  function training(run) {
    const splits = [["train", "training", "--series-1"], ["test", "held out", "--series-2"]].filter(([split]) => run.curves[split]);
    if (splits.length === 0) return section("Training", null, absent("Not recorded: this SAE's folder has no metrics.jsonl."));
    const chart = (column, title, options) => {
      const series = splits.filter(([split]) => run.curves[split][column]).map(([split, name, color]) => ({ name, color, x: run.curves[split].tokens, y: run.curves[split][column] }));
      return lines({ title, series, xLabel: "tokens", height: 190, ...options });
    };
    return section(
      "Training",
      null,
      h("div", { class: "grid four" }, chart("loss", "Loss", { isLogY: true, fromZero: false }), chart("fvu", "FVU", {}), chart("l0", "L0", {}), chart("dead_fraction", "Dead features", { yFormat: percentTick })),
    );
  }

  function featureStatistics(run) {
    const density = run.density;
    const charts = [];
    if (density) {
      charts.push(
        histogram({
          title: "How often features fire",
          note: run.scanned_tokens ? `over ${compact(run.scanned_tokens)} training tokens; ${integer(density.never)} never fired` : `${integer(density.never)} never fired`,
          edges: density.edges.map((edge) => 10 ** edge), series: [{ name: "features", color: "--series-1", counts: density.counts }],
          isLogX: true, xLabel: "share of tokens (log)", xFormat: percentTick,
        }),
      );
    }
    if (run.evaluation?.decoder_cosine.counts.length) {
      const cosine = trimmed(run.evaluation.decoder_cosine);
      charts.push(histogram({ title: "Nearest feature by decoder cosine", note: "towards 1: near duplicates", edges: cosine.edges, series: [{ name: "features", color: "--series-1", counts: cosine.counts }], xLabel: "largest cosine with another feature", xFormat: (value) => number(value, 2) }));
    }
    const labelers = run.labelers.length > 0 ? labelerTable(run) : absent("Labels: not computed.");
    return section("Features", null, charts.length ? h("div", { class: "grid two" }, charts) : absent("Firing densities: not computed."), labelers, controlTable(run));
  }

  /** The histogram without its empty ends. */
  function trimmed({ edges, counts }) {
    const first = counts.findIndex((count) => count > 0);
    const last = counts.findLastIndex((count) => count > 0);
    if (first < 0) return { edges, counts };
    const [from, to] = [Math.max(0, first - 2), Math.min(counts.length, last + 3)];
    return { edges: edges.slice(from, to + 1), counts: counts.slice(from, to) };
  }

  function controlTable(run) {
    const { controls } = run;
    if (!controls) return null;
    const rows = [["the labels", ""], ["each label on another feature", "shuffled_"], ["a label that always fires", "always_"], ["a label that never fires", "empty_"]];
    const body = rows.filter(([, key]) => isNumber(controls[`${key}f1`])).map(([name, key]) => h("tr", {}, h("th", { scope: "row", class: "left", text: name }), h("td", { class: key ? null : "own", text: fixed(controls[`${key}f1`], 3) }), h("td", { class: key ? null : "own", text: fixed(controls[`${key}auprc`], 3) })));
    const caption = `Token rules against labels that know nothing: means over ${integer(controls.labels)} labels on ${integer(controls.tokens)} held-out tokens of ${integer(controls.documents)} documents.`;
    return h("div", { class: "controls" }, h("p", { class: "small", text: caption }), h("div", { class: "scroll-x", tabindex: "0", role: "region", "aria-label": "Labels beside controls" }, h("table", { class: "figures" }, h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "left", text: "label" }), h("th", { scope: "col", text: "mean F1" }), h("th", { scope: "col", text: "mean AUPRC" }))), h("tbody", {}, body))));
  }

  function labelerTable(run) {
    const rows = run.labelers.flatMap((labeler) => {
      const scorers = Object.entries(labeler.scorers);
      return (scorers.length ? scorers : [[null, null]]).map(([scorer, figures]) =>
        h("tr", {}, h("th", { scope: "row", class: "left", text: labeler.name }), h("td", { text: integer(labeler.done) }), h("td", { text: integer(labeler.failed) }), h("td", { class: "left", text: scorer ?? "not scored" }), h("td", { text: figures ? integer(figures.scored) : NONE }), h("td", { text: fixed(figures?.f1, 3) }), h("td", { text: fixed(figures?.auprc, 3) }), h("td", { text: fixed(figures?.accuracy, 3) }), h("td", { text: fixed(figures?.pearson, 3) }), h("td", { text: fixed(figures?.gain, 3) }), h("td", { text: fixed(figures?.auprc_near, 3) }), h("td", { text: number(figures?.base_rate, 2) })),
      );
    });
    const head = h("tr", {}, [["labeler", "left"], ["labels"], ["failed"], ["scorer", "left"], ["scored"], ["median F1"], ["median AUPRC"], ["median accuracy"], ["median correlation"], ["median nats gained"], ["median AUPRC, near"], ["median base rate"]].map(([text, side]) => h("th", { scope: "col", class: side, text })));
    return h("div", { class: "scroll-x", tabindex: "0", role: "region", "aria-label": "Labelers" }, h("table", { class: "figures" }, h("thead", {}, head), h("tbody", {}, rows)));
  }

  function storeBlock(report, run) {
    const store = report.stores[run.store];
    if (!store) return section("Activations", null, absent("The store has no activations at this SAE's hook point."));
    const { normal, padding, special, massive } = store.tokens;
    const usable = normal + special + massive;
    const share = isNumber(store.massive_variance_share)
      ? ` The massive ones, ${percent(massive / usable)} of the tokens, carry ${percent(store.massive_variance_share)} of the variance.` : "";
    const intro = `${integer(normal)} tokens are used. Left out: ${integer(massive)} with massive activations${isNumber(store.massive_threshold) ? ` (norm above ${number(store.massive_threshold)})` : ""}, ${integer(special)} special${padding ? `, ${integer(padding)} padding` : ""}.${share}`;
    const norms = store.norm_histogram;
    const names = [["normal", "used", "--series-1"], ["special", "special", "--series-3"], ["massive", "massive", "--series-2"]];
    return section(
      "Activations",
      intro,
      h(
        "div",
        { class: "grid two" },
        norms ? histogram({ title: "Norm of the activations", note: `median ${number(store.median_norm)} of those used; both axes logarithmic`, edges: norms.edges, series: names.filter(([name]) => norms.series[name].some((count) => count > 0)).map(([name, title, color]) => ({ name: title, color, counts: norms.series[name] })), isLogX: true, isLogY: true, xLabel: "norm", unit: "tokens" }) : absent("Norms: not recorded."),
        lines({ title: "Mean norm by position", note: "logarithmic", series: [["all tokens", "--series-2", store.position_norms_all], ["used", "--series-1", store.position_norms]].map(([name, color, y]) => ({ name, color, x: y.map((_, at) => at), y })), xLabel: "position in the context", isLogY: true }),
      ),
    );
  }

  function stageTable(report, run) {
    const stages = [["cache", report.cache], ...Object.entries(run.stages)];
    const row = ([name, stage]) => h("tr", {}, h("th", { scope: "row", class: "left", text: name }), h("td", { class: "left", text: (stage.finished ?? stage.started).replace("T", " ").replace("+00:00", " UTC") }), h("td", { class: "left mono", text: stage.config_sha256.slice(0, 12) }), h("td", { class: "left", text: ["saekit", "torch", "transformers"].filter((name) => stage.versions[name]).map((name) => `${name} ${stage.versions[name]}`).join(", ") }));
    const head = h("tr", {}, ["stage", "finished", "config", "versions"].map((text) => h("th", { scope: "col", class: "left", text })));
    return h("div", { class: "scroll-x", tabindex: "0", role: "region", "aria-label": "Stages" }, h("table", { class: "figures plain" }, h("thead", {}, head), h("tbody", {}, stages.map(row))));
  }

  function provenance(report, run) {
    const store = report.stores[run.store];
    const python = report.cache.versions;
    const facts = [
      ["model", store?.model], ["hook point", run.hook_point], ["texts", textsLine(report.cache.config.text)], ["tokens cached", store && `${integer(store.rows * store.context_len)}, ${integer(store.rows)} rows of ${store.context_len}, ${integer(store.documents)} documents`],
      ["SAE", architectureLine(run)], ["machine", python.platform && `Python ${python.python}, ${python.platform}`],
    ].filter(([, value]) => value);
    const raw = [["cache", report.cache], ...Object.entries(run.stages)].map(([name, stage]) => h("details", { class: "small" }, h("summary", { text: `${name}: config and counts` }), h("pre", { tabindex: "0", text: JSON.stringify({ config: stage.config, counts: stage.counts }, null, 2) })));
    return section("Provenance", null, h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", { text: name }), h("dd", { text: value })))), stageTable(report, run), raw);
  }

  function render(node, report, run) {
    const store = report.stores[run.store];
    const where = [shortName(store?.model), run.hook_point, store && `${compact(store.rows * store.context_len)} tokens`].filter(Boolean).join(" \u00b7 ");
    node.replaceChildren(
      h("div", { class: "hero" }, h("h1", { text: run.name }), h("p", { class: "lead", text: architectureLine(run) }), h("p", { class: "where", text: where }), h("p", { class: "hero-action" }, h("a", { class: "button primary", href: `#/${run.slug}/features`, text: `Browse ${integer(run.features.total)} features` }))),
      tiles(run),
      ...[compare(report), training(run), metricTable(run), featureStatistics(run), saekit.judged.section(run), storeBlock(report, run), provenance(report, run)].filter(Boolean),
      h("footer", { class: "foot", text: `Built by saekit ${report.version} on ${report.created.slice(0, 10)}. A folder of static files: nothing is loaded from a network.` }),
    );
  }

  return { render, kindName };
})();
