// Line charts of the report: inline SVG with plain axes, one cursor shared by all of them.
// One script with report.js, which has `el`, `svg` and `number`.
'use strict';

const MARGIN = { top: 10, right: 12, bottom: 22, left: 46 };
const charts = [];

/** The least of 1, 2, 5 times a power of ten that divides the span into at most `count` parts. */
function tickStep(lo, hi, count) {
  const raw = (hi - lo) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
}

/** The multiples of `step` from lo to hi. */
function ticks(lo, hi, step) {
  const first = Math.ceil(lo / step - 1e-9);
  const last = Math.floor(hi / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

/** Least and greatest finite value, widened when they agree; null if there is none. */
function extent(values) {
  let lo = Infinity;
  let hi = -Infinity;
  for (const v of values) {
    if (v === null) continue;
    lo = Math.min(lo, v);
    hi = Math.max(hi, v);
  }
  if (lo > hi) return null;
  const pad = lo === hi ? Math.abs(lo) * 0.1 || 1 : 0;
  return [lo - pad, hi + pad];
}

/** Exponential moving average with the start-up bias divided out; null stays null. */
function smooth(y, span) {
  const keep = 1 - 2 / (span + 1);
  let sum = 0;
  let weight = 0;
  return y.map((v) => {
    if (v === null) return null;
    sum = keep * sum + v;
    weight = keep * weight + 1;
    return sum / weight;
  });
}

/** SVG path of the points, broken where a value is missing. */
function linePath(x, y, toX, toY) {
  let open = false;
  return x.map((step, i) => {
    if (y[i] === null) {
      open = false;
      return '';
    }
    const command = open ? 'L' : 'M';
    open = true;
    return `${command}${toX(step).toFixed(1)},${toY(y[i]).toFixed(1)}`;
  }).join('');
}

/** Whether point i has no neighbour that a line could join it to. */
function isolated(y, i) {
  return y[i] !== null && (y[i - 1] ?? null) === null && (y[i + 1] ?? null) === null;
}

/** A word-sized graphic for a table cell. */
function sparkline(x, y) {
  const node = svg('svg', { class: 'spark', viewBox: '0 0 80 18', 'aria-hidden': 'true' });
  const range = extent(y);
  if (!range || x.length < 2) return node;
  const toX = (v) => 2 + (76 * (v - x[0])) / (x[x.length - 1] - x[0]);
  const toY = (v) => 16 - (14 * (v - range[0])) / (range[1] - range[0]);
  node.append(svg('path', { class: 'line s0', d: linePath(x, y, toX, toY) }));
  return node;
}

/**
 * Appends a chart to `host`.
 * spec: title, key (muted, under the title), series [{name, x, y, style}], offset (what to add
 * to x to get the step shared by all charts), range ([lo, hi] the y axis must hold), tall, dots,
 * marks [{x, label}], stepName(x).
 */
function addChart(host, spec) {
  const series = spec.series.filter((s) => s.x.length);
  if (!series.length) return;
  const xs = [...new Set(series.flatMap((s) => s.x))].sort((a, b) => a - b);
  const lookup = series.map((s) => new Map(s.x.map((x, i) => [x, s.y[i]])));
  const stepName = spec.stepName || ((x) => `step ${x.toLocaleString('en')}`);
  const style = (s, i) => s.style || `s${i % 6}`;
  const seen = extent(series.flatMap((s) => s.y).concat(spec.range || []));
  const unit = seen && tickStep(...seen, spec.tall ? 5 : 3);
  const range = seen && [Math.floor(seen[0] / unit + 1e-6) * unit, Math.ceil(seen[1] / unit - 1e-6) * unit];

  const step = el('span', { class: 'at' });
  const readings = series.map(() => el('b', {}));
  const legend = el('div', { class: 'legend' }, ...series.map((s, i) => el('span', {},
    series.length > 1 ? swatch(style(s, i)) : '', series.length > 1 ? `${s.name} ` : '', readings[i])));
  const picture = svg('svg', {
    class: spec.tall ? 'plot tall' : 'plot', tabindex: 0, role: 'img',
    'aria-label': describe(spec.title, series, stepName),
  });
  host.append(el('figure', { class: 'chart' },
    el('figcaption', {},
      el('span', { class: 'title' }, spec.title), step,
      spec.key ? el('code', {}, spec.key) : '', legend),
    picture));

  const overlay = svg('g', { class: 'cursor' });
  let scale = null;
  let cursor = null;

  function read(x) {
    step.textContent = stepName(x);
    readings.forEach((node, i) => { node.textContent = number(lookup[i].get(x) ?? null); });
  }

  function draw() {
    const width = picture.clientWidth;
    const height = picture.clientHeight;
    if (width < 100) return;
    const [x0, x1] = extent(xs);
    picture.setAttribute('viewBox', `0 0 ${width} ${height}`);
    picture.replaceChildren();
    if (!range) {
      picture.append(svg('text', { x: 12, y: 30, class: 'tick' }, 'no finite value'));
      return;
    }
    const right = width - MARGIN.right;
    const bottom = height - MARGIN.bottom;
    const toX = (v) => MARGIN.left + ((right - MARGIN.left) * (v - x0)) / (x1 - x0);
    const toY = (v) => bottom - ((bottom - MARGIN.top) * (v - range[0])) / (range[1] - range[0]);
    scale = { toX, toY, bottom };
    for (const v of ticks(...range, unit)) {
      picture.append(
        svg('line', { class: 'rule', x1: MARGIN.left, x2: right, y1: toY(v), y2: toY(v) }),
        svg('text', { class: 'tick y', x: MARGIN.left - 6, y: toY(v) + 3.5 }, axisNumber(v)));
    }
    const steps = ticks(x0, x1, Math.max(1, tickStep(x0, x1, width / 70)));
    for (const v of steps) {
      picture.append(
        svg('line', { class: 'axis', x1: toX(v), x2: toX(v), y1: bottom, y2: bottom + 4 }),
        svg('text', { class: 'tick x', x: toX(v), y: bottom + 16 }, axisNumber(v)));
    }
    picture.append(
      svg('line', { class: 'axis', x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }),
      svg('text', { class: 'tick y', x: MARGIN.left - 6, y: bottom + 16 }, 'step'));
    for (const mark of spec.marks || []) {
      picture.append(
        svg('line', { class: 'mark', x1: toX(mark.x), x2: toX(mark.x), y1: MARGIN.top, y2: bottom }),
        svg('text', { class: 'tick', x: toX(mark.x) + 5, y: bottom - 6 }, mark.label));
    }
    series.forEach((s, i) => {
      picture.append(svg('path', { class: `line ${style(s, i)}`, d: linePath(s.x, s.y, toX, toY) }));
      s.x.forEach((x, j) => {
        if (spec.dots ? s.y[j] !== null : isolated(s.y, j)) {
          picture.append(svg('circle', { class: `dot ${style(s, i)}`, cx: toX(x), cy: toY(s.y[j]), r: 2.2 }));
        }
      });
    });
    picture.append(overlay);
    point(cursor);
  }

  /** Moves this chart's cursor to the logged step nearest to x, or to the last one for null. */
  function point(x) {
    overlay.replaceChildren();
    cursor = x === null ? null : nearest(xs, x);
    read(cursor ?? xs[xs.length - 1]);
    if (cursor === null || !scale) return;
    const px = scale.toX(cursor);
    overlay.append(svg('line', { x1: px, x2: px, y1: MARGIN.top, y2: scale.bottom }));
    series.forEach((s, i) => {
      const value = lookup[i].get(cursor) ?? null;
      if (value === null) return;
      overlay.append(svg('circle', { class: `dot ${style(s, i)}`, cx: px, cy: scale.toY(value), r: 3.5 }));
    });
  }

  const offset = spec.offset || 0;
  const self = {
    /** Follows a step of the common axis where this chart has it. */
    follow(common) {
      const x = common === null ? null : common - offset;
      point(x !== null && x >= xs[0] && x <= xs[xs.length - 1] ? x : null);
    },
  };
  const moveAll = (x) => {
    charts.forEach((chart) => chart !== self && chart.follow(x === null ? null : x + offset));
    point(x);
  };
  picture.addEventListener('pointermove', (event) => {
    if (!scale) return;
    const box = picture.getBoundingClientRect();
    const share = (event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right);
    const [x0, x1] = extent(xs);
    moveAll(nearest(xs, x0 + share * (x1 - x0)));
  });
  picture.addEventListener('pointerleave', () => moveAll(null));
  picture.addEventListener('focus', () => step.setAttribute('aria-live', 'polite'));
  picture.addEventListener('blur', () => { step.removeAttribute('aria-live'); moveAll(null); });
  picture.addEventListener('keydown', (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const at = xs.indexOf(cursor ?? xs[xs.length - 1]) + move;
    moveAll(xs[Math.min(Math.max(at, 0), xs.length - 1)]);
  });
  charts.push(self);
  read(xs[xs.length - 1]);
  new ResizeObserver(draw).observe(picture);
}

/** The element of the sorted xs nearest to x. */
function nearest(xs, x) {
  let lo = 0;
  let hi = xs.length - 1;
  while (hi - lo > 1) {
    const middle = (lo + hi) >> 1;
    if (xs[middle] < x) lo = middle; else hi = middle;
  }
  return x - xs[lo] < xs[hi] - x ? xs[lo] : xs[hi];
}

function swatch(style) {
  const node = svg('svg', { class: 'swatch', viewBox: '0 0 18 8', 'aria-hidden': 'true' });
  node.append(svg('path', { class: `line ${style}`, d: 'M0,4L18,4' }));
  return node;
}

/** What a chart says to someone who does not see it. */
function describe(title, series, stepName) {
  const parts = series.map((s) => {
    const seen = s.x.map((x, i) => i).filter((i) => s.y[i] !== null);
    if (!seen.length) return `${s.name}: no finite value`;
    const say = (i) => `${number(s.y[i])} at ${stepName(s.x[i])}`;
    return `${s.name}: from ${say(seen[0])} to ${say(seen[seen.length - 1])}`;
  });
  return `Chart of ${title}. ${parts.join('; ')}. Left and right arrow keys read single steps.`;
}
