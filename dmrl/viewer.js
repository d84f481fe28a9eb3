// The viewer of traces: choose a prompt, scrub through the denoising steps, compare two traces.
// One script with page.js, viewer_trace.js and viewer_board.js; `addViewer` is the way in.
'use strict';

const KEYS = '← → move a step, Home and End to either end, Space plays; Shift with an arrow moves '
  + 'to another token; n and p, the next and previous prompt';

/** Sorts "before" first, "step N" by N, "after" last; other names stay as they came. */
function whenRank(when) {
  if (when === 'before') return -1;
  return when.startsWith('step ') ? Number(when.slice(5)) : Infinity;
}

const TITLES_OF_WHEN = { before: 'Before training', after: 'After training' };
const whenTitle = (when) => TITLES_OF_WHEN[when] || when;

/** Solved or not: a sign for each trace, of a training for its two ends. */
function verdicts(traces) {
  const sign = ({ metrics }) => ({ 1: '✓', 0: '✗' }[metrics?.solved ?? metrics?.correct] || '');
  if (traces[0].when !== 'before') return traces.map(sign).join('');
  const ends = traces.length > 1 ? [traces[0], traces[traces.length - 1]] : traces;
  return ends.map(sign).filter(Boolean).join(' → ');
}

/** The view in `host`; keys are heard where `keys` has the focus. */
function addViewer(host, keys = host) {
  if (!data.traces.length) {
    host.append(el('p', { class: 'note' }, 'No traces have been recorded yet.'));
    return;
  }
  const settings = [...new Set(data.traces.map((trace) => trace.setting))];
  const ids = (setting) => [...new Set(data.traces.filter((trace) => trace.setting === setting).map((trace) => trace.id))];
  const of = (setting, id) => data.traces
    .filter((trace) => trace.setting === setting && trace.id === id)
    .sort((a, b) => (whenRank(a.when) === whenRank(b.when) ? 0 : whenRank(a.when) - whenRank(b.when)));

  const setting = select('Decoding', settings, () => choosePlace());
  const prompt = select('Prompt', [], () => build());
  const colour = select('Colour', COLOURS.map((c) => c.name), () => { explain(); go(now()); });
  const bar = el('input', { type: 'range', id: 'scrub', min: 0, max: 1, value: 0, step: 1 });
  const marks = el('div', { class: 'marks', 'aria-hidden': 'true' });
  const play = el('button', { type: 'button', id: 'play' }, 'Play');
  const clock = el('output', { for: 'scrub' });
  const reading = el('div', { class: 'reading', 'aria-live': 'polite' });
  const panels = el('div', { class: 'panels' });
  const key = el('div', { class: 'key' });
  const scale = el('span', { class: 'scale' });
  const bench = el('div', { class: 'bench' }, panels, key);
  const asked = el('pre', {});
  const view = { go: (t) => { stop(); go(t); }, colour: () => COLOURS[colour.node.selectedIndex], top: {} };
  const now = () => Number(bar.value);
  let shown = [];
  let timer = null;
  let cursor = null;
  let hovered = null;

  function go(t) {
    bar.value = t;
    clock.textContent = `after step ${bar.value} of ${bar.max}`;
    bar.setAttribute('aria-valuetext', clock.textContent);
    shown.forEach((item) => item.show(now()));
    read();
  }

  /** What is known about the token under the pointer, or else under the cursor. */
  function read() {
    const i = hovered ?? cursor;
    shown.forEach((item) => item.mark(i));
    reading.replaceChildren(...(i === null ? [el('p', {}, 'Point at a token, or tap it, to read what happened there.')]
      : shown.map((item) => el('p', {}, el('b', {}, shown.length > 1 ? `${whenTitle(item.trace.when)} ` : ''), item.read(i, now())))));
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = 'Play';
  }

  function toggle() {
    if (timer) { stop(); return; }
    const steps = Number(bar.max);
    if (now() === steps) go(0);
    play.textContent = 'Pause';
    timer = setInterval(() => {
      go(now() + 1);
      if (now() === steps) stop();
    }, Math.min(700, Math.max(60, 8000 / steps)));
  }

  /** Marks on the scrub bar: first violations, branched states, steps that took tokens back. */
  function drawMarks() {
    const at = (kind, t) => {
      const node = el('span', { class: `at ${kind}` });
      node.style.setProperty('--at', t / Number(bar.max));
      return node;
    };
    marks.replaceChildren(...shown.flatMap(({ trace }) => [
      ...revisions(trace).map((step) => at('revision', step + 1)),
      ...(trace.branches || []).map((branch) => at('branching', branch.step)),
      ...(trace.violation ? [at('violation', trace.violation.step + 1)] : []),
    ]));
  }

  function explain() {
    const [low, high] = view.colour().ends(view.top);
    scale.replaceChildren(low, el('span', { class: 'ramp', 'aria-hidden': 'true' }), high);
    key.replaceChildren(...legend(shown.map((item) => item.trace)));
  }

  /** A panel whose heading chooses which trace it shows, if there are more than two. */
  function panel(traces, first, slot) {
    const body = el('div', {});
    const here = settings[setting.node.selectedIndex];
    const title = (trace) => (trace.setting === here ? whenTitle(trace.when) : `${whenTitle(trace.when)}, ${trace.setting}`);
    const put = (i) => {
      shown[slot] = makeBoard(traces[i], title(traces[i]), view);
      body.replaceChildren(shown[slot].panel);
    };
    const head = traces.length > 2
      ? select('Shown', traces.map(title), (i) => { put(i); settle(); }, first, 'hidden').label
      : el('h3', {}, title(traces[first]));
    panels.append(el('div', { class: 'panel' }, head, body));
    put(first);
  }

  /** After a change of what is shown: the bar, its marks and the legend. */
  function settle() {
    const traces = shown.map((item) => item.trace);
    const before = now() === Number(bar.max) ? Infinity : now();
    bar.max = Math.max(...traces.map(stepsTaken));
    const entropies = traces.flatMap((trace) => trace.entropy.filter((value) => value !== null));
    Object.assign(view.top, { steps: Number(bar.max), entropy: entropies.reduce((a, b) => Math.max(a, b), 0) });
    bench.classList.toggle('wide', !traces.every(isGrid));
    drawMarks();
    explain();
    go(Math.min(before, Number(bar.max)));
  }

  function build() {
    stop();
    const name = settings[setting.node.selectedIndex];
    const id = ids(name)[prompt.node.selectedIndex];
    const own = of(name, id);
    const { split } = own[0];
    const others = settings.filter((s) => s !== name).flatMap((s) => of(s, id)).filter((trace) => trace.split === split);
    const traces = [...own, ...others];
    shown = [];
    cursor = null;
    hovered = null;
    panels.replaceChildren();
    panel(traces, 0, 0);
    if (traces.length > 1) panel(traces, own.length > 1 ? own.length - 1 : 1, 1);
    asked.textContent = own[0].prompt ?? '';
    promptDetails.hidden = !asked.textContent;
    bar.value = bar.max;
    settle();
  }

  /** Offers the prompts of the chosen setting, keeping the one that is shown where it has it. */
  function choosePlace() {
    const name = settings[setting.node.selectedIndex];
    const labels = ids(name).map((id) => {
      const traces = of(name, id);
      const start = visible(traces[0].prompt ?? '').slice(0, 32);
      return [id, verdicts(traces), traces[0].prompt ? start : ''].filter(Boolean).join('  ');
    });
    prompt.fill(labels, Math.max(0, Math.min(prompt.node.selectedIndex, labels.length - 1)));
    build();
  }

  function turn(by) {
    const next = prompt.node.selectedIndex + by;
    if (next < 0 || next >= prompt.node.length) return;
    prompt.node.selectedIndex = next;
    build();
  }

  /** Moves the cursor to another token; on a board up and down move a row. */
  function moveCursor(name) {
    const { trace } = shown[0];
    const row = isGrid(trace) ? trace.grid[1] : 1;
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row }[name];
    const next = cursor === null ? 0 : cursor + by;
    if (next in trace.tokens) cursor = next;
    hovered = null;
    read();
  }

  function press(event) {
    const on = event.target.tagName;
    if (on === 'SELECT' || event.ctrlKey || event.altKey || event.metaKey) return;
    const arrow = event.key.startsWith('Arrow');
    const target = { ArrowLeft: now() - 1, ArrowRight: now() + 1, Home: 0, End: Number(bar.max) }[event.key];
    if (arrow && event.shiftKey) moveCursor(event.key);
    else if (event.key === ' ' && on !== 'BUTTON' && on !== 'SUMMARY') toggle();
    else if (event.key === 'n' || event.key === 'p') turn(event.key === 'n' ? 1 : -1);
    else if (target !== undefined) view.go(target);
    else return;
    event.preventDefault();
  }

  const cellAt = (event) => {
    const cell = event.target.closest('.panel > div > div > .board .cell');
    return cell ? Number(cell.dataset.i) : null;
  };
  const hover = (i) => { if (i !== hovered) { hovered = i; read(); } };
  panels.addEventListener('pointermove', (event) => { if (event.pointerType !== 'touch') hover(cellAt(event)); });
  panels.addEventListener('pointerleave', () => hover(null));
  panels.addEventListener('click', (event) => {
    if (cellAt(event) === null) return;
    cursor = cellAt(event);
    read();
  });
  bar.addEventListener('input', () => view.go(bar.value));
  play.addEventListener('click', toggle);
  keys.addEventListener('keydown', press);

  const promptDetails = el('details', { class: 'asked' }, el('summary', {}, 'Prompt'), asked);
  host.append(
    el('div', { class: 'controls' }, ...(settings.length > 1 ? [setting.label] : []), prompt.label,
      el('span', { class: 'scaled' }, colour.label, scale)),
    promptDetails, bench,
    el('div', { class: 'dock', tabindex: 0, role: 'group', 'aria-label': `Denoising steps. ${KEYS}` },
      el('div', { class: 'controls scrub' }, play,
        el('label', { class: 'grow' }, el('span', { class: 'hidden' }, 'Denoising step'), el('span', { class: 'rail' }, bar, marks)), clock),
      reading),
    el('p', { class: 'note keys' }, `Keys: ${KEYS}.`));
  if (data.left_out) {
    host.append(el('p', { class: 'note' }, `${data.left_out} further prompts are not shown.`));
  }
  choosePlace();
}

/** What the signs on these traces mean, without those that none of them has. */
function legend(traces) {
  const item = (sign, text) => el('span', {}, sign, text);
  const sample = (name, text) => el('span', { class: `cell sample ${name}`, 'aria-hidden': 'true' }, el('span', { class: 'token' }, text));
  const some = (test) => traces.some((trace) => trace.tokens.some((_, i) => test(trace, i)));
  const judged = some((trace, i) => (trace.answer?.[i] ?? null) !== null && !fixed(trace, i));
  const edited = some((trace, i) => stateOf(trace, i, trace.steps).edited);
  return [
    item(sample('', '·'), 'masked'),
    ...(some((trace, i) => trace.reveal_step[i] === GIVEN) ? [item(sample('revealed given', '1'), 'given')] : []),
    ...(some((trace, i) => trace.reveal_step[i] === INJECTED) ? [item(sample('revealed injected', '1'), 'injected')] : []),
    ...(some((trace, i) => histories(trace)[i].some(({ text }) => text === null)) ? [item(sample('remasked', '·'), 'masked again')] : []),
    ...(edited ? [item(sample('revealed filled edited', '1'), 'held another token before')] : []),
    ...(judged ? [el('span', {}, el('b', { class: 'right' }, '✓'), 'right'), el('span', {}, el('b', { class: 'wrong' }, '✗'), 'wrong')] : []),
    ...(traces.some((trace) => trace.violation) ? [item(sample('revealed filled violation', '1'), 'first token that breaks a rule')] : []),
    el('span', {}, el('span', { class: 'bar-sample', 'aria-hidden': 'true' }), 'bar: probability of the token when it was filled'),
  ];
}
