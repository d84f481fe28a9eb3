// The denoising view of the report: held-out completions, before and after, step by step.
// One script with report.js, which has `data`, `el`, `number` and `select`.
'use strict';

const GIVEN = -1;
const INJECTED = -2;

/** Sorts "before" first, "step N" by N, "after" last. */
function whenRank(when) {
  if (when === 'before') return -1;
  return when.startsWith('step ') ? Number(when.slice(5)) : Infinity;
}

/** How position i came to be, in words. */
function origin(row, i) {
  const step = row.reveal_step[i];
  if (step === GIVEN) return 'given by the template';
  if (step === INJECTED) return 'injected';
  if (step >= row.steps) return 'never filled';
  return `filled at step ${step + 1} of ${row.steps}`;
}

function verdict(row, i) {
  return { true: 'right', false: 'wrong' }[row.correct[i]] || '';
}

const sampled = (row, i) => row.reveal_step[i] >= 0 && row.reveal_step[i] < row.steps;
const probability = (row, i) => (row.log_prob[i] === null ? null : Math.exp(row.log_prob[i]));

/** A token as it can be seen: line breaks and empty tokens get a sign. */
function visible(token) {
  return String(token).replaceAll('\n', '↵') || '∅';
}

function place(row, i) {
  if (!isGrid(row)) return `position ${i + 1}`;
  return `row ${Math.floor(i / row.grid[1]) + 1}, column ${(i % row.grid[1]) + 1}`;
}

function isGrid(row) {
  return Array.isArray(row.grid) && row.grid[0] * row.grid[1] === row.tokens.length;
}

/** One position. Its looks after t steps are set by `showCell`. */
function makeCell(row, i) {
  const node = el('span', { class: 'cell' },
    el('span', { class: 'token' }), el('span', { class: 'mark' }), el('span', { class: 'bar' }));
  if (sampled(row, i)) {
    node.style.setProperty('--t', row.steps > 1 ? row.reveal_step[i] / (row.steps - 1) : 1);
    node.style.setProperty('--p', probability(row, i) ?? 0);
  }
  if (isGrid(row)) {
    const [height, width] = row.grid;
    if (i % width % Math.sqrt(width) === 0) node.classList.add('box-left');
    if (Math.floor(i / width) % Math.sqrt(height) === 0) node.classList.add('box-top');
    if (sampled(row, i)) node.prepend(el('span', { class: 'order' }, String(row.reveal_step[i] + 1)));
  }
  return node;
}

function showCell(node, row, i, t) {
  const step = row.reveal_step[i];
  const filled = sampled(row, i) && step < t;
  const known = filled || step < 0;
  node.classList.toggle('revealed', known);
  node.classList.toggle('filled', filled);
  node.classList.toggle('fresh', filled && step === t - 1);
  node.classList.toggle('given', step === GIVEN);
  node.classList.toggle('injected', step === INJECTED);
  node.querySelector('.token').textContent = known ? visible(row.tokens[i]) : '·';
  const said = filled ? verdict(row, i) : '';
  node.querySelector('.mark').textContent = { right: '✓', wrong: '✗' }[said] || '';
  node.classList.toggle('wrong', said === 'wrong');
}

/** The lines of a cell's tooltip after t steps. */
function explain(row, i, t) {
  if (sampled(row, i) && row.reveal_step[i] >= t) return [place(row, i), 'still masked'];
  if (!sampled(row, i)) return [place(row, i), origin(row, i)];
  return [
    `${place(row, i)}: ${visible(row.tokens[i])} ${verdict(row, i)}`, origin(row, i),
    `probability ${number(probability(row, i))}`, `entropy ${number(row.entropy[i])} nats`,
  ];
}

/** All positions as a table: the exact values, for reading without a pointer. */
function positionTable(row) {
  const heads = ['Position', 'Token', 'Origin', 'Probability', 'Entropy (nats)', ''];
  const rows = row.tokens.map((token, i) => [
    place(row, i), sampled(row, i) || row.reveal_step[i] < 0 ? visible(token) : '·', origin(row, i),
    sampled(row, i) ? number(probability(row, i)) : '', sampled(row, i) ? number(row.entropy[i]) : '',
    sampled(row, i) ? verdict(row, i) : '',
  ]);
  return el('div', { class: 'scroll' }, el('table', {},
    el('thead', {}, el('tr', {}, ...heads.map((h) => el('th', { scope: 'col' }, h)))),
    el('tbody', {}, ...rows.map((cells) => el('tr', {}, ...cells.map((c) => el('td', {}, c)))))));
}

/** One trajectory; `show(t)` brings it to the state after t steps. */
function makeBoard(row, name, tip) {
  const cells = row.tokens.map((_, i) => makeCell(row, i));
  const board = el('div', { class: isGrid(row) ? 'board grid' : 'board text', role: 'img' });
  if (isGrid(row)) board.style.setProperty('--columns', row.grid[1]);
  cells.forEach((node, i) => {
    const breaks = isGrid(row) ? -1 : String(row.tokens[i]).indexOf('\n');
    board.append(breaks === 0 ? el('br') : '', node, breaks > 0 ? el('br') : '');
    if (isGrid(row)) return;
    // A mask is as wide as its token, so that the text stands still while it is filled.
    node.style.minWidth = `min(100%, ${visible(row.tokens[i]).length}ch)`;
  });
  const status = el('p', { class: 'status' });
  const scores = Object.entries({ reward: row.reward, ...row.metrics })
    .map(([key, value]) => `${key} ${number(value)}`).join(' · ');
  let now = 0;

  function show(t) {
    now = Math.min(t, row.steps);
    cells.forEach((node, i) => showCell(node, row, i, now));
    const free = row.tokens.map((_, i) => i).filter((i) => row.reveal_step[i] >= 0);
    const done = free.filter((i) => sampled(row, i) && row.reveal_step[i] < now);
    const right = done.filter((i) => row.correct[i] === true).length;
    const wrong = done.filter((i) => row.correct[i] === false).length;
    const judged = right + wrong ? ` · ${right} right, ${wrong} wrong` : '';
    status.textContent = `${done.length} of ${free.length} filled${judged}`;
    board.setAttribute('aria-label', `${name}, after step ${now}: ${status.textContent}`);
  }

  const cellAt = (event) => cells.indexOf(event.target.closest('.cell'));
  board.addEventListener('pointermove', (event) => {
    const i = cellAt(event);
    if (i < 0) tip.hide(); else tip.show(explain(row, i, now), cells[i]);
  });
  board.addEventListener('pointerleave', tip.hide);
  const panel = el('div', {}, board, status, el('p', { class: 'scores' }, scores),
    el('details', {}, el('summary', {}, 'Every position'), positionTable(row)));
  return { panel, show };
}

/** The one tooltip of the view. */
function makeTip() {
  const node = el('div', { class: 'tip', role: 'tooltip', hidden: '' });
  document.body.append(node);
  return {
    show(lines, anchor) {
      node.replaceChildren(...lines.map((line) => el('div', {}, line)));
      node.hidden = false;
      const box = anchor.getBoundingClientRect();
      const left = Math.min(box.left + scrollX, scrollX + innerWidth - node.offsetWidth - 24);
      node.style.left = `${Math.max(left, 8)}px`;
      node.style.top = `${box.bottom + scrollY + 6}px`;
    },
    hide() { node.hidden = true; },
  };
}

/** The whole section: choice of board, scrub bar, two panels. */
function addBoards(host) {
  if (!data.boards.length) {
    host.append(el('p', { class: 'note' }, 'No trajectories have been recorded yet.'));
    return;
  }
  const tip = makeTip();
  const settings = [...new Set(data.boards.map((row) => row.setting))];
  const of = (setting, id) => data.boards
    .filter((row) => row.setting === setting && row.id === id)
    .sort((a, b) => whenRank(a.when) - whenRank(b.when));
  const ids = (setting) => [...new Set(
    data.boards.filter((row) => row.setting === setting).map((row) => row.id))];

  const setting = select('Setting', settings, choosePlace);
  const board = select('Board', [], build);
  const bar = el('input', { type: 'range', id: 'scrub', min: 0, max: 1, value: 0, step: 1 });
  const play = el('button', { type: 'button', id: 'play' }, 'Play');
  const clock = el('output', { for: 'scrub' });
  const panels = el('div', { class: 'panels', tabindex: 0, role: 'group',
    'aria-label': 'Boards; left and right arrow keys move through the denoising steps' });
  const bench = el('div', { class: 'bench' }, panels, legend());
  const prompt = el('pre', {});
  let shown = [];
  let timer = null;

  function go(t) {
    bar.value = t;
    clock.textContent = `after step ${bar.value} of ${bar.max}`;
    bar.setAttribute('aria-valuetext', clock.textContent);
    shown.forEach((item) => item.show(Number(bar.value)));
    tip.hide();
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = 'Play';
  }

  function toggle() {
    if (timer) { stop(); return; }
    const steps = Number(bar.max);
    if (Number(bar.value) === steps) go(0);
    play.textContent = 'Pause';
    timer = setInterval(() => {
      go(Number(bar.value) + 1);
      if (Number(bar.value) === steps) stop();
    }, Math.min(700, Math.max(60, 8000 / steps)));
  }

  /** A panel whose heading chooses the moment of training, if there are more than two. */
  function panel(rows, first, slot) {
    const body = el('div', {});
    const fill = (i) => {
      const made = makeBoard(rows[i], rows[i].when, tip);
      body.replaceChildren(made.panel);
      shown[slot] = made;
      go(Number(bar.value));
    };
    const head = rows.length > 2
      ? select('Shown', rows.map((row) => row.when), (i) => fill(i), first).label
      : el('h3', {}, rows[first].when === 'before' ? 'Before training'
        : rows[first].when === 'after' ? 'After training' : rows[first].when);
    panels.append(el('div', { class: 'panel' }, head, body));
    fill(first);
  }

  function build() {
    stop();
    const name = settings[setting.node.selectedIndex];
    const rows = of(name, ids(name)[board.node.selectedIndex]);
    bar.max = Math.max(...rows.map((row) => row.steps));
    bar.value = bar.max;
    shown = [];
    panels.replaceChildren();
    bench.classList.toggle('wide', !rows.every(isGrid));
    panel(rows, 0, 0);
    if (rows.length > 1) panel(rows, rows.length - 1, 1);
    prompt.textContent = rows[0].prompt ?? '';
    document.getElementById('legend-steps').textContent = bar.max;
  }

  /** Offers the boards of the chosen setting, keeping the board where it has it. */
  function choosePlace() {
    const name = settings[setting.node.selectedIndex];
    const labels = ids(name).map((id) => {
      const sign = ({ metrics }) => ({ 1: '✓', 0: '✗' }[metrics?.solved ?? metrics?.correct] || '');
      const rows = of(name, id);
      const ends = rows.length > 1 ? [rows[0], rows[rows.length - 1]] : rows;
      return `${id}  ${ends.map(sign).filter(Boolean).join(' → ')}`;
    });
    const kept = Math.max(0, Math.min(board.node.selectedIndex, labels.length - 1));
    board.fill(labels, kept);
    build();
  }

  bar.addEventListener('input', () => { stop(); go(bar.value); });
  play.addEventListener('click', toggle);
  panels.addEventListener('keydown', (event) => {
    if (event.target !== panels) return;
    const t = Number(bar.value);
    const target = { ArrowLeft: t - 1, ArrowRight: t + 1, Home: 0, End: Number(bar.max) }[event.key];
    if (event.key === ' ') toggle();
    else if (target === undefined) return;
    else { stop(); go(target); }
    event.preventDefault();
  });

  host.append(
    el('div', { class: 'controls' }, setting.label, board.label),
    el('div', { class: 'controls scrub' }, play,
      el('label', { class: 'grow' }, el('span', { class: 'hidden' }, 'Denoising step'), bar), clock),
    bench,
    el('details', {}, el('summary', {}, 'Prompt'), prompt));
  if (data.boards_left_out) {
    host.append(el('p', { class: 'note' }, `${data.boards_left_out} further boards are not shown.`));
  }
  choosePlace();
}

function legend() {
  const item = (sample, text) => el('span', {}, sample, text);
  const sample = (name, text) => el('span', { class: `cell sample ${name}`, 'aria-hidden': 'true' },
    el('span', { class: 'token' }, text));
  return el('div', { class: 'key' },
    item(sample('', '·'), 'masked'), item(sample('revealed given', '1'), 'given'),
    data.boards.some((row) => row.reveal_step.includes(INJECTED))
      ? item(sample('revealed injected', '1'), 'injected') : '',
    el('span', {}, 'filled at step 1', el('span', { class: 'ramp', 'aria-hidden': 'true' }),
      el('span', { id: 'legend-steps' })),
    el('span', {}, el('b', { class: 'right' }, '✓'), 'right'),
    el('span', {}, el('b', { class: 'wrong' }, '✗'), 'wrong'),
    el('span', {}, el('span', { class: 'bar-sample', 'aria-hidden': 'true' }),
      'bar: probability of the token when it was filled'));
}
