"""DeepSparse in an environment of its own (Python 3.11, numpy<2): opens and runs networks as it is told on stdin.

open NAME MODEL.onnx INPUTS.npz OUTPUTS.npz BATCH THREADS
                                        what it puts out is written to OUTPUTS.npz; answers "done"
run NAME                                answers with the seconds of one call
close NAME                              answers "done"
PATHS have no spaces; what fails is answered "failed: …".
"""

import os
import sys
import time

import deepsparse
import numpy as np


def opened(path, inputs, outputs, batch, threads):
    engine = deepsparse.compile_model(path, batch_size=int(batch), num_cores=int(threads))
    given = np.load(inputs)
    feed = [np.ascontiguousarray(given[name]) for name in engine.input_names]
    np.savez(outputs, *engine.run(feed))
    return engine, feed


def main() -> None:
    engines = {}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine itself prints is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        word, name, *more = line.split()
        try:
            if word == "open":
                engines[name] = opened(*more)
                answer = "done"
            elif word == "close":
                engines.pop(name, None)
                answer = "done"
            else:
                engine, feed = engines[name]
                start = time.perf_counter()
                engine.run(feed)
                answer = time.perf_counter() - start
        except Exception as error:
            answer = f"failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
