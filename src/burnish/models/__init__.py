"""Models: where they are, their tokenizer, their weights, adapters on them, and the policy that objectives see."""

import logging

# bitsandbytes warns at import about an optional kernel, and on every product of an int8 layer; nothing can be done about either.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
