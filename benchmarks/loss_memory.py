"""Peak memory and time of the loss over 151,936 words: ours against the plain one, each in a process of its own."""

import argparse
import resource
import subprocess
import sys
import time

TOKENS, HIDDEN = 2048, 512


def measure(kind: str, precision: str, vocabulary: int) -> tuple[float, float]:
    """Extra peak memory in MiB and seconds of one forward and backward pass."""
    import torch
    from torch.nn import functional

    from lacuna.train.loss import chunked_cross_entropy

    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    weight = (torch.randn(vocabulary, HIDDEN) / 20).requires_grad_()
    weight.grad = torch.zeros_like(weight)
    targets = torch.randint(vocabulary, (TOKENS,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if kind == "lacuna":
        loss = chunked_cross_entropy(hidden, weight, targets, 1 / TOKENS, dtype)
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = functional.linear(hidden, weight)
        loss = functional.cross_entropy(logits.float(), targets)
    loss.backward()
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) / 1024, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "PRECISION"))
    arguments = parser.parse_args()
    vocabulary: int = arguments.vocabulary
    if arguments.one:
        print(*measure(*arguments.one, vocabulary))
        return
    print(f"\nLoss of {TOKENS} tokens, hidden size {HIDDEN}, vocabulary {vocabulary}: extra peak memory, seconds")
    print("| precision | plain MiB | lacuna MiB | plain s | lacuna s |")
    print("|---|---|---|---|---|")
    for precision in ("fp32", "bf16"):
        figures = []
        for kind in ("plain", "lacuna"):
            words = [sys.executable, __file__, "--vocabulary", str(vocabulary), "--one", kind, precision]
            output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            figures.append([float(word) for word in output.split()])
        (plain_memory, plain_seconds), (memory, seconds) = figures
        print(f"| {precision} | {plain_memory:.0f} | {memory:.0f} | {plain_seconds:.1f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
