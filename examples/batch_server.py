"""A server's inner loop: requests of one kind are collected into batches of the size that gives most images per second.

    python examples/batch_server.py MODEL_FOLDER_OR_ID

`calls` says that compiling is paid back over many calls. `plan.run` recovers when another process takes memory meanwhile:
it falls back to an alternative that needs less, and says so in the log.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

LARGEST_BATCH = 16
WAIT_SECONDS = 0.05


class Server:
    """Takes prompts from any thread; one thread runs the pipeline."""

    def __init__(self, pipe: Any, batch: int, inputs: dict[str, Any]) -> None:
        from planner import autoplan

        self.pipe, self.batch, self.inputs = pipe, batch, inputs
        self.requests: queue.Queue[tuple[str, Future[Any]] | None] = queue.Queue()
        self.plan = autoplan(pipe, batch_size=batch, inputs={**inputs, "prompt": ["a warm-up"] * batch}, objective="throughput", calls=1000)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, prompt: str) -> Future[Any]:
        """A future of the prompt's image."""
        answer: Future[Any] = Future()
        self.requests.put((prompt, answer))
        return answer

    def close(self) -> None:
        """Finish what is waiting, then take the plan back."""
        self.requests.put(None)
        self.thread.join()
        self.plan.undo(self.pipe)

    def _batches(self) -> Iterator[list[tuple[str, Future[Any]]]]:
        """Up to ``batch`` requests that arrive within a moment of each other."""
        while (first := self.requests.get()) is not None:
            taken, last = [first], False
            while len(taken) < self.batch:
                try:
                    more = self.requests.get(timeout=WAIT_SECONDS)
                except queue.Empty:
                    break
                if more is None:
                    last = True
                    break
                taken.append(more)
            yield taken
            if last:
                return

    def _work(self) -> None:
        for taken in self._batches():
            prompts = [prompt for prompt, _ in taken]
            padded = prompts + [prompts[-1]] * (self.batch - len(prompts))  # the planned shapes: nothing is compiled anew
            try:
                images = self.plan.run(self.pipe, **self.inputs, prompt=padded).images
            except Exception as error:
                for _, answer in taken:
                    answer.set_exception(error)
                continue
            for (_, answer), image in zip(taken, images, strict=False):
                answer.set_result(image)


def main(model: str) -> int:
    import torch
    from diffusers import DiffusionPipeline

    from planner import max_batch_size

    logging.basicConfig(level=logging.INFO)
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float16 if torch.cuda.is_available() else torch.float32)
    server = Server(pipe, max(max_batch_size(pipe, limit=LARGEST_BATCH), 1), {"num_inference_steps": 20})
    answers = [server.submit(line.strip()) for line in sys.stdin if line.strip()]
    for number, answer in enumerate(answers):
        answer.result().save(f"image-{number}.png")
    server.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
