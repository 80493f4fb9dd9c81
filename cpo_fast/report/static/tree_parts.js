// What the tree browser is made of: how texts and figures become elements, and how a tree of the payload is walked. All text
// of models and files becomes text nodes, with characters that cannot be seen made visible. `trees.js` draws with it.
const treeParts = (() => {
  "use strict";
  const ROOT = -1;
  const KEPT = 1, TERMINAL = 2, CUT = 8; // of a node's flags
  const ROW_CHARACTERS = 240, PANEL_CHARACTERS = 1500; // of a text before it is cut
  const STATUSES = ["winning", "chosen", "rejected", "kept", "pruned"];
  // control, format and unpaired surrogate characters, line separators, and letters that are drawn as nothing
  const INVISIBLE = /([\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\u115f\u1160\u3164\uffa0])\1*/gu;
  const NAMES = { 0: "NUL", 7: "BEL", 8: "BS", 9: "TAB", 10: "LF", 13: "CR", 27: "ESC", 127: "DEL" };

  // ---- elements and text

  function el(tag, attributes, ...children) {
    const element = document.createElement(tag);
    set(element, attributes);
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return element;
  }

  function set(element, attributes) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "on") for (const [event, act] of Object.entries(value)) element.addEventListener(event, act);
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, String(value));
    }
  }

  function svg(tag, attributes, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    set(element, attributes);
    element.append(...children);
    return element;
  }

  function codeName(character) {
    const code = character.codePointAt(0);
    return NAMES[code] || `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
  }

  // text as nodes, invisible characters as marked names
  function visible(text) {
    const pieces = [];
    let end = 0;
    for (const match of text.matchAll(INVISIBLE)) {
      pieces.push(text.slice(end, match.index));
      const times = match[0].length / match[1].length;
      pieces.push(el("span", { class: "t-code" }, codeName(match[1]) + (times > 1 ? ` ×${times}` : "")));
      if (match[1] === "\n") pieces.push("\n");
      end = match.index + match[0].length;
    }
    pieces.push(text.slice(end));
    return pieces.filter((piece) => piece !== "");
  }

  // the same for attributes and titles
  const plain = (text) => text.replace(INVISIBLE, (run, character) => `‹${codeName(character)}›`);

  function cutAt(text, limit) {
    const last = text.charCodeAt(limit - 1);
    return text.slice(0, last >= 0xd800 && last < 0xdc00 ? limit - 1 : limit); // no half of a pair
  }

  function bdi(text, limit) {
    return el("bdi", { dir: "auto", class: "t-text" }, visible(limit && text.length > limit ? cutAt(text, limit) : text));
  }

  // a text that opens to its whole length, and says what the page itself does not hold
  function longText(text, length) {
    const box = el("div", { class: "t-long" }, bdi(text, PANEL_CHARACTERS));
    const missing = length && length > text.length
      ? el("p", { class: "t-note" }, `${number(length)} characters; only the first ones are in this page, the rest is in the file of trees.`)
      : null;
    if (text.length > PANEL_CHARACTERS) {
      const button = el("button", { type: "button", class: "t-button" }, `show all ${number(text.length)} characters`);
      button.addEventListener("click", () => {
        const whole = bdi(text);
        set(whole, { tabindex: -1 });
        box.replaceChildren(whole);
        if (missing) box.append(missing);
        whole.focus();
      });
      box.append(" … ", button);
    }
    if (missing) box.append(missing);
    return box;
  }

  const number = (value) => value.toLocaleString("en-US");
  const plural = (count, one, many) => `${number(count)} ${count === 1 ? one : many || `${one}s`}`;

  function figure(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size >= 1e6 || size < 1e-3)) return value.toExponential(2);
    return size >= 1000 ? number(Math.round(value)) : value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 3);
  }

  const badge = (kind, text) => el("span", { class: `t-badge t-${kind}` }, text || kind);
  // the newline that ended the generation belongs to every thought
  const line = (text) => (text.endsWith("\n") ? text.slice(0, -1) : text);

  // ---- a tree as the browser walks it

  function grown(payload, tree) {
    const names = payload.columns;
    const nodes = tree.nodes.map((row, id) => {
      const node = { id, children: [], pairs: [], is: new Set() };
      names.forEach((name, place) => { node[name] = row[place]; });
      node.kept = Boolean(node.flags & KEPT);
      node.is.add(node.kept ? "kept" : "pruned");
      return node;
    });
    const root = { id: ROOT, parent: null, children: [], pairs: [], is: new Set(), text: tree.question };
    const at = (id) => (id === ROOT ? root : nodes[id]);
    for (const node of nodes) {
      node.depth = (at(node.parent).depth || 0) + 1;
      at(node.parent).children.push(node);
    }
    for (const winner of tree.winning) for (const node of path(winner)) node.is.add("winning");
    const pairs = tree.pairs.map(([step, chosen, rejected], place) => {
      nodes[chosen].is.add("chosen");
      nodes[rejected].is.add("rejected");
      for (const id of [chosen, rejected]) nodes[id].pairs.push(place);
      return { place, step, chosen: nodes[chosen], rejected: nodes[rejected] };
    });
    // pairs of whole chains continue the question, others the state of both thoughts
    for (const pair of pairs) pair.state = pair.step === 0 ? ROOT : pair.chosen.parent;

    function path(id) {
      const found = [];
      for (let at = id; at !== ROOT; at = nodes[at].parent) found.unshift(nodes[at]);
      return found;
    }
    return { tree, nodes, root, at, path, pairs };
  }

  const isOdd = (pair) => pair.chosen.value !== null && pair.rejected.value !== null && pair.chosen.value <= pair.rejected.value;
  const perToken = (node) => (node.scored ? node.logp / node.scored : null);

  function metrics(node) {
    const parts = [`value ${figure(node.value)}`, `log-prob ${figure(node.logp)}`];
    if (node.scored) parts.push(`${figure(perToken(node))} a token`);
    if (node.visits !== null) parts.push(plural(node.visits, "visit"));
    if (node.count > 1) parts.push(`${node.count} samples alike`);
    return parts.map((part) => el("span", { class: "t-metric" }, part));
  }

  const badges = (node) => [
    ...STATUSES.filter((status) => node.is.has(status)).map((status) => badge(status)),
    node.answer !== null && node.answer !== undefined ? badge("answer", "answer") : null,
    node.flags & CUT ? badge("cut", "cut at the token cap") : null,
  ].filter(Boolean);

  return {
    ROOT, TERMINAL, ROW_CHARACTERS, PANEL_CHARACTERS, STATUSES, el, set, svg, plain, cutAt, bdi, longText, number, plural, figure, badge, line,
    grown, isOdd, perToken, metrics, badges,
  };
})();
