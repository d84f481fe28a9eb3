// What every page shares: its data, elements, numbers, controls, theme. All text from a run or a
// model enters through text nodes or attributes that hold no markup, never as HTML.
'use strict';

const data = JSON.parse(document.getElementById('data').textContent);
// Taken from the parsed document, so that the page holds no address at all.
const SVG = new DOMParser().parseFromString('<svg></svg>', 'text/html').body.firstChild.namespaceURI;

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== ''));
  return node;
}

const el = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

/** A value to six significant digits; a dash for one that is missing or not finite. */
function number(value) {
  if (value === null || value === undefined) return '–';
  if (typeof value !== 'number') return String(value);
  if (Number.isInteger(value)) return value.toLocaleString('en').replace('-', '−');
  const size = Math.abs(value);
  const text = size < 1e-3 || size >= 1e7 ? Number(value.toPrecision(6)).toExponential() : String(Number(value.toPrecision(6)));
  return text.replace('-', '−').replace('e+', 'e');
}

/** A labelled select; `fill` replaces its options, `change` receives the chosen index. */
function select(text, labels, change, chosen = 0, labelClass = '') {
  const node = el('select', {});
  const put = (names, index) => {
    node.replaceChildren(...names.map((name) => el('option', {}, name)));
    node.selectedIndex = index;
  };
  put(labels, chosen);
  node.addEventListener('change', () => change(node.selectedIndex));
  return { node, fill: put, label: el('label', {}, el('span', { class: labelClass }, text), node) };
}

function section(id, title, ...children) {
  return el('section', { id, 'aria-labelledby': `${id}-title` },
    el('h2', { id: `${id}-title` }, title), ...children);
}

/** Light or dark: the system's choice until the button is pressed. */
function setTheme(button) {
  const root = document.documentElement;
  const system = matchMedia('(prefers-color-scheme: dark)');
  const dark = () => (root.dataset.theme || (system.matches ? 'dark' : 'light')) === 'dark';
  const name = () => { button.textContent = dark() ? 'Light theme' : 'Dark theme'; };
  button.addEventListener('click', () => {
    root.dataset.theme = dark() ? 'light' : 'dark';
    name();
  });
  system.addEventListener('change', name);
  name();
}

/** The line above the title with the theme's button, and the title. */
function heading(kicker, title) {
  const toggle = el('button', { type: 'button', id: 'theme' }, '');
  setTheme(toggle);
  return [
    el('div', { class: 'top' }, el('span', { class: 'kicker' }, kicker), toggle),
    el('h1', {}, title),
  ];
}
