// The search-tree browser of the report: a list of questions, one tree, the pairs it gives, and the audit of the pairs.
// It reads the JSON of #trees-data (`cpo_fast/report/trees.py` writes and describes it) and draws into #trees-app, with the
// elements of `tree_parts.js`.
(() => {
  "use strict";
  const host = document.getElementById("trees-app");
  const source = document.getElementById("trees-data");
  if (!host || !source) return;

  const {
    ROOT, TERMINAL, ROW_CHARACTERS, PANEL_CHARACTERS, STATUSES, el, set, svg, plain, cutAt, bdi, longText, number, plural, figure, badge, line,
    grown, isOdd, perToken, metrics, badges,
  } = treeParts;
  const PAIRS_AT_ONCE = 8, DAMAGED_SHOWN = 5;
  const OUTCOMES = { right: "✓ right", wrong: "✗ wrong", none: "– no answer", ungraded: "? not graded" };
  const WHY = {
    abstained: "no winning chain was valued high enough", no_answer: "no chain came to an answer",
    no_candidates: "not one usable thought", failed: "the search failed",
  };

  function browser(runs) {
    const state = { run: 0, outcome: "all", query: "", place: 0, status: "all", node: ROOT, scope: "node", open: new Set(), limit: PAIRS_AT_ONCE };
    let grove = null; // the tree that is shown, grown
    const box = {}; // the elements that show it
    const note = el("p", { class: "t-note" });
    const heard = el("p", { class: "t-note", role: "status" });
    const list = el("ul", { class: "t-list", role: "listbox", "aria-label": "Questions", on: { keydown: onListKey } });
    const main = el("div", { class: "t-main" });
    const side = el("div", { class: "t-side" });
    const outcomes = el("fieldset", { class: "t-choices" });
    const audit = el("div", { class: "t-audit", role: "region", "aria-labelledby": "trees-audit-heading" });
    const search = el("input", { type: "search", id: "trees-search", autocomplete: "off", spellcheck: "false", on: { input: onSearch } });
    const chooser = el("select", { id: "trees-run", on: { change: () => showRun(Number(chooser.value)) } },
      runs.map((run, place) => el("option", { value: place }, plain(run.name))));
    host.append(
      runs.length > 1 ? el("p", { class: "t-run" }, el("label", { for: "trees-run" }, "Run "), chooser) : "",
      note,
      el("div", { class: "t-columns" },
        el("div", { class: "t-questions" },
          el("label", { for: "trees-search", class: "t-label" }, "Search questions"), search, outcomes, heard, list),
        main, side),
      audit);

    function payload() { return runs[state.run].trees; }

    function showRun(place) {
      Object.assign(state, { run: place, outcome: "all", query: "", status: "all" });
      search.value = "";
      const data = payload();
      note.replaceChildren(...sampled(data));
      fillOutcomes();
      fillAudit();
      fillList();
      // a tree that gives pairs says most
      showTree(Math.max(0, data.trees.findIndex((tree) => tree.pairs.length)));
      const one = optionAt(state.place);
      if (one) list.scrollTop = one.offsetTop - list.offsetTop;
    }

    function sampled(data) {
      const file = el("code", {}, bdi(data.path));
      const parts = data.shown < data.total
        ? [`${number(data.shown)} of ${plural(data.total, "tree")}, evenly spaced in the file; the rest is in `, file, "."]
        : [`${plural(data.total, "tree")} of `, file, "."];
      if (data.num_damaged) parts.push(el("br"), `${plural(data.num_damaged, "line")} of the file ${data.num_damaged === 1 ? "is no whole tree and is" : "are no whole trees and are"} left out: `,
        bdi(data.damaged.slice(0, DAMAGED_SHOWN).join("; "), PANEL_CHARACTERS), data.num_damaged > DAMAGED_SHOWN ? `; and ${number(data.num_damaged - DAMAGED_SHOWN)} more.` : ".");
      return parts;
    }

    function fillOutcomes() {
      const counts = { all: payload().trees.length };
      for (const tree of payload().trees) counts[tree.outcome] = (counts[tree.outcome] || 0) + 1;
      const names = { all: "all", ...OUTCOMES };
      choices(outcomes, "outcome", "Filter by outcome", Object.keys(names).filter((name) => name !== "ungraded" || counts[name]),
        (name) => `${names[name]} ${number(counts[name] || 0)}`, (name) => { state.outcome = name; fillList(); });
    }

    // radio buttons for state[key]
    function choices(fieldset, key, legend, names, label, act) {
      fieldset.replaceChildren(el("legend", {}, legend), ...names.map((name) => {
        const input = el("input", { type: "radio", name: `trees-${key}`, value: name, id: `trees-${key}-${name}` });
        input.checked = state[key] === name;
        input.addEventListener("change", () => act(name));
        return el("span", { class: "t-choice" }, input, el("label", { for: input.id }, label(name)));
      }));
    }

    function onSearch() {
      state.query = search.value.trim().toLowerCase();
      fillList();
    }

    function matches(tree) {
      if (state.outcome !== "all" && tree.outcome !== state.outcome) return false;
      return !state.query || [tree.question, tree.id, tree.answer || ""].some((text) => text.toLowerCase().includes(state.query));
    }

    function fillList() {
      const trees = payload().trees;
      const found = trees.map((tree, place) => place).filter((place) => matches(trees[place]));
      list.replaceChildren(...found.map((place) => option(trees[place], place)));
      heard.textContent = found.length === trees.length ? plural(found.length, "question") : `${number(found.length)} of ${plural(trees.length, "question")}`;
      markSelected();
    }

    function option(tree, place) {
      return el("li", { role: "option", class: "t-option", id: `trees-question-${place}`, "data-place": place, tabindex: -1, on: { click: () => { showTree(place); optionAt(place).focus({ preventScroll: true }); } } },
        bdi(tree.question, ROW_CHARACTERS),
        el("span", { class: "t-meta" }, badge(tree.outcome, OUTCOMES[tree.outcome]),
          el("span", { class: "t-metric" }, plural(tree.nodes.length, "thought")),
          el("span", { class: "t-metric" }, plural(tree.pairs.length, "pair"))));
    }

    const optionAt = (place) => list.querySelector(`[data-place="${place}"]`);

    function markSelected() {
      const options = [...list.children];
      for (const one of options) {
        const chosen = Number(one.dataset.place) === state.place;
        one.setAttribute("aria-selected", String(chosen));
        one.tabIndex = chosen ? 0 : -1;
      }
      // something of the list is always reached by the keyboard
      if (options.length && !options.some((one) => one.tabIndex === 0)) options[0].tabIndex = 0;
    }

    function onListKey(event) {
      const options = [...list.children];
      const at = options.indexOf(event.target.closest("[role=option]"));
      const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: options.length - 1 }[event.key];
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        showTree(Number(options[at].dataset.place));
        focusNode(state.node);
      } else if (to !== undefined) {
        event.preventDefault();
        const next = options[Math.max(0, Math.min(to, options.length - 1))];
        showTree(Number(next.dataset.place));
        next.focus();
      }
    }

    // ---- one tree

    function showTree(place) {
      const data = payload();
      if (!data.trees.length) {
        main.replaceChildren(el("p", { class: "t-note" }, data.total ? "Not one tree fits into this page." : "The file holds no tree."));
        side.replaceChildren();
        grove = null;
        return;
      }
      grove = grown(data, data.trees[place]);
      Object.assign(state, { place, node: ROOT, scope: "tree", limit: PAIRS_AT_ONCE, open: new Set([String(ROOT)]) });
      for (const node of grove.nodes) if (node.is.has("winning")) state.open.add(String(node.id));
      markSelected();
      fillMain();
      fillSide();
    }

    function fillMain() {
      const { tree, nodes } = grove;
      box.overview = el("div", { class: "t-overview" });
      box.filter = el("fieldset", { class: "t-choices" });
      box.tree = el("ul", { class: "t-tree", role: "tree", "aria-label": "Thoughts of the search", on: { keydown: onTreeKey, click: onTreeClick } });
      box.none = el("p", { class: "t-note", role: "status" });
      const counts = { all: nodes.length };
      for (const status of STATUSES) counts[status] = nodes.filter((node) => node.is.has(status)).length;
      choices(box.filter, "status", "Filter thoughts", ["all", ...STATUSES], (name) => `${name} ${number(counts[name])}`, (name) => {
        state.status = name;
        fillTree();
        drawOverview();
      });
      const said = [badge(tree.outcome, OUTCOMES[tree.outcome])];
      if (tree.answer !== null) said.push(el("span", { class: "t-metric" }, "answer ", bdi(tree.answer, ROW_CHARACTERS)));
      else if (WHY[tree.status]) said.push(el("span", { class: "t-metric" }, WHY[tree.status]));
      said.push(el("span", { class: "t-metric" }, plural(nodes.length, "thought")), el("span", { class: "t-metric" }, plural(tree.pairs.length, "pair")));
      main.replaceChildren(
        el("h3", { class: "t-question", id: "trees-question" }, bdi(tree.question, ROW_CHARACTERS)),
        el("p", { class: "t-meta" }, said, el("span", { class: "t-metric t-id" }, `no. ${number(tree.number)}, `, bdi(tree.id, 80))),
        ...(tree.detail ? [el("p", { class: "t-note" }, "Note of the search: ", bdi(tree.detail, ROW_CHARACTERS))] : []),
        ...(tree.without && !WHY[tree.without] ? [el("p", { class: "t-note" }, `No pairs: ${tree.without}.`)] : []),
        box.overview, legend(), box.filter, box.none, box.tree,
        el("p", { class: "t-note t-keys" }, "Keys: arrows walk and fold, Home and End jump, Enter or Space folds, p goes to the pairs of a thought."));
      drawOverview();
      fillTree();
    }

    function legend() {
      const drawn = (kind, text) => el("span", {}, svg("svg", { viewBox: "-7 -7 14 14", width: 14, height: 14, "aria-hidden": "true" }, mark(kind, 0, 0)), ` ${text}`);
      return el("p", { class: "t-legend" }, drawn("winning", "winning path"), drawn("rejected", "rejected"), drawn("kept", "kept"), drawn("pruned", "pruned"));
    }

    function mark(kind, x, y) {
      if (kind === "rejected") return svg("path", { class: "t-mark t-mark-rejected", d: `M${x - 3.5} ${y - 3.5}L${x + 3.5} ${y + 3.5}M${x + 3.5} ${y - 3.5}L${x - 3.5} ${y + 3.5}` });
      return svg("circle", { class: `t-mark t-mark-${kind}`, cx: x, cy: y, r: kind === "winning" ? 4.5 : 3.5 });
    }

    const kindOf = (node) => (node.id === ROOT ? "winning" : ["winning", "rejected", "kept", "pruned"].find((kind) => node.is.has(kind)));

    function drawOverview() {
      if (!grove || !box.overview) return;
      const { nodes, root } = grove;
      const columns = [[]];
      (function place(node, depth) { // in the order in which the tree below shows them
        (columns[depth] = columns[depth] || []).push(node);
        for (const child of node.children) place(child, depth + 1);
      })(root, 0);
      const width = Math.max(box.overview.clientWidth, 200);
      const height = Math.max(90, Math.min(220, 9 * Math.max(...columns.map((column) => column.length)))) + 24;
      const places = new Map();
      columns.forEach((column, depth) => column.forEach((node, index) => places.set(node.id, [
        24 + (depth * (width - 48)) / Math.max(1, columns.length - 1), 20 + ((index + 0.5) * (height - 24)) / column.length])));
      const lines = nodes.map((node) => {
        const [x, y] = places.get(node.id), [fromX, fromY] = places.get(node.parent), middle = (x + fromX) / 2;
        return svg("path", { class: `t-edge${node.is.has("winning") ? " t-edge-winning" : ""}`, d: `M${fromX} ${fromY}C${middle} ${fromY} ${middle} ${y} ${x} ${y}` });
      });
      lines.sort((one, other) => one.classList.length - other.classList.length); // the winning path on top
      const marks = [root, ...nodes].map((node) => {
        const shown = state.status === "all" || node.id === ROOT || node.is.has(state.status);
        return svg("g", { class: shown ? "t-node" : "t-node t-faint" }, mark(kindOf(node), ...places.get(node.id)), svg("title", {}, plain(cutAt(line(node.text), ROW_CHARACTERS))));
      });
      const heads = columns.map((column, depth) => {
        const anchor = depth === 0 ? "start" : depth === columns.length - 1 ? "end" : "middle";
        const x = 24 + (depth * (width - 48)) / Math.max(1, columns.length - 1);
        return svg("text", { class: "t-head", x: depth === 0 ? 2 : depth === columns.length - 1 ? width - 2 : x, y: 10, "text-anchor": anchor }, depth ? `step ${depth}` : "question");
      });
      box.ring = svg("circle", { class: "t-ring", r: 7.5 });
      box.places = places;
      const drawing = svg("svg", {
        class: "t-drawing", role: "img", width, height, viewBox: `0 0 ${width} ${height}`,
        "aria-label": `The tree in columns: ${plural(nodes.length, "thought")} in ${plural(columns.length - 1, "step")}; the list below holds the same.`,
      }, ...heads, ...lines, ...marks, box.ring);
      drawing.addEventListener("click", (event) => {
        const frame = drawing.getBoundingClientRect();
        let best = null, least = 14;
        for (const [id, [x, y]] of places) {
          const distance = Math.hypot(x - (event.clientX - frame.left), y - (event.clientY - frame.top));
          if (distance < least) [best, least] = [id, distance];
        }
        if (best !== null) focusNode(best);
      });
      box.overview.replaceChildren(drawing);
      ring();
    }

    function ring() {
      const place = box.places && box.places.get(state.node);
      if (place) set(box.ring, { cx: place[0], cy: place[1] });
    }

    // ---- the ARIA tree. Items: nodes by id, and for each parent one that folds its pruned children: "f" + id

    function wanted() {
      if (state.status === "all") return null;
      const ids = new Set([ROOT]);
      for (const node of grove.nodes) if (node.is.has(state.status)) for (const above of grove.path(node.id)) ids.add(above.id);
      return ids;
    }

    function fillTree() {
      box.wanted = wanted();
      // a filter opens what it shows, and leaves what is open without it
      box.open = box.wanted ? new Set([...state.open, ...[...box.wanted].map(String)]) : state.open;
      const found = box.wanted ? grove.nodes.filter((node) => node.is.has(state.status)).length : grove.nodes.length;
      box.none.textContent = found ? "" : `No thought of this tree is ${state.status}.`;
      box.tree.replaceChildren(item(grove.root, [1, 1, 1]));
      const kept = itemOf(state.node) ? state.node : ROOT;
      select(kept);
    }

    const isFold = (node, children) => children.filter((child) => !child.kept && !child.is.has("winning")).length > 1 && !box.wanted;

    function shownChildren(node) {
      const children = node.children.filter((child) => !box.wanted || box.wanted.has(child.id));
      if (!isFold(node, children)) return { children, folded: [] };
      const folded = children.filter((child) => !child.kept && !child.is.has("winning"));
      return { children: children.filter((child) => !folded.includes(child)), folded };
    }

    // `at`: level, place among the siblings from 1, number of siblings
    function item(node, at) {
      const { children, folded } = shownChildren(node);
      const body = el("span", { class: "t-body" },
        bdi(line(node.text), ROW_CHARACTERS),
        el("span", { class: "t-meta" },
          node.text.length > ROW_CHARACTERS ? el("span", { class: "t-metric" }, `… of ${number(node.length || node.text.length)} characters`) : null,
          node.id === ROOT ? badge("state", "question") : [badges(node), metrics(node)]));
      const kind = node.id === ROOT ? "" : node.is.has("winning") ? " t-won" : node.kept ? "" : " t-lost";
      const dim = state.status !== "all" && node.id !== ROOT && !node.is.has(state.status) ? " t-dim" : "";
      return treeItem(String(node.id), `t-item${kind}${dim}`, body, at, children.length + folded.length > 0);
    }

    function foldItem(node, at, folded) {
      const rejected = folded.filter((child) => child.is.has("rejected")).length;
      const text = `${number(folded.length)} pruned${rejected ? `, ${rejected === folded.length ? "all" : number(rejected)} rejected in pairs` : ""}`;
      return treeItem(`f${node.id}`, "t-item t-fold", el("span", { class: "t-body t-folded" }, text), at, true);
    }

    // the group of the children stands beside the row, which is the item: its name is what the row says
    function treeItem(key, kind, body, [level, place, count], hasMore) {
      const open = hasMore && box.open.has(key);
      const row = el("div", {
        role: "treeitem", class: "t-row", id: `trees-item-${key}`, "data-key": key, tabindex: -1, "aria-selected": "false",
        "aria-level": level, "aria-posinset": place, "aria-setsize": count, "aria-expanded": hasMore ? String(open) : null,
      }, el("span", { class: "t-caret", "aria-hidden": "true" }), body);
      return el("li", { role: "none", class: kind }, row, open ? group(key, level) : null);
    }

    function group(key, level) {
      const inFold = key.startsWith("f");
      const node = grove.at(Number(inFold ? key.slice(1) : key));
      const { children, folded } = shownChildren(node);
      const shown = inFold ? folded : children;
      const count = shown.length + (!inFold && folded.length ? 1 : 0);
      const items = shown.map((child, place) => item(child, [level + 1, place + 1, count]));
      if (count > shown.length) items.push(foldItem(node, [level + 1, count, count], folded));
      return el("ul", { role: "group", class: "t-group" }, items);
    }

    const itemOf = (key) => box.tree.querySelector(`[data-key="${key}"]`);

    function toggle(one, open) {
      if (!one.hasAttribute("aria-expanded") || (one.getAttribute("aria-expanded") === "true") === open) return;
      one.setAttribute("aria-expanded", String(open));
      const key = one.dataset.key;
      if (open) {
        box.open.add(key);
        one.after(group(key, Number(one.getAttribute("aria-level"))));
      } else {
        box.open.delete(key);
        const held = one.nextElementSibling.contains(document.activeElement);
        one.nextElementSibling.remove();
        if (held || !itemOf(state.node)) moveTo(one);
      }
    }

    // selection follows the focus; a fold is focused but is no thought
    function moveTo(one) {
      const key = one.dataset.key;
      select(key.startsWith("f") ? Number(key.slice(1)) : Number(key));
      for (const other of box.tree.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
      one.tabIndex = 0;
      one.focus({ preventScroll: true });
      one.scrollIntoView({ block: "nearest" });
    }

    function select(id) {
      const changed = id !== state.node;
      for (const other of box.tree.querySelectorAll("[aria-selected='true']")) other.setAttribute("aria-selected", "false");
      for (const other of box.tree.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
      const one = itemOf(id);
      one.setAttribute("aria-selected", "true");
      one.tabIndex = 0;
      state.node = id;
      ring();
      if (!changed) return;
      state.scope = grove.at(id).pairs.length ? "node" : "tree";
      state.limit = PAIRS_AT_ONCE;
      fillSide();
    }

    function focusNode(id) {
      if (box.wanted && !box.wanted.has(id)) {
        state.status = "all";
        document.getElementById("trees-status-all").checked = true;
        fillTree();
        drawOverview();
      }
      const way = id === ROOT ? [] : [grove.root, ...grove.path(id)];
      for (const node of way.slice(0, -1)) {
        toggle(itemOf(node.id), true);
        const next = way[way.indexOf(node) + 1];
        if (!itemOf(next.id)) toggle(itemOf(`f${node.id}`), true);
      }
      moveTo(itemOf(id));
    }

    function onTreeClick(event) {
      const one = event.target.closest("[role=treeitem]");
      if (!one) return;
      if (event.target.closest(".t-caret") || one.dataset.key.startsWith("f")) toggle(one, one.getAttribute("aria-expanded") !== "true");
      moveTo(one);
    }

    function onTreeKey(event) {
      if (event.altKey || event.ctrlKey || event.metaKey) return;
      const one = event.target.closest("[role=treeitem]");
      const all = [...box.tree.querySelectorAll("[role=treeitem]")];
      const at = all.indexOf(one), open = one.getAttribute("aria-expanded");
      const go = (target) => target && moveTo(target);
      const acts = {
        ArrowDown: () => go(all[at + 1]),
        ArrowUp: () => go(all[at - 1]),
        Home: () => go(all[0]),
        End: () => go(all[all.length - 1]),
        ArrowRight: () => (open === "false" ? toggle(one, true) : open === "true" && go(all[at + 1])),
        ArrowLeft: () => (open === "true" ? toggle(one, false) : go(one.closest("ul").previousElementSibling)),
        Enter: () => toggle(one, open !== "true"),
        " ": () => toggle(one, open !== "true"),
        p: () => goToPairs(),
      };
      if (!Object.hasOwn(acts, event.key)) return;
      event.preventDefault();
      acts[event.key]();
    }

    // ---- the thought and its pairs

    function fillSide() {
      side.replaceChildren(thought(grove.at(state.node)), pairsPanel());
    }

    function thought(node) {
      const heading = el("h3", { id: "trees-thought-heading" }, node.id === ROOT ? "Question" : `Thought, step ${node.depth}`);
      const rows = node.id === ROOT ? [] : [
        ["value", figure(node.value)], ["log-prob", node.logp === null ? "not kept" : `${figure(node.logp)} in sum`],
        ["a token", node.scored ? `${figure(perToken(node))} over ${plural(node.scored, "token")}` : "–"],
        ["tokens", number(node.tokens)], ["samples alike", number(node.count)],
        ...(node.visits === null ? [] : [["visits", number(node.visits)]]),
        ...(node.answer === null ? [] : [["answer", bdi(node.answer, ROW_CHARACTERS)]]),
        ...(node.flags & TERMINAL && node.answer === null ? [["end", "the chain broke off here"]] : []),
      ];
      const count = node.pairs.length;
      return el("div", { class: "t-panel", role: "region", "aria-labelledby": "trees-thought-heading" }, heading,
        longText(line(node.text), node.length), node.id === ROOT ? null : el("p", { class: "t-meta" }, badges(node)),
        rows.length ? el("dl", { class: "t-figures" }, rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))) : null,
        node.id === ROOT ? null : count
          ? el("button", { type: "button", class: "t-button", id: "trees-to-pairs", on: { click: goToPairs } }, `go to its ${plural(count, "pair")}`)
          : el("p", { class: "t-note" }, "It is in no pair."));
    }

    function listed() {
      return state.scope === "tree" ? grove.pairs : grove.at(state.node).pairs.map((place) => grove.pairs[place]);
    }

    function pairsPanel() {
      const mine = grove.at(state.node).pairs.length;
      const scope = el("fieldset", { class: "t-choices" });
      choices(scope, "scope", "Pairs of", ["node", "tree"], (name) => (name === "tree" ? `the tree ${grove.pairs.length}` : `the thought ${mine}`), (name) => {
        Object.assign(state, { scope: name, limit: PAIRS_AT_ONCE });
        fillPairs();
      });
      box.pairs = el("ol", { class: "t-pairs" });
      box.more = el("div", {});
      fillPairs();
      return el("div", { class: "t-panel", role: "region", "aria-labelledby": "trees-pairs-heading" }, el("h3", { id: "trees-pairs-heading" }, "Pairs"), grove.pairs.length ? scope : null, box.pairs, box.more);
    }

    function fillPairs() {
      const pairs = listed();
      box.pairs.replaceChildren(...pairs.slice(0, state.limit).map(card));
      box.more.replaceChildren();
      if (!pairs.length) box.more.append(el("p", { class: "t-note" }, state.scope === "tree" ? "This tree gives no pairs." : "No pair has this thought."));
      if (pairs.length > state.limit) box.more.append(el("button", { type: "button", class: "t-button", on: { click: () => {
        const at = state.limit;
        state.limit += PAIRS_AT_ONCE;
        fillPairs();
        box.pairs.children[at].focus();
      } } }, `show ${number(Math.min(PAIRS_AT_ONCE, pairs.length - state.limit))} more of ${number(pairs.length)}`));
    }

    function card(pair) {
      const prefix = pair.state === ROOT ? [] : grove.path(pair.state);
      const gap = (one, other) => (one === null || other === null ? "–" : figure(one - other));
      return el("li", { class: "t-pair", id: `trees-pair-${pair.place}`, tabindex: -1, "aria-label": `Pair ${pair.place + 1}` },
        el("p", { class: "t-pair-head" }, el("strong", {}, `Pair ${pair.place + 1}`), el("span", { class: "t-metric" }, pair.step ? `step ${pair.step}` : "whole chains"),
          isOdd(pair) ? badge("odd", "odd: chosen is not valued higher") : null),
        el("details", {}, el("summary", {}, prefix.length ? `after the question and ${plural(prefix.length, "thought")}` : "after the question"),
          el("ol", { class: "t-prefix" }, el("li", {}, bdi(grove.tree.question, ROW_CHARACTERS)), prefix.map((node) => el("li", {}, bdi(line(node.text), ROW_CHARACTERS))))),
        response(pair, "chosen"), response(pair, "rejected"),
        el("p", { class: "t-note" }, `chosen less rejected: value ${gap(pair.chosen.value, pair.rejected.value)}, log-prob ${gap(pair.chosen.logp, pair.rejected.logp)}`));
    }

    function response(pair, role) {
      const last = pair[role];
      const thoughts = pair.step ? [last] : grove.path(last.id);
      return el("div", { class: `t-response t-is-${role}` },
        el("p", { class: "t-meta" }, badge(role), el("button", { type: "button", class: "t-button t-small", "aria-label": `show in tree: ${role} of pair ${pair.place + 1}`, on: { click: () => focusNode(last.id) } }, "show in tree")),
        thoughts.map((node) => el("p", { class: "t-said" }, bdi(line(node.text), ROW_CHARACTERS))),
        el("p", { class: "t-meta" }, metrics(last)));
    }

    function goToPairs() {
      if (!grove.at(state.node).pairs.length) return;
      Object.assign(state, { scope: "node", limit: PAIRS_AT_ONCE });
      document.getElementById("trees-scope-node").checked = true;
      fillPairs();
      focusCard(box.pairs.firstElementChild);
    }

    function focusCard(one) {
      one.focus({ preventScroll: true });
      one.scrollIntoView({ block: "nearest" });
    }

    // from the audit: a tree by its number in the file, and one of its pairs or thoughts
    function visit(place, pairPlace, id) {
      if (!matches(payload().trees[place])) {
        Object.assign(state, { outcome: "all", query: "" });
        search.value = "";
        fillOutcomes();
        fillList();
      }
      showTree(place);
      optionAt(place).scrollIntoView({ block: "nearest" });
      if (pairPlace === null) focusNode(id);
      else {
        focusNode(grove.pairs[pairPlace].chosen.id);
        state.limit = Math.max(state.limit, grove.pairs.length);
        fillPairs();
        focusCard(document.getElementById(`trees-pair-${pairPlace}`));
      }
    }

    // ---- the audit

    function fillAudit() {
      const data = payload(), found = data.audit, settings = data.settings;
      const places = new Map(data.trees.map((tree, place) => [tree.number, place]));
      const link = (numberOf, pairPlace, id, text) => (places.has(numberOf)
        ? el("button", { type: "button", class: "t-button t-small", on: { click: () => visit(places.get(numberOf), pairPlace, id) } }, text || `tree ${number(numberOf)}`)
        : el("span", { class: "t-note" }, `${text || `tree ${number(numberOf)}`} (not in this page)`));
      const shape = [`pairs.rule=${settings.rule}`, `seed ${settings.seed}`];
      if (settings.rejected_fraction < 1) shape.push(`pairs.rejected_fraction=${settings.rejected_fraction}`);
      if (settings.num_questions !== null) shape.push(`pairs.num_questions=${settings.num_questions}`);
      const where = settings.source ? `as ${settings.source} of the run says` : "the defaults, as the run keeps no configuration";
      const other = settings.method === "preference" ? "" : ` The run trains by train.method=${settings.method}, which does not take these pairs; they are what the rule would give.`;
      const steps = found.steps, reasons = Object.entries(found.without), unused = Object.entries(found.unused);
      const ruleSteps = [...new Set(Object.values(found.rules).flatMap((rule) => Object.keys(rule.steps).map(Number)))].sort((a, b) => a - b);
      const stepName = (step) => (step ? `step ${step}` : "whole chains");
      const sum = (rule) => Object.values(rule.steps).reduce((total, count) => total + count, 0);
      const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");
      const rows = (entries) => entries.map((cells) => cells.map((cell) => (typeof cell === "number" ? number(cell) : cell)));
      audit.replaceChildren(
        el("h3", { id: "trees-audit-heading" }, "Pair audit"),
        el("p", {}, `${plural(found.num_pairs, "pair")} from ${number(data.total - reasons.reduce((total, [, each]) => total + each.count, 0))} of ${plural(data.total, "tree")}, by ${shape.join(", ")} (${where}).${other}`),
        table("What each rule takes, by step", ["rule", ...ruleSteps.map(stepName), "pairs", "trees"],
          rows(Object.entries(found.rules).map(([name, rule]) => [name === settings.rule ? `${name} (this run)` : name, ...ruleSteps.map((step) => rule.steps[step] || 0), sum(rule), rule.trees]))),
        steps.length ? table("The pairs of this run, by step (means)", ["", "pairs", "chosen value", "rejected value", "without a value", "odd", "chosen log-prob a token", "rejected log-prob a token"],
          rows(steps.map((one) => [stepName(one.step), one.pairs, figure(one.chosen_value), figure(one.rejected_value), one.without_value, `${number(one.odd)} (${share(one.odd, one.pairs)})`, figure(one.chosen_logp), figure(one.rejected_logp)]))) : "",
        fold(`Odd pairs: ${number(found.num_odd)} of ${number(found.num_pairs)} (${share(found.num_odd, found.num_pairs)}), whose chosen thought is not valued higher than the rejected one`,
          found.odd.length ? table(found.odd.length < found.num_odd ? `The first ${number(found.odd.length)}` : "All of them", ["pair", "step", "chosen value", "rejected value"],
            found.odd.map(([tree, place, step, chosen, rejected]) => [link(tree, place, null, `tree ${number(tree)}, pair ${place + 1}`), stepName(step), figure(chosen), figure(rejected)])) : el("p", { class: "t-note" }, "None.")),
        fold(`Trees without pairs: ${number(reasons.reduce((total, [, each]) => total + each.count, 0))} of ${number(data.total)}`,
          reasons.length ? reasons.map(([reason, each]) => el("div", {}, el("p", {}, `${number(each.count)}: ${WHY[reason] || reason}`),
            el("p", { class: "t-links" }, each.trees.map((one) => link(one, null, ROOT))))) : el("p", { class: "t-note" }, "None.")),
        fold(`Duplicates: ${number(found.num_merged)} of ${plural(found.num_samples, "sample")} (${share(found.num_merged, found.num_samples)}) said what a sibling had said`,
          el("p", {}, `${plural(found.num_samples, "sample")} gave ${plural(found.num_thoughts, "thought")}; ${number(found.num_empty)} were empty.`),
          unused.length ? table("Couples of winner and loser that became no pair", ["reason", "couples"], rows(unused)) : null,
          found.repeated.length ? table("The most repeated thoughts", ["thought", "samples"], found.repeated.map(([tree, id, count]) => [link(tree, null, id, `tree ${number(tree)}, thought ${id}`), number(count)])) : null));
    }

    function fold(title, ...children) {
      return el("details", { class: "t-more" }, el("summary", {}, title), ...children);
    }

    function table(caption, heads, rows) {
      return el("div", { class: "t-scroll", tabindex: 0, role: "region", "aria-label": caption },
        el("table", {}, el("caption", {}, caption),
          el("thead", {}, el("tr", {}, heads.map((head) => (head ? el("th", { scope: "col" }, head) : el("td", {}))))),
          el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell, place) => el(place ? "td" : "th", place ? {} : { scope: "row" }, cell)))))));
    }

    let resized = 0;
    new ResizeObserver(() => {
      cancelAnimationFrame(resized);
      resized = requestAnimationFrame(drawOverview);
    }).observe(main);
    showRun(0);
  }

  const runs = JSON.parse(source.textContent).runs.filter((run) => run.trees);
  if (runs.length) browser(runs);
  else host.append(el("p", { class: "t-note" }, "No run here has a trees.jsonl: these were not searched, or train on pairs of a file."));
})();
