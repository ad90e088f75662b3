// A server that only pretends, to work on the page.
import { createServer } from 'node:http';
import { readFileSync } from 'node:fs';
const page = new URL('../../src/serve/page/', import.meta.url);
const CSP = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const wait = t => new Promise(r => setTimeout(r, t));
const L = +process.env.LAYERS || 6;
const ours = ['<|im_start|>', 'user', '\n', 'In', ' which', ' country', ' is', ' Gren', 'oble', ':', ' A', ' Spain', ',', ' B', ' Poland', ',', ' C', ' Greece', ',', ' D', ' France', '?', '<|im_end|>', '\n', '<|im_start|>', 'assistant', '\n'];
const theirs = ['<s>', 'user:', ' In', ' which', ' country', ' is', ' Grenoble', ':', ' A', ' Sp', 'ain', ',', ' B', ' Pol', 'and', ',', ' C', ' Greece', ',', ' D', ' France', '?', '</s>'];
const cols = [null, null, null, 2, 3, 4, 5, 6, 6, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, null, null, null, null, null];
const tokens = cols.map((c, i) => c === null ? -1 : i).filter(i => i >= 0);
const w = (l, t, k) => 0.5 + 0.5 * Math.sin(l * 1.7 + t * 0.9 + k);
const gates = Array.from({ length: L }, (_, l) => [l % 3 !== 1, l > 1]);
const answers = { receiver: 'Poland', sharer: 'France', t2t: 'France. Grenoble lies in the Alps.', c2c: 'France' };
createServer(async (q, s) => {
  if (q.url === '/health') return s.end('{"status":"ok"}');
  if (q.method === 'GET') {
    const name = { '/': 'index.html', '/page.css': 'page.css', '/page.js': 'page.js' }[q.url];
    if (!name) { s.statusCode = 404; return s.end(); }
    s.setHeader('Content-Security-Policy', CSP);
    s.setHeader('Content-Type', { html: 'text/html', css: 'text/css', js: 'text/javascript' }[name.split('.')[1]]);
    return s.end(readFileSync(new URL(name, page)));
  }
  let body = ''; for await (const c of q) body += c;
  const { c2c: { mode, gates: g } } = JSON.parse(body);
  if (g === 'nonsense') { s.statusCode = 400; return s.end(JSON.stringify({ error: { message: 'gates `nonsense`: neither open, closed, learned, nor a list such as 0-3,7' } })); }
  s.setHeader('Content-Type', 'text/event-stream');
  const send = o => s.write(`data: ${JSON.stringify(o)}\n\n`);
  await wait(mode === 't2t' ? 400 : 120);
  for (const piece of answers[mode].match(/.{1,3}/gs)) { send({ choices: [{ delta: { content: piece } }] }); await wait(60); }
  send({ choices: [{ delta: {}, finish_reason: 'stop' }] });
  const T = { receiver: [.3, 0, 0, 3.1, 0, 3.6, 1.4, 5], sharer: [.2, 0, 4.4, 0, 0, 4.8, 1.7, 6.5], t2t: [.6, 0, 4.8, 5.5, 0, 19.5, 3.2, 22.7], c2c: [.2, .4, 4.4, 3.2, 1.1, 9.5, 1.4, 10.9] }[mode];
  const [tokenize, align, sharer_prefill, receiver_prefill, fuse, first_token, decode, total] = T;
  const c2c = { mode, timings_ms: { tokenize, align, sharer_prefill, receiver_prefill, fuse, first_token, decode, total } };
  if (mode === 't2t') c2c.sharer_text = 'Grenoble is a city in France.';
  if (mode === 'c2c') Object.assign(c2c, {
    gates, mean_weights: gates.map((_, l) => [w(l, 0, 0), w(l, 0, 1)]), aligned_tokens: tokens.length, bytes_communicated: 29184,
    alignment: { receiver_tokens: ours, sharer_tokens: theirs, columns: cols },
    weights: { tokens, key: gates.map((_, l) => tokens.map(t => w(l, t, 0))), value: gates.map((_, l) => tokens.map(t => w(l, t, 1))) },
  });
  send({ choices: [], usage: { prompt_tokens: 27, completion_tokens: 5, total_tokens: 32 }, c2c });
  s.end('data: [DONE]\n\n');
}).listen(+process.env.PORT || 0, '127.0.0.1', function () { console.log(`http://127.0.0.1:${this.address().port}`); });
