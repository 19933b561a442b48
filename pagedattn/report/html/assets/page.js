"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const UNITS = { ns: 1e-3, "µs": 1, ms: 1e3, s: 1e6 };
  const root = document.documentElement;

  function make(name, text, kind) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  // theme: as the system has it, light, dark; kept for the next visit where the browser allows it
  const themes = ["system", "light", "dark"];
  const button = document.getElementById("theme");
  function remembered() {
    try { return localStorage.getItem("pagedattn-theme"); } catch { return null; }
  }
  function apply(theme) {
    if (theme === "system") delete root.dataset.theme;
    else root.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  }
  let theme = themes.includes(remembered()) ? remembered() : "system";
  apply(theme);
  button.parentElement.hidden = false;
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    apply(theme);
    try { localStorage.setItem("pagedattn-theme", theme); } catch { /* a page may not keep it */ }
  });
  let printed = null;
  window.addEventListener("beforeprint", () => { printed = theme; apply("light"); });
  window.addEventListener("afterprint", () => { if (printed !== null) apply(printed); });

  // "1,414", "61 %", "1.11x", "1.2 ms" as a number, a time in microseconds; NaN for other text
  function value(text) {
    const found = /^([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)\s*(ns|µs|ms|s|%|x)?(?=$|\s)/.exec(text);
    return found ? Number(found[1].replaceAll(",", "")) * (UNITS[found[2]] ?? 1) : NaN;
  }
  function compare(one, other) {
    const a = value(one), b = value(other);
    if (Number.isNaN(a) !== Number.isNaN(b)) return Number.isNaN(a) ? 1 : -1;
    return Number.isNaN(a) ? one.localeCompare(other, "en", { numeric: true }) : a - b;
  }

  for (const table of document.querySelectorAll(".table")) {
    const source = table.querySelector(":scope > script.lines");
    if (!source) continue;
    const { kinds, page, lines } = JSON.parse(source.textContent);
    const texts = lines.map((line) => line.join("\n").toLowerCase());
    const body = table.querySelector("tbody"), said = table.querySelector("output");
    const filter = table.querySelector("input");
    const [back, next] = table.querySelectorAll(".tools button");
    const heads = [...table.querySelectorAll("thead th")];
    let order = lines.map((_, place) => place), column = -1, falling = false, begin = 0;

    function show() {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      const found = order.filter((place) => words.every((word) => texts[place].includes(word)));
      begin = Math.max(0, Math.min(begin, Math.floor((found.length - 1) / page) * page));
      body.replaceChildren(...found.slice(begin, begin + page).map((place) => {
        const line = make("tr");
        lines[place].forEach((text, number) => {
          const cell = make(number ? "td" : "th", text, text.length > 40 ? "long" : kinds[number]);
          if (!number) cell.scope = "row";
          line.append(cell);
        });
        return line;
      }));
      const end = Math.min(begin + page, found.length);
      const of = found.length < lines.length ? `, filtered from ${lines.length}` : "";
      said.textContent = found.length ? `${begin + 1} to ${end} of ${found.length}${of}` : `no line${of}`;
      back.disabled = begin === 0;
      next.disabled = end >= found.length;
      back.hidden = next.hidden = lines.length <= page;
    }

    function sort(number) {
      if (column !== number) { column = number; falling = false; }
      else if (!falling) falling = true;
      else column = -1;
      order = lines.map((_, place) => place);
      if (column >= 0) {
        const missing = (place) => lines[place][column] === "-";
        order.sort((a, b) => missing(a) - missing(b)
          || (falling ? -1 : 1) * compare(lines[a][column], lines[b][column]) || a - b);
      }
      heads.forEach((head, place) => {
        if (place === column) head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
      begin = 0;
      show();
    }

    heads.forEach((head, number) => {
      const sorter = make("button", head.textContent);
      sorter.type = "button";
      sorter.title = "Sort; a third time: the report's own order";
      sorter.addEventListener("click", () => sort(number));
      head.replaceChildren(sorter);
    });
    filter.addEventListener("input", () => { begin = 0; show(); });
    back.addEventListener("click", () => { begin -= page; show(); });
    next.addEventListener("click", () => { begin += page; show(); });
    table.querySelector(".tools").hidden = false;
    show();
  }

  // the rounds of rows that the reader chooses, drawn as the page's first picture was
  const choices = document.querySelector("script.choices");
  if (choices) {
    const figure = choices.closest("figure");
    const { names, medians, ratios, drawn, colours, frame } = JSON.parse(choices.textContent);
    const [left, right, top, bottom] = frame;
    const select = figure.querySelector("select"), legend = figure.querySelector(".legend");
    const picture = figure.querySelector(".picture svg");
    names.forEach((name, place) => {
      const option = make("option", name);
      option.selected = place < drawn;
      select.append(option);
    });
    figure.querySelector(".chooser").hidden = false;

    function draw(name, attributes, text) {
      const made = document.createElementNS(SVG, name);
      for (const [key, one] of Object.entries(attributes)) made.setAttribute(key, one);
      if (text !== undefined) made.textContent = text;
      return made;
    }
    function ticks(low, high) {
      for (let power = -4; power < 19; power += 1) {
        for (const digit of [1, 2, 5]) {
          const step = digit * 10 ** power;
          const from = Math.ceil(low / step - 1e-9), to = Math.floor(high / step + 1e-9);
          if (to - from < 7) {
            return Array.from({ length: to - from + 1 }, (_, n) => +((from + n) * step).toFixed(6));
          }
        }
      }
      return [low];
    }
    function key(kind) {
      const mark = draw("svg", { class: "key", "aria-hidden": "true", viewBox: "0 0 26 16", width: 26, height: 16 });
      mark.append(draw("path", { class: kind, d: "M1 8H25" }));
      return mark;
    }

    select.addEventListener("change", () => {
      const chosen = [...select.options].flatMap((option, place) => (option.selected ? [place] : []));
      if (!chosen.length) return;
      const least = Math.min(...chosen.map((place) => ratios[place][0]));
      const most = Math.max(...chosen.map((place) => ratios[place].at(-1)));
      const margin = 0.03 * (most - least) || 0.01, low = least - margin, high = most + margin;
      const x = (ratio) => left + (ratio - low) / (high - low) * (right - left);
      const y = (share) => bottom - share * (bottom - top);
      const parts = [];
      for (const tick of ticks(low, high)) {
        parts.push(draw("polyline", { class: "grid", points: `${x(tick)},${top} ${x(tick)},${bottom}` }));
        parts.push(draw("text", { class: "tick", x: x(tick), y: bottom + 16, "text-anchor": "middle" }, `${tick}x`));
      }
      for (const share of [0, 0.25, 0.5, 0.75, 1]) {
        parts.push(draw("polyline", { class: "grid", points: `${left},${y(share)} ${right},${y(share)}` }));
        parts.push(draw("text", { class: "tick", x: left - 7, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`));
      }
      parts.push(draw("polyline", { class: "axis", points: `${left},${top} ${left},${bottom} ${right},${bottom}` }));
      parts.push(draw("text", { class: "label", x: (left + right) / 2, y: bottom + 35, "text-anchor": "middle" },
        "time of a round over the row's median"));
      const entries = chosen.map((place, number) => {
        const values = ratios[place], points = [`${x(values[0])},${y(0)}`];
        values.forEach((ratio, count) => {
          points.push(`${x(ratio)},${y(count / values.length)}`, `${x(ratio)},${y((count + 1) / values.length)}`);
        });
        points.push(`${right},${y(1)}`);
        const kind = `curve s${number % colours} dash${Math.floor(number / colours) % 3}`;
        parts.push(draw("polyline", { class: kind, points: points.join(" ") }));
        const entry = make("li");
        entry.append(key(kind), names[place]);
        return entry;
      });
      picture.replaceChildren(...parts);
      legend.replaceChildren(...entries);
      const said = chosen.map((place) => `${names[place]}: ${ratios[place].length} rounds drawn, median `
        + `${medians[place]}, from ${ratios[place][0]} to ${ratios[place].at(-1)} times the median.`).join(" ");
      picture.setAttribute("aria-label", `Share of the rounds against time over the median. ${said}`);
      figure.querySelector("figcaption").textContent = said;
    });
  }
})();
