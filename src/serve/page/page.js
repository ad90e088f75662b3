// One question to the four modes at once; everything shown comes from the server's own answers.

const MODES = [
  { mode: 'receiver', model: 'receiver', name: 'Receiver', how: 'answers alone' },
  { mode: 'sharer', model: 'sharer', name: 'Sharer', how: 'answers alone' },
  { mode: 't2t', model: 'receiver+sharer', name: 'Text-to-text', how: 'the Sharer writes, the Receiver reads' },
  { mode: 'c2c', model: 'receiver+sharer', name: 'C2C', how: 'the Receiver reads the Sharer’s cache' },
];

// Class, name, milliseconds out of an answer's timings. All but decoding lie before the first token.
const PHASES = [
  ['tokenise', 'tokenise', t => (t.tokenize ?? 0) + (t.align ?? 0)],
  ['sharer', 'Sharer reads', t => t.sharer_prefill],
  ['receiver', 'Receiver reads', t => t.receiver_prefill],
  ['fuse', 'fuse', t => t.fuse],
  ['wait', 'to first token', (t, before) => (t.first_token ?? 0) - before],
  ['decode', 'decode', t => t.decode],
];

// From the questions that the built-in pair's fuser has not seen.
const EXAMPLES = {
  Grenoble: 'In which country is Grenoble: A Spain, B Poland, C Greece, D France?',
  Dresden: 'In which country is Dresden: A Germany, B Portugal, C Italy, D Brazil?',
  Botswana: 'On which continent is Botswana: A Asia, B Africa, C Europe, D Oceania?',
  gecko: 'What kind of animal is the gecko: A bird, B fish, C reptile, D insect?',
};

const $ = id => document.getElementById(id);

/// An element with properties and children; `class` and `aria-…` are attributes.
function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === 'class' || name.includes('-') || name === 'role' || name === 'scope') node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

const plural = (n, what) => `${n} ${what}${n === 1 ? '' : 's'}`;
const ms = t => `${t >= 100 ? t.toFixed(0) : t.toFixed(1)} ms`;
const bytes = n => n < 1e3 ? plural(n, 'byte') : n < 1e6 ? `${(n / 1e3).toFixed(1)} kB` : `${(n / 1e6).toFixed(1)} MB`;

// ---- Asking ----------------------------------------------------------------------------------------------------------------

const form = $('ask');
const columns = MODES.map(column);
let running = null;

function column(of) {
  const answer = h('p', { class: 'answer' });
  const costs = h('div');
  const node = h('article', { id: of.mode, 'aria-label': of.name },
    h('header', {}, h('h2', {}, of.name), h('p', {}, of.how)), answer, costs);
  $('answers').append(node);
  return { ...of, node, answer, costs, spent: 0 };
}

function request({ mode, model }, salt) {
  const field = name => form.elements[name].value.trim();
  const messages = [{ role: 'user', content: $('question').value }];
  if (field('system')) messages.unshift({ role: 'system', content: field('system') });
  const c2c = { mode };
  if (mode === 'c2c') {
    Object.assign(c2c, { gates: field('gates'), alignment: field('alignment'), details: true });
    if (field('fraction') !== '1') c2c.fraction = field('fraction');
  }
  return {
    // With a salt of its own nothing is found cached: times can be compared.
    model, messages, c2c, cache_salt: salt, stream: true, stream_options: { include_usage: true },
    max_tokens: +field('max_tokens'), temperature: +field('temperature'), seed: +field('seed'),
  };
}

function post(body, signal) {
  const headers = { 'Content-Type': 'application/json' };
  const key = form.elements.key.value;
  if (key) headers.Authorization = `Bearer ${key}`;
  return fetch('v1/chat/completions', { method: 'POST', headers, body: JSON.stringify(body), signal });
}

/// The objects of an event stream. One that ends without [DONE] was cut off.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error('the server broke off before the answer was complete');
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith('data:') ? line.slice(5).trim() : '';
      if (data === '[DONE]') return;
      if (data) yield JSON.parse(data);
    }
  }
}

async function run(column, salt, signal) {
  column.node.setAttribute('aria-busy', 'true');
  const result = { usage: null, c2c: null, finish: null };
  try {
    const response = await post(request(column, salt), signal);
    if (!response.ok) {
      const said = await response.json().catch(() => null);
      throw new Error(said?.error?.message ?? `the server answered ${response.status} ${response.statusText}`);
    }
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      column.answer.append(event.choices?.[0]?.delta?.content ?? '');
      result.finish = event.choices?.[0]?.finish_reason ?? result.finish;
      result.usage = event.usage ?? result.usage;
      result.c2c = event.c2c ?? result.c2c;
    }
    $('said').textContent = `${column.name}: ${column.answer.textContent}`;
  } catch (error) {
    const unreachable = error instanceof TypeError ? 'the server cannot be reached' : error.message;
    column.costs.append(signal.aborted
      ? h('p', { class: 'small' }, 'stopped')
      : h('p', { class: 'error', role: 'alert' }, unreachable));
  }
  column.node.removeAttribute('aria-busy');
  if (result.c2c) show(column, result);
}

async function ask() {
  if (!$('question').value.trim() || !form.reportValidity()) return $('question').focus();
  running?.abort();
  const mine = running = new AbortController();
  $('inside').hidden = true;
  for (const column of columns) {
    column.answer.replaceChildren();
    column.costs.replaceChildren();
    column.spent = 0;
  }
  $('stop').disabled = false;
  const salt = `page ${Date.now()} ${Math.random()}`;
  if (form.elements.turns.checked) {
    for (const column of columns) await run(column, salt, mine.signal);
  } else {
    await Promise.all(columns.map(column => run(column, salt, mine.signal)));
  }
  if (running === mine) $('stop').disabled = true;
}

const stop = () => running?.abort();
form.addEventListener('submit', event => { event.preventDefault(); ask(); });
$('stop').addEventListener('click', stop);
document.addEventListener('keydown', event => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); }
  if (event.key === 'Escape') stop();
});
for (const [name, text] of Object.entries(EXAMPLES)) {
  const choose = () => { $('question').value = text; ask(); };
  $('examples').append(h('li', {}, h('button', { type: 'button', title: text, onclick: choose }, name)));
}

// ---- What an answer cost ---------------------------------------------------------------------------------------------------

function show(column, { c2c, usage, finish }) {
  const t = c2c.timings_ms ?? {};
  let before = 0;
  const parts = PHASES.map(([kind, name, of]) => {
    const time = Math.max(0, of(t, before) || 0);
    before += time;
    return { kind, name, time };
  }).filter(part => part.time > 0);
  // In text-to-text the first token waits for the Sharer's text, which is written before the Receiver reads.
  const writes = c2c.mode === 't2t' && parts.find(part => part.kind === 'wait');
  if (writes) {
    writes.name = 'Sharer writes';
    parts.splice(parts.findIndex(part => part.kind === 'receiver'), 0, ...parts.splice(parts.indexOf(writes), 1));
  }
  const tokens = usage?.completion_tokens ?? 0;
  const rate = tokens > 1 && t.decode > 0 ? ` · ${((tokens - 1) / t.decode * 1e3).toFixed(0)} tokens/s` : '';
  const bar = h('div', { class: 'bar', role: 'img', 'aria-label': parts.map(p => `${p.name} ${ms(p.time)}`).join(', ') },
    ...parts.map(part => {
      const piece = h('span', { class: part.kind, title: `${part.name} ${ms(part.time)}` });
      piece.style.flexGrow = part.time;
      return piece;
    }));
  column.bar = bar;
  column.costs.append(h('div', { class: 'track' }, bar), h('dl', { class: 'phases' },
    ...parts.flatMap(part => [h('dt', { class: part.kind }, h('span', {}, part.name)), h('dd', {}, ms(part.time))]),
    h('dt', { class: 'sum' }, h('span', {}, 'total')), h('dd', { class: 'sum' }, ms(t.total ?? before))));
  column.costs.append(h('p', { class: 'small' }, plural(tokens, 'token') + rate + (finish === 'length' ? ' · cut at the limit' : '')));
  column.spent = before;
  const longest = Math.max(...columns.map(other => other.spent));
  for (const other of columns) if (other.spent) other.bar.style.width = `${100 * other.spent / longest}%`;
  if (c2c.sharer_text) {
    column.costs.append(h('details', {}, h('summary', {}, 'What the Sharer wrote'), h('blockquote', {}, c2c.sharer_text)));
  }
  if (c2c.mode === 'c2c') inside(c2c);
}

// ---- Inside C2C ------------------------------------------------------------------------------------------------------------

const HALVES = [['key', 'Keys'], ['value', 'Values']];

function inside({ gates, mean_weights: means, weights, alignment, aligned_tokens, bytes_communicated }) {
  gates ??= [];
  // Of several sharers the first is shown.
  if (Array.isArray(gates[0]?.[0])) [gates] = gates;
  const open = gates.flat().filter(Boolean).length;
  $('carried').textContent = `${plural(aligned_tokens ?? 0, 'token')} took a column of the Sharer’s cache, `
    + `${bytes(bytes_communicated ?? 0)} in all; ${open} of ${2 * gates.length} gates are open.`;
  const place = new Map((weights?.tokens ?? []).map((token, i) => [token, i]));
  const weight = (half, layer, token) => weights?.[HALVES[half][0]]?.[layer]?.[place.get(token)];
  const cells = drawMap(gates, means);
  const words = drawTokens(alignment);
  $('inside').hidden = false;

  /// Shades the map by the weights of a receiver token, or by the means.
  const shadeMap = token => cells.forEach(({ node, half, layer, open }) =>
    node.style.setProperty('--w', open ? (token === null ? means?.[layer]?.[half] : weight(half, layer, token)) ?? 1 : 0));
  /// Shades the receiver's tokens by their weights in a half of a layer.
  const shadeTokens = cell => words.ours.forEach((node, token) =>
    node.style.setProperty('--w', cell ? weight(cell.half, cell.layer, token) ?? 0 : 0));
  const say = text => { $('pointed').textContent = text; };

  const point = (lit, token, cell, text) => {
    document.querySelectorAll('#inside .lit').forEach(node => node.classList.remove('lit'));
    lit.forEach(node => node?.classList.add('lit'));
    shadeMap(token);
    shadeTokens(cell);
    say(text);
  };
  const rest = () => point([], null, null, '');
  rest();

  for (const cell of cells) {
    const text = `Layer ${cell.layer}, ${HALVES[cell.half][1].toLowerCase()}: ${cell.label}`;
    onPoint(cell.node, () => point([cell.node], null, cell.open ? cell : null, text), rest);
  }
  rove($('map'), cells.map(cell => cell.node), gates.length);

  const columns = alignment?.columns ?? [];
  const quote = node => `“${node.textContent.trim() || node.textContent}”`;
  const mean = (half, token) => {
    const all = gates.map((gate, layer) => gate[half] ? weight(half, layer, token) : null).filter(w => w != null);
    return all.length ? (all.reduce((sum, w) => sum + w) / all.length).toFixed(2) : 'none';
  };
  words.ours.forEach((node, token) => {
    const other = words.theirs[columns[token]];
    if (!place.has(token) && weights || !other) return;
    node.classList.add('linked');
    node.classList.remove('apart');
    const told = weights ? `; mean weight of keys ${mean(0, token)}, of values ${mean(1, token)}` : '';
    onPoint(node, () => point([node, other], token, null, `${quote(node)} takes the column of ${quote(other)}${told}`), rest);
  });
  words.theirs.forEach((node, column) => {
    const mine = words.ours.filter((ours, token) => columns[token] === column && ours.classList.contains('linked'));
    if (!mine.length) return;
    node.classList.add('linked');
    node.classList.remove('apart');
    onPoint(node, () => point([node, ...mine], null, null, `${quote(node)} is read by ${mine.map(quote).join(', ')}`), rest);
  });
  for (const id of ['ours', 'theirs']) rove($(id), [...$(id).querySelectorAll('.linked')]);
}

function drawMap(gates, means) {
  const cells = [];
  const row = ([, name], half) => h('tr', {}, h('th', { scope: 'row' }, name), ...gates.map((gate, layer) => {
    const open = Boolean(gate[half]);
    const mean = means?.[layer]?.[half];
    const label = (open ? 'open' : 'closed') + (open && mean != null ? `, mean weight ${mean.toFixed(2)}` : '');
    const node = h('td', { class: open ? 'open' : 'closed', 'aria-label': label });
    cells.push({ node, half, layer, open, label });
    return node;
  }));
  $('map').replaceChildren(
    h('thead', {}, h('tr', {}, h('td', { hidden: true }), h('th', { scope: 'col' }, 'Layer'),
      ...gates.map((_, layer) => h('th', { scope: 'col' }, String(layer))))),
    h('tbody', {}, ...HALVES.map(row)));
  return cells;
}

function drawTokens(alignment) {
  $('alignment').hidden = !alignment;
  const draw = (id, tokens = []) => {
    const nodes = tokens.map(text => h('span', { class: 'apart' }, text.replaceAll('\n', '⏎\n')));
    $(id).replaceChildren(...nodes);
    return nodes;
  };
  return { ours: draw('ours', alignment?.receiver_tokens), theirs: draw('theirs', alignment?.sharer_tokens) };
}

/// Pointing is hovering, or focus: by keys or by a tap.
function onPoint(node, enter, leave) {
  node.addEventListener('mouseenter', enter);
  node.addEventListener('focus', enter);
  node.addEventListener('mouseleave', () => document.activeElement === node || leave());
  node.addEventListener('blur', leave);
}

/// One tab stop for `nodes`; arrow keys move among them, up and down by rows of `width`.
function rove(box, nodes, width = 1) {
  nodes.forEach((node, i) => { node.tabIndex = i ? -1 : 0; });
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: width, ArrowUp: -width };
  box.onkeydown = event => {
    const at = nodes.indexOf(document.activeElement);
    const next = nodes[at + steps[event.key]] ?? { Home: nodes[0], End: nodes.at(-1) }[event.key];
    if (at < 0 || !next) return;
    event.preventDefault();
    nodes.forEach(node => { node.tabIndex = node === next ? 0 : -1; });
    next.focus();
  };
}

// ---- Whether the server is ready -------------------------------------------------------------------------------------------

async function ready() {
  const response = await fetch('health').catch(() => null);
  $('server').textContent = !response ? 'The server cannot be reached.' : response.ok ? '' : 'The models are loading …';
  $('go').disabled = !response?.ok;
  if (!response?.ok) setTimeout(ready, 1000);
}

ready();
