// What a trace says about each position after each denoising step. No drawing.
'use strict';

const GIVEN = -1;
const INJECTED = -2;

/**
 * For each position what it came to hold, [{step, text}] by step; text is null where a step masked
 * it again. Kept on the trace: a scrub asks often.
 */
function histories(trace) {
  if (!trace.histories) {
    const made = trace.tokens.map(() => []);
    const changes = trace.changes
      || trace.tokens.flatMap((text, i) => (filledOnce(trace, i) ? [[trace.reveal_step[i], i, text]] : []));
    for (const [step, i, text] of changes) made[i]?.push({ step, text });
    trace.histories = made;
  }
  return trace.histories;
}

const filledOnce = (trace, i) => trace.reveal_step[i] >= 0 && trace.reveal_step[i] < trace.steps;
const fixed = (trace, i) => trace.reveal_step[i] < 0;

/** Steps until the last change: a schedule that asks the model may need few of its T. */
function stepsTaken(trace) {
  const last = histories(trace).flat().reduce((most, { step }) => Math.max(most, step + 1), 0);
  return last || trace.steps;
}

/** Whether a position lies behind the end of the text and was never filled. */
const beyond = (trace, i) => (trace.length ?? Infinity) <= i && !fixed(trace, i)
  && !histories(trace)[i].length;

/**
 * Position i after t steps: its text (null: masked), the step that left it so, and whether it was
 * masked again or overwritten on the way.
 */
function stateOf(trace, i, t) {
  const past = histories(trace)[i].filter((event) => event.step < t);
  const last = past[past.length - 1];
  if (!last) {
    return { text: fixed(trace, i) ? trace.tokens[i] : null, step: null, remasked: false, edited: false };
  }
  const texts = [...(fixed(trace, i) ? [trace.tokens[i]] : []), ...past.map((event) => event.text)];
  return {
    text: last.text, step: last.step,
    remasked: last.text === null,
    edited: last.text !== null && texts.some((text) => text !== null && text !== last.text),
  };
}

/** Probability and entropy of what a position holds; null for a token that was taken back later. */
function confidence(trace, i, state) {
  const known = state.text !== null && state.step === trace.reveal_step[i];
  const logProb = known ? trace.log_prob[i] : null;
  return {
    probability: logProb === null ? null : Math.exp(logProb),
    entropy: known ? trace.entropy[i] : null,
  };
}

/** 'right' or 'wrong' for a filled position whose right token is known, else ''. */
function verdict(trace, i, text) {
  const wanted = trace.answer?.[i] ?? null;
  if (wanted === null || text === null || fixed(trace, i)) return '';
  return text === wanted ? 'right' : 'wrong';
}

/** The first step that filled in a wrong token, with its position; null if none did. */
function firstWrong(trace) {
  let found = null;
  histories(trace).forEach((events, position) => {
    for (const { step, text } of events) {
      if (verdict(trace, position, text) === 'wrong' && !(found && found.step <= step)) found = { step, position };
    }
  });
  return found;
}

/** Steps that masked a token again or put another in its place. */
function revisions(trace) {
  const steps = new Set();
  histories(trace).forEach((events) => events.forEach(({ step, text }, n) => {
    if (text === null || (n && events[n - 1].text !== null)) steps.add(step);
  }));
  return [...steps];
}

const isGrid = (trace) => Array.isArray(trace.grid) && trace.grid[0] * trace.grid[1] === trace.tokens.length;

function place(trace, i) {
  if (!isGrid(trace)) return `position ${i + 1}`;
  return `row ${Math.floor(i / trace.grid[1]) + 1}, column ${(i % trace.grid[1]) + 1}`;
}

/** A token as it can be seen: line breaks, empty tokens and characters without a shape get a sign. */
function visible(token) {
  return String(token).replaceAll('\n', '↵').replace(
    /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (c) => `⟨${c.codePointAt(0).toString(16)}⟩`) || '∅';
}

/** How position i came to be what it is after t steps, in words. */
function story(trace, i, t) {
  const state = stateOf(trace, i, t);
  const started = fixed(trace, i)
    ? [trace.reveal_step[i] === INJECTED ? 'injected' : 'given by the template'] : [];
  const events = histories(trace)[i].filter((event) => event.step < t).map(({ step, text }, n, all) => {
    if (text === null) return `masked again at step ${step + 1}`;
    const before = n ? all[n - 1].text : null;
    const token = all.length > 1 ? ` with ${visible(text)}` : '';
    return `${before === null ? 'filled' : 'overwritten'}${token} at step ${step + 1}`;
  });
  const parts = [...started, ...events];
  if (!parts.length) parts.push('masked');
  const { probability, entropy } = confidence(trace, i, state);
  const short = (value) => number(Number(value.toPrecision(3)));
  if (probability !== null) parts.push(`probability ${short(probability)}`);
  if (entropy !== null) parts.push(`entropy ${short(entropy)} nats`);
  if (state.step !== null && state.text !== null && probability === null) parts.push('probability not recorded');
  return parts.join(' · ');
}
