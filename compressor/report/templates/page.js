"use strict";
(() => {
  // Tables are sorted by what their cells say: numbers with their units, else words.
  const factors = { kB: 1e3, MB: 1e6, GB: 1e9, million: 1e6 };
  const numeric = (cell) => {
    const text = (cell.firstChild ? cell.firstChild.textContent : "").trim();
    if (text === "reference") return 0;
    const found = text.replaceAll("\u2212", "-").replaceAll(",", "").match(/^[+-]?\d+(\.\d+)?(e[+-]?\d+)?/);
    if (!found) return NaN;
    const unit = text.split(" ")[1];
    return Number(found[0]) * (factors[unit] || 1);
  };
  const sort = (table, column, down) => {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => {
      const cell = row.cells[column];
      return { row, number: numeric(cell), words: cell.textContent.trim() };
    });
    const count = rows.some((one) => !Number.isNaN(one.number));
    rows.sort((a, b) => {
      if (count) {
        // What has no figure stays at the end either way.
        if (Number.isNaN(a.number) || Number.isNaN(b.number)) return Number.isNaN(a.number) - Number.isNaN(b.number);
        return down ? b.number - a.number : a.number - b.number;
      }
      return (down ? -1 : 1) * a.words.localeCompare(b.words);
    });
    body.append(...rows.map((one) => one.row));
  };
  for (const table of document.querySelectorAll(".sortable table")) {
    if (!table.tHead || table.tBodies[0].rows.length < 2) continue;
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        sort(table, column, down);
      });
    });
  }

  // The what-if panel.
  const source = document.getElementById("whatif-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const form = document.getElementById("whatif-form");
  const field = (name) => form.elements.namedItem(name);
  const value = (name) => (field(name).value === "" ? null : Number(field(name).value));
  const show = (number, interval) => {
    if (number === null || !Number.isFinite(number)) return "–";
    if (number === 0) return "0";
    const first = -Math.floor(Math.log10(Math.abs(number)));
    let places = first + 2;
    if (interval) {
      const half = (interval[1] - interval[0]) / 2;
      const exponent = Math.floor(Math.log10(half));
      const supported = (half / 10 ** exponent < 3 ? 1 : 0) - exponent;
      places = Math.min(Math.max(supported, first + 1), first + 3);
    }
    const unit = 10 ** Math.max(0, -places);
    const digits = Math.max(0, Math.min(12, places));
    const rounded = unit > 1 ? Math.round(number / unit) * unit : number;
    return rounded.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  };
  const sum = (list) => list.reduce((total, one) => total + one, 0);
  // exp(mean of the logarithms' t interval) about a value, from its values in the rounds.
  const reach = (rounds) => {
    const count = rounds.length;
    if (count < 2 || rounds.some((one) => !(one > 0))) return null;
    const logs = rounds.map(Math.log);
    const mean = sum(logs) / count;
    const error = Math.sqrt(sum(logs.map((one) => (one - mean) ** 2)) / (count - 1) / count);
    const quantile = data.quantiles[Math.min(count - 1, data.quantiles.length) - 1];
    return Math.exp(quantile * error);
  };
  const within = (samples, index, ttft, tpot) =>
    samples.ttft_ms[index] !== null &&
    (ttft === null || samples.ttft_ms[index] <= ttft) &&
    (tpot === null || samples.tpot_ms[index] === null || samples.tpot_ms[index] <= tpot);
  const same = (name) => value(name) === data.defaults[name];
  // Goodput [tok/s] under limits: {value, interval, rounds, met}.
  const goodput = (row) => {
    const good = row.goodput;
    const asMeasured = { value: good.value, interval: good.low === null ? null : [good.low, good.high], rounds: null, met: row.met };
    if (!row.samples || (same("ttft") && same("tpot"))) return asMeasured;
    const samples = row.samples;
    const tokens = samples.round_seconds.map(() => 0);
    let met = 0;
    samples.round.forEach((round, index) => {
      if (!within(samples, index, value("ttft"), value("tpot"))) return;
      tokens[round] += samples.output_tokens[index];
      met += 1;
    });
    const rate = sum(tokens) / row.window;
    const rounds = tokens.map((count, round) => count / samples.round_seconds[round]);
    const factor = reach(rounds);
    return { value: rate, interval: factor && [rate / factor, rate * factor], rounds, met: met / samples.round.length };
  };
  const cost = (row) => {
    const rate = goodput(row);
    const watts = row.watts === null ? value("watts") : row.watts;
    const hourly = value("price") + row.host + row.storage + (watts * value("pue") / 1000) * value("electricity");
    let mix = 1;
    if (row.seconds && !(same("input") && same("output"))) {
      const [a, b] = row.seconds;
      const per = (input, output) => (a * input + b * output) / output;
      mix = per(value("input"), value("output")) / per(row.mix[0], row.mix[1]);
    }
    const at = (tokens) => (hourly / (tokens * 3600 / 1e6) + row.network_per_mtok) / (value("utilisation") / 100) * mix;
    return {
      row, rate, hourly,
      value: rate.value > 0 ? at(rate.value) : null,
      interval: rate.value > 0 && rate.interval ? [at(rate.interval[1]), at(rate.interval[0])] : null,
    };
  };
  // How much cheaper than the baseline: the value, and its interval paired by round.
  const gain = (one, base) => {
    if (!base || base.value === null || one.value === null || !one.value) return null;
    const ratio = base.value / one.value;
    let factors = null;
    if (one.rate.rounds && base.rate.rounds) {
      const pairs = one.rate.rounds.map((rate, round) => rate / base.rate.rounds[round]).filter((rate) => rate < Infinity);
      const factor = reach(pairs);
      factors = factor && [1 / factor, factor];
    } else if (one.row.ratio && one.row.ratio.low !== null) {
      factors = [one.row.ratio.low / one.row.ratio.value, one.row.ratio.high / one.row.ratio.value];
    }
    return { value: ratio, interval: factors && [ratio * factors[0], ratio * factors[1]] };
  };
  const write = (line, text, interval, unit = "") => {
    const cell = line.insertCell();
    cell.className = "n";
    cell.append(text === "–" ? text : text + unit);
    if (text === "–" || !interval) return;
    const second = document.createElement("span");
    second.className = "ci";
    second.append(`${show(interval[0], interval)} to ${show(interval[1], interval)}`);
    cell.append(second);
  };
  const compute = () => {
    const answer = document.getElementById("whatif-answer");
    if (!form.checkValidity()) {
      answer.textContent = "A value is missing or outside of what is possible.";
      return;
    }
    const rows = data.rows.filter((row) => row.point === Number(field("point").value)).map(cost);
    const base = rows.find((one) => one.row.variant === data.baseline);
    const body = document.getElementById("whatif-table").tBodies[0];
    body.replaceChildren();
    for (const one of rows) {
      const line = body.insertRow();
      const head = document.createElement("th");
      head.scope = "row";
      head.append(one.row.variant);
      line.append(head);
      write(line, one.rate.met === null ? "–" : `${(one.rate.met * 100).toFixed(1)}%`, null);
      write(line, show(one.rate.value, one.rate.interval), one.rate.interval);
      write(line, show(one.hourly), null);
      write(line, show(one.value, one.interval), one.interval);
      line.cells[4].dataset.value = one.value;
      const found = one === base ? null : gain(one, base);
      write(line, one === base ? "1×" : found ? show(found.value, found.interval) : "–", found && found.interval, found ? "×" : "");
    }
    const priced = rows.filter((one) => one.value !== null).sort((a, b) => a.value - b.value);
    if (!priced.length) {
      answer.textContent = "No recorded request is within these limits.";
      return;
    }
    const words = (one) => `${one.row.variant} at ${show(one.value, one.interval)} ${data.currency} per million output tokens`;
    const limit = `${Number((data.limit * 100).toPrecision(3))}%`;
    const kept = priced.find((one) => one.row.keeps);
    answer.textContent = `Cheapest: ${words(priced[0])}` + (
      priced[0].row.keeps ? `, which keeps quality within ${limit}.`
        : kept ? `, which does not surely keep quality within ${limit}; of those that do, ${words(kept)}.`
          : `, which does not surely keep quality within ${limit}; none does.`);
  };
  const restore = () => {
    for (const [name, number] of Object.entries(data.defaults)) {
      field(name).value = number === null ? "" : String(number);
    }
    compute();
  };
  data.points.forEach((label, index) => field("point").add(new Option(label, String(index))));
  if (!data.rows.every((row) => row.samples)) for (const name of ["ttft", "tpot"]) field(name).disabled = true;
  if (!data.rows.every((row) => row.seconds)) for (const name of ["input", "output"]) field(name).disabled = true;
  form.addEventListener("input", compute);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => { event.preventDefault(); restore(); });
  restore();
  for (const hidden of document.querySelectorAll(".whatif[hidden]")) hidden.hidden = false;
})();
