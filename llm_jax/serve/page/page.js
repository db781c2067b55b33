// The chat page. Conversations and settings are kept in this browser alone. Text goes into the page as text, never as
// markup: what a model or a user writes cannot become an element.
'use strict';

const KEPT = 'llm_jax';
const SETTINGS = {system: '', temperature: 0.7, top_p: 0.95, top_k: 0, min_p: 0, max_tokens: 512, seed: '',
                  probabilities: true};
const byId = (id) => document.getElementById(id);
const state = Object.assign({conversations: [], current: null, settings: {}, theme: null},
                            read(localStorage.getItem(KEPT)));
state.settings = Object.assign({}, SETTINGS, state.settings);
let model = null, feedback = false, running = null;

function read(text) {
  try {
    return JSON.parse(text) || {};
  } catch {
    return {};
  }
}

function keep() {
  try {
    localStorage.setItem(KEPT, JSON.stringify(state));
  } catch {
    say('This browser keeps no more: delete a conversation.');
  }
}

function say(text) {
  byId('status').textContent = text;
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
    if (done) return;
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

function conversation() {
  let found = state.conversations.find((c) => c.id === state.current);
  if (!found) {
    found = {id: crypto.randomUUID(), title: 'New conversation', messages: []};
    state.conversations.unshift(found);
    state.current = found.id;
  }
  return found;
}

async function answer() {
  const talk = conversation(), settings = state.settings;
  const said = talk.messages.filter((m) => !m.wrong).map((m) => ({role: m.role, content: m.content}));
  if (settings.system) said.unshift({role: 'system', content: settings.system});
  const body = {messages: said, stream: true, stream_options: {include_usage: true}, model: model,
                temperature: Number(settings.temperature), top_p: Number(settings.top_p), top_k: Number(settings.top_k),
                min_p: Number(settings.min_p), max_tokens: Number(settings.max_tokens)};
  if (settings.seed !== '') body.seed = Number(settings.seed);
  if (settings.probabilities) Object.assign(body, {logprobs: true, top_logprobs: 5});
  const message = {id: '', role: 'assistant', content: '', pieces: []};
  talk.messages.push(message);
  running = new AbortController();
  draw();
  const place = byId('messages').lastElementChild.querySelector('.text'), start = performance.now();
  let made = 0;
  say('Answering');
  try {
    for await (const event of events(await call('/v1/chat/completions', {
      method: 'POST', body: JSON.stringify(body), signal: running.signal}))) {
      message.id = event.id;
      if (event.usage) made = event.usage.completion_tokens;
      const choice = event.choices[0];
      if (!choice || !choice.delta || !choice.delta.content) continue;
      const tokens = choice.logprobs ? choice.logprobs.content.map((t) => [t.token, t.logprob, t.top_logprobs.map(
        (o) => [o.token, o.logprob])]) : null;
      message.content += choice.delta.content;
      message.pieces.push([choice.delta.content, tokens]);
      place.append(piece(choice.delta.content, tokens));
      byId('messages').scrollTop = byId('messages').scrollHeight;
    }
    const seconds = (performance.now() - start) / 1000;
    say(made ? `Answered: ${made} tokens, ${(made / seconds).toFixed(0)} a second` : 'Answered');
  } catch (error) {
    if (error.name === 'AbortError') {
      say('Stopped');
    } else {
      if (!message.content) talk.messages.pop();
      talk.messages.push({role: 'assistant', content: error.message, wrong: true});
      say(error.message);
    }
  }
  running = null;
  keep();
  draw();
  byId('prompt').focus();
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

function drawMessage(message, index) {
  const talk = conversation(), text = element('div', {className: 'text'});
  if (message.pieces && message.pieces.length) {
    message.pieces.forEach(([part, tokens]) => text.append(piece(part, tokens)));
  } else {
    text.textContent = message.content;
  }
  const tools = element('div', {className: 'tools'});
  if (!running && message.role === 'user') {
    tools.append(button('Edit', 'Edit this message and ask again', () => edit(index)));
  }
  if (!running && message.role === 'assistant' && index === talk.messages.length - 1) {
    tools.append(button('Regenerate', 'Ask for another answer', () => again(index)));
  }
  if (message.role === 'assistant' && !message.wrong) {
    tools.append(button('Copy', 'Copy this answer', () => navigator.clipboard.writeText(message.content).then(
      () => say('Copied'), () => say('This browser does not let pages copy'))));
    if (feedback) {
      for (const [sign, value, label] of [['Good', 1, 'A good answer'], ['Bad', -1, 'A bad answer']]) {
        const made = button(sign, label, () => rate(index, value));
        made.setAttribute('aria-pressed', String(message.rating === value));
        tools.append(made);
      }
    }
  }
  const name = {user: 'You', assistant: message.wrong ? 'Error' : 'Model'}[message.role];
  return element('li', {className: `message ${message.role}${message.wrong ? ' wrong' : ''}`},
                 element('h2', {textContent: name}), text, tools);
}

function draw() {
  const talk = conversation(), list = byId('messages');
  list.replaceChildren(...talk.messages.map(drawMessage));
  list.scrollTop = list.scrollHeight;
  byId('conversations').replaceChildren(...state.conversations.map((c) => {
    const open = element('button', {type: 'button', textContent: c.title, onclick: () => choose(c.id)});
    const item = element('li', {}, open, button('×', `Delete ${c.title}`, () => remove(c.id)));
    item.setAttribute('aria-current', String(c.id === state.current));
    return item;
  }));
  byId('stop').hidden = !running;
  byId('send').hidden = Boolean(running);
  document.documentElement.dataset.theme = state.theme;
  byId('theme').setAttribute('aria-pressed', String(state.theme === 'dark'));
}

function ask(title, label, text) {
  const dialog = byId('ask');
  byId('ask_title').textContent = title;
  byId('ask_label').textContent = label;
  byId('ask_text').value = text;
  dialog.returnValue = 'cancel';
  dialog.showModal();
  return new Promise((done) => {
    dialog.onclose = () => done(dialog.returnValue === 'ok' ? byId('ask_text').value : null);
  });
}

// What the user does --------------------------------------------------------------------------------------------------

function send(text) {
  const talk = conversation();
  talk.messages = talk.messages.filter((m) => !m.wrong);
  if (!talk.messages.length) talk.title = text.slice(0, 60);
  talk.messages.push({role: 'user', content: text});
  keep();
  return answer();
}

async function edit(index) {
  const talk = conversation(), text = await ask('Edit the message', 'Message', talk.messages[index].content);
  if (text && !running) {
    talk.messages = talk.messages.slice(0, index);
    send(text);
  }
}

function again(index) {
  const talk = conversation();
  talk.messages = talk.messages.slice(0, index);
  answer();
}

async function rate(index, value) {
  const talk = conversation(), message = talk.messages[index];
  const comment = await ask(value > 0 ? 'What was good?' : 'What was bad?', 'Comment (may be empty)', '');
  if (comment === null) return;
  const before = talk.messages.slice(0, index).filter((m) => !m.wrong).map((m) => ({role: m.role, content: m.content}));
  try {
    await call('/feedback', {method: 'POST', body: JSON.stringify({
      id: message.id, rating: value, comment: comment, messages: before, answer: message.content})});
    message.rating = value;
    say('Thank you: kept on the server');
  } catch (error) {
    say(error.message);
  }
  keep();
  draw();
}

function choose(id) {
  if (running) return;
  state.current = id;
  keep();
  draw();
  byId('prompt').focus();
}

function remove(id) {
  if (running) return;
  state.conversations = state.conversations.filter((c) => c.id !== id);
  if (state.current === id) state.current = state.conversations.length ? state.conversations[0].id : null;
  keep();
  draw();
}

function setUp() {
  state.theme = state.theme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');
  const form = byId('settings');
  for (const [name, value] of Object.entries(state.settings)) {
    const field = form.elements[name];
    if (!field) continue;
    if (field.type === 'checkbox') field.checked = value;
    else field.value = value;
  }
  form.oninput = (event) => {
    const field = event.target;
    state.settings[field.name] = field.type === 'checkbox' ? field.checked : field.value;
    keep();
  };
  form.onsubmit = (event) => event.preventDefault();
  byId('settings_button').onclick = () => {
    form.hidden = !form.hidden;
    byId('settings_button').setAttribute('aria-expanded', String(!form.hidden));
  };
  byId('theme').onclick = () => {
    state.theme = state.theme === 'dark' ? 'light' : 'dark';
    keep();
    draw();
  };
  byId('new').onclick = () => {
    if (running) return;
    if (conversation().messages.length) state.current = null;
    draw();
    byId('prompt').focus();
  };
  byId('stop').onclick = () => running && running.abort();
  byId('compose').onsubmit = (event) => {
    event.preventDefault();
    const text = byId('prompt').value.trim();
    if (text && !running) {
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
    if (event.key === 'Escape' && running) running.abort();
  };
  draw();
  byId('prompt').focus();
  call('/v1/models').then((r) => r.json()).then((found) => {
    model = found.data[0].id;
    feedback = Boolean(found.data[0].feedback);
    document.title = `${model} - llm_jax`;
    draw();
  }).catch((error) => say(error.message));
}

setUp();
