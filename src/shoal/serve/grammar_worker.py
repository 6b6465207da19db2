"""The process behind `Trial`: the first line on stdin is a vocabulary, each of the others a grammar; it says what is wrong with that.

It imports nothing of Shoal's, as it has to be there at once.
"""

from __future__ import annotations

import json
import signal
import sys

from llguidance import LLMatcher, LLTokenizer

MOST_SECONDS = 2.0
"""Of computing, for one grammar: beyond them, the process ends."""


def main() -> None:
    tokenizer, vocab_size, eos_id = json.loads(sys.stdin.readline())
    backend = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos_id)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)  # SIGPROF ends a process that does not catch it, whatever it is in
        matcher = LLMatcher(backend, json.loads(line), log_level=0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(" ".join(matcher.get_error().split())[:300]), flush=True)


if __name__ == "__main__":
    main()
