"use strict";
// The page works without this script; it adds filters and the cases of a cell. All texts are inserted as text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const width = data.dtypes.length;
  const grid = document.getElementById("grid");
  const rows = [...grid.querySelectorAll("tbody tr[id]")];
  const buttons = rows.map((row) => [...row.querySelectorAll("button")]);
  const clauseNumbers = new Map(data.clauses.map(([id], number) => [id, number]));
  const FAILING = new Set(["fail", "deviation", "error", "crash", "timeout", "internal"]);
  const ALWAYS = new Set(["core", "lse"]); // Every call has these features.

  document.documentElement.classList.add("script");

  const element = (name, properties, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };

  // Return the outcome of a case in a dtype, and the share of the allowance that a pass uses.
  const resultAt = (column, place) => {
    const code = data.codes.indexOf(column.results[place]);
    if (code < 0) return { outcome: "not asked" };
    if (code < data.levels) return { outcome: "pass", share: code / (data.levels - 1) };
    return { outcome: data.outcomes[code - data.levels] };
  };

  // The causes are listed in the order of the results that are not passes.
  for (const column of data.columns) {
    column.causeAt = new Map();
    let next = 0;
    for (let place = 0; place < column.results.length; place += 1) {
      const { outcome } = resultAt(column, place);
      if (outcome !== "pass" && outcome !== "not asked") column.causeAt.set(place, column.numbers[next++]);
    }
  }

  // --- Who is right? ---
  const choice = document.getElementById("choice");
  const answer = document.getElementById("answer");
  const chosen = (name) => [...choice.querySelectorAll(`[name=${name}]:checked`)].map((input) => input.value);

  const relevantPlaces = (features, dtypes) => {
    const allowed = new Set([...features, ...ALWAYS]);
    const places = [];
    data.cases.forEach(([, , numbers, must], number) => {
      const names = numbers.map((n) => data.features[n]);
      if (!must || (features.length && !names.some((name) => features.includes(name)))) return;
      if (features.length && !names.every((name) => allowed.has(name))) return;
      const together = features.every((name) => names.includes(name));
      data.dtypes.forEach((dtype, d) => {
        if (!dtypes.length || dtypes.includes(dtype)) places.push({ place: number * width + d, dtype, names, together });
      });
    });
    return places;
  };

  const verdictOf = (column, places, features, dtypes) => {
    const count = { passed: 0, failed: 0, refused: 0, deviating: 0 };
    const proved = new Set();
    let together = false;
    for (const { place, dtype, names, together: all } of places) {
      const { outcome } = resultAt(column, place);
      if (outcome === "pass") {
        count.passed += 1;
        [dtype, ...names].forEach((name) => proved.add(name));
        together ||= all;
      } else if (FAILING.has(outcome)) {
        count.failed += 1;
        count.deviating += outcome === "deviation";
      } else if (outcome === "unsupported") count.refused += 1;
    }
    const asked = count.passed + count.failed;
    if (count.failed) {
      const only = count.failed === count.deviating;
      return [only ? "convention" : "wrong", `${only ? "another convention" : "wrong"} in ${count.failed} of ${asked} cases`, 1];
    }
    const lacking = [...features, ...dtypes].filter((name) => !proved.has(name));
    if (!asked) return count.refused ? ["unsupported", `refused all ${count.refused} cases`, 3] : ["not asked", "not asked", 4];
    if (lacking.length) return ["unsupported", `right in ${asked} cases, but none with ${lacking.join(", ")}`, 2];
    if (!together && places.some((p) => p.together)) return ["unsupported", `right in ${asked} cases, but not asked all of it together`, 2];
    const of = `${asked === 1 ? "the case that was" : `all ${asked} cases that were`} asked${count.refused ? `; refused ${count.refused}` : ""}`;
    return column.whole ? ["conforms", `right in ${of}`, 0] : ["not asked", `right in ${of}, but the run is partial`, 2];
  };

  const sign = (state) => {
    const made = element("span", { className: `sign s-${state.replace(" ", "-")}` });
    made.setAttribute("aria-hidden", "true");
    return made;
  };

  const showAnswer = () => {
    const features = chosen("feature"), dtypes = chosen("dtype");
    answer.replaceChildren();
    if (!features.length && !dtypes.length) return;
    const places = relevantPlaces(features, dtypes);
    const list = data.columns.map((column) => [column, ...verdictOf(column, places, features, dtypes)]);
    list.sort((a, b) => a[3] - b[3]);
    const right = list.filter((entry) => entry[3] === 0).length;
    answer.append(element("p", {}, element("strong", {}, `${right} of ${list.length} are right`), ` about ${[...features, ...dtypes].join(", ")}.`));
    answer.append(element("ul", { className: "answers" }, ...list.map(([column, state, text]) =>
      element("li", {}, sign(state), " ", element("strong", {}, column.name), ` (${column.versions}): ${text}`))));
  };

  // --- Search ---
  const search = document.getElementById("search");
  const texts = rows.map((row, r) => `${row.querySelector("th").textContent} ${row.parentElement.querySelector(".theme").textContent} ${data.clauses[r][2]}`.toLowerCase());
  const stateOf = (button) => [...button.classList].find((name) => name.startsWith("s-")).slice(2);

  const KINDS = {
    all: () => true,
    wrong: (states) => states.has("wrong") || states.has("error"),
    differ: (states) => ["conforms", "convention", "wrong", "error"].filter((state) => states.has(state)).length > 1,
  };

  const showRows = () => {
    const words = search.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kind = KINDS[search.elements.rows.value];
    const features = chosen("feature"), dtypes = chosen("dtype");
    const cited = new Set(relevantPlaces(features, dtypes).flatMap(({ place }) => data.cases[Math.floor(place / width)][1]));
    let shown = 0;
    rows.forEach((row, r) => {
      const states = new Set(buttons[r].map(stateOf));
      const needed = (!features.length && !dtypes.length) || cited.has(r);
      row.hidden = !(needed && kind(states) && words.every((word) => texts[r].includes(word)));
      shown += !row.hidden;
    });
    for (const body of grid.tBodies) body.querySelector(".theme").hidden = ![...body.rows].some((row) => row.id && !row.hidden);
    document.getElementById("shown").textContent = `${shown} of ${rows.length} clauses`;
    makeReachable();
  };

  // --- Keyboard: a single cell can be reached with Tab, and the arrow keys move ---
  let reachable = null;
  const makeReachable = (button) => {
    const first = rows.findIndex((row) => !row.hidden);
    if (reachable) reachable.tabIndex = -1;
    if (button) reachable = button;
    else if (!reachable || reachable.closest("tr").hidden) reachable = first < 0 ? null : buttons[first][0];
    if (reachable) reachable.tabIndex = 0;
  };

  const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -Infinity], End: [0, Infinity] };
  grid.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step || event.target.tagName !== "BUTTON" || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const visible = buttons.filter((_, r) => !rows[r].hidden);
    const r = visible.findIndex((row) => row.includes(event.target)), c = visible[r].indexOf(event.target);
    const within = (value, length) => Math.min(Math.max(value, 0), length - 1);
    const next = visible[within(r + step[0], visible.length)][within(c + step[1], visible[r].length)];
    makeReachable(next);
    next.focus();
  });

  // --- The cases of a cell ---
  const dialog = document.getElementById("details");
  const MOST = 200;

  const casesOf = (clause, column) => {
    const results = [];
    data.cases.forEach(([id, cited, , must], number) => {
      if (!cited.includes(clause) || (!must && data.clauses[clause][1] !== "SHOULD")) return;
      data.dtypes.forEach((dtype, d) => {
        const place = number * width + d;
        const result = resultAt(column, place);
        if (result.outcome !== "not asked") results.push({ id, dtype, place, ...result });
      });
    });
    return results;
  };

  const listed = (title, results, column) => {
    if (!results.length) return [];
    const byCase = new Map();
    for (const result of results) byCase.set(result.id, [...(byCase.get(result.id) || []), result]);
    const items = [...byCase].slice(0, MOST).map(([id, of]) => {
      const reason = of.map(({ place }) => column.reasons[place]).find(Boolean);
      return element("li", {}, element("code", {}, id), ` ${of.map((r) => r.dtype).join(", ")}`, reason ? `: ${reason}` : "");
    });
    const more = byCase.size > MOST ? [element("p", {}, `${byCase.size - MOST} further cases are not shown.`)] : [];
    return [element("details", { open: results.length <= 12 }, element("summary", {}, `${title} (${results.length})`), element("ul", {}, ...items), ...more)];
  };

  const section = (clause, column, cell) => {
    const [id, level, sentence] = data.clauses[clause];
    const results = casesOf(clause, column);
    const passes = results.filter((result) => result.outcome === "pass");
    const largest = passes.filter((p) => p.share !== undefined).sort((a, b) => b.share - a.share)[0];
    const parts = [
      element("h2", { id: "details-title" }, `${id}: ${column.name}`),
      element("p", { className: "quiet" }, `${column.versions}; ${column.description}`),
      element("p", {}, sign(cell.state), " ", element("strong", {}, cell.text)),
      element("p", {}, `${level}: ${sentence}`),
    ];
    if (largest) parts.push(element("p", {}, `The cases that pass use at most ${largest.share.toFixed(2)} of their allowance, in ${largest.id} ${largest.dtype}.`));
    const byCause = new Map();
    for (const result of results) {
      if (result.outcome === "pass") continue;
      const number = column.causeAt.get(result.place);
      byCause.set(number, [...(byCause.get(number) || []), result]);
    }
    const counts = (number) => column.causes[number][1].includes(clause);
    for (const [number, of] of [...byCause].sort((a, b) => counts(b[0]) - counts(a[0]))) {
      const outcomes = [...new Set(of.map((result) => result.outcome))].join(", ");
      const note = counts(number) || outcomes === "unsupported" ? "" : `; counts against ${column.causes[number][1].map((n) => data.clauses[n][0]).join(", ")}`;
      parts.push(...listed(`${outcomes}: ${column.causes[number][0]}${note}`, of, column));
    }
    const failure = results.find((result) => FAILING.has(result.outcome) && counts(column.causeAt.get(result.place)))
      || results.find((result) => FAILING.has(result.outcome));
    if (failure) {
      parts.push(element("p", {}, "A script that shows the first failure without the suite:"));
      parts.push(element("pre", {}, `mha-spec repro ${column.target} ${failure.id} --dtype ${failure.dtype}`));
    }
    parts.push(...listed("pass", passes, column));
    if (!results.length) parts.push(element("p", {}, "No case of this clause was asked."));
    const close = element("button", { className: "close", type: "button" }, "Close");
    close.addEventListener("click", () => dialog.close());
    return element("div", {}, ...parts, close);
  };

  const open = (r, c) => {
    const button = buttons[r][c], column = data.columns[c];
    dialog.replaceChildren(section(clauseNumbers.get(rows[r].id), column, { state: stateOf(button), text: button.textContent }));
    makeReachable(button);
    dialog.showModal();
    history.replaceState(null, "", `#${rows[r].id}/${column.slug}`);
  };

  dialog.addEventListener("close", () => {
    history.replaceState(null, "", `#${location.hash.slice(1).split("/")[0]}`);
    if (reachable) reachable.focus();
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  grid.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const r = buttons.findIndex((row) => row.includes(button));
    open(r, buttons[r].indexOf(button));
  });

  const followLink = () => {
    const [id, slug] = decodeURIComponent(location.hash.slice(1)).split("/");
    const r = rows.findIndex((row) => row.id === id), c = data.columns.findIndex((column) => column.slug === slug);
    if (r < 0) return;
    if (rows[r].hidden) { search.reset(); choice.reset(); showAnswer(); showRows(); }
    if (c >= 0) { rows[r].scrollIntoView({ block: "center" }); open(r, c); }
  };
  addEventListener("hashchange", followLink);

  choice.addEventListener("change", () => { showAnswer(); showRows(); });
  choice.addEventListener("reset", () => setTimeout(() => { showAnswer(); showRows(); }));
  search.addEventListener("input", showRows);
  search.addEventListener("submit", (event) => event.preventDefault());
  showAnswer();
  showRows();
  followLink();
})();
