// One trace on the page: its tokens as a board or a text, what is said below, its branches.
'use strict';

const CONTEXT = 24;

/** What a colour can mean: a share from 0 to 1 of position i, or null where nothing is known. */
const COLOURS = [
  { name: 'order of filling', ends: (top) => ['step 1', String(top.steps)],
    share: (trace, i, state, top) => (state.step === null ? null : top.steps > 1 ? state.step / (top.steps - 1) : 1) },
  { name: 'probability when filled', ends: () => ['0', '1'],
    share: (trace, i, state) => confidence(trace, i, state).probability },
  { name: 'entropy when filled', ends: (top) => ['0', `${number(Number(top.entropy.toPrecision(3)))} nats`],
    share: (trace, i, state, top) => {
      const { entropy } = confidence(trace, i, state);
      return entropy === null ? null : top.entropy ? Math.min(1, entropy / top.entropy) : 0;
    } },
];

/** Thick lines around the boxes of a board. */
function markBoxes(node, trace, i) {
  if (!Array.isArray(trace.box)) return;
  if (i % trace.grid[1] % trace.box[1] === 0) node.classList.add('box-left');
  if (Math.floor(i / trace.grid[1]) % trace.box[0] === 0) node.classList.add('box-top');
}

/** Line breaks around a token of a text: [before it, after it]. */
function lineBreaks(token) {
  const text = String(token);
  const only = text.includes('\n') && !text.trim();
  return [!only && text.startsWith('\n'), only || (text.endsWith('\n') && !text.startsWith('\n'))];
}

/** An empty board with a cell for each position from `first` to `end`; cells[i] is undefined elsewhere. */
function makeCells(trace, label, first = 0, end = trace.tokens.length) {
  const grid = isGrid(trace);
  const board = el('div', { class: grid ? 'board grid' : 'board text', role: 'group', 'aria-label': label });
  if (grid) board.style.setProperty('--columns', trace.grid[1]);
  if (first) board.append(el('span', { class: 'beyond' }, `${first} before … `));
  const cells = trace.tokens.map((token, i) => {
    if (i < first || i >= end) return undefined;
    const node = el('span', { class: 'cell' }, el('span', { class: 'token' }));
    node.dataset.i = i;
    const [before, after] = grid ? [] : lineBreaks(token);
    board.append(before ? el('br') : '', node, after ? el('br') : '');
    if (grid) markBoxes(node, trace, i);
    // A mask is as wide as its token, so that the text stands still while it is filled.
    else node.style.minWidth = `min(100%, ${Math.min(visible(token).length, 24)}ch)`;
    return node;
  });
  const left = trace.tokens.length - end;
  if (left) board.append(el('span', { class: 'beyond' }, ` … ${left} after the end`));
  return { board, cells };
}

/** Where the part of a text ends that was ever filled: what comes after it is left out. */
function drawnLength(trace) {
  return isGrid(trace) ? trace.tokens.length : trace.tokens.findLastIndex((_, i) => !beyond(trace, i)) + 1;
}

/** Brings a cell to what its position holds after t steps. */
function showCell(node, trace, i, t, colour, top) {
  const state = stateOf(trace, i, t);
  const fresh = state.step === t - 1 && t > 0;
  // Most cells look as they did a step ago, and a long text has hundreds.
  const look = [state.step, state.text, fresh, colour.name, top.steps, top.entropy].join();
  if (node.look === look) return;
  node.look = look;
  const share = state.text === null || state.step === null ? null : colour.share(trace, i, state, top);
  const filled = state.text !== null && state.step !== null;
  const said = filled ? verdict(trace, i, state.text) : '';
  const broken = filled && i === trace.violation?.position && state.step === trace.violation.step;
  const classes = {
    revealed: state.text !== null, filled, wrong: said === 'wrong', right: said === 'right',
    fresh, remasked: state.remasked, edited: state.edited,
    given: !filled && trace.reveal_step[i] === GIVEN, injected: !filled && trace.reveal_step[i] === INJECTED,
    unknown: filled && share === null, violation: broken,
    after: (trace.length ?? Infinity) <= i,
  };
  for (const [name, on] of Object.entries(classes)) node.classList.toggle(name, Boolean(on));
  node.style.setProperty('--t', share ?? 0);
  node.style.setProperty('--p', filled ? confidence(trace, i, state).probability ?? 0 : 0);
  node.dataset.order = filled ? state.step + 1 : '';
  node.firstChild.textContent = state.text === null ? '·' : visible(state.text);
}

/** All positions as a table: the exact values, for reading without a pointer. */
function positionTable(trace) {
  const heads = ['Position', 'Token', 'What happened', ''];
  const rows = trace.tokens.map((token, i) => {
    const { text } = stateOf(trace, i, trace.steps);
    return [place(trace, i), text === null ? '·' : visible(text), story(trace, i, trace.steps), verdict(trace, i, text)];
  });
  return el('div', { class: 'scroll' }, el('table', { class: 'positions' },
    el('thead', {}, el('tr', {}, ...heads.map((h) => el('th', { scope: 'col' }, h)))),
    el('tbody', {}, ...rows.map((cells) => el('tr', {}, ...cells.map((c) => el('td', {}, c)))))));
}

/** Details that are built when they are opened for the first time. */
function lazyDetails(title, build) {
  const node = el('details', {}, el('summary', {}, title));
  node.addEventListener('toggle', () => { if (node.open && node.childElementCount === 1) node.append(build()); });
  return node;
}

/** Buttons that go to the step at which the trace first went wrong. */
function jumps(trace, go) {
  const button = (step, kind, text) => {
    const node = el('button', { type: 'button', class: `jump ${kind}` }, text);
    node.addEventListener('click', () => go(step + 1));
    return node;
  };
  const found = [];
  const wrong = firstWrong(trace);
  if (wrong) found.push(button(wrong.step, 'wrong', `✗ first wrong token at step ${wrong.step + 1}: ${place(trace, wrong.position)}`));
  if (trace.violation) {
    const { step, position, against } = trace.violation;
    const others = against.map((i) => place(trace, i)).join('; ');
    found.push(button(step, 'violation', `! first rule broken at step ${step + 1}: ${place(trace, position)}, the same as ${others}`));
  }
  return found.length ? el('p', { class: 'jumps' }, ...found) : '';
}

const signed = (value) => (value > 0 ? `+${number(value)}` : number(value));

/** One filling of a branch: the state's tokens, and what was drawn for its masks. */
function fillingBoard(trace, branch, z, label) {
  const masked = branch.state.flatMap((text, i) => (text === null ? [i] : []));
  const drawn = new Map(masked.map((i, n) => [i, n]));
  // Of a long text the part that was drawn, with a little before it.
  const first = isGrid(trace) ? 0 : Math.max(0, branch.state.indexOf(null) - CONTEXT);
  const { board, cells } = makeCells(trace, label, first, branch.lengths?.[z] ?? drawnLength(trace));
  cells.forEach((node, i) => {
    if (!node) return;
    const text = drawn.has(i) ? (z === null ? null : branch.fills[z][drawn.get(i)]) : branch.state[i];
    node.classList.add(text === null ? 'masked' : 'revealed');
    node.classList.toggle('drawn', drawn.has(i) && text !== null);
    node.classList.toggle('given', fixed(trace, i));
    const said = drawn.has(i) ? verdict(trace, i, text) : '';
    if (said) node.classList.add(said);
    node.firstChild.textContent = text === null ? '·' : visible(text);
  });
  board.classList.add('small');
  return board;
}

/** A state, its Z fillings, their rewards and advantages; best first. */
function branchView(trace, branch, go) {
  const best = branch.fills.map((_, z) => z).sort((a, b) => branch.reward[b] - branch.reward[a] || a - b);
  const show = el('button', { type: 'button', class: 'jump' }, `after step ${branch.step}`);
  show.addEventListener('click', () => go(branch.step));
  const figure = (board, ...caption) => el('figure', { class: 'filling' }, board, el('figcaption', {}, ...caption));
  return el('div', { class: 'branch' },
    el('h4', {}, 'The state ', show, `, ${branch.state.filter((text) => text === null).length} masked, and its ${branch.fills.length} fillings`),
    el('div', { class: isGrid(trace) ? 'fillings' : 'fillings long' },
      figure(fillingBoard(trace, branch, null, 'the state that was branched'), 'state'),
      ...best.map((z) => figure(fillingBoard(trace, branch, z, `filling ${z + 1}`),
        `reward ${number(branch.reward[z])}`, el('b', {
          class: branch.advantage[z] > 0 ? 'right' : branch.advantage[z] < 0 ? 'wrong' : '',
        }, `advantage ${signed(branch.advantage[z])}`)))));
}

/** One trace; `show(t)` brings it to the state after t steps, `mark(i)` puts the cursor on a token. */
function makeBoard(trace, name, view) {
  const { board, cells } = makeCells(trace, name, 0, drawnLength(trace));
  const status = el('p', { class: 'status' });
  const scores = Object.entries({ reward: trace.reward, ...trace.metrics })
    .filter(([, value]) => value !== null && value !== undefined)
    .map(([key, value]) => `${key} ${number(value)}`).join(' · ');
  const free = trace.tokens.map((_, i) => i).filter((i) => !fixed(trace, i) && cells[i]);

  function show(t) {
    const now = Math.min(t, stepsTaken(trace));
    cells.forEach((node, i) => node && showCell(node, trace, i, now, view.colour(), view.top));
    const texts = free.map((i) => stateOf(trace, i, now).text);
    const count = (said) => free.filter((i, n) => verdict(trace, i, texts[n]) === said).length;
    const [right, wrong] = [count('right'), count('wrong')];
    const judged = right + wrong ? ` · ${right} right, ${wrong} wrong` : '';
    status.textContent = `${texts.filter((text) => text !== null).length} of ${free.length} filled${judged}`;
    board.setAttribute('aria-label', `${name}, after step ${now}: ${status.textContent}`);
  }

  const branches = Array.isArray(trace.branches) ? trace.branches : [];
  const panel = el('div', {}, board, status, scores ? el('p', { class: 'scores' }, scores) : '', jumps(trace, view.go),
    ...branches.map((branch) => branchView(trace, branch, view.go)),
    lazyDetails('Every position', () => positionTable(trace)));
  return { trace, panel, board, show,
    mark: (i) => cells.forEach((node, n) => node?.classList.toggle('cursor', n === i)),
    read: (i, t) => {
      if (!(i in trace.tokens)) return 'no such position';
      const now = Math.min(t, trace.steps);
      const { text } = stateOf(trace, i, now);
      const said = { right: ' ✓ right', wrong: ' ✗ wrong' }[verdict(trace, i, text)] || '';
      const held = text === null ? '' : `${visible(text)}${said} · `;
      return `${place(trace, i)}: ${held}${story(trace, i, now)}`;
    } };
}
