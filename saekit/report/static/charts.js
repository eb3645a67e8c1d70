"use strict";

// Small inline SVG charts that redraw at their own width, so that text keeps its size on narrow screens.
saekit.charts = (() => {
  const { h, s, isNumber, number, compact } = saekit;
  const MARGIN = { top: 8, right: 12, bottom: 34, left: 46 };

  function niceTicks(low, high, count) {
    const raw = (high - low) / Math.max(1, count);
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw);
    const ticks = [];
    for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) {
      ticks.push(Math.abs(tick) < step * 1e-9 ? 0 : tick);
    }
    return ticks;
  }

  function logTicks(low, high) {
    const first = Math.ceil(Math.log10(low) - 1e-9);
    const last = Math.floor(Math.log10(high) + 1e-9);
    const stride = Math.max(1, Math.ceil((last - first + 1) / 7));
    const ticks = [];
    for (let power = first; power <= last; power += stride) ticks.push(10 ** power);
    if (ticks.length >= 3) return ticks;
    const wide = [];
    for (let power = first - 1; power <= last + 1; power += 1) wide.push(...[1, 2, 5].map((factor) => factor * 10 ** power));
    const fitting = wide.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
    if (fitting.length > 7) return ticks;
    // Less than two 1-2-5 steps: a logarithm over so short a range is nearly a line.
    return fitting.length >= 2 ? fitting : niceTicks(low, high, 3).filter((tick) => tick > 0);
  }

  /** Maps [low, high] to [from, to], linearly or by logarithm. */
  function scale(low, high, from, to, isLog) {
    const change = isLog ? Math.log10 : (value) => value;
    const [a, b] = [change(low), change(high)];
    const map = (value) => from + ((change(value) - a) / (b - a || 1)) * (to - from);
    map.ticks = (count) => (isLog ? logTicks(low, high) : niceTicks(low, high, count));
    return map;
  }

  /** A figure with caption whose drawing follows its width. */
  function figure({ title, note, label, height = 190, legend }, draw) {
    const holder = h("div", { class: "plot" });
    const node = h(
      "figure",
      { class: "chart" },
      h("figcaption", {}, h("span", { class: "chart-title", text: title }), legend && legendNode(legend), note && h("span", { class: "chart-note", text: note })),
      holder,
    );
    let drawnAt = 0;
    new ResizeObserver(() => {
      const width = Math.floor(holder.clientWidth);
      if (width < 40 || width === drawnAt) return;
      drawnAt = width;
      const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
      draw(svg, width, height);
      holder.replaceChildren(svg);
    }).observe(holder);
    return node;
  }

  const legendNode = (entries) =>
    h("span", { class: "legend" }, entries.map(({ name, color }) => h("span", {}, h("i", { class: "swatch", style: { background: `var(${color})` } }), name)));

  function axes(svg, x, y, { width, height, xLabel, xFormat, yFormat, yCount = 4, margin }) {
    const bottom = height - margin.bottom;
    const grid = s("g", { class: "grid" });
    const texts = s("g", { class: "ticks" });
    for (const tick of y.ticks(yCount)) {
      grid.append(s("line", { x1: margin.left, x2: width - margin.right, y1: y(tick), y2: y(tick) }));
      texts.append(s("text", { x: margin.left - 7, y: y(tick), "text-anchor": "end", "dominant-baseline": "middle", text: yFormat(tick) }));
    }
    const xTicks = x.ticks(Math.max(3, Math.floor((width - margin.left) / 80)));
    for (const tick of xTicks) {
      const isAtEdge = x(tick) > width - margin.right - 14;
      texts.append(s("text", { x: isAtEdge ? width - 2 : x(tick), y: bottom + 15, "text-anchor": isAtEdge ? "end" : "middle", text: xFormat(tick) }));
    }
    svg.append(grid, texts, s("line", { class: "axis", x1: margin.left, x2: width - margin.right, y1: bottom, y2: bottom }));
    if (xLabel) {
      svg.append(s("text", { class: "axis-label", x: (margin.left + width - margin.right) / 2, y: height - 4, "text-anchor": "middle", text: xLabel }));
    }
  }

  /** series: [{name, color, x, y, isDotted, isPoints}]; nulls break the line, points have none. */
  function lines({ title, note, series, xLabel, yFormat = compact, height, fromZero = true, isLogY = false, legend }) {
    const points = series.map((one) => one.x.map((x, at) => [x, one.y[at]]).filter(([x, y]) => isNumber(x) && isNumber(y) && (!isLogY || y > 0)));
    const all = points.flat();
    if (all.length === 0) return empty(title, "not recorded");
    const xs = all.map(([x]) => x);
    const ys = all.map(([, y]) => y);
    const [xLow, xHigh] = [Math.min(...xs), Math.max(...xs)];
    let [yLow, yHigh] = [fromZero && !isLogY ? Math.min(0, ...ys) : Math.min(...ys), Math.max(...ys)];
    if (yLow === yHigh) [yLow, yHigh] = isLogY ? [yLow / 2, yHigh * 2] : [yLow - (yLow ? Math.abs(yLow) * 0.1 : 0), yHigh + (Math.abs(yHigh) * 0.1 || 1)];
    else if (!isLogY) yHigh += (yHigh - yLow) * 0.05;
    const label = `${title}. ${series.map((one, at) => (points[at].length ? `${one.name}: from ${number(points[at][0][1])} to ${number(points[at].at(-1)[1])}` : "")).join("; ")}`;
    return figure({ title, note, label, height, legend: legend ?? (series.length > 1 ? series : null) }, (svg, width, tall) => {
      const x = scale(xLow, xHigh === xLow ? xLow + 1 : xHigh, MARGIN.left, width - MARGIN.right, false);
      const y = scale(yLow, yHigh, tall - MARGIN.bottom, MARGIN.top, isLogY);
      axes(svg, x, y, { width, height: tall, xLabel, xFormat: compact, yFormat, margin: MARGIN });
      series.forEach((one, at) => {
        const path = points[at].map(([px, py], n) => `${n ? "L" : "M"}${x(px).toFixed(1)},${y(py).toFixed(1)}`).join("");
        if (!one.isPoints) svg.append(s("path", { d: path, fill: "none", class: one.isDotted ? "line dotted" : "line", style: { stroke: `var(${one.color})` } }));
        if (one.isPoints || points[at].length <= 24) {
          svg.append(points[at].map(([px, py]) => s("circle", { cx: x(px), cy: y(py), r: 2.6, style: { fill: `var(${one.color})` } })).reduce((group, dot) => (group.append(dot), group), s("g")));
        }
      });
      crosshair(svg, { width, height: tall, x, points, series, yFormat, xLabel });
    });
  }

  function crosshair(svg, { width, height, x, points, series, yFormat, xLabel }) {
    const rule = s("line", { class: "crosshair", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" });
    svg.append(rule);
    const nearest = (list, at) => list.reduce((best, point) => (Math.abs(x(point[0]) - at) < Math.abs(x(best[0]) - at) ? point : best));
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * width;
      const lead = nearest(points.flat(), at);
      rule.setAttribute("x1", x(lead[0]));
      rule.setAttribute("x2", x(lead[0]));
      rule.setAttribute("visibility", "visible");
      const rows = series.map((one, n) => points[n].length > 0 && h("div", { class: "tip-row" }, h("i", { class: "swatch", style: { background: `var(${one.color})` } }), `${one.name} `, h("b", { text: yFormat === compact ? number(nearest(points[n], at)[1], 4) : yFormat(nearest(points[n], at)[1]) })));
      saekit.showTooltip(event.clientX, box.top + MARGIN.top, h("div", { class: "tip-head", text: `${compact(lead[0])} ${xLabel ?? ""}` }), ...rows.filter(Boolean));
    });
    svg.addEventListener("pointerleave", () => {
      rule.setAttribute("visibility", "hidden");
      saekit.hideTooltip();
    });
  }

  /** series: [{name, color, counts}] over shared edges, drawn on top of each other; counts of zero draw nothing. */
  function histogram({ title, note, edges, series, xLabel, xFormat = compact, isLogX = false, isLogY = false, height, unit = "features", binText }) {
    const total = series.reduce((sum, one) => sum + one.counts.reduce((a, b) => a + b, 0), 0);
    if (total === 0 || edges.length < 2) return empty(title, "nothing to count");
    const most = Math.max(...series.flatMap((one) => one.counts));
    const label = `${title}: ${series.map((one) => `${one.name} ${one.counts.reduce((a, b) => a + b, 0)}`).join(", ")} ${unit} from ${xFormat(edges[0])} to ${xFormat(edges.at(-1))}`;
    return figure({ title, note, label, height, legend: series.length > 1 ? series : null }, (svg, width, tall) => {
      const x = scale(edges[0], edges.at(-1), MARGIN.left, width - MARGIN.right, isLogX);
      const bottom = tall - MARGIN.bottom;
      const y = scale(isLogY ? 0.7 : 0, isLogY ? most * 1.3 : most * 1.05, bottom, MARGIN.top, isLogY);
      axes(svg, x, y, { width, height: tall, xLabel, xFormat, yFormat: compact, yCount: 3, margin: MARGIN });
      for (const one of series) {
        const bars = s("g", { style: { fill: `var(${one.color})` }, class: "bars" });
        one.counts.forEach((count, bin) => {
          if (count === 0) return;
          const left = x(edges[bin]);
          const right = x(edges[bin + 1]);
          bars.append(s("rect", { x: left + 0.5, width: Math.max(1, right - left - 1), y: y(count), height: Math.max(1, bottom - y(count)) }));
        });
        svg.append(bars);
      }
      binHover(svg, { edges, series, x, width, height: tall, unit, binText: binText ?? ((bin) => `${xFormat(edges[bin])} to ${xFormat(edges[bin + 1])}`) });
    });
  }

  function binHover(svg, { edges, series, x, width, height, unit, binText }) {
    const band = s("rect", { class: "bin-band", y: MARGIN.top, height: height - MARGIN.bottom - MARGIN.top, visibility: "hidden" });
    svg.prepend(band);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * width;
      const bin = edges.findIndex((edge, n) => n + 1 < edges.length && at >= x(edge) && at < x(edges[n + 1]));
      if (bin < 0) {
        band.setAttribute("visibility", "hidden");
        saekit.hideTooltip();
        return;
      }
      band.setAttribute("x", x(edges[bin]));
      band.setAttribute("width", x(edges[bin + 1]) - x(edges[bin]));
      band.setAttribute("visibility", "visible");
      const rows = series.map((one) => h("div", { class: "tip-row" }, h("i", { class: "swatch", style: { background: `var(${one.color})` } }), series.length > 1 ? `${one.name} ` : "", h("b", { text: saekit.integer(one.counts[bin]) }), ` ${unit}`));
      saekit.showTooltip(event.clientX, box.top + MARGIN.top, h("div", { class: "tip-head", text: binText(bin) }), ...rows);
    });
    svg.addEventListener("pointerleave", () => {
      band.setAttribute("visibility", "hidden");
      saekit.hideTooltip();
    });
  }

  const empty = (title, reason) =>
    h("figure", { class: "chart" }, h("figcaption", {}, h("span", { class: "chart-title", text: title })), h("p", { class: "absent", text: reason }));

  /** A value on [0, 1] as a dot, with its interval as a bar and a reference as a tick. */
  function whisker({ value, low, high, reference, referenceName, name }) {
    const width = 132;
    const x = (share) => 4 + Math.min(1, Math.max(0, share)) * (width - 8);
    const label = `${name} ${number(value)}${isNumber(low) ? `, 95 % interval ${number(low)} to ${number(high)}` : ""}${isNumber(reference) ? `, ${referenceName} ${number(reference)}` : ""}`;
    const svg = s("svg", { class: "whisker", width, height: 16, viewBox: `0 0 ${width} 16`, role: "img", "aria-label": label });
    svg.append(s("line", { class: "track", x1: 4, x2: width - 4, y1: 8, y2: 8 }));
    if (isNumber(reference)) svg.append(s("line", { class: "reference", x1: x(reference), x2: x(reference), y1: 2, y2: 14 }));
    if (isNumber(low) && isNumber(high)) svg.append(s("line", { class: "interval", x1: x(low), x2: x(high), y1: 8, y2: 8 }));
    if (isNumber(value)) svg.append(s("circle", { class: "dot", cx: x(value), cy: 8, r: 4 }));
    svg.append(s("title", { text: label }));
    return svg;
  }

  return { lines, histogram, whisker };
})();
