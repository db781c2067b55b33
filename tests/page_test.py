"""The chat page in a real browser: Debian's Chromium, by playwright, against a real server."""
import json
import shutil

import pytest

playwright = pytest.importorskip('playwright.sync_api', reason="the browser's driver comes with pip install '.[test]'")
pytest.importorskip('uvicorn', reason="serving needs pip install '.[serve]'")
CHROMIUM = shutil.which('chromium')
if not CHROMIUM:
  pytest.skip("no chromium here; Debian's package of that name has it", allow_module_level=True)

import serving  # noqa: E402

FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']
SLOW = 'from llm_jax.generate import engine\nimport time\nstep = engine.Engine.step\n' \
       'engine.Engine.step = lambda self: (time.sleep(0.1), step(self))[1]'      # slower than a hand
EVIL = '<img src=x onerror="window.hit=1"><script>window.hit=1</script><a href="javascript:window.hit=1">x</a>'


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  folder = tmp_path_factory.mktemp('model')
  feedback = folder / 'feedback.jsonl'
  with serving.serve(serving.make_model(folder), '--slots=2', '--length=256', f'--feedback={feedback}',
                     code=SLOW, env=dict(XDG_CACHE_HOME=str(folder / 'cache'))) as (_, address, _):
    yield address, feedback


@pytest.fixture(scope='module')
def browser():
  with playwright.sync_playwright() as p:
    made = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield made
    made.close()


@pytest.fixture
def page(browser, server):
  """A page of a new profile; every request that it makes goes to the server, and nothing in it fails."""
  context = browser.new_context(viewport=dict(width=1100, height=800))
  page = context.new_page()
  asked, wrong = [], []
  page.on('request', lambda request: asked.append(request.url))
  page.on('pageerror', lambda error: wrong.append(str(error)))
  page.on('console', lambda message: wrong.append(message.text) if (
      message.type == 'error' and 'status of 400' not in message.text) else None)          # a refusal is tested
  page.goto(server[0])
  yield page
  assert all(url.startswith(server[0]) for url in asked) and not wrong, (asked, wrong)
  context.close()


def send(page, text):
  page.fill('#prompt', text)
  page.keyboard.press('Enter')
  done(page)


def done(page):
  page.wait_for_selector('#send:not([hidden])')


def texts(page, role):
  return [e.inner_text() for e in page.query_selector_all(f'.message.{role} .text')]


def answers(page, *pieces):
  """The server's answers from here on, with the probabilities of each piece; returns what is asked."""
  asked = []
  def fulfill(route):
    asked.append(route.request.post_data_json)
    token = lambda text: dict(token=text, logprob=-0.5, top_logprobs=[dict(token=text, logprob=-0.5)] * 5)
    choices = [[dict(index=0, delta=dict(content=p), logprobs=dict(content=[token(p)]))] for p in pieces]
    events = [json.dumps(dict(id='chatcmpl-1', choices=c)) for c in choices]
    route.fulfill(content_type='text/event-stream', body=''.join(f'data: {e}\n\n' for e in [*events, '[DONE]']))
  page.route('**/v1/chat/completions', fulfill)
  return asked


def titles(page):
  return [e.inner_text() for e in page.query_selector_all('#conversations li button:first-child')]


def settings(page, **values):
  if page.get_attribute('#settings_button', 'aria-expanded') == 'false':
    page.click('#settings_button')
  for name, value in values.items():
    page.fill(f'[name={name}]', str(value))


def test_a_conversation(page, server, request):
  """Streams, edits, regenerates; several conversations that a reload keeps; dark and light."""
  settings(page, max_tokens=12, temperature=0)
  send(page, 'hello')
  first = texts(page, 'assistant')
  assert texts(page, 'user') == ['hello'] and len(first) == 1 and 'tokens' in page.inner_text('#status')
  title = page.get_attribute('.message.assistant .text span', 'title')
  assert '%' in title and title.count('\n') >= 5                            # the token and five that might have come
  send(page, 'more')
  assert len(texts(page, 'assistant')) == 2
  page.click('text=Regenerate')
  done(page)
  assert len(texts(page, 'assistant')) == 2
  page.click('.message.user >> nth=0 >> text=Edit')
  page.fill('#ask_text', 'changed')
  page.click('#ask [value=ok]')
  playwright.expect(page.locator('.message.user')).to_have_count(1)
  done(page)
  assert texts(page, 'user') == ['changed'] and len(texts(page, 'assistant')) == 1
  page.click('#new')
  send(page, 'second')
  page.reload()
  assert titles(page) == ['second', 'changed']
  page.click('#conversations >> text=changed')
  assert texts(page, 'user') == ['changed']
  before = page.evaluate('getComputedStyle(document.body).backgroundColor')
  page.click('#theme')
  assert page.evaluate('getComputedStyle(document.body).backgroundColor') != before
  assert page.get_attribute('#conversations >> text=changed', 'aria-current') == 'true'
  page.click('[aria-label="Delete second"]')
  assert titles(page) == ['changed']
  page.keyboard.press('Enter')                                              # Undo has the focus
  assert titles(page) == ['second', 'changed'] and texts(page, 'user') == ['second']
  page.click('[aria-label="Delete second"]')
  page.reload()
  assert titles(page) == ['changed']


def test_on_plain_http(page):
  """Where the address is not localhost, browsers give a page neither randomUUID nor a clipboard."""
  page.context.add_init_script('delete Crypto.prototype.randomUUID; delete Navigator.prototype.clipboard;')
  page.reload()
  answers(page, 'to be copied')
  send(page, 'hello')
  assert page.evaluate('[crypto.randomUUID, navigator.clipboard]') == [None, None]
  page.click('text=Copy')
  assert page.inner_text('#status') == 'Copied'
  page.focus('#prompt')
  page.keyboard.press('Control+V')
  assert page.input_value('#prompt') == 'to be copied'


def test_two_tabs_keep_what_the_other_wrote(page, server):
  answers(page, 'fine')
  send(page, 'first')
  other = page.context.new_page()
  other.goto(server[0])
  answers(other, 'fine')
  other.click('#new')
  send(other, 'second')
  send(page, 'more')
  other.reload()
  assert titles(other) == titles(page) == ['second', 'first']
  other.click('[aria-label="Delete first"]')
  playwright.expect(page.locator('#conversations li')).to_have_count(1)
  send(page, 'again')
  other.reload()
  assert titles(other) == ['second'] and texts(other, 'user') == ['second', 'again']


def test_conversations_of_the_former_format(page):
  page.evaluate("""localStorage.setItem('llm_jax', JSON.stringify({settings: {}, conversations: ['b', 'a'].map(
    (id) => ({id, title: id, messages: [{role: 'user', content: id}]}))}))""")
  for _ in range(2):
    page.reload()
    assert titles(page) == ['b', 'a'] and texts(page, 'user') == ['b']


def test_a_refused_message_does_not_spoil_the_conversation(page):
  """It is marked, kept, sent again when asked for, and left out of what is sent otherwise."""
  send(page, 'long ' * 200)                                                 # for --length=256
  assert texts(page, 'assistant') == [] and 'Not answered: ' in page.inner_text('.message.user.wrong')
  page.reload()
  asked = answers(page, 'fine')
  send(page, 'hello')
  assert asked[-1]['messages'] == [dict(role='user', content='hello')] and 'max_tokens' not in asked[-1]
  assert len(page.query_selector_all('.message.wrong')) == 1
  page.click('.message.wrong >> text=Edit')
  page.fill('#ask_text', 'shorter')
  page.click('#ask [value=ok]')
  playwright.expect(page.locator('.message.wrong')).to_have_count(0)
  done(page)
  assert [m['content'] for m in asked[-1]['messages']] == ['hello', 'fine', 'shorter']
  page.unroute('**/v1/chat/completions')
  page.route('**/v1/chat/completions', lambda route: route.fulfill(status=400, json=dict(error=dict(message='no'))))
  send(page, 'refused')
  page.unroute('**/v1/chat/completions')
  asked = answers(page, 'fine')
  page.click('text=Retry')
  playwright.expect(page.locator('.message.wrong')).to_have_count(0)
  done(page)
  assert asked[-1]['messages'][-1]['content'] == 'refused' and len(texts(page, 'assistant')) == 3


def test_the_settings_fit_the_server(page):
  """As they are at first; emptied; out of range."""
  playwright.expect(page).to_have_title('tiny - llm_jax')
  page.fill('#prompt', 'hello')
  page.keyboard.press('Enter')
  page.wait_for_selector('.message.assistant .text span', state='attached')
  page.keyboard.press('Escape')
  done(page)
  assert not page.query_selector_all('.wrong')
  asked = answers(page, 'fine')
  settings(page, temperature='', top_p='', max_tokens=100)
  send(page, 'more')
  assert asked[0]['max_tokens'] == 100 and asked[0]['min_p'] == 0 and not {'temperature', 'top_p'} & asked[0].keys()
  settings(page, max_tokens=257)
  page.click('#settings_button')
  send(page, 'kept')
  assert len(asked) == 1 and page.input_value('#prompt') == 'kept' and page.is_visible('#settings')


def test_an_answer_in_the_background(page):
  """The view stays where the reader is, and other conversations can be had."""
  page.set_viewport_size(dict(width=1100, height=500))
  settings(page, temperature=0)
  page.click('#settings_button')
  page.evaluate("""conversation().title = 'long'; for (let i = 0; i < 30; i++)
    conversation().messages.push({role: 'user', content: 'x', failed: 'y'});""")
  page.fill('#prompt', 'long')
  page.keyboard.press('Enter')
  spans = page.locator('.message.assistant .text span')
  spans.first.wait_for(state='attached')
  top = 'document.getElementById("messages").scrollTop'
  assert page.evaluate(top) > 500
  page.evaluate(f'{top} = 100')
  spans.nth(spans.count() + 2).wait_for(state='attached')
  assert page.evaluate(top) == 100
  page.click('#new')
  assert titles(page) == ['New conversation', 'long']
  answers(page, *['line\n'] * 60)
  send(page, 'beside')
  assert texts(page, 'assistant')[0].count('line') == 60
  assert page.evaluate(f'{top} + document.getElementById("messages").clientHeight + 10 > '
                       'document.getElementById("messages").scrollHeight') and page.evaluate(top) > 500
  page.click('#conversations >> text=long')
  spans.nth(3).wait_for(state='attached')
  page.click('#stop')
  done(page)
  assert page.inner_text('#status') == 'Stopped'


def test_code_is_told_from_text(page):
  """Between lines of ```, however the tokens cut them; as it was said, and never as markup."""
  answers(page, 'So:\n``', '`py\nx = ', EVIL, '\n', '```', '\nThat `', 'is` it\n```no', '`fence')
  send(page, '```\nmine\n```')
  assert page.locator('pre').all_inner_texts() == ['mine\n', f'x = {EVIL}\n']
  blocks = page.evaluate("""[...document.querySelectorAll('.assistant .text > *')].map((e) => e.textContent)""")
  assert blocks == ['So:\n', f'x = {EVIL}\n', 'That `is` it\n```no`fence']
  assert page.evaluate("""() => conversation().messages[1].pieces.every((_, i, pieces) => {
    const part = {content: '', pieces: []}, streamed = element('div'), whole = element('div');
    drawText(streamed, part);
    for (const piece of pieces.slice(0, i + 1)) {
      part.content += piece[0];
      part.pieces.push(piece);
      addPiece(streamed, part);
    }
    drawText(whole, part);
    return streamed.innerHTML === whole.innerHTML;
  })""")
  assert page.evaluate('getComputedStyle(document.querySelector("pre")).fontFamily').endswith('monospace')
  assert page.evaluate('window.hit') is None


def test_stopped_by_the_keyboard(page):
  settings(page, max_tokens=200, temperature=1)
  page.fill('#prompt', 'long')
  page.keyboard.press('Enter')
  page.wait_for_selector('.message.assistant .text span', state='attached')
  page.keyboard.press('Escape')
  done(page)
  assert page.inner_text('#status') == 'Stopped' and page.evaluate('document.activeElement.id') == 'prompt'


def test_S13_what_is_said_is_never_markup(page):
  """By the user, and by the model: the page gets the same text as an answer."""
  settings(page, max_tokens=4, temperature=0)
  send(page, EVIL)
  assert texts(page, 'user') == [EVIL]
  page.evaluate('''(text) => { const talk = conversation(); talk.title = text; draw(
    talk.messages.push({role: 'assistant', content: text, pieces: [[text, null]]})); }''', EVIL)
  assert texts(page, 'assistant')[-1] == EVIL
  page.wait_for_timeout(200)
  assert page.evaluate('window.hit') is None
  assert not page.query_selector_all('#messages img, #messages script, #messages a')


def test_the_policy_blocks_what_would_run_all_the_same(browser, server):
  """Markup that got into the page by another way does nothing."""
  page = browser.new_page()
  page.goto(server[0])
  page.evaluate('(text) => { document.getElementById("messages").innerHTML = text; }', EVIL)
  page.evaluate('''() => { const s = document.createElement('script'); s.textContent = 'window.hit = 1';
    document.body.append(s); }''')
  page.wait_for_timeout(200)
  assert page.evaluate('window.hit') is None
  page.close()


def test_feedback_is_kept_without_secrets_and_deleted(page, server):
  settings(page, max_tokens=5, temperature=0, system='Be brief.')
  send(page, 'my password: hunter2 and sk-abcdefghijklmnop')
  settings(page, system='Another.')
  page.click('[aria-label="A good answer"]')
  assert 'is stored on the server' in page.inner_text('#ask_note')
  page.fill('#ask_text', 'fine, api_key=12345')
  page.click('#ask [value=ok]')
  page.wait_for_selector('[aria-label="A good answer"][aria-pressed="true"]')
  row, = [json.loads(line) for line in server[1].read_text().splitlines()]
  assert row['rating'] == 1 and [m['role'] for m in row['messages']] == ['system', 'user'] and row['answer']
  assert row['messages'][0]['content'] == 'Be brief.'
  assert row['id'].startswith('chatcmpl-') and '[redacted]' in str(row)
  assert not any(secret in str(row) for secret in ('hunter2', 'sk-abc', '12345'))
  from llm_jax.serve import feedback
  feedback.main([str(server[1]), 'list'])
  feedback.main([str(server[1]), 'delete', row['id']])
  assert server[1].read_text() == ''


def test_for_keyboards_and_screen_readers(page):
  """Every control has a name; Tab reaches them; the state is announced."""
  settings(page, max_tokens=5, temperature=0)
  send(page, 'hello')
  names = page.evaluate('''() => [...document.querySelectorAll('button, input, textarea')].filter(
    (e) => e.offsetParent).map((e) => [e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels[0]
    && e.labels[0].textContent.trim()) || '', e.outerHTML])''')
  assert names and all(name for name, _ in names), [html for name, html in names if not name]
  page.evaluate('document.activeElement.blur()')
  reached = set()
  for _ in range(30):
    page.keyboard.press('Tab')
    reached.add(page.evaluate('document.activeElement.id || document.activeElement.getAttribute("aria-label") || '
                              'document.activeElement.textContent'))
  assert {'new', 'theme', 'settings_button', 'prompt', 'send'} <= reached, reached
  page.focus('summary')
  page.keyboard.press('Enter')
  page.wait_for_selector('details td')
  rows = page.locator('details tbody tr')
  assert rows.count() == 5 and all('%' in row for row in rows.all_inner_texts())
  assert page.get_attribute('#status', 'aria-live') == 'polite' and page.get_attribute('html', 'lang') == 'en'


def test_with_a_key(browser, tmp_path):
  """The page asks for it once."""
  with serving.serve(serving.make_model(tmp_path / 'm'), '--slots=1', '--length=128', '--no_warm_up',
                     env=dict(XDG_CACHE_HOME=str(tmp_path), LLM_JAX_API_KEY='right')) as (_, address, _):
    page = browser.new_page()
    page.goto(address)
    page.fill('#ask_text', 'right')
    page.click('#ask [value=ok]')
    playwright.expect(page).to_have_title('tiny - llm_jax')
    settings(page, max_tokens=5, temperature=0)
    send(page, 'hello')
    assert len(texts(page, 'assistant')) == 1 and not page.query_selector_all('.wrong')
    page.close()
