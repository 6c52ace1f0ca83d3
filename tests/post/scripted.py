"""An OpenAI-shaped server that answers by a script, and remembers what it was asked."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Script = Callable[[dict, int], tuple[int, dict | bytes]]  # (request body, how many came before) → status and reply


def says(content: str, reasoning: str | None = None, finish: str = "stop") -> tuple[int, dict]:
    message = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    usage = {"prompt_tokens": 10, "completion_tokens": 20}
    return 200, {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


class Asked(list):
    """Bodies and keys, in the order in which they came."""

    url = ""


@contextmanager
def server(script: Script) -> Iterator[Asked]:
    asked, lock = Asked(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(asked)
                asked.append((body, self.headers.get("Authorization"), self.path))
            status, reply = script(body, number)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    asked.url = f"http://127.0.0.1:{found.server_port}/v1"
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield asked
    finally:
        found.shutdown()
        thread.join()
        found.server_close()
