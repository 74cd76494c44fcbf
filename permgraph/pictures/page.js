"use strict";
// The data, as content.py writes them:
//   groups      [name, short name, size, parents, fixed, moves, colour]; modules: which of them exchange whole modules
//   parameters  [name, shape, one expression per dimension, other names]; stacks: of which these are the parts
//   tree        [path, parameters, children]; in place of a child [path, modules like that one]
//   pins        [parameter, dimension, size, reason, step]
//   ties        slot, slot, step, one after the other; rests: slot, reason, step
//   steps       [operator, module, source], numbers in strings, -1 where unknown
// Slots are numbers: first the axes of the parameters in their order, then those of other tensors.
// Whatever is shown is set as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const groups = data.groups.map(([name, short, size, parents, fixed, moves, colour]) =>
    ({ name, short, size, parents, fixed: !!fixed, moves: !!moves, colour, modules: false, slots: [] }));
  for (const at of data.modules) groups[at].modules = true;
  const parameters = data.parameters.map(([name, shape, axes, others]) => ({ name, shape, axes, others, as: "also" }));
  for (const at of data.stacks) parameters[at].as = "stack of";
  const owners = []; // for each slot of a parameter, which parameter and dimension
  parameters.forEach((parameter, at) => {
    parameter.first = owners.length;
    parameter.axes.forEach((_, dim) => owners.push([at, dim]));
  });

  const leaves = (axis) => typeof axis === "number" ? [axis]
    : axis[0] === "*" || axis[0] === "+" ? axis.slice(1).flatMap(leaves) : axis.slice(2).flatMap(leaves);
  const leavesOf = (slot) => leaves(parameters[owners[slot][0]].axes[owners[slot][1]]);
  owners.forEach((_, slot) => new Set(leavesOf(slot)).forEach((leaf) => {
    if (leaf < 0) groups[-1 - leaf].slots.push(slot);
  }));
  const slotName = (slot) => `${parameters[owners[slot][0]].name}[${owners[slot][1]}]`;
  const string = (at) => at < 0 ? null : data.strings[at];

  // --- why -----------------------------------------------------------------------------------------------------------

  let near = null;
  const restsAt = new Map();
  function neighbours(slot) {
    if (near === null) {
      near = new Map();
      const add = (from, to, step) => { if (!near.has(from)) near.set(from, []); near.get(from).push([to, step]); };
      for (let at = 0; at < data.ties.length; at += 3) {
        add(data.ties[at], data.ties[at + 1], data.ties[at + 2]);
        add(data.ties[at + 1], data.ties[at], data.ties[at + 2]);
      }
      for (let at = 0; at < data.rests.length; at += 3) {
        if (!restsAt.has(data.rests[at])) restsAt.set(data.rests[at], []);
        restsAt.get(data.rests[at]).push({ reason: string(data.rests[at + 1]), step: data.rests[at + 2] });
      }
    }
    return near.get(slot) || [];
  }

  /** A shortest way from a slot to each that can be reached: a map from slot to [slot before it, step]. */
  function ways(start, through) {
    const found = new Map([[start, null]]);
    const queue = [start];
    for (let at = 0; at < queue.length; at++) {
      for (const [next, step] of neighbours(queue[at])) {
        if (!found.has(next) && through(next)) { found.set(next, [queue[at], step]); queue.push(next); }
      }
    }
    return found;
  }

  function stepsTo(slot, found) {
    const steps = [];
    for (let back = found.get(slot); back; back = found.get(back[0])) steps.unshift(back[1]);
    return steps;
  }

  const inWords = (step) => {
    const [operator, module, source] = data.steps[step].map(string);
    if (operator === null) return null;
    const name = operator.replace(/^aten\./, "").replace(/\.default$/, "");
    return `${name}${module ? ` in ${module}` : ""}${source ? ` (${source})` : ""}`;
  };
  const said = (steps) => steps.map(inWords).filter((words, at, all) => words !== null && words !== all[at - 1]);

  /** The other slots of a group, the nearest first, each with the steps that lead there. */
  function links(slot, group) {
    const shared = new Set(group.slots);
    const found = ways(slot, (s) => s >= owners.length || shared.has(s));
    const far = (link) => link.steps.length || owners.length;
    return group.slots.filter((s) => s !== slot)
      .map((s) => ({ slot: s, steps: found.has(s) ? stepsTo(s, found) : [] }))
      .sort((one, other) => far(one) - far(other));
  }

  /** Why indices stay put: {reason, at, step, steps}, or null if it was not kept. */
  function reason(slot, size) {
    const [parameter, dim] = owners[slot];
    const pin = data.pins.find((p) => p[0] === parameter && p[1] === dim && p[2] === size);
    const known = pin && { reason: string(pin[3]), step: pin[4] };
    if (data.kept) {
      const still = (s) => s >= owners.length || leavesOf(s).some((leaf) => leaf >= 0 || groups[-1 - leaf].fixed);
      const found = ways(slot, still);
      for (const s of found.keys()) {
        const here = (restsAt.get(s) || []).find((rest) => !known || rest.reason === known.reason);
        if (here) return { ...here, at: s, steps: stepsTo(s, found) };
      }
    }
    return known ? { ...known, at: slot, steps: [] } : null;
  }

  // --- elements --------------------------------------------------------------------------------------------------------

  function make(tag, attributes = {}, ...inside) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null) element.setAttribute(name, value);
    }
    element.append(...inside.flat().filter((item) => item !== null));
    return element;
  }

  const button = (attributes, ...inside) => make("button", { type: "button", ...attributes }, ...inside);
  const look = (group) => `g${group.colour % 7} s${Math.floor(group.colour / 7)}`; // a colour, and a border
  const swatch = (group) => make("i", { class: `swatch ${look(group)}`, "aria-hidden": "true" });
  const plural = (count, one, many) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;

  /** A list that shows its first items, and more when asked. */
  function inPortions(items, show, list, portion = 25) {
    let shown = 0;
    const more = button({ class: "more", onclick: () => grow(true) });
    function grow(asked) {
      const from = shown;
      for (; shown < Math.min(items.length, from + portion); shown++) list.append(show(items[shown]));
      more.textContent = `Show ${Math.min(portion, items.length - shown)} more of ${items.length.toLocaleString("en")}`;
      more.hidden = shown >= items.length;
      if (asked && list.children[from]) list.children[from].querySelector("button, summary, td, code")?.focus();
    }
    grow(false);
    return make("div", {}, list, more);
  }

  // --- axes ------------------------------------------------------------------------------------------------------------

  let chosen = null; // {slot, leaf}

  // Beside the modules among which a group is at home, the end of its name will do, unless that names another group.
  const groupNames = new Set(groups.map((group) => group.name));
  function labelOf(slot, group) {
    const cut = group.name.lastIndexOf(".") + 1;
    const end = group.name.slice(cut);
    const near = parameters[owners[slot][0]].name.startsWith(group.name.slice(0, cut));
    return cut && near && !groupNames.has(end) && !/^\d+(#|$)/.test(end) ? end : group.short;
  }

  function chip(slot, leaf) {
    const dim = owners[slot][1];
    if (leaf >= 0) {
      return button({
        class: "chip still", "data-slot": slot, "data-leaf": leaf, "aria-pressed": "false",
        "aria-label": `${slotName(slot)}: ${plural(leaf, "index stays", "indices stay")} put`, title: "stays put",
      }, leaf === 1 ? "1" : String(leaf));
    }
    const group = groups[-1 - leaf];
    return button({
      class: `chip ${group.fixed ? "still" : look(group)}`, "data-slot": slot, "data-leaf": leaf,
      "aria-pressed": "false", title: `${group.name}, ${group.size}`,
      "aria-label": `${slotName(slot)}, dimension ${dim}: group ${group.name} of ${group.size}`,
    }, labelOf(slot, group));
  }

  function expression(slot, axis) {
    if (typeof axis === "number") return [chip(slot, axis)];
    const mark = (text) => make("span", { class: "mark" }, text);
    const joined = (items, between) => items.flatMap((item, at) =>
      at ? [mark(between), ...expression(slot, item)] : expression(slot, item));
    if (axis[0] === "*") return [mark("("), ...joined(axis.slice(1), " "), mark(")")];
    if (axis[0] === "+") return [mark("["), ...joined(axis.slice(1), " + "), mark("]")];
    if (axis[0] === ":") return [mark(`${axis[1]}:`), ...expression(slot, axis[2])];
    return [mark("{"), ...joined(axis.slice(2), " | "), mark(`}@${axis[1]}`)];
  }

  function parameterRow(at, whole) {
    const parameter = parameters[at];
    const name = whole ? parameter.name : parameter.name.slice(parameter.name.lastIndexOf(".") + 1) || parameter.name;
    const axes = parameter.axes.map((axis, dim) =>
      make("span", { class: "dim" }, expression(parameter.first + dim, axis)));
    const others = `${parameter.as} ${parameter.others.join(", ")}`;
    const also = parameter.others.length ? make("span", { class: "also" }, others) : null;
    return make("li", { class: "parameter", "data-parameter": at },
      make("span", { class: "name", title: parameter.name }, name),
      make("span", { class: "shape" }, parameter.shape.join(" × ") || "scalar"),
      make("span", { class: "axes" }, axes), also);
  }

  function mark() {
    for (const element of document.querySelectorAll(".chip.same, .chip[aria-pressed=true]")) {
      element.classList.remove("same");
      element.setAttribute("aria-pressed", "false");
    }
    if (chosen === null) return;
    if (chosen.leaf < 0) {
      for (const element of document.querySelectorAll(`.chip[data-leaf="${chosen.leaf}"]`)) element.classList.add("same");
    }
    const same = `.chip[data-slot="${chosen.slot}"][data-leaf="${chosen.leaf}"]`;
    for (const element of document.querySelectorAll(same)) element.setAttribute("aria-pressed", "true");
  }

  // --- the detail of one axis ------------------------------------------------------------------------------------------

  const detail = document.getElementById("detail");
  const path = (steps) => make("ol", { class: "path" }, said(steps).map((words) => make("li", {}, words)));

  function because(steps, at, group) {
    const words = said(steps);
    if (group.modules) return make("p", { class: "faint" }, "of the same modules");
    if (!words.length) return make("p", { class: "faint" }, data.kept ? "directly" : "why was not kept");
    return make("details", {},
      make("summary", { "aria-label": `why ${at}: by ${plural(words.length, "operator", "operators")}` },
        `by ${plural(words.length, "operator", "operators")}`), path(steps));
  }

  function choose(slot, leaf, from) {
    chosen = { slot, leaf };
    const [at, dim] = owners[slot];
    const whole = parameters[at].shape[dim];
    const inside = [make("div", { class: "heading" }, make("h2", {}, make("code", {}, slotName(slot))),
      button({ class: "close", "aria-label": "Close", onclick: close }, "×"))];
    const size = leaf < 0 ? groups[-1 - leaf].size : leaf;
    if (size !== whole) inside.push(make("p", { class: "faint" }, `a part of an axis of ${whole}`));
    if (leaf < 0) inside.push(...groupDetail(slot, groups[-1 - leaf]));
    if (leaf >= 0 || groups[-1 - leaf].fixed) inside.push(...stillDetail(slot, size));
    detail.replaceChildren(...inside);
    detail.scrollTop = 0;
    document.body.classList.add("chosen");
    mark();
    origin = from || origin;
  }

  function groupDetail(slot, group) {
    const inside = [make("p", {}, swatch(group), ` ${plural(group.size, "index", "indices")}: `,
      group.fixed ? "an axis with a name, on which nothing moves: " : "group ", make("code", {}, group.name))];
    if (group.parents.length) {
      inside.push(make("p", {}, "It has a permutation of its own at each index of ",
        group.parents.flatMap((parent, at) => [at ? ", " : "", make("code", {}, groups[parent].name)]), "."));
    }
    if (group.fixed) return inside;
    const tied = links(slot, group);
    inside.push(make("h3", {}, tied.length ? `Tied to ${plural(tied.length, "other axis", "other axes")}`
      : "Tied to no other axis of a parameter"));
    const leaf = -1 - groups.indexOf(group);
    inside.push(inPortions(tied, (link) => make("li", {},
      button({ class: "goto", "aria-label": `show ${slotName(link.slot)}`, onclick: () => reveal(link.slot, leaf) },
        slotName(link.slot)), because(link.steps, slotName(link.slot), group)), make("ul", { class: "links" })));
    return inside;
  }

  function stillDetail(slot, size) {
    const why = reason(slot, size);
    if (why === null) return [make("h3", {}, "Stays put"), make("p", {}, "The reason was not kept.")];
    const at = inWords(why.step);
    return [make("h3", {}, "Stays put"), make("p", { class: "reason" }, why.reason),
      at ? make("p", {}, "by ", make("code", {}, at)) : null,
      why.at < owners.length && why.at !== slot ? make("p", {}, "at ", button({
        class: "goto", "aria-label": `show ${slotName(why.at)}`, onclick: () => reveal(why.at, leavesOf(why.at)[0]) },
        slotName(why.at))) : null,
      said(why.steps).length ? make("details", {}, make("summary", {}, "reached by"), path(why.steps)) : null,
    ].filter((item) => item !== null);
  }

  let origin = null;
  function close() {
    chosen = null;
    mark();
    document.body.classList.remove("chosen");
    hint();
    if (origin && origin.isConnected) origin.focus();
  }
  const hint = () => detail.replaceChildren(make("p", { class: "faint" },
    "Choose an axis to see everything that is tied to it, and why. Groups in one place differ in colour or border; grey stays put."));

  /** Open the modules around a slot, scroll there and choose it. */
  function reveal(slot, leaf) {
    show("structure", false);
    search.value = "";
    filter();
    open(owners[slot][0]);
    const target = tree.querySelector(`.chip[data-slot="${slot}"][data-leaf="${leaf}"]`);
    choose(slot, leaf, target);
    if (target) {
      target.scrollIntoView({ block: "center" });
      target.focus({ preventScroll: true });
    }
  }

  document.addEventListener("click", (event) => {
    const element = event.target.closest(".chip");
    if (!element) return;
    const [slot, leaf] = [Number(element.dataset.slot), Number(element.dataset.leaf)];
    if (chosen && chosen.slot === slot && chosen.leaf === leaf) { origin = element; close(); }
    else choose(slot, leaf, element);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && chosen) close();
  });

  // --- the tree --------------------------------------------------------------------------------------------------------

  // Each parameter's way down: the branches that must be opened to see it, as far as they have been made.
  const waysDown = new Map();

  function groupsInside(node, found = new Set()) {
    for (const at of node[1]) {
      for (const leaf of parameters[at].axes.flatMap(leaves)) if (leaf < 0 && groups[-1 - leaf].moves) found.add(-1 - leaf);
    }
    for (const child of node[2]) (isRun(child) ? child[1].slice(0, 1) : [child]).forEach((n) => groupsInside(n, found));
    return found;
  }
  const isRun = (node) => node.length === 2;
  const count = (node) => isRun(node) ? node[1].reduce((sum, n) => sum + count(n), 0)
    : node[1].length + node[2].reduce((sum, n) => sum + count(n), 0);

  /** A module that opens and closes; `fill(way)` makes what is inside when it is first opened. */
  function branch(label, described, inside, fill, above, node) {
    const list = make("ul", { role: "group" });
    list.hidden = true;
    let filled = false;
    const head = button({ class: "module", "aria-expanded": "false" }, make("span", { class: "twist", "aria-hidden": "true" }),
      make("span", { class: "name" }, label), make("span", { class: "faint" }, described), inside);
    const entry = { alike: isRun(node), rows: isRun(node) ? node[1].length : node[1].length + node[2].length, open(wanted) {
      if (wanted && !filled) { filled = true; list.append(...fill(way)); }
      list.hidden = !wanted;
      head.setAttribute("aria-expanded", String(wanted));
    } };
    const way = [...above, entry];
    head.addEventListener("click", () => { entry.open(list.hidden); mark(); });
    entries.push(entry);
    register(node, way);
    return make("li", { class: "branch" }, head, list);
  }

  const entries = [];
  function register(node, way) {
    if (isRun(node)) node[1].forEach((inner) => register(inner, way));
    else {
      node[1].forEach((at) => waysDown.set(at, way));
      node[2].forEach((inner) => register(inner, way));
    }
  }

  const dots = (found) => make("span", { class: "dots", "aria-hidden": "true" },
    [...found].slice(0, 8).map((at) => swatch(groups[at])), found.size > 8 ? `+${found.size - 8}` : null);

  function nodes(parent, way) {
    const within = parent[0] ? `${parent[0]}.` : "";
    return [
      ...parent[1].map((at) => parameterRow(at, false)),
      ...parent[2].map((node) => {
        if (isRun(node)) {
          const [like, alike] = node;
          const names = alike.map((one) => one[0].slice(within.length));
          const label = names.length > 1 ? `${names[0]} … ${names[names.length - 1]}` : names[0];
          return branch(label, `${alike.length} like ${like.slice(within.length)}`, null,
            (inner) => alike.map((one) => moduleBranch(one, within, inner)), way, node);
        }
        return moduleBranch(node, within, way);
      }),
    ];
  }
  const moduleBranch = (node, within, way) => branch(node[0].slice(within.length) || node[0],
    plural(count(node), "parameter", "parameters"), dots(groupsInside(node)), (inner) => nodes(node, inner), way, node);

  function open(at) {
    // Opening a branch makes those inside, which lengthens the way.
    for (let done = 0; done < (waysDown.get(at) || []).length; done++) waysDown.get(at)[done].open(true);
  }

  const tree = make("ul", { class: "tree", "aria-label": "Modules" });
  const found = make("ul", { class: "tree found", "aria-label": "Found" });
  found.hidden = true;
  const state = make("p", { class: "faint", role: "status" });
  const search = make("input", { type: "search", id: "search", placeholder: "Find a parameter or a group",
    "aria-label": "Find a parameter or a group", autocomplete: "off", spellcheck: "false" });

  function filter() {
    const wanted = search.value.trim().toLowerCase();
    tree.hidden = wanted !== "";
    found.hidden = wanted === "";
    state.textContent = "";
    found.replaceChildren();
    if (!wanted) return;
    const named = new Set(groups.flatMap((group, at) => group.name.toLowerCase().includes(wanted) ? group.slots : [])
      .map((slot) => owners[slot][0]));
    const hits = parameters.map((_, at) => at).filter((at) => named.has(at)
      || [parameters[at].name, ...parameters[at].others].some((name) => name.toLowerCase().includes(wanted)));
    state.textContent = `${hits.length} of ${plural(parameters.length, "parameter", "parameters")}`;
    if (hits.length > 200) state.textContent += ", of which 200 are shown";
    found.append(...hits.slice(0, 200).map((at) => parameterRow(at, true)));
    mark();
  }
  search.addEventListener("input", filter);

  // Arrow keys walk through what is visible, as in any tree; Tab goes from one thing to the next too.
  tree.addEventListener("keydown", (event) => {
    const row = event.target.closest("li");
    const all = [...tree.querySelectorAll("li")].filter((li) => li.offsetParent !== null);
    const focus = (li) => li && li.querySelector("button")?.focus();
    const at = all.indexOf(row);
    if (event.key === "ArrowDown") focus(all.slice(at + 1).find((li) => li.querySelector("button")));
    else if (event.key === "ArrowUp") focus(all.slice(0, at).reverse().find((li) => li.querySelector("button")));
    else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      const forward = event.key === "ArrowRight";
      const head = event.target.closest(".module");
      if (head) {
        if ((head.getAttribute("aria-expanded") === "true") !== forward) head.click();
        else if (!forward) focus(row.parentElement.closest("li"));
        else focus(row.querySelector("li"));
      } else {
        const chips = [...row.querySelectorAll(".chip")];
        const next = chips[chips.indexOf(event.target) + (forward ? 1 : -1)];
        if (next) next.focus();
        else if (!forward) focus(row.parentElement.closest("li"));
      }
    } else return;
    event.preventDefault();
  });

  function structure() {
    const panel = document.getElementById("structure");
    const few = () => entries.slice().forEach((entry) => entry.open(false));
    const all = () => { for (let at = 0; at < entries.length && at < 400; at++) entries[at].open(true); mark(); };
    panel.append(make("div", { class: "tools" }, search, button({ onclick: all }, "Open all"),
      button({ onclick: few }, "Close all")), state, tree, found);
    tree.append(...nodes(data.tree, []));
    // A first look: level by level, as long as there is room.
    for (let at = 0, room = 60; at < entries.length;) {
      const level = entries.slice(at);
      room -= level.reduce((sum, entry) => sum + (entry.alike ? 0 : entry.rows), 0);
      if (room < 0 && level.length > 1) break;
      at += level.length;
      level.filter((entry) => !entry.alike).forEach((entry) => entry.open(true));
    }
    if (!parameters.length) panel.append(make("p", {}, "There are no parameters."));
  }

  // --- groups, and what stays put ----------------------------------------------------------------------------------------

  function wideTable(head, rows) {
    const body = make("tbody");
    const shown = inPortions(rows, (row) => row, body, 100);
    const whole = make("table", {}, make("thead", {}, make("tr", {}, head.map((h) => make("th", { scope: "col" }, h)))), body);
    return make("div", {}, make("div", { class: "wide" }, whole), shown.lastChild);
  }

  function groupsPanel() {
    const panel = document.getElementById("groups");
    const moving = groups.filter((group) => group.moves);
    if (!moving.length) { panel.append(make("p", {}, "Nothing can be permuted: every axis stays put.")); return; }
    panel.append(wideTable(["group", "size", "one at each index of", "axes"], moving.map((group) => make("tr", {},
      make("th", { scope: "row" }, swatch(group), button({ class: "goto", "aria-label": `show group ${group.name}`,
        onclick: () => reveal(group.slots[0], -1 - groups.indexOf(group)) }, group.name)),
      make("td", { class: "number" }, group.size.toLocaleString("en")),
      make("td", {}, group.parents.map((parent) => groups[parent].short).join(", ") || "—"),
      make("td", { class: "number" }, group.slots.length.toLocaleString("en"))))));
  }

  function stillPanel() {
    const panel = document.getElementById("still");
    const byReason = new Map();
    for (const pin of data.pins) {
      const why = string(pin[3]);
      if (!byReason.has(why)) byReason.set(why, []);
      byReason.get(why).push(pin);
    }
    panel.append(make("h2", {}, "Operators without a rule"));
    if (data.unknown.length) {
      panel.append(make("p", {}, "Everything that they touch stays put. A rule for one of them is a function of a few lines."));
      panel.append(wideTable(["operator", "times", "module", "source"], data.unknown.map(([operator, times, module, source]) =>
        make("tr", {}, make("th", { scope: "row" }, make("code", {}, operator)), make("td", { class: "number" }, String(times)),
          make("td", {}, module || "—"), make("td", {}, source || "—")))));
    } else panel.append(make("p", {}, "None: every operator that the model ran is known."));
    panel.append(make("h2", {}, "Axes that stay put, by reason"));
    if (!byReason.size) panel.append(make("p", {}, "None is listed."));
    for (const [why, pins] of [...byReason].sort((one, other) => other[1].length - one[1].length)) {
      const box = make("details", {}, make("summary", {}, `${why} `, make("span", { class: "faint" }, `${pins.length}×`)));
      box.addEventListener("toggle", () => {
        if (box.children.length > 1) return;
        box.append(inPortions(pins, (pin) => {
          const slot = parameters[pin[0]].first + pin[1];
          return make("li", {}, button({ class: "goto", "aria-label": `show ${slotName(slot)}`,
            onclick: () => reveal(slot, leavesOf(slot).find((leaf) => leaf === pin[2]) ?? leavesOf(slot)[0]) }, slotName(slot)),
          make("span", { class: "faint" }, ` ${plural(pin[2], "index", "indices")}`));
        }, make("ul", { class: "links" })));
      });
      panel.append(box);
    }
    if (data.unread.length) {
      panel.append(make("h2", {}, "Read whole in no pass, and as long as groups that move"));
      panel.append(inPortions(data.unread, ([parameter, dim, concerned]) => {
        const slot = parameters[parameter].first + dim;
        return make("li", {}, button({ class: "goto", "aria-label": `show ${slotName(slot)}`,
          onclick: () => reveal(slot, leavesOf(slot)[0]) }, slotName(slot)),
        make("span", { class: "faint" }, ` ${concerned.map((at) => data.groups[at][0]).join(", ")}`));
      }, make("ul", { class: "links" })));
    }
    if (data.unused.length) {
      panel.append(make("h2", {}, "Never read by the forward pass"));
      panel.append(inPortions(data.unused, (name) => make("li", {}, make("code", {}, name)), make("ul", { class: "links" })));
    }
  }

  // --- tabs and theme ----------------------------------------------------------------------------------------------------

  const tabs = [...document.querySelectorAll("[role=tab]")];
  function show(key, focus) {
    for (const tab of tabs) {
      const here = tab.id === `tab-${key}`;
      tab.setAttribute("aria-selected", String(here));
      tab.tabIndex = here ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = !here;
      if (here && focus) tab.focus();
    }
    document.body.dataset.panel = key;
  }
  tabs.forEach((tab, at) => {
    tab.addEventListener("click", () => show(tab.getAttribute("aria-controls"), true));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(tabs[(to + tabs.length) % tabs.length].getAttribute("aria-controls"), true);
    });
  });

  const themes = ["system", "light", "dark"];
  const theme = document.getElementById("theme");
  theme.addEventListener("click", () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme || "system") + 1) % themes.length];
    if (next === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    theme.textContent = `Theme: ${next}`;
    theme.setAttribute("aria-label", `Theme: ${next === "system" ? "as the system" : next}`);
  });

  structure();
  groupsPanel();
  stillPanel();
  hint();
  show("structure", false);
})();
