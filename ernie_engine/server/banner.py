"""What the server prints when it is ready: where it is, and what to paste into clients.

Never prints a key.
"""

from ernie_engine.server.served import ServedModel
from ernie_engine.server.settings import Settings

_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}


def base_url(settings: Settings) -> str:
    """The URL for a client on this machine, without /v1."""
    host = settings.server.host
    host = _ANYWHERE.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{settings.port}"


def banner(settings: Settings, served: ServedModel) -> str:
    url, names = base_url(settings), settings.model_names
    key = "<your key>" if settings.key_digests else "EMPTY"
    header = ' -H "Authorization: Bearer <your key>"' if settings.key_digests else ""
    return f"""
Serving {", ".join(names)}
  base URL        {url}/v1
  context length  {served.config.max_model_len} tokens, prompt and answer

Python (pip install openai):
  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="{key}")
  client.chat.completions.create(
      model="{names[0]}", messages=[{{"role": "user", "content": "Hello"}}])

curl:
  curl {url}/v1/chat/completions{header} -H "Content-Type: application/json" \\
    -d '{{"model": "{names[0]}", "messages": [{{"role": "user", "content": "Hello"}}]}}'

AnythingLLM (LLM provider "Generic OpenAI"):
  Base URL              {url}/v1
  API key               {key}
  Chat model name       {names[0]}
  Model context window  {served.config.max_model_len}

Ready. Ctrl-C ends it."""
