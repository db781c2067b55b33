// The chat page. Conversations and settings are kept in this browser alone. Text goes into the page as text, never as
// markup: what a model or a user writes cannot become an element.
'use strict';

const TALK = 'llm_jax.talk.', KEPT = 'llm_jax.settings';       // a key for each conversation: tabs write side by side
const SETTINGS = {system: '', temperature: 0.7, top_p: 0.95, top_k: 0, min_p: 0, max_tokens: '', seed: '',
                  probabilities: true, theme: ''};
const byId = (id) => document.getElementById(id);
const settings = Object.assign({}, SETTINGS, read(localStorage.getItem(KEPT)));
for (const [i, {id, title, messages}] of (read(localStorage.getItem('llm_jax')).conversations || []).entries()) {
  keep(TALK + id, {id, title, time: -i, messages: messages.filter((m) => !m.wrong)});     // they were all in one key
}
localStorage.removeItem('llm_jax');
const conversations = Object.keys(localStorage).filter((key) => key.startsWith(TALK)).map(
  (key) => read(localStorage.getItem(key))).filter((c) => c.id).sort(newest);
const running = new Map();                                     // id of a conversation: what stops its answer
let current = sessionStorage.getItem('current'), model, feedback = false;

function newest(a, b) {
  return b.time - a.time;
}

function read(text) {
  try {
    return JSON.parse(text) || {};
  } catch {
    return {};
  }
}

function keep(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    say('This browser keeps no more: delete a conversation.');
  }
}

function say(text, ...more) {
  atPlace(() => byId('status').replaceChildren(text, ...more));
}

// What happens in a conversation, which may not be the one in view.
function tell(talk, text) {
  say(talk.id === current ? text : `${talk.title}: ${text}`);
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function button(text, label, action) {
  const made = element('button', {type: 'button', textContent: text, onclick: action});
  made.setAttribute('aria-label', label);
  return made;
}

// Asking the server -------------------------------------------------------------------------------------------------

async function call(path, options = {}) {
  const key = sessionStorage.getItem('key');
  const headers = Object.assign({'Content-Type': 'application/json'}, key ? {Authorization: `Bearer ${key}`} : {});
  const response = await fetch(path, Object.assign({headers}, options));
  if (response.status === 401) {
    const given = await ask('This server asks for an API key', 'Key', '');
    if (given) {
      sessionStorage.setItem('key', given);
      return call(path, options);
    }
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Error(body.error ? body.error.message : `The server answers ${response.status}`);
  }
  return response;
}

async function* events(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = '';
  for (;;) {
    const {done, value} = await reader.read();
    if (done) throw new Error('The answer broke off');
    rest += decoder.decode(value, {stream: true});
    const parts = rest.split('\n\n');
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, '');
      if (data === '[DONE]') return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function begin() {
  const id = [...crypto.getRandomValues(new Uint32Array(4))].map((n) => n.toString(36)).join('');
  conversations.unshift({id, time: Date.now(), title: 'New conversation', messages: []});
  return conversations[0];
}

function conversation() {
  const found = conversations.find((c) => c.id === current) || conversations[0] || begin();
  current = found.id;
  return found;
}

function keepTalk(talk) {
  if (conversations.includes(talk)) keep(TALK + talk.id, talk);     // it may have been deleted during an answer
}

function answered(messages, index) {
  const next = messages[index + 1];
  return Boolean(next && next.role === 'assistant' && !next.failed);
}

// What the model reads. A turn that failed would fail again, and is left out; the last message is being asked now.
function sent(messages, system) {
  const said = messages.filter((m, i) => m.role === 'user' ? i === messages.length - 1 || answered(messages, i)
    : !m.failed);
  return [...(system ? [{role: 'system', content: system}] : []), ...said.map(({role, content}) => ({role, content}))];
}

async function answer(talk) {
  const asked = talk.messages.at(-1), stop = new AbortController(), start = performance.now();
  const message = {id: '', role: 'assistant', content: '', pieces: [], system: settings.system};
  const body = {model, messages: sent(talk.messages, message.system), stream: true,
                stream_options: {include_usage: true}};
  for (const name of ['temperature', 'top_p', 'top_k', 'min_p', 'max_tokens', 'seed']) {
    if (settings[name] !== '') body[name] = Number(settings[name]);        // empty: what the server does by itself
  }
  if (settings.probabilities) Object.assign(body, {logprobs: true, top_logprobs: 5});
  delete asked.failed;
  talk.messages.push(message);
  running.set(talk.id, stop);
  draw();
  toEnd();
  say('Answering');
  let made = 0, reason = '', said;
  try {
    for await (const event of events(await call('/v1/chat/completions', {
      method: 'POST', body: JSON.stringify(body), signal: stop.signal}))) {
      message.id = event.id;
      if (event.usage) made = event.usage.completion_tokens;
      const choice = event.choices[0];
      if (choice && choice.finish_reason) reason = choice.finish_reason;
      if (!choice || !choice.delta || !choice.delta.content) continue;
      const tokens = choice.logprobs ? choice.logprobs.content.map((t) => [t.token, t.logprob, t.top_logprobs.map(
        (o) => [o.token, o.logprob])]) : null;
      message.content += choice.delta.content;
      message.pieces.push([choice.delta.content, tokens]);
      if (talk.id === current) {
        atPlace((list) => addPiece(list.lastElementChild.querySelector('.text'), message));
      }
    }
    if (reason === 'content_filter') throw new Error('The server held this answer back');
    const seconds = (performance.now() - start) / 1000;
    said = 'Answered' + (made ? `: ${made} tokens, ${(made / seconds).toFixed(0)} a second` : '') +
      (reason === 'length' ? '; cut off at the most tokens' : '');
  } catch (error) {
    said = error.name === 'AbortError' ? 'Stopped' : error.message;
    if (!message.content) talk.messages.pop();
    if (!message.content) asked.failed = said;
    else if (error.name !== 'AbortError') message.failed = said;
  }
  running.delete(talk.id);
  keepTalk(talk);
  const stopped = document.activeElement === byId('stop');
  draw();
  if (conversations.includes(talk)) tell(talk, said);
  if (stopped || document.activeElement === document.body) byId('prompt').focus();
}

// Drawing -----------------------------------------------------------------------------------------------------------

function percent(logprob) {
  return `${(100 * Math.exp(logprob)).toFixed(1)}%`;
}

function piece(text, tokens) {
  const made = element('span', {textContent: text});
  if (tokens) {
    made.title = tokens.map(([token, logprob, others]) => `${JSON.stringify(token)} ${percent(logprob)}\n` + others.map(
      ([other, p]) => `   ${JSON.stringify(other)} ${percent(p)}`).join('\n')).join('\n');
  }
  return made;
}

// [from, to, whether it is code] of what stands before, between and after lines of ```.
function blocks(text) {
  const found = [];
  let from = 0, open = '';
  for (const fence of text.matchAll(/^[ \t]*(`{3,})([^`\n]*)(\n|$)/gm)) {
    if (open && (fence[1].length < open.length || fence[2].trim())) continue;
    found.push([from, fence.index, Boolean(open)]);
    from = fence.index + fence[0].length;
    open = open ? '' : fence[1];
  }
  return [...found, [from, text.length, Boolean(open)]];
}

function drawText(place, message) {
  place.replaceChildren(...blocks(message.content).map(([from, to, code]) => {
    const block = element(code ? 'pre' : 'div');
    let at = 0;
    for (const [text, tokens] of message.pieces || [[message.content, null]]) {
      const part = text.slice(Math.max(from - at, 0), Math.max(to - at, 0));
      if (part) block.append(piece(part, tokens));
      at += text.length;
    }
    return block;
  }));
}

// The last piece, as drawText would draw it, without drawing the others again.
function addPiece(place, message) {
  const found = blocks(message.content), [text, tokens] = message.pieces.at(-1);
  if (found.length === place.children.length && message.content.length - text.length >= found.at(-1)[0]) {
    place.lastElementChild.append(piece(text, tokens));
  } else {
    drawText(place, message);
  }
}

// The probabilities once more, as a table: for those who do not hover. Made when it is opened.
function probabilities(message) {
  const made = element('details', {}, element('summary', {textContent: 'Token probabilities'}));
  made.addEventListener('toggle', () => {
    const row = (tag, ...cells) => element('tr', {}, ...cells.map((textContent) => element(tag, {textContent})));
    const table = element('table', {}, element('thead', {}, row('th', 'Token', 'Probability', 'The likeliest')));
    const rows = message.pieces.flatMap(([, tokens]) => tokens || []).map(([token, logprob, others]) => row(
      'td', JSON.stringify(token), percent(logprob),
      others.map(([other, p]) => `${JSON.stringify(other)} ${percent(p)}`).join('  ')));
    table.append(element('tbody', {}, ...rows));
    made.append(element('div', {tabIndex: 0, role: 'region', ariaLabel: 'Token probabilities'}, table));
  }, {once: true});
  return made;
}

function drawMessage(message, index) {
  const talk = conversation(), last = index === talk.messages.length - 1, next = talk.messages[index + 1];
  const busy = running.has(talk.id), mine = message.role === 'user';
  const text = element('div', {className: 'text'}), tools = element('div', {className: 'tools'}), more = [];
  drawText(text, message);
  if (mine && !busy) {
    if (!answered(talk.messages, index)) {
      tools.append(button('Retry', 'Ask this again', () => ready() && askAgain(message, message.content)));
    }
    tools.append(button('Edit', 'Edit this message and ask again', () => edit(message)));
  }
  const wrong = Boolean(message.failed) || (mine && !(next && next.role === 'assistant'));
  if (wrong) {
    const why = [mine ? 'Not answered' : 'Broken off', ...(message.failed ? [message.failed] : [])].join(': ');
    more.push(element('p', {className: 'why', textContent: `${why}. Later messages are sent without this.`}));
  }
  if (!mine && last && !busy && !message.failed) {
    tools.append(button('Regenerate', 'Ask for another answer', () => ready() && again(message)));
  }
  if (!mine && !(last && busy)) {
    tools.append(button('Copy', 'Copy this answer', () => copy(message.content)));
    if (feedback && !message.failed) tools.append(...ratings(message));
    if ((message.pieces || []).some(([, tokens]) => tokens)) more.push(probabilities(message));
  }
  return element('li', {className: `message ${message.role}${wrong ? ' wrong' : ''}`},
                 element('h2', {textContent: mine ? 'You' : 'Model'}), text, tools, ...more);
}

function ratings(message) {
  const made = [['Good', 1, 'A good answer'], ['Bad', -1, 'A bad answer']].map(([sign, value, label]) => button(
    sign, label, () => rate(message, value).then(press)));
  const press = () => made.forEach((b, i) => b.setAttribute('aria-pressed', String(message.rating === 1 - 2 * i)));
  press();
  return made;
}

// Changes the messages, or their room. A reader at the end stays there; one who has scrolled up, where they read.
function atPlace(change) {
  const list = byId('messages'), at = list.scrollTop, end = list.scrollHeight - list.clientHeight - at < 10;
  change(list);
  list.scrollTop = end ? list.scrollHeight : at;
}

function toEnd() {
  byId('messages').scrollTop = byId('messages').scrollHeight;
}

function draw() {
  const talk = conversation();
  sessionStorage.setItem('current', talk.id);
  atPlace((list) => list.replaceChildren(...talk.messages.map(drawMessage)));
  byId('conversations').replaceChildren(...conversations.map((c) => {
    const open = element('button', {type: 'button', textContent: c.title, onclick: () => choose(c.id)});
    open.setAttribute('aria-current', String(c === talk));
    open.classList.toggle('busy', running.has(c.id));
    return element('li', {}, open, button('×', `Delete ${c.title}`, () => remove(c)));
  }));
  byId('stop').hidden = !running.has(talk.id);
  byId('send').hidden = running.has(talk.id);
}

function drawSettings() {
  for (const field of byId('settings').elements) {
    if (field.type === 'checkbox') field.checked = settings[field.name];
    else field.value = settings[field.name];
  }
  const dark = settings.theme ? settings.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  document.documentElement.dataset.theme = dark ? 'dark' : 'light';
  byId('theme').setAttribute('aria-pressed', String(dark));
}

function ask(title, label, text, note = '') {
  const dialog = byId('ask');
  byId('ask_title').textContent = title;
  byId('ask_label').textContent = label;
  byId('ask_text').value = text;
  byId('ask_note').textContent = note;
  dialog.returnValue = 'cancel';
  dialog.showModal();
  return new Promise((done) => {
    dialog.onclose = () => done(dialog.returnValue === 'ok' ? byId('ask_text').value : null);
  });
}

// What the user does --------------------------------------------------------------------------------------------------

function showSettings(shown) {
  atPlace(() => { byId('settings').hidden = !shown; });
  byId('settings_button').setAttribute('aria-expanded', String(shown));
}

// Whether something can be asked now. A setting that is out of its range is shown.
function ready() {
  if (running.has(conversation().id)) return false;
  if (byId('settings').checkValidity()) return true;
  showSettings(true);
  return byId('settings').reportValidity();
}

function send(text) {
  const talk = conversation();
  if (!talk.messages.length) talk.title = text.slice(0, 60);
  talk.messages.push({role: 'user', content: text});
  keepTalk(talk);
  answer(talk);
}

// An answered message is asked anew from its place. One that failed goes to the end: the rest was said without it.
function askAgain(message, text) {
  const {messages} = conversation(), index = messages.indexOf(message), next = messages[index + 1];
  if (index < 0) return;                                       // another tab has changed the conversation
  messages.splice(index, answered(messages, index) ? messages.length : next && next.role === 'assistant' ? 2 : 1);
  send(text);
}

async function edit(message) {
  const text = ready() && await ask('Edit the message', 'Message', message.content);
  if (text && ready()) askAgain(message, text);
}

function again(message) {
  const talk = conversation();
  talk.messages.splice(talk.messages.indexOf(message), 1);
  answer(talk);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {                                        // only localhost and https have a clipboard, and it may be denied
    const field = element('textarea', {className: 'hidden', value: text}), before = document.activeElement;
    document.body.append(field);
    field.select();
    const copied = document.execCommand('copy');
    field.remove();
    before.focus();
    if (!copied) return say('This browser does not let pages copy');
  }
  say('Copied');
}

async function rate(message, value) {
  const talk = conversation(), before = sent(talk.messages.slice(0, talk.messages.indexOf(message)), message.system);
  const comment = await ask(
    value > 0 ? 'What was good?' : 'What was bad?', 'Comment (may be empty)', '', 'This is stored on the server: ' +
    'the system message, the conversation up to this answer, the answer, your rating and the comment. What looks ' +
    'like a password or a key is taken out.');
  if (comment === null) return;
  try {
    await call('/feedback', {method: 'POST', body: JSON.stringify({
      id: message.id, rating: value, comment: comment, messages: before, answer: message.content})});
    message.rating = value;
    keepTalk(talk);
    say('Thank you: kept on the server');
  } catch (error) {
    say(error.message);
  }
}

function choose(id) {
  current = id;
  draw();
  toEnd();
  say(running.has(id) ? 'Answering' : '');
  byId('prompt').focus();
}

function forget(talk) {
  if (running.has(talk.id)) running.get(talk.id).abort();
  conversations.splice(conversations.indexOf(talk), 1);
  draw();
}

function remove(talk) {
  forget(talk);
  localStorage.removeItem(TALK + talk.id);
  const undo = button('Undo', `Undo: delete ${talk.title}`, () => {
    conversations.push(talk);
    conversations.sort(newest);
    keepTalk(talk);
    choose(talk.id);
  });
  say(`Deleted: ${talk.title.slice(0, 30)} `, undo);
  undo.focus();
}

// Another tab has written.
function follow({key, newValue}) {
  if (key === KEPT) {
    Object.assign(settings, SETTINGS, read(newValue));
    drawSettings();
  }
  if (!key || !key.startsWith(TALK)) return;
  const found = conversations.find((c) => TALK + c.id === key);
  if (newValue === null) {
    if (found) forget(found);
    return;
  }
  if (!found) conversations.push(read(newValue));
  else if (!running.has(found.id)) Object.assign(found, read(newValue));
  conversations.sort(newest);
  draw();
}

function setUp() {
  const form = byId('settings');
  form.oninput = ({target}) => {
    settings[target.name] = target.type === 'checkbox' ? target.checked : target.value;
    keep(KEPT, settings);
  };
  form.onsubmit = (event) => event.preventDefault();
  byId('settings_button').onclick = () => showSettings(form.hidden);
  byId('theme').onclick = () => {
    settings.theme = document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark';
    keep(KEPT, settings);
    drawSettings();
  };
  byId('new').onclick = () => choose((conversations.find((c) => !c.messages.length) || begin()).id);
  byId('stop').onclick = () => running.get(current).abort();
  byId('compose').onsubmit = (event) => {
    event.preventDefault();
    const text = byId('prompt').value.trim();
    if (text && ready()) {
      byId('prompt').value = '';
      send(text);
    }
  };
  byId('prompt').onkeydown = (event) => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId('compose').requestSubmit();
    }
  };
  document.onkeydown = (event) => {
    if (event.key === 'Escape' && running.has(current) && !byId('ask').open) running.get(current).abort();
  };
  window.onstorage = follow;
  window.onpageshow = (event) => event.persisted && location.reload();       // asleep, it did not hear other tabs
  drawSettings();
  draw();
  byId('prompt').focus();
  call('/v1/models').then((r) => r.json()).then((found) => {
    const {id, max_model_len: most} = found.data[0];
    model = id;
    feedback = Boolean(found.data[0].feedback);
    Object.assign(form.elements.max_tokens, {max: most, placeholder: `up to ${most}`});
    document.title = `${model} - llm_jax`;
    draw();
  }).catch((error) => say(error.message));
}

setUp();
