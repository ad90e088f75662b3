// The page as a person uses it: the built-in pair's server, Debian's Chromium, nothing in between.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { chromium } from 'playwright-core';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const SHOTS = `${ROOT}target/screenshots`;
const QUESTION = 'In which country is Grenoble: A Spain, B Poland, C Greece, D France?';
const FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
  '--disable-background-networking', '--disable-component-update', '--disable-sync'];
const WIDE = { width: 1280, height: 1000 };
const PHONE = { width: 390, height: 844 };

let server, url, browser;
/// Everything that any page asked for, and everything it complained about.
const asked = [], complaints = [];

/// The address that a server prints when it is ready to be asked.
async function serve(...args) {
  const command = (process.env.C2C_SERVE ?? `${ROOT}target/debug/serve-local`).split(' ');
  const child = spawn(command[0], [...command.slice(1), '--port', '0', ...args], { cwd: ROOT });
  let said = '';
  const address = await new Promise((resolve, reject) => {
    const read = data => {
      said += data;
      const found = said.match(/http:\/\/127\.0\.0\.1:\d+/);
      if (found) resolve(found[0]);
    };
    child.stdout.on('data', read);
    child.stderr.on('data', read);
    child.on('error', reject);
    child.on('exit', code => reject(new Error(`the server ended with ${code}: ${said}`)));
  });
  return { child, address };
}

async function open(options = {}) {
  const page = await browser.newPage({ viewport: WIDE, ...options });
  page.on('request', request => asked.push(request.url()));
  page.on('pageerror', error => complaints.push(error.message));
  page.on('console', message => message.type() === 'error' && complaints.push(message.text()));
  await page.goto(url);
  await page.waitForFunction(() => !document.getElementById('go').disabled);
  return page;
}

const answers = page => page.locator('article .answer').allTextContents();
const shot = (page, name) => page.screenshot({ path: `${SHOTS}/${name}.png`, fullPage: true });

/// Asks by keyboard and waits for all four answers.
async function ask(page, question = QUESTION) {
  await page.getByLabel('Question').fill(question);
  await page.keyboard.press('Control+Enter');
  await page.waitForFunction(() => document.querySelectorAll('article .phases').length === 4);
  await page.waitForFunction(() => !document.querySelector('[aria-busy]'));
}

before(async () => {
  mkdirSync(SHOTS, { recursive: true });
  ({ child: server, address: url } = await serve());
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: FLAGS });
});

after(async () => {
  await browser?.close();
  server?.kill();
});

test('a question brings four answers, their costs and what the gates did', async () => {
  const page = await open();
  const types = [];
  page.on('response', response => response.url().endsWith('completions') && types.push(response.headers()['content-type']));
  await shot(page, 'empty');
  await ask(page);
  assert.equal(types.length, 4);
  assert.ok(types.every(type => type.startsWith('text/event-stream')), `${types}`);
  const [receiver, sharer, t2t, c2c] = await answers(page);
  assert.ok([receiver, sharer, t2t, c2c].every(text => text.trim()), 'four answers');
  assert.match(sharer, /\bD\b/);
  assert.match(c2c, /\bD\b/, 'the Receiver knows what the Sharer knows');
  for (const [mode, phases] of [['receiver', ['Receiver reads']], ['sharer', ['Sharer reads']],
    ['t2t', ['Sharer reads', 'Sharer writes', 'Receiver reads']], ['c2c', ['Sharer reads', 'Receiver reads', 'fuse']]]) {
    const said = await page.locator(`#${mode} .phases`).innerText();
    for (const phase of [...phases, 'total']) assert.ok(said.includes(phase), `${mode}: ${phase} in ${said}`);
  }
  const widths = await page.locator('.bar').evaluateAll(bars => bars.map(bar => bar.getBoundingClientRect().width));
  assert.ok(widths.every(width => width > 0) && new Set(widths).size > 1, `bars on one scale: ${widths}`);
  await page.getByText('What the Sharer wrote').click();
  assert.ok((await page.locator('#t2t blockquote').innerText()).trim(), 'the Sharer’s text');
  await shot(page, 'answers');
  await page.close();
});

test('in turn, nobody waits for the others', async () => {
  const page = await open();
  const most = () => page.evaluate(() => window.most);
  await page.evaluate(() => {
    window.most = 0;
    const count = () => { window.most = Math.max(window.most, document.querySelectorAll('[aria-busy]').length); };
    new MutationObserver(count).observe(document.getElementById('answers'), { subtree: true, attributes: true });
  });
  await page.getByText('Settings').click();
  await page.getByLabel('One after the other').check();
  await ask(page);
  assert.equal(await most(), 1);
  await page.getByLabel('One after the other').uncheck();
  await ask(page);
  assert.equal(await most(), 4);
  await page.getByLabel('One after the other').check();
  await ask(page);
  await shot(page, 'in-turn');
  await page.close();
});

test('the gate map tells each gate, by pointer and by keys', async () => {
  const page = await open();
  await ask(page);
  const carried = await page.locator('#carried').innerText();
  const [, tokens, open_, gates] = carried.match(/(\d+) tokens? took .* (\d+) of (\d+) gates/);
  assert.ok(tokens > 10, carried);
  assert.equal(await page.locator('#map td.open, #map td.closed').count(), +gates);
  assert.equal(await page.locator('#map td.open').count(), +open_);
  const cell = page.locator('#map td.open').first();
  await cell.hover();
  assert.match(await page.locator('#pointed').innerText(), /^Layer \d+, (keys|values): open, mean weight 0\.\d\d$/);
  const shaded = await page.locator('#ours .linked').evaluateAll(
    nodes => nodes.filter(node => +node.style.getPropertyValue('--w') > 0).length);
  assert.equal(shaded, +tokens, 'every fused token shows its weight in this layer');
  await shot(page, 'gate');
  await page.mouse.move(0, 0);
  await page.locator('#map [tabindex="0"]').focus();
  await page.keyboard.press('ArrowRight');
  assert.match(await page.locator('#pointed').innerText(), /^Layer 1, keys/);
  await page.keyboard.press('ArrowDown');
  assert.match(await page.locator('#pointed').innerText(), /^Layer 1, values/);
  await page.close();
});

test('pointing at a token lights its counterpart', async () => {
  const page = await open();
  await ask(page);
  const lit = side => page.locator(`#${side} .lit`).allTextContents();
  const france = page.locator('#ours .linked', { hasText: 'France' });
  await france.hover();
  assert.match((await lit('ours')).join(), /France/);
  assert.match((await lit('theirs')).join(), /France|ance/);
  assert.match(await page.locator('#pointed').innerText(), /takes the column of .*; mean weight of keys/);
  await shot(page, 'alignment');
  await page.locator('#theirs .linked').first().hover();
  assert.equal((await lit('theirs')).length, 1);
  assert.ok((await lit('ours')).length >= 1);
  await page.mouse.move(0, 0);
  assert.equal((await lit('ours')).length, 0);
  await page.locator('#ours [tabindex="0"]').focus();
  const first = await lit('ours');
  await page.keyboard.press('ArrowRight');
  assert.notDeepEqual(await lit('ours'), first);
  await page.close();
});

test('an error is shown where it happens', async () => {
  const page = await open();
  await page.getByText('Settings').click();
  await page.getByLabel('Gates').fill('nonsense');
  await page.getByLabel('Question').fill(QUESTION);
  await page.getByRole('button', { name: 'Ask' }).click();
  await page.locator('#c2c .error').waitFor();
  assert.match(await page.locator('#c2c .error').innerText(), /nonsense/);
  await page.waitForFunction(() => document.querySelectorAll('article .phases').length === 3);
  assert.equal(await page.locator('.error').count(), 1);
  await shot(page, 'error');
  await page.getByLabel('Gates').fill('closed');
  await ask(page);
  const [receiver, , , c2c] = await answers(page);
  assert.equal(c2c, receiver, 'with closed gates the Receiver is alone');
  assert.equal(await page.locator('.error').count(), 0);
  await page.close();
  // The browser itself notes the refused request.
  assert.ok(complaints.splice(0).every(text => /status of 4\d\d/.test(text)));
});

test('stopping ends the requests', async () => {
  const page = await open();
  const failed = [];
  page.on('requestfailed', request => failed.push(request.failure().errorText));
  await page.route('**/completions', () => {});
  await page.getByLabel('Question').fill(QUESTION);
  await page.keyboard.press('Control+Enter');
  await page.locator('#stop:enabled').waitFor();
  await page.keyboard.press('Escape');
  await page.waitForFunction(() => !document.querySelector('[aria-busy]'));
  assert.equal(await page.getByText('stopped').count(), 4);
  assert.deepEqual(failed, Array(4).fill('net::ERR_ABORTED'));
  assert.ok(await page.locator('#stop').isDisabled());
  await page.unroute('**/completions');
  await ask(page);
  await page.close();
});

test('it is readable on a phone', async () => {
  const page = await open({ viewport: PHONE, deviceScaleFactor: 2, hasTouch: true, isMobile: true });
  await ask(page);
  const [width, inner] = await page.evaluate(() => [document.scrollingElement.scrollWidth, innerWidth]);
  assert.ok(width <= inner, `${width} px wide on ${inner}`);
  const lefts = await page.locator('article').evaluateAll(nodes => nodes.map(node => node.getBoundingClientRect().left));
  assert.equal(new Set(lefts).size, 1, 'one column');
  await page.locator('#ours .linked').nth(3).tap();
  assert.equal(await page.locator('#theirs .lit').count(), 1, 'a tap points');
  await shot(page, 'phone');
  await page.close();
});

test('it is dark where the person wants it dark, and legible either way', async () => {
  const luminance = rgb => rgb.match(/\d+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4).reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  for (const colorScheme of ['light', 'dark']) {
    const page = await open({ colorScheme });
    await ask(page);
    const style = (selector, property) => page.locator(selector).first().evaluate((node, p) => getComputedStyle(node)[p], property);
    const back = luminance(await style('body', 'backgroundColor'));
    assert.equal(back < 0.2, colorScheme === 'dark');
    const card = luminance(await style('article', 'backgroundColor'));
    for (const selector of ['.answer', 'article header p', '.phases dd', '#pointed', 'th']) {
      const ink = luminance(await style(selector, 'color'));
      const contrast = (Math.max(ink, card) + 0.05) / (Math.min(ink, card) + 0.05);
      assert.ok(contrast >= 4.5, `${colorScheme}: ${selector} has a contrast of ${contrast}`);
    }
    await shot(page, colorScheme);
    await page.close();
  }
});

test('nothing but the page’s own server is asked, and no policy is broken', async () => {
  const response = await fetch(url);
  assert.match(response.headers.get('content-security-policy'), /default-src 'none'/);
  assert.ok(asked.length > 20);
  for (const address of asked.filter(address => !address.startsWith('data:'))) assert.equal(new URL(address).origin, url);
  assert.deepEqual(complaints, []);
});

test('a server that is gone is said to be', async () => {
  const page = await open();
  const ended = new Promise(resolve => server.on('exit', resolve));
  server.kill();
  await ended;
  await page.getByLabel('Question').fill(QUESTION);
  await page.keyboard.press('Control+Enter');
  await page.waitForFunction(() => document.querySelectorAll('.error').length === 4);
  assert.match(await page.locator('.error').first().innerText(), /cannot be reached/);
  await page.close();
});
