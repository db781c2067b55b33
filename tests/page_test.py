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
  page.on('console', lambda message: wrong.append(message.text) if message.type == 'error' else None)
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
  page.click('#ask >> text=OK')
  playwright.expect(page.locator('.message.user')).to_have_count(1)
  done(page)
  assert texts(page, 'user') == ['changed'] and len(texts(page, 'assistant')) == 1
  page.click('#new')
  send(page, 'second')
  page.reload()
  titles = [e.inner_text() for e in page.query_selector_all('#conversations li button:first-child')]
  assert titles == ['second', 'changed']
  page.click('#conversations >> text=changed')
  assert texts(page, 'user') == ['changed']
  before = page.evaluate('getComputedStyle(document.body).backgroundColor')
  page.click('#theme')
  assert page.evaluate('getComputedStyle(document.body).backgroundColor') != before
  page.click('[aria-label="Delete second"]')
  assert len(page.query_selector_all('#conversations li')) == 1


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
  settings(page, max_tokens=5, temperature=0)
  send(page, 'my password: hunter2 and sk-abcdefghijklmnop')
  page.click('[aria-label="A good answer"]')
  page.fill('#ask_text', 'fine, api_key=12345')
  page.click('#ask >> text=OK')
  page.wait_for_selector('[aria-label="A good answer"][aria-pressed="true"]')
  row, = [json.loads(line) for line in server[1].read_text().splitlines()]
  assert row['rating'] == 1 and row['messages'][0]['role'] == 'user' and row['answer']
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
  assert page.get_attribute('#status', 'aria-live') == 'polite' and page.get_attribute('html', 'lang') == 'en'


def test_with_a_key(browser, tmp_path):
  """The page asks for it once."""
  with serving.serve(serving.make_model(tmp_path / 'm'), '--slots=1', '--length=128', '--no_warm_up',
                     env=dict(XDG_CACHE_HOME=str(tmp_path), LLM_JAX_API_KEY='right')) as (_, address, _):
    page = browser.new_page()
    page.goto(address)
    page.fill('#ask_text', 'right')
    page.click('#ask >> text=OK')
    playwright.expect(page).to_have_title('tiny - llm_jax')
    settings(page, max_tokens=5, temperature=0)
    send(page, 'hello')
    assert len(texts(page, 'assistant')) == 1 and not page.query_selector_all('.wrong')
    page.close()
