"""What one of several processes does in tests/contracts/test_processes_generate.py; prints one line of JSON."""

import json
import sys

import jaxpipe

if __name__ == "__main__":
    jaxpipe.start(heartbeat_timeout=60)

import numpy as np

from tests.generation import EMBED, HEAD, causal, prompts


def main(pipe, data, inside):
    """Tokens with caches, drawn ones with a stop token, and those of a model without a cache."""
    mesh = jaxpipe.make_mesh(pipe=pipe, data=data, inside=inside)
    found = {}
    made = jaxpipe.Pipeline(causal(), mesh)
    params = made.init(3, prompts(1))
    found["greedy"] = np.asarray(made.generate(params, prompts(5), 5)).tolist()
    drawn = made.generate(params, prompts(5), 5, temperature=3.0, top_k=6, stop=9, key=1)
    found["drawn"] = np.asarray(drawn).tolist()

    def before(x):
        return x.cumsum(axis=1)

    made = jaxpipe.Pipeline(jaxpipe.PipelineModule([EMBED, before, HEAD], partition_method="uniform"), mesh)
    found["recomputed"] = np.asarray(made.generate(made.init(3, prompts(1)), prompts(3), 2)).tolist()
    return found


if __name__ == "__main__":
    _, stages, ranks, axis = sys.argv
    print("found " + json.dumps(main(int(stages), int(ranks), axis)), flush=True)
