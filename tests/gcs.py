"""A bucket on 127.0.0.1 that speaks as much of the Google Cloud Storage JSON API as gcsfs and TensorStore use: list,
read (with ranges), write (simple, multipart, resumable), delete, copy, and generations with their preconditions."""
import email.parser
import email.policy
import http.server
import json
import re
import threading
import urllib.parse


class Bucket:
  """Objects in memory; a context manager. `address` goes into STORAGE_EMULATOR_HOST and TENSORSTORE_GCS_HTTP_URL."""

  def __init__(self, name: str):
    self.name, self.objects, self.uploads, self.lock = name, {}, {}, threading.RLock()
    self.generation = 0
    handler = type('Handler', (_Handler,), dict(bucket=self))
    self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    self.server.handle_error = lambda *_: None          # a client was killed
    self.address = f'http://127.0.0.1:{self.server.server_port}'

  def put(self, key, data):
    with self.lock:
      self.generation += 1
      self.objects[key] = (data, self.generation)

  def meta(self, key):
    data, generation = self.objects[key]
    return dict(kind='storage#object', bucket=self.name, name=key, size=str(len(data)), generation=str(generation),
                metageneration='1', updated='2026-01-01T00:00:00Z', timeCreated='2026-01-01T00:00:00Z')

  def __enter__(self):
    threading.Thread(target=self.server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_):
    self.server.shutdown()
    self.server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True         # else each answer waits 40 ms for an acknowledgement
  bucket = None

  def log_message(self, *_):
    pass

  def answer(self, code, body=b'', **headers):
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    self.send_response(code)
    for name, value in {'Content-Type': 'application/json', 'Content-Length': str(len(body)), **headers}.items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()
    self.wfile.write(body)

  def read(self):
    if self.headers.get('Transfer-Encoding') == 'chunked':
      data = b''
      while size := int(self.rfile.readline(), 16):
        data += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
      return data
    return self.rfile.read(int(self.headers.get('Content-Length') or 0))

  def handle_any(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    body = self.read()
    with self.bucket.lock:
      self.route(url.path, query, body)

  do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any

  def route(self, path, query, body):
    bucket, name = self.bucket, self.bucket.name
    if path.startswith('/upload/'):
      return self.upload(query, body)
    match = re.fullmatch(rf'(?:/download)?/storage/v1/b/{name}/o/([^/]+)(?:/(\w+)(?:/b/{name})?/o/([^/]+))?', path)
    if not match:
      if path.rstrip('/') == f'/storage/v1/b/{name}/o':
        return self.list(query)
      return self.answer(200 if path.rstrip('/') == f'/storage/v1/b/{name}' else 404, dict(name=name))
    key, verb, target = (urllib.parse.unquote(x) if x else x for x in match.groups())
    if key not in bucket.objects:
      return self.answer(404, dict(error=dict(code=404, message='no such object')))
    if verb:
      bucket.put(target, bucket.objects[key][0])
      if verb == 'moveTo':
        del bucket.objects[key]
      made = bucket.meta(target)
      return self.answer(200, dict(done=True, resource=made) if verb == 'rewriteTo' else made)
    if self.command == 'DELETE':
      del bucket.objects[key]
      return self.answer(204)
    if query.get('alt') != 'media':
      return self.answer(200, bucket.meta(key))
    data, generation = bucket.objects[key]
    if query.get('ifGenerationNotMatch') == str(generation):
      return self.answer(304)
    headers = {'x-goog-generation': str(generation), 'Content-Type': 'application/octet-stream'}
    asked = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if not asked:
      return self.answer(200, data, **headers)
    first = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[2]))
    stop = int(asked[2]) + 1 if asked[1] and asked[2] else len(data)
    if first >= len(data):
      return self.answer(416)
    part = data[first:stop]
    return self.answer(206, part, **headers, Content_Range=f'bytes {first}-{first + len(part) - 1}/{len(data)}')

  def list(self, query):
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    start, end = query.get('startOffset', ''), query.get('endOffset', '\U0010ffff')
    items, prefixes = [], set()
    for key in sorted(self.bucket.objects):
      if key.startswith(prefix) and start <= key < end:
        head, found, _ = key[len(prefix):].partition(delimiter) if delimiter else (key, '', '')
        if found:
          prefixes.add(prefix + head + delimiter)
        else:
          items.append(self.bucket.meta(key))
    self.answer(200, dict(kind='storage#objects', items=items, prefixes=sorted(prefixes)))

  def upload(self, query, body):
    bucket, kind = self.bucket, query.get('uploadType')
    if kind == 'resumable' and 'upload_id' not in query:
      key = query.get('name') or json.loads(body)['name']
      bucket.generation += 1
      bucket.uploads[str(bucket.generation)] = (key, b'')
      return self.answer(200, dict(), Location=f'{bucket.address}{self.path}&upload_id={bucket.generation}')
    if kind == 'resumable':
      key, data = bucket.uploads[query['upload_id']]
      data += body
      bucket.uploads[query['upload_id']] = key, data
      if self.headers.get('Content-Range', '').endswith('/*') and body:
        return self.answer(308, Range=f'bytes=0-{len(data) - 1}')
    elif kind == 'multipart':
      head = f'Content-Type: {self.headers["Content-Type"]}\r\n\r\n'.encode()
      parts = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body).get_payload()
      key, data = json.loads(parts[0].get_content())['name'], parts[1].get_payload(decode=True)
    else:
      key, data = query['name'], body
    expected = query.get('ifGenerationMatch')
    if expected is not None and expected != str(bucket.objects[key][1] if key in bucket.objects else 0):
      return self.answer(412, dict(error=dict(code=412, message='generation differs')))
    bucket.put(key, data)
    self.answer(200, bucket.meta(key))
