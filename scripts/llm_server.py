"""`python llm_server.py MODEL.gguf PORT NAME`: llama.cpp's OpenAI-compatible server on 127.0.0.1, until a signal; needs xllamacpp only."""

import signal
import sys

import xllamacpp  # type: ignore[import-not-found]  # only in the environment of scripts/test_llm

PARALLEL = 4


def main() -> None:
    """Serves a model until SIGTERM or SIGINT."""
    path, port, name = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.model_alias = {name}
    params.hostnames = ["127.0.0.1"]
    params.port = int(port)
    params.n_parallel = PARALLEL
    params.n_ctx = 4096 * PARALLEL
    params.n_gpu_layers = 0
    params.warmup = False
    # Several wait for each other by spinning, which on a busy machine takes minutes for an answer.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    main()
