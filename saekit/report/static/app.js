"use strict";

// Routes, theme and keyboard. Addresses: #/<run>, #/<run>/features?<query>, #/<run>/feature/<number>.
saekit.app = (() => {
  const { h } = saekit;
  const byId = (id) => document.getElementById(id);
  const state = { report: null, run: null, view: null, feature: null, notice: null, queries: new Map(), indexes: new Map() };
  let table;
  let panel;
  let turn = 0;

  function parseRoute() {
    const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
    const [slug, view = "overview", feature] = path.split("/");
    return { slug, view, feature, query };
  }

  function indexOf(run) {
    if (!state.indexes.has(run.slug)) {
      const index = saekit.load(`${run.slug}/index`).then((raw) => new saekit.query.FeatureIndex(raw));
      index.catch(() => state.indexes.delete(run.slug));
      state.indexes.set(run.slug, index);
    }
    return state.indexes.get(run.slug);
  }

  async function route() {
    const mine = ++turn;
    saekit.hideTooltip();
    const { slug, view, feature, query } = parseRoute();
    const run = state.report.runs.find((one) => one.slug === slug);
    if (!run) {
      state.notice = slug ? `There is no SAE called "${slug}" in this report; this is ${state.report.runs[0].name}.` : null;
      location.replace(`#/${state.report.runs[0].slug}`);
      return;
    }
    fail(state.notice);
    state.notice = null;
    state.run = run;
    table.base = `#/${run.slug}`;
    frame(run, view);
    try {
      if (view === "feature") await showFeature(run, feature, mine);
      else if (view === "features") await showList(run, query, mine);
      else showOverview(run);
    } catch (error) {
      if (mine === turn) fail(error.message);
    }
  }

  function frame(run, view) {
    state.view = view;
    const isOverview = view !== "features" && view !== "feature";
    byId("overview").hidden = !isOverview;
    byId("browser").hidden = isOverview;
    byId("browser").classList.toggle("open", view === "feature");
    byId("detail").hidden = view !== "feature";
    byId("tab-overview").href = `#/${run.slug}`;
    byId("tab-features").href = listAddress(run);
    markCurrent(byId("tab-overview"), isOverview);
    markCurrent(byId("tab-features"), !isOverview);
    for (const link of byId("run-switch").querySelectorAll("a")) {
      link.href = isOverview ? `#/${link.dataset.slug}` : `#/${link.dataset.slug}/features`;
      markCurrent(link, link.dataset.slug === run.slug);
    }
    const choice = byId("run-switch").querySelector("select");
    if (choice) choice.value = run.slug;
  }

  function markCurrent(link, isCurrent) {
    if (isCurrent) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }

  function listAddress(run) {
    const query = state.queries.get(run.slug);
    return `#/${run.slug}/features${query ? `?${query}` : ""}`;
  }

  function showOverview(run) {
    title(run.name);
    saekit.overview.render(byId("overview"), state.report, run);
  }

  async function showList(run, query, mine) {
    const index = await indexOf(run);
    if (mine !== turn) return;
    state.feature = null;
    state.queries.set(run.slug, query);
    title(`Features, ${run.name}`);
    table.show(index, query);
    table.setCurrent(null);
    byId("tab-features").href = listAddress(run);
  }

  async function showFeature(run, text, mine) {
    const index = await indexOf(run);
    if (mine !== turn) return;
    table.show(index, state.queries.get(run.slug) ?? "");
    const feature = /^\d+$/.test(text ?? "") ? Number(text) : NaN;
    if (!(feature < index.count)) {
      byId("detail").replaceChildren(h("p", { class: "absent", text: `There is no feature "${text ?? ""}": ${run.name} has ${index.count}, numbered from 0.` }), h("p", {}, h("a", { class: "button", href: listAddress(run), text: "Back to the table" })));
      return;
    }
    state.feature = feature;
    table.setCurrent(feature);
    const place = table.place.get(feature);
    const around = place === undefined ? "not in the current list" : `${saekit.integer(place + 1)} of ${saekit.integer(table.order.length)}`;
    await panel.show({ run, index, feature, previous: table.neighbor(feature, -1), next: table.neighbor(feature, 1), around, base: table.base });
    if (mine !== turn) return;
    const label = index.label(feature, "");
    title(`${feature}${label ? ` ${label.text}` : ""}, ${run.name}`);
    byId("close-feature").href = listAddress(run);
    if (!byId("list").contains(document.activeElement)) byId("feature-title").focus({ preventScroll: true });
    byId("announcer").textContent = `Feature ${feature}${label ? `: ${label.text}` : ""}`;
  }

  function title(text) {
    document.title = `${text} \u00b7 ${state.report.title}`;
  }

  function fail(message) {
    byId("failure").hidden = message === null;
    byId("failure").textContent = message ?? "";
  }

  const go = (feature) => {
    if (feature !== null && feature !== undefined) location.hash = `#/${state.run.slug}/feature/${feature}`;
  };

  function queryChanged(query) {
    state.queries.set(state.run.slug, query);
    const address = listAddress(state.run);
    // A filter set beside an open feature narrows the list and keeps the feature; history holds pages, not keystrokes.
    if (state.view === "features") history.replaceState(null, "", address);
    byId("tab-features").href = address;
    indexOf(state.run).then((index) => {
      table.show(index, query);
      table.setCurrent(state.feature);
      if (state.view === "feature") route();
    });
  }

  function buildSwitch() {
    const { runs } = state.report;
    const holder = byId("run-switch");
    if (runs.length < 2) return;
    if (runs.length <= 4 && runs.reduce((sum, run) => sum + run.name.length, 0) <= 40) {
      holder.replaceChildren(h("nav", { class: "segmented", "aria-label": "SAE" }, runs.map((run) => h("a", { "data-slug": run.slug, href: `#/${run.slug}`, text: run.name }))));
      return;
    }
    const choose = (event) => {
      location.hash = state.view === "overview" ? `#/${event.target.value}` : `#/${event.target.value}/features`;
    };
    holder.replaceChildren(h("label", { class: "field" }, h("span", { class: "visually-hidden", text: "SAE" }), h("select", { onchange: choose }, runs.map((run) => h("option", { value: run.slug, text: run.name })))));
  }

  function isDark() {
    const { theme } = document.documentElement.dataset;
    return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function paintThemeButton() {
    const button = byId("theme-button");
    button.textContent = isDark() ? "\u263c" : "\u263e";
    button.setAttribute("aria-label", isDark() ? "Use the light theme" : "Use the dark theme");
    button.title = button.getAttribute("aria-label");
  }

  function toggleTheme() {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem("saekit-theme", theme);
    } catch {
      // Without storage the choice lasts as long as the page.
    }
    paintThemeButton();
  }

  function key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || byId("help").open) return;
    const isTyping = event.target.closest?.("input, select, textarea");
    if (isTyping) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const inGrid = event.target.closest?.(".scroller") && event.key.startsWith("Arrow");
    const onFeature = state.view === "feature" && state.feature !== null;
    const actions = {
      "/": () => focusSearch(),
      ...(state.view !== "overview" && { r: () => table.openRandom() }),
      "?": () => byId("help").showModal(),
      ...(onFeature && {
        j: () => go(table.neighbor(state.feature, 1)), ArrowRight: () => go(table.neighbor(state.feature, 1)),
        k: () => go(table.neighbor(state.feature, -1)), ArrowLeft: () => go(table.neighbor(state.feature, -1)),
        t: () => panel.toggleKind(),
      }),
      ...(state.view === "feature" && { Escape: () => { location.hash = listAddress(state.run); } }),
    };
    if (inGrid && event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  function focusSearch() {
    if (state.view === "overview" || getComputedStyle(byId("list")).display === "none") location.hash = listAddress(state.run);
    requestAnimationFrame(() => requestAnimationFrame(() => byId("search").focus()));
  }

  async function start() {
    table = new saekit.table.FeatureTable(byId("list"), { open: go, changed: queryChanged });
    panel = new saekit.feature.FeaturePanel(byId("detail"));
    byId("help-button").addEventListener("click", () => byId("help").showModal());
    byId("theme-button").addEventListener("click", toggleTheme);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintThemeButton);
    document.addEventListener("keydown", key);
    document.addEventListener("scroll", saekit.hideTooltip, { capture: true, passive: true });
    paintThemeButton();
    try {
      state.report = await saekit.load("report");
    } catch (error) {
      fail(error.message);
      return;
    }
    buildSwitch();
    window.addEventListener("hashchange", route);
    await route();
    document.documentElement.dataset.ready = "yes";
  }

  start();
  return { state };
})();
