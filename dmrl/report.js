// The page of the report: headline, curves, traces, configuration. One script with page.js,
// report_charts.js and the viewer's.
'use strict';

const TITLES = {
  reward: 'Reward', kl: 'KL to the reference', entropy: 'Entropy', grad_norm: 'Gradient norm',
  loss: 'Loss', learning_rate: 'Learning rate', tokens_per_s: 'Tokens per second',
  frac_reward_zero_std: 'Groups of equal reward', 'dispo/step_reward': 'Step reward',
};
const MAIN = ['reward', 'dispo/step_reward'];
const SMALL = ['kl', 'entropy', 'grad_norm', 'loss', 'learning_rate', 'frac_reward_zero_std',
  'tokens_per_s'];
const TIMES = ['time/rollout', 'time/reward', 'time/update'];

/** A short number for an axis. */
function axisNumber(value) {
  const v = Number(value.toPrecision(6));
  const size = Math.abs(v);
  if (v === 0) return '0';
  const text = size >= 1e6 ? `${Number((v / 1e6).toPrecision(4))}M`
    : size >= 1e4 ? `${Number((v / 1e3).toPrecision(4))}k`
      : size < 1e-3 ? v.toExponential().replace('e-', 'e−') : String(v);
  return text.replace(/^-/, '−');
}

/** A metric over all stages on the common axis of steps. */
function overStages(key) {
  const x = [];
  const y = [];
  for (const stage of data.stages) {
    const [steps, values] = stage.series[key] || [[], []];
    steps.forEach((step, i) => {
      const at = step + stage.offset;
      if (x[x.length - 1] === at) { x.pop(); y.pop(); }
      x.push(at);
      y.push(values[i]);
    });
  }
  return { x, y };
}

/** The stage and its own step number at a step of the common axis. */
function commonStep(at) {
  const stage = data.stages.findLast((s) => at >= s.offset + s.first) || data.stages[0];
  return `${data.stages.length > 1 ? `${stage.title} ` : ''}step ${at - stage.offset}`;
}

const lastName = (name) => name.split('/').pop();
const metricNames = () => [...new Set(data.changes.map((c) => lastName(c.name)))];
const leadMetric = () => (metricNames().includes('solved') ? 'solved' : metricNames()[0]);

/** The split that all evaluation metrics share, such as "validation/", or nothing. */
function sharedSplit() {
  const firsts = new Set(data.changes.map((c) => c.name.split('/').slice(0, -2)[0]));
  return firsts.size === 1 && !firsts.has(undefined) ? `${[...firsts][0]}/` : '';
}

const shortName = (name) => name.slice(sharedSplit().length);

/** One chart for every evaluation metric of this last name, one line for each setting. */
function evalChart(host, metric, title, tall) {
  const keys = data.changes.map((c) => c.name).filter((name) => lastName(name) === metric);
  const rate = ['solved', 'cells', 'correct', 'accuracy'].includes(metric);
  addChart(host, {
    title, key: `eval/…/${metric}`, tall, dots: true, stepName: commonStep,
    range: rate ? [0, 1] : [],
    marks: data.stages.slice(1).map((s) => ({ x: s.offset + s.first, label: s.title })),
    series: keys.map((name) => ({ name: shortName(name).replace(/\/[^/]*$/, ''), ...overStages(`eval/${name}`) })),
  });
}

function addHeadline(host) {
  host.append(el('header', {}, ...heading('dmrl training report', data.name),
    el('dl', { class: 'facts' }, ...data.facts.map(
      ([label, text]) => el('div', {}, el('dt', {}, label), el('dd', {}, text))))));
  for (const [file, count] of Object.entries(data.skipped)) {
    host.append(el('p', { class: 'note' }, file.endsWith('.jsonl')
      ? `${file}: ${count} unreadable ${count > 1 ? 'lines were' : 'line was'} left out.`
      : `${file} could not be read.`));
  }
}

function addChanges(host) {
  if (!data.changes.length) {
    host.append(el('p', { class: 'note' }, 'No evaluation has been logged yet.'));
    return;
  }
  const staged = data.changes.some((c) => c.middle !== null);
  const stage = data.stages[data.stages.length - 1].title;
  const signed = (v) => (v > 0 ? '+' : v < 0 ? '−' : '') + fixed(Math.abs(v));
  const fixed = (v) => (v === null ? '–' : Math.abs(v) < 100 ? v.toFixed(3) : number(v)).replace('-', '−');
  const heads = [`Metric${sharedSplit() && `, ${sharedSplit().slice(0, -1)}`}`, 'Before', ...(staged ? [`${stage} begins`] : []), 'After', 'Change',
    ...(staged ? [`of it in ${stage}`] : []), 'Course'];
  const rows = data.changes.map((c) => {
    const cells = [c.before, ...(staged ? [c.middle] : []), c.after].map(fixed);
    cells.push(c.after === null ? '–' : signed(c.after - c.before));
    if (staged) cells.push(c.middle === null ? '–' : signed(c.after - c.middle));
    const { x, y } = overStages(`eval/${c.name}`);
    return el('tr', { class: lastName(c.name) === leadMetric() ? 'lead' : '' },
      el('th', { scope: 'row' }, shortName(c.name)), ...cells.map((text) => el('td', {}, text)),
      el('td', {}, sparkline(x, y)));
  });
  host.append(el('div', { class: 'scroll' }, el('table', { class: 'changes' },
    el('thead', {}, el('tr', {}, ...heads.map((h) => el('th', { scope: 'col' }, h)))),
    el('tbody', {}, ...rows))));
}

/** A chart of one metric of one stage; curves with many points also get a smoothed line. */
function metricChart(host, stage, key, { tall = false, smoothed = false } = {}) {
  const [x, y] = stage.series[key] || [[], []];
  const series = [{ name: TITLES[key] || key, x, y }];
  if (smoothed && x.length >= 20) {
    const span = Math.max(5, Math.round(x.length / 20));
    series[0] = { ...series[0], name: 'logged', style: 'faint' };
    series.push({ name: `smoothed (EMA, span ${span})`, style: 'strong', x, y: smooth(y, span) });
  }
  addChart(host, { title: TITLES[key] || key, key: key in TITLES ? key : '', tall, series,
    offset: stage.offset });
}

/** Rollout, reward and update as shares of their sum. */
function timeChart(host, stage) {
  const columns = TIMES.map((key) => stage.series[key]).filter(Boolean);
  if (columns.length < 2) return;
  const sums = new Map();
  for (const [x, y] of columns) x.forEach((s, i) => sums.set(s, (sums.get(s) || 0) + (y[i] || 0)));
  addChart(host, {
    title: 'Share of step time', key: 'time/…', range: [0, 1], offset: stage.offset,
    series: TIMES.filter((key) => stage.series[key]).map((key) => {
      const [x, y] = stage.series[key];
      return { name: key.slice(5), x, y: y.map((v, i) => (v === null ? null : v / (sums.get(x[i]) || 1))) };
    }),
  });
}

function addCurves(host) {
  const main = el('div', { class: 'charts wide' });
  const rl = data.stages[data.stages.length - 1];
  const lead = leadMetric();
  evalChart(main, lead, lead === 'solved' ? 'Solve rate' : `Evaluation: ${lead}`, true);
  if (rl) MAIN.forEach((key) => metricChart(main, rl, key, { tall: true, smoothed: true }));
  if (main.childElementCount) host.append(section('curves', 'Learning curves', main));
}

function addDetails(host) {
  for (const stage of [...data.stages].reverse()) {
    const grid = el('div', { class: 'charts' });
    SMALL.forEach((key) => metricChart(grid, stage, key));
    timeChart(grid, stage);
    const shown = new Set([...MAIN, ...SMALL, ...TIMES]);
    const others = Object.keys(stage.series).filter((k) => !shown.has(k) && !k.startsWith('eval/'));
    const rest = el('div', { class: 'charts' });
    others.sort().forEach((key) => metricChart(rest, stage, key));
    if (!grid.childElementCount && !rest.childElementCount) continue;
    host.append(section(`stage-${data.stages.indexOf(stage)}`, `Optimisation: ${stage.title}`,
      grid, rest.childElementCount ? el('details', {},
        el('summary', {}, `All other metrics (${rest.childElementCount})`), rest) : ''));
  }
  const rest = el('div', { class: 'charts' });
  metricNames().filter((m) => m !== leadMetric()).forEach((m) => evalChart(rest, m, `Evaluation: ${m}`, false));
  if (rest.childElementCount) host.append(section('evaluation', 'Other evaluation metrics', rest));
}

function addConfig(host) {
  const lines = [];
  const walk = (value, path) => {
    if (value && typeof value === 'object' && !Array.isArray(value) && Object.keys(value).length) {
      Object.entries(value).forEach(([key, item]) => walk(item, path ? `${path}.${key}` : key));
    } else lines.push([path, JSON.stringify(value)]);
  };
  if (data.config) walk(data.config, '');
  const table = (rows) => el('div', { class: 'scroll' }, el('table', { class: 'config' }, el('tbody', {},
    ...rows.map(([key, value]) => el('tr', {}, el('th', { scope: 'row' }, key), el('td', {}, value))))));
  host.append(section('config', 'What exactly ran',
    el('details', {}, el('summary', {}, 'Resolved configuration'),
      lines.length ? table(lines) : el('p', { class: 'note' }, 'config.json is missing.')),
    data.packages ? el('details', {}, el('summary', {}, 'Packages'),
      table(Object.entries(data.packages).map(([k, v]) => [k, String(v)]))) : '',
    el('p', { class: 'note' }, 'Git commit: ', el('code', {}, data.git ? String(data.git) : 'not recorded'))));
}

const page = document.getElementById('page');
const main = el('main', {});
addHeadline(page);
page.append(main);
addChanges(main.appendChild(section('changes', 'Before and after')));
addCurves(main);
addViewer(main.appendChild(section('traces', 'Denoising, step by step')));
addDetails(main);
addConfig(main);
