"""Engines whose behaviour is known, to drive what drives engines."""

from dataclasses import dataclass, field

from pagedattn.serving.memory import EngineMemory
from pagedattn.serving.settings import EngineSettings


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


@dataclass
class SteppedEngine:
    """Computes a prompt in one step of `prefill` seconds, then a token a step of `decode`.

    At most `most` requests run; the others wait. `tokens_a_step` come in each decode step.
    """

    clock: Clock
    prefill: float = 4.0
    decode: float = 1.0
    most: int = 1000
    tokens_a_step: int = 1
    interrupt_at: int | None = None
    settings: EngineSettings = field(default_factory=lambda: EngineSettings("model"))
    model: object = None
    memory: EngineMemory = field(
        default_factory=lambda: EngineMemory(None, None, None, None, None, 101, 4)
    )
    vocab_size: int = 100
    max_model_len: int = 64
    waiting: list = field(default_factory=list)
    running: dict = field(default_factory=dict)
    aborted: list = field(default_factory=list)
    most_at_once: int = 0
    steps: int = 0
    num_resets: int = 0

    def submit(self, number, request):
        self.waiting.append((number, request))

    def step(self):
        self.steps += 1
        if self.steps == self.interrupt_at:
            raise KeyboardInterrupt
        new = self.waiting[: self.most - len(self.running)]
        self.waiting = self.waiting[len(new) :]
        received = []
        self.clock.seconds += self.prefill if new else self.decode
        for number in list(self.running):
            tokens = min(self.tokens_a_step, self.running[number][1])
            received.append((number, tokens))
            self.running[number][1] -= tokens
        for number, request in new:
            self.running[number] = [request, request.output_tokens - 1]
            received.append((number, 1))
        self.most_at_once = max(self.most_at_once, len(self.running))
        self.running = {number: state for number, state in self.running.items() if state[1]}
        return received

    def abort(self, numbers):
        self.aborted += numbers
        self.waiting, self.running = [], {}

    def usage(self):
        blocks = 0
        for request, left in self.running.values():
            stored = request.num_tokens - left - 1 + self.memory.tokens_ahead
            blocks += -(-stored // self.memory.block_size)
        return blocks / (self.memory.num_blocks - 1), len(self.running), len(self.waiting)

    def encode(self, text):
        return [len(word) for word in text.split()]

    def reset_prefix_cache(self):
        self.num_resets += 1

    def prefix_hits(self):
        return 0, 0
